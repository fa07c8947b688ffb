"""Adapters trained a minute: ours in packs, against Hugging Face's Trainer with PEFT and a tight PEFT loop.

    .venv/bin/python experiments/benchmarks/training.py --quick      # under a minute
    .venv/bin/python experiments/benchmarks/training.py              # embedded base on CPU, 64 users
    .venv/bin/python experiments/benchmarks/training.py --device cuda --model llama-160m --users 32

The same users, sequences, steps and recipe for all, in turns within one process:

* trainer: ``transformers.Trainer`` over a fresh PEFT model, one user after the other;
* loop: PEFT put on the base once, its weights set anew for every user, a plain loop with torch's AdamW, the
  batches padded to their longest row, the loss as transformers works it out;
* pack N: :func:`milp_ray.training.train.train` with N slots.

The loop takes the batches and the initial weights that ours takes (sorted by length: better than a plain
loop would do), so that final weights can be compared. Shapes other than ``embedded`` are built from a
configuration with random weights; their rows are 64 tokens long.

The ceiling is the rate of a large matrix product measured in the same run; a side's share is what the
forward and backward passes of its users need at least (no padding, no logits without a target) over its time,
over the ceiling. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from headline import with_headline
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from milp_ray.config import BaseSection, PromptSection, SplitSection, TrainingSection
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.memory.lora import lora_config
from milp_ray.training.adapters import injected, load_tensors, read_tensors
from milp_ray.training.base import Base, base_around, load_base
from milp_ray.training.data import Sequence as TokenSequence
from milp_ray.training.data import epoch_plan
from milp_ray.training.engine import linear_schedule
from milp_ray.training.flat import padded_length
from milp_ray.training.job import Job, JobPlan, Stage, plan_job
from milp_ray.training.rack import initial_weights, pairs_of
from milp_ray.training.train import train
from milp_ray.users.persona_world import generate_users
from milp_ray.users.splits import split_user

PROMPT = PromptSection()
# hidden, ffn, layers, heads, key-value heads: Llama-160M and TinyLlama's and LLaMA2's published shapes.
SHAPES = {
    "llama-160m": (768, 3072, 12, 12, 12),
    "llama-1b": (2048, 5632, 22, 32, 4),
    "llama-7b": (4096, 11008, 32, 32, 32),
}
ROW = 64  # tokens a row with those
Tensors = dict[str, Tensor]


def main() -> None:
    """Measure, print the table, then the JSON line."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    base = _base(arguments.model, arguments.device)
    section = _section(arguments)
    plans = _plans(base, section, arguments)
    sides: dict[str, Callable[[Sequence[JobPlan]], list[Tensors]]] = {}
    if not arguments.without_trainer:
        sides["trainer"] = lambda some: with_trainer(base, some, section)
    sides["loop"] = lambda some: with_loop(base, some, section)
    for size in arguments.packs:
        sides[f"pack {size}"] = lambda some, n=size: ours(base, some, section, n)
    rounds = _measured(base, sides, plans, arguments)
    _report(base, section, plans, rounds, arguments)


# ------------------------------------------------------------------------------------------- the sides


def ours(base: Base, plans: Sequence[JobPlan], section: TrainingSection, pack_size: int) -> list[Tensors]:
    """The package's own engine."""
    packed = section.model_copy(update={"pack_size": pack_size})
    results = train(base, [plan.job for plan in plans], packed, PROMPT)
    return [result.adapter.tensors for result in results if result.adapter is not None]


def with_loop(base: Base, plans: Sequence[JobPlan], section: TrainingSection) -> list[Tensors]:
    """PEFT and AdamW, written by hand without waste, one user after the other."""
    first = plans[0].job
    pairs = pairs_of(first.layout, base.spec, base.shapes)
    config = lora_config(first.layout, base.spec, section.lora_alpha, section.dropout, base.model_id)
    adapters = []
    with injected(base, config, seed=0) as model:
        parameters = [p for p in model.parameters() if p.requires_grad]
        for plan in plans:
            load_tensors(model, initial_weights(pairs, plan.job.seed))
            for stage in plan.stages:
                _train_stage(base, model, parameters, stage, plan.job.seed, section)
            adapters.append(read_tensors(model))
    return adapters


