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
over the ceiling. A second table says what the steps of the quickest pack spend their time on, in a short run
of its own under torch's profiler (adapters/breakdown.py). The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from adapters.bases import SHAPES, base_of
from adapters.breakdown import Breakdown, breakdown
from adapters.memory import memory_growth
from adapters.sides import Tensors, ours, with_loop, with_trainer
from adapters.users import PROMPT, splits
from adapters.work import ceiling, n_tokens, needed_flops, padding_share
from headline import with_headline
from rich.console import Console
from rich.table import Table

from milp_ray.config.training import TrainingSection
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.training.base import Base
from milp_ray.training.job import Job, JobPlan, plan_job

ROW = 64  # tokens a row with the shapes of random weights


def main() -> None:
    """Measure, print the table, then the JSON line."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    base = base_of(arguments.model, arguments.device)
    section = _section(arguments)
    plans = _plans(base, section, arguments)
    sides: dict[str, Callable[[Sequence[JobPlan]], list[Tensors]]] = {}
    if not arguments.without_trainer:
        sides["trainer"] = lambda some: with_trainer(base, some, section)
    sides["loop"] = lambda some: with_loop(base, some, section)
    for size in arguments.packs:
        sides[f"pack {size}"] = lambda some, n=size: ours(base, some, section, n)
    rounds = _measured(base, sides, plans, arguments)
    best = min(arguments.packs, key=lambda size: _median(rounds[f"pack {size}"], "seconds"))
    _report(base, plans, rounds, best, breakdown(base, plans, section, best), arguments)


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
            fastest = ceiling(base)
            with memory_growth(base.device) as memory:
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
            found[name].append(
                {
                    "seconds": seconds / len(chosen),
                    "ceiling": fastest,
                    "tokens": float(sum(n_tokens(plan) for plan in chosen)) / len(chosen),
                    "flops": sum(needed_flops(base, plan) for plan in chosen) / len(chosen),
                    "difference": furthest if name != "trainer" else float("nan"),
                    "memory": memory.mib,
                }
            )
    return found


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
    own = splits(arguments.users, long=arguments.model != "embedded")
    jobs = [Job(f"user-{i}", split, layout, frozenset(parts), seed=i) for i, split in enumerate(own)]
    return [plan_job(job, base, section, PROMPT) for job in jobs]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="16 users, two epochs of a stage, two rounds")
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
        arguments.users, arguments.epochs, arguments.rounds, arguments.sample = 16, 2, 2, 4
        arguments.packs = "1,16"
    arguments.packs = [int(size) for size in arguments.packs.split(",")]
    return arguments


# ----------------------------------------------------------------------------------------------- output


def _report(
    base: Base,
    plans: Sequence[JobPlan],
    rounds: dict[str, list[dict[str, float]]],
    best_size: int,
    where: Breakdown,
    arguments: argparse.Namespace,
) -> None:
    def median(name: str, key: str) -> float:
        return _median(rounds[name], key)

    device = (
        torch.cuda.get_device_name() if base.device.type == "cuda" else f"CPU, {arguments.threads} threads"
    )
    table = Table(title=f"{arguments.model}, {arguments.layout}, {len(plans)} users, {device}")
    for column in (
        "side",
        "users a minute",
        "tokens a second",
        "share of ceiling",
        "peak MiB",
        "furthest weight",
    ):
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
            f"{median(name, 'memory'):,.0f}",
            f"{median(name, 'difference'):.1e}",
        )
    console = Console(width=110)
    console.print(table)
    console.print(where.table())
    packs = [name for name in rounds if name.startswith("pack")]
    best = f"pack {best_size}"

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
        "where_time_goes": where.figures(),
        "peak_memory_mib": {name: round(median(name, "memory")) for name in rounds},
    }
    line = json.dumps(with_headline("training", figures, keep=not arguments.quick))
    if arguments.results is not None:
        arguments.results.write_text(line + "\n", encoding="utf-8")
    print(line)


def _median(rounds: Sequence[dict[str, float]], key: str) -> float:
    return statistics.median(one[key] for one in rounds)


if __name__ == "__main__":
    main()
