"""Jobs that begin with the weights of an adapter."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from support.jobs import make_job
from torch import Tensor

from milp_ray.config.base import BaseSection
from milp_ray.config.prompt import PromptSection
from milp_ray.config.training import LoraAlphaSection, TrainingSection
from milp_ray.errors import MilpError
from milp_ray.training.adapters import Adapter, read_tensors, save_adapter
from milp_ray.training.base import Base, load_base
from milp_ray.training.data import epoch_plan, make_batch
from milp_ray.training.engine import linear_schedule
from milp_ray.training.hooks import Hooks
from milp_ray.training.job import Job, plan_job
from milp_ray.training.train import train, train_alone
from milp_ray.users.records import UserSplit

PROMPT = PromptSection()
RECIPE = TrainingSection(memory_epochs=2, instruction_epochs=2, batch_size=2, memory_block_turns=2)
MakeSplit = Callable[..., UserSplit]


@pytest.fixture(scope="module")
def base(tiny_llama_dir: Path) -> Base:
    return load_base(BaseSection(model=str(tiny_llama_dir), device="cpu"))


@pytest.fixture(scope="module")
def start(base: Base, make_split: MakeSplit) -> Adapter:
    [result] = train(base, [make_job(make_split("u-1"))], RECIPE, PROMPT)
    assert result.adapter is not None
    return result.adapter


def continued_with_plain_peft(base: Base, job: Job, start: Adapter, folder: Path) -> dict[str, Tensor]:
    """The stored adapter opened with PEFT for training, and torch's AdamW."""
    save_adapter(start, folder)
    plan = plan_job(job, base, RECIPE, PROMPT)
    model = PeftModel.from_pretrained(copy.deepcopy(base.model), folder, is_trainable=True)
    model.eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    for stage in plan.stages:
        optimizer = torch.optim.AdamW(parameters, lr=RECIPE.learning_rate, weight_decay=RECIPE.weight_decay)
        done, n_steps = 0, stage.n_steps(RECIPE)
        for epoch in range(stage.epochs):
            rng = random.Random(f"{job.seed}/{stage.name}/{epoch}")
            for chosen in epoch_plan(stage.sequences, RECIPE.batch_size, RECIPE.order, rng):
                batch = make_batch([stage.sequences[i] for i in chosen], base)
                logits = model(input_ids=batch.ids).logits[batch.keep]
                torch.nn.functional.cross_entropy(logits, batch.labels).backward()
                torch.nn.utils.clip_grad_norm_(parameters, RECIPE.max_grad_norm)
                factor = linear_schedule(done, n_steps, RECIPE.warmup_ratio)
                optimizer.param_groups[0]["lr"] = RECIPE.learning_rate * factor
                optimizer.step()
                optimizer.zero_grad()
                done += 1
    return read_tensors(model)


def furthest(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def test_a_job_that_continues_an_adapter_equals_plain_peft_continued(
    base: Base, start: Adapter, make_split: MakeSplit, tmp_path: Path
) -> None:
    job = make_job(make_split("u-1", seed=1), seed=4, start=start)
    expected = continued_with_plain_peft(base, job, start, tmp_path)
    [packed] = train(base, [job], RECIPE, PROMPT)
    assert packed.adapter is not None
    assert furthest(packed.adapter.tensors, start.tensors) > 1e-4, "it has learnt"
    assert furthest(packed.adapter.tensors, expected) < 1e-5
    alone = train_alone(base, job, RECIPE, PROMPT, Hooks()).tensors
    assert furthest(alone, expected) < 1e-5


def test_the_weights_to_start_from_are_part_of_what_a_job_is_made_from(
    base: Base, start: Adapter, make_split: MakeSplit
) -> None:
    job = make_job(make_split("u-1"))
    other = replace(start, tensors={name: tensor + 1e-3 for name, tensor in start.tensors.items()})
    found = {
        plan_job(replace(job, start=one), base, RECIPE, PROMPT).fingerprint for one in (None, start, other)
    }
    assert len(found) == 3


@pytest.mark.parametrize(
    ("changes", "section", "said"),
    [
        ({"bits": "1100"}, RECIPE, "cannot continue an adapter of layout 0101-r4"),
        ({}, RECIPE.model_copy(update={"lora_alpha": LoraAlphaSection(value=3.0)}), "lora_alpha 8, .* 12"),
    ],
)
def test_weights_that_would_mean_something_else_are_refused(
    base: Base,
    start: Adapter,
    make_split: MakeSplit,
    changes: dict[str, Any],
    section: TrainingSection,
    said: str,
) -> None:
    job = make_job(make_split("u-1"), **changes, start=start)
    with pytest.raises(MilpError, match=said):
        train(base, [job], section, PROMPT)
