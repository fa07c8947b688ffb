"""Small training jobs over the tiny bases of four layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from milp_ray.config.training import LoraAlphaSection, TrainingSection
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.training.job import Job
from milp_ray.users.records import UserSplit

MakeSplit = Callable[..., UserSplit]
BOTH = frozenset({"memory", "instruction"})
# One epoch of each stage, loud enough that answers of the tiny bases change.
ONE_EPOCH = TrainingSection(
    memory_epochs=1,
    instruction_epochs=1,
    learning_rate=1e-2,
    lora_alpha=LoraAlphaSection(rule="constant", value=8),
)


def layout_of(bits: str, rank: int = 4) -> CanonicalLayout:
    """A layout from one bit a layer; of no rank where none is set."""
    return CanonicalLayout(tuple(bit == "1" for bit in bits), rank if "1" in bits else 0)


def make_job(split: UserSplit, bits: str = "0101", **changes: Any) -> Job:
    """A job of both stages; ``changes`` are fields of :class:`Job`."""
    return replace(Job("job", split, layout_of(bits), BOTH, seed=0), **changes)