def _train_stage(
    base: Base,
    model: nn.Module,
    parameters: list[nn.Parameter],
    stage: Stage,
    seed: int,
    section: TrainingSection,
) -> None:
    n_steps = stage.n_steps(section)
    optimizer = torch.optim.AdamW(
        parameters, lr=section.learning_rate, weight_decay=section.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: linear_schedule(step, n_steps, section.warmup_ratio)
    )
    for epoch in range(stage.epochs):
        rng = random.Random(f"{seed}/{stage.name}/{epoch}")
        for chosen in epoch_plan(stage.sequences, section.batch_size, section.order, rng):
            batch = padded([stage.sequences[i] for i in chosen], base)
            model(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, section.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)


def padded(rows: Sequence[TokenSequence], base: Base) -> dict[str, Tensor]:
    """Rows as transformers takes them: padded on the right, labels −100 where nothing is predicted."""
    length = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), length), base.pad_id)
    labels = torch.full((len(rows), length), -100)
    mask = torch.zeros((len(rows), length), dtype=torch.long)
    for i, row in enumerate(rows):
        n = len(row.ids)
        ids[i, :n] = torch.tensor(row.ids)
        labels[i, row.target_from : n] = ids[i, row.target_from : n]
        mask[i, :n] = 1
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: tensor.to(base.device) for name, tensor in batch.items()}


def with_trainer(base: Base, plans: Sequence[JobPlan], section: TrainingSection) -> list[Tensors]:
    """A fresh PEFT model and a ``Trainer`` a stage, for every user."""
    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments

    adapters = []
    for plan in plans:
        config = lora_config(plan.job.layout, base.spec, section.lora_alpha, section.dropout, base.model_id)
        model = get_peft_model(base.model, config)
        with TemporaryDirectory() as folder:
            for stage in plan.stages:
                arguments = TrainingArguments(
                    output_dir=folder,
                    per_device_train_batch_size=section.batch_size,
                    num_train_epochs=stage.epochs,
                    learning_rate=section.learning_rate,
                    weight_decay=section.weight_decay,
                    warmup_steps=section.warmup_ratio,
                    max_grad_norm=section.max_grad_norm,
                    lr_scheduler_type="linear",
                    use_cpu=base.device.type == "cpu",
                    bf16=base.dtype == torch.bfloat16,
                    report_to="none",
                    save_strategy="no",
                    logging_strategy="no",
                    disable_tqdm=True,
                    remove_unused_columns=False,
                    seed=plan.job.seed,
                )
                trainer = Trainer(
                    model=model,
                    args=arguments,
                    train_dataset=_Rows(stage.sequences),
                    data_collator=lambda rows: padded(rows, _on_cpu(base)),
                )
                trainer.train()
        adapters.append(read_tensors(model))
        model.unload()
        base.model.eval().requires_grad_(False)
    return adapters


class _Rows(torch.utils.data.Dataset[TokenSequence]):
    """A stage's sequences."""

    def __init__(self, sequences: Sequence[TokenSequence]) -> None:
        self._sequences = sequences

    def __len__(self) -> int:
        return len(self._sequences)

    def __getitem__(self, index: int) -> TokenSequence:
        return self._sequences[index]


def _on_cpu(base: Base) -> Any:
    """Enough of a base to pad with, on the CPU: the Trainer moves batches itself."""
    return argparse.Namespace(pad_id=base.pad_id, device=torch.device("cpu"))


# -------------------------------------------------------------------------------------------- the measure


