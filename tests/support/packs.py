"""Jobs for packs: six of different layouts, lengths and rates, their recipe, and how results are compared."""

from __future__ import annotations

from torch import Tensor

from milp_ray.config.prompt import PromptSection
from milp_ray.config.training import TrainingSection
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.training.base import Base
from milp_ray.training.job import Job, JobResult
from support.jobs import BOTH, MakeSplit

PROMPT = PromptSection()
RECIPE = TrainingSection(
    memory_epochs=5, instruction_epochs=7, batch_size=2, memory_block_turns=2, pack_size=3, learning_rate=5e-4
)
Tensors = dict[str, Tensor]


def mixed_jobs(base: Base, make_split: MakeSplit) -> list[Job]:
    """Six jobs of different layers, ranks, lengths, rates and seeds: some end long before others."""
    shapes = [("001", 4, 3, 2), ("110", 8, 9, 6), ("111", 2, 14, 9), ("010", 8, 1, 1), ("110", 8, 6, 7)]
    jobs = []
    for i, (bits, rank, n_turns, n_train) in enumerate(shapes):
        mask = tuple(bit == "1" for bit in bits.ljust(base.n_layers, "1"))
        split = make_split(f"u-{i}", n_turns=n_turns, n_train=n_train, n_val=1 + i % 2)
        jobs.append(Job(f"job-{i}", split, CanonicalLayout(mask, rank), BOTH, seed=i))
    rate = 2e-4
    mask = tuple(i == 1 for i in range(base.n_layers))
    split = make_split("u-9", n_turns=5, n_train=3)
    jobs.append(Job("job-5", split, CanonicalLayout(mask, 8), BOTH, seed=9, learning_rate=rate))
    return jobs


def furthest(a: Tensors, b: Tensors) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def tensors_of(result: JobResult) -> Tensors:
    assert result.adapter is not None
    return result.adapter.tensors
