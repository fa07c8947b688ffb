"""The same jobs trained by ours in packs, by a tight PEFT loop, and by Hugging Face's Trainer with PEFT."""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from tempfile import TemporaryDirectory
from typing import Any

import torch
from adapters.users import PROMPT
from torch import Tensor, nn

from milp_ray.config.training import TrainingSection
from milp_ray.memory.lora import lora_config
from milp_ray.training.adapters import injected, load_tensors, read_tensors
from milp_ray.training.base import Base
from milp_ray.training.data import Sequence as TokenSequence
from milp_ray.training.data import epoch_plan
from milp_ray.training.engine import linear_schedule
from milp_ray.training.job import JobPlan, Stage
from milp_ray.training.rack import initial_weights, pairs_of
from milp_ray.training.train import train

Tensors = dict[str, Tensor]


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