def _measured(
    base: Base,
    sides: dict[str, Callable[[Sequence[JobPlan]], list[Tensors]]],
    plans: Sequence[JobPlan],
    arguments: argparse.Namespace,
) -> dict[str, list[dict[str, float]]]:
    """Each round: seconds a user, the ceiling beside it, peak memory, the adapters' distance to the loop's.

    The slow sides get ``--sample`` of the users, others in every round; a pack needs all of them.
    """
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for name, side in sides.items():  # warm up
        side(plans[: 2 if name in ("trainer", "loop") else 4])
    for number in range(arguments.rounds):
        start = number * arguments.sample % len(plans)
        some = [plans[(start + i) % len(plans)] for i in range(min(arguments.sample, len(plans)))]
        reference: dict[str, Tensors] = {}
        for name, side in sides.items():
            chosen = some if name in ("trainer", "loop") else plans
            if base.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            ceiling = _ceiling(base)
            started = time.perf_counter()
            adapters = side(chosen)
            if base.device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - started
            by_job = dict(zip((plan.job.job_id for plan in chosen), adapters, strict=True))
            if name == "loop":
                reference = by_job
            furthest = max(
                (
                    float((by_job[job][key] - tensor).abs().max())
                    for job, tensors in reference.items()
                    for key, tensor in tensors.items()
                    if job in by_job
                ),
                default=float("nan"),
            )
            memory = torch.cuda.max_memory_allocated() if base.device.type == "cuda" else 0
            found[name].append(
                {
                    "seconds": seconds / len(chosen),
                    "ceiling": ceiling,
                    "tokens": float(sum(_tokens(plan) for plan in chosen)) / len(chosen),
                    "flops": sum(needed_flops(base, plan) for plan in chosen) / len(chosen),
                    "difference": furthest if name != "trainer" else float("nan"),
                    "memory": memory / 2**20,
                }
            )
    return found


def _ceiling(base: Base) -> float:
    """FLOP a second of a large matrix product in the base's precision."""
    n = 1024 if base.device.type == "cpu" else 8192
    left, right = (torch.randn(n, n, device=base.device, dtype=base.dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        if base.device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        left @ right
        if base.device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * n**3 / best


def _tokens(plan: JobPlan) -> int:
    return sum(stage.epochs * sum(len(s.ids) for s in stage.sequences) for stage in plan.stages)


def padding_share(plans: Sequence[JobPlan]) -> float:
    """Share of the places in attention that are padding; the rest of the model has none."""
    lengths = [len(s.ids) for plan in plans for stage in plan.stages for s in stage.sequences * stage.epochs]
    return 1 - sum(lengths) / sum(padded_length(length) for length in lengths)


def needed_flops(base: Base, plan: JobPlan) -> float:
    """Multiply-adds × 2 that a job's steps need: every layer forward, back only to the lowest LoRA, no weight
    gradients of the base, logits at targets.
    """
    model: Any = base.model
    layers = model.get_submodule(base.spec.layers_path)
    per_layer = sum(p.numel() for p in layers[0].parameters() if p.dim() == 2)
    head = model.get_output_embeddings().weight.numel()
    hidden = model.config.hidden_size
    layout = plan.job.layout
    lora = sum(layout.rank * (n_in + n_out) for _, n_in, n_out in base.shapes.modules)
    n_back = base.n_layers - layout.layers[0]
    total = 0.0
    for stage in plan.stages:
        for sequence in stage.sequences:
            n = len(sequence.ids)
            attention = 2 * hidden * n / 2  # scores and values of a causal row, a token and layer
            token = base.n_layers * (per_layer + attention) + n_back * (per_layer + 2 * attention)
            token += 3 * lora * len(layout.layers)
            total += 2 * stage.epochs * (n * token + 2 * head * sequence.n_targets)
    return total


# ------------------------------------------------------------------------------------------------ input


def _base(name: str, device: str) -> Base:
    if name == "embedded":
        return load_base(BaseSection(device=device))
    from transformers import LlamaConfig, LlamaForCausalLM

    embedded = load_base(BaseSection(device="cpu"))
    hidden, ffn, layers, heads, kv_heads = SHAPES[name]
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=2048,
        bos_token_id=embedded.model.config.bos_token_id,
        eos_token_id=embedded.model.config.eos_token_id,
    )
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config).to(dtype)
    return base_around(model, embedded.tokenizer, BaseSection(model=name, device=device), model_id=name)


