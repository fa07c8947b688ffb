"""The size of a pack: the memory model against what packs really take, and what follows from it."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from milp_ray.config.base import BaseSection
from milp_ray.config.prompt import PromptSection
from milp_ray.config.training import TrainingSection
from milp_ray.errors import MilpError
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.training.base import Base, load_base
from milp_ray.training.data import chunks
from milp_ray.training.device import take_share
from milp_ray.training.job import Job, JobPlan, plan_job
from milp_ray.training.memory_model import JobLoad, memory_of_pack
from milp_ray.training.model_shape import shape_of_model
from milp_ray.training.pack_size import Room, free_beside, pack_size, slots_that_fit
from milp_ray.training.train import train
from milp_ray.users.records import UserSplit

PROMPT = PromptSection()
RECIPE = TrainingSection(memory_epochs=1, instruction_epochs=1, order="chronological")
BOTH = frozenset({"memory", "instruction"})
Split = Callable[..., UserSplit]


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def base(request: pytest.FixtureRequest) -> Base:
    """The embedded base: its activations are what counts, as they are for larger ones."""
    return load_base(BaseSection(device=request.param, dtype="float32"))


@pytest.fixture(scope="module")
def on_cpu() -> Base:
    return load_base(BaseSection(device="cpu"))


def jobs_of(make_split: Split, bits: str, rank: int, n: int) -> list[Job]:
    layout = CanonicalLayout(tuple(bit == "1" for bit in bits), rank)
    return [Job(str(i), make_split(f"u-{i}", n_turns=60, n_train=9), layout, BOTH, seed=i) for i in range(n)]


def room_of(base: Base, free_bytes: int) -> Room:
    return Room(shape_of_model(base.model, base.spec, dtype_bytes=base.dtype.itemsize), free_bytes)


def bytes_taken(base: Base, jobs: list[Job], section: TrainingSection) -> int:
    """Most bytes that training holds at once beside the base, as torch's profiler or allocator saw them."""
    from torch.profiler import ProfilerActivity, profile

    train(base, jobs, section, PROMPT)  # what is made once a process is made now
    gc.collect()  # what earlier tests left must not be freed under the profiler
    if base.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        train(base, jobs, section, PROMPT)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        train(base, jobs, section, PROMPT)
    assert seen.profiler is not None
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def largest_step(plans: list[JobPlan], section: TrainingSection) -> tuple[int, int]:
    """Tokens of the largest step of all jobs together, and its longest row."""
    steps: dict[int, list[int]] = {}
    for plan in plans:
        batches = [
            [len(stage.sequences[i].ids) for i in chosen]
            for stage in plan.stages
            for chosen in chunks(range(len(stage.sequences)), section.batch_size)
        ]
        for number, lengths in enumerate(batches):
            steps.setdefault(number, []).extend(lengths)
    return max((sum(lengths), max(lengths)) for lengths in steps.values())


@pytest.mark.parametrize(
    ("bits", "rank", "n_jobs"), [("00001111", 16, 4), ("11111111", 64, 3), ("00000011", 8, 6)]
)
def test_a_pack_takes_what_the_memory_model_says(
    base: Base, make_split: Split, bits: str, rank: int, n_jobs: int
) -> None:
    jobs, section = jobs_of(make_split, bits, rank, n_jobs), RECIPE.model_copy(update={"pack_size": n_jobs})
    plans = [plan_job(job, base, section, PROMPT) for job in jobs]
    n_tokens, longest = largest_step(plans, section)
    layout = jobs[0].layout
    texts = [s for p in plans for s in (*(s for stage in p.stages for s in stage.sequences), *p.validation)]
    kept = sum(len(sequence.ids) for sequence in texts)
    parts = memory_of_pack(
        shape_of_model(base.model, base.spec, dtype_bytes=base.dtype.itemsize),
        JobLoad(
            rank=rank,
            n_lora_layers=len(layout.layers),
            lowest_layer=layout.layers[0],
            tokens_per_step=n_tokens // n_jobs,
            targets_per_step=0,  # the loss keeps no logits
            longest_row=longest,
            kept_tokens=kept // n_jobs,
        ),
        n_jobs=n_jobs,
    )
    assert parts.total - parts.base == pytest.approx(bytes_taken(base, jobs, section), rel=0.15)


def test_slots_are_as_many_as_fit_beside_the_base(base: Base, make_split: Split) -> None:
    jobs = jobs_of(make_split, "00001111", 16, 5)
    fitting = [slots_that_fit(base, jobs, RECIPE, PROMPT, room_of(base, 2**n)) for n in (22, 28, 29, 31)]
    assert fitting[0] == 0
    assert 1 <= fitting[1] < fitting[2] < fitting[3]
    assert fitting[3] == pytest.approx(8 * fitting[1], rel=0.5)