def _section(arguments: argparse.Namespace) -> TrainingSection:
    common: dict[str, Any] = {
        "learning_rate": 5e-4,
        "lora_alpha": {"rule": "sqrt", "value": 8.0},
        "memory_epochs": arguments.epochs,
        "instruction_epochs": arguments.epochs,
    }
    if arguments.model != "embedded":
        return TrainingSection(**common, max_length=ROW)
    return TrainingSection(**common)


def _plans(base: Base, section: TrainingSection, arguments: argparse.Namespace) -> list[JobPlan]:
    mask, _, rank = arguments.layout.partition("-r")
    if arguments.model != "embedded":
        mask = "1" * base.n_layers
    layout = CanonicalLayout(tuple(bit == "1" for bit in mask), int(rank))
    parts = {"memory", "instruction"} if arguments.model == "embedded" else {"memory"}
    n_long = 0 if arguments.model == "embedded" else arguments.users
    users = generate_users(n_short=arguments.users - n_long, n_long=n_long, n_examples=50, seed=1)
    jobs = [
        Job(f"user-{i}", split_user(user, SplitSection()), layout, frozenset(parts), seed=i)
        for i, user in enumerate(users)
    ]
    return [plan_job(job, base, section, PROMPT) for job in jobs]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="8 users, few epochs, one round")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", choices=("embedded", *SHAPES), default="embedded")
    parser.add_argument("--layout", default="00001111-r16", help="mask and rank; other shapes: all layers")
    parser.add_argument("--users", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=10, help="of each stage")
    parser.add_argument("--packs", default="1,4,16,64", help="sizes of packs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sample", type=int, default=8, help="users of a round for the one-by-one sides")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--without-trainer", action="store_true")
    parser.add_argument("--results", type=Path, default=None, help="also write the JSON line to this file")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.users, arguments.epochs, arguments.rounds, arguments.sample = 16, 2, 3, 4
        arguments.packs = "1,16"
    arguments.packs = [int(size) for size in arguments.packs.split(",")]
    return arguments


# ----------------------------------------------------------------------------------------------- output


def _report(
    base: Base,
    section: TrainingSection,
    plans: Sequence[JobPlan],
    rounds: dict[str, list[dict[str, float]]],
    arguments: argparse.Namespace,
) -> None:
    def median(name: str, key: str) -> float:
        return statistics.median(one[key] for one in rounds[name])

    device = (
        torch.cuda.get_device_name() if base.device.type == "cuda" else f"CPU, {arguments.threads} threads"
    )
    table = Table(title=f"{arguments.model}, {arguments.layout}, {len(plans)} users, {device}")
    for column in ("side", "users a minute", "tokens a second", "share of ceiling", "furthest weight"):
        table.add_column(column, justify="left" if column == "side" else "right")
    shares = {}
    for name in rounds:
        shares[name] = statistics.median(
            one["flops"] / one["seconds"] / one["ceiling"] for one in rounds[name]
        )
        table.add_row(
            name,
            f"{60 / median(name, 'seconds'):.1f}",
            f"{median(name, 'tokens') / median(name, 'seconds'):,.0f}",
            f"{shares[name]:.3f}",
            f"{median(name, 'difference'):.1e}",
        )
    Console(width=110).print(table)
    packs = [name for name in rounds if name.startswith("pack")]
    best = min(packs, key=lambda name: median(name, "seconds"))

    def speedup(over: str) -> float | None:
        if over not in rounds:
            return None
        ratios = [a["seconds"] / b["seconds"] for a, b in zip(rounds[over], rounds[best], strict=True)]
        return round(statistics.median(ratios), 3)

    figures = {
        "device": device,
        "model": arguments.model,
        "best": best,
        "train_speedup_vs_trainer": speedup("trainer"),
        "train_speedup_vs_loop": speedup("loop"),
        "max_weight_difference": max(one["difference"] for name in packs for one in rounds[name]),
        "padding_share": round(padding_share(plans), 4),
        "flop_share": round(shares[best], 4),
        "peak_memory_mib": {name: round(median(name, "memory")) for name in rounds},
    }
    line = json.dumps(with_headline("training", figures, keep=not arguments.quick))
    if arguments.results is not None:
        arguments.results.write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main()