def test_the_recipe_decides_where_it_says_a_size(base: Base, make_split: Split) -> None:
    jobs = jobs_of(make_split, "00001111", 16, 20)
    three = RECIPE.model_copy(update={"pack_size": 3})
    assert pack_size(base, jobs, three, PROMPT) == 3
    assert pack_size(base, jobs[:2], three, PROMPT) == 2, "no more slots than jobs"
    by_itself = pack_size(base, jobs, RECIPE, PROMPT)
    assert by_itself == (16 if base.device.type == "cpu" else 20), "twenty small jobs fit any GPU"


def test_a_pack_on_a_cpu_is_as_large_as_memory_allows_and_no_larger_than_pays(
    on_cpu: Base, make_split: Split
) -> None:
    jobs = jobs_of(make_split, "11111111", 96, 40)
    sizes = [
        pack_size(on_cpu, jobs, RECIPE, PROMPT, room=room_of(on_cpu, 2**n)) for n in (20, 27, 28, 32, 40)
    ]
    assert sizes[0] == 1
    assert 1 < sizes[1] < sizes[2] < 16
    assert sizes[3:] == [16, 16]


def test_a_step_is_no_larger_than_its_sequences(on_cpu: Base, make_split: Split) -> None:
    """However large a batch may be: few jobs have as many sequences."""
    jobs = jobs_of(make_split, "11111111", 16, 4)
    sizes = [
        slots_that_fit(
            on_cpu, jobs, RECIPE.model_copy(update={"batch_size": n}), PROMPT, room_of(on_cpu, 2**30)
        )
        for n in (50, 500)
    ]
    assert sizes[0] == sizes[1] > 1


def test_a_job_that_cannot_be_planned_is_told_by_itself(on_cpu: Base, make_split: Split) -> None:
    jobs = jobs_of(make_split, "11111111", 16, 6)
    beyond = RECIPE.model_copy(update={"max_length": 10_000})
    assert pack_size(on_cpu, jobs, beyond, PROMPT) == 1
    failed: dict[str, MilpError] = {}
    train(on_cpu, jobs, beyond, PROMPT, on_failure=failed.__setitem__)
    assert failed.keys() == {job.job_id for job in jobs}


def test_what_is_free_on_a_cpu_is_the_process_s_memory_beside_the_base(
    on_cpu: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("milp_ray.training.pack_size.process_memory", lambda threads: 2**30)
    weights = sum(parameter.numel() * 4 for parameter in on_cpu.model.parameters())
    assert free_beside(on_cpu) == 2**30 - weights


# --------------------------------------------------------------------------------------- a part of a GPU


def gpu(monkeypatch: pytest.MonkeyPatch, *, total: int, free: int, allocated: int = 0) -> None:
    """A GPU as torch tells of it; ``allocated`` is this process's."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, total))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: allocated)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: allocated)


@pytest.fixture(scope="module")
def on_gpu(on_cpu: Base) -> Base:
    """The embedded base, which says that it lies on a GPU."""
    return replace(on_cpu, device=torch.device("cuda:0"))


@pytest.mark.parametrize(
    ("share", "free", "allocated", "expected"),
    [
        (1.0, 70, 5, 70),
        (0.25, 70, 5, 15),  # what others have not taken yet is theirs all the same
        (0.25, 6, 5, 6),  # somebody takes more than a share
        (0.25, 70, 25, 0),
    ],
)
def test_what_is_free_for_a_process_is_within_its_share(
    share: float, free: int, allocated: int, expected: int, on_gpu: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(monkeypatch, total=80, free=free, allocated=allocated)
    assert free_beside(replace(on_gpu, device_share=share)) == expected


def test_a_quarter_of_a_gpu_gets_a_pack_of_its_size(
    on_gpu: Base, make_split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs, total = jobs_of(make_split, "00001111", 16, 200), 2**31
    gpu(monkeypatch, total=total, free=total)
    whole, quarter = (
        pack_size(replace(on_gpu, device_share=share), jobs, RECIPE, PROMPT) for share in (1.0, 0.25)
    )
    assert 1 < quarter < whole < 200
    assert quarter == slots_that_fit(on_gpu, jobs, RECIPE, PROMPT, room_of(on_gpu, total // 4))


def test_a_share_is_a_limit_on_what_a_process_allocates(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[tuple[float, int | None]] = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *limit: limits.append(limit))
    assert [take_share("cuda", 0.25), take_share("cuda:1", 0.5)] == [0.25, 0.5]
    assert limits == [(0.25, None), (0.5, 1)]
    assert [take_share("cuda", 1.0), take_share("cuda", 2.0), take_share("cpu", 0.25)] == [1.0, 1.0, 1.0]
    assert len(limits) == 2
