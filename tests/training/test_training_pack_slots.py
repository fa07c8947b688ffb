"""The slots of a pack: filled again as jobs end, whatever becomes of a job, within the memory there is."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from support.jobs import BOTH, MakeSplit, make_job
from support.packs import PROMPT, RECIPE, furthest, mixed_jobs, tensors_of
from torch import Tensor

from milp_ray.config.base import BaseSection
from milp_ray.config.training import DeepSpeedSection, TrainingSection
from milp_ray.errors import MilpError
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.memory.lora import target_modules
from milp_ray.training import packed_base, response_loss, stages
from milp_ray.training.base import Base, load_base
from milp_ray.training.flat_batch import FlatBatch
from milp_ray.training.flat_prefix import FlatPrefix
from milp_ray.training.hooks import Ended, Hooks
from milp_ray.training.job import Job, JobResult, plan_job
from milp_ray.training.pack import Pack
from milp_ray.training.pack_module import PackModule
from milp_ray.training.packed_base import PackedBase
from milp_ray.training.rack import Rack
from milp_ray.training.train import train


@pytest.fixture(scope="module")
def base(tiny_llama_dir: Path) -> Base:
    return load_base(BaseSection(model=str(tiny_llama_dir), device="cpu"))


# ------------------------------------------------------------------------------------------------- slots


def test_results_come_as_jobs_end_and_slots_are_filled_again(base: Base, make_split: MakeSplit) -> None:
    jobs = mixed_jobs(base, make_split)
    order: list[str] = []
    active: set[str] = set()
    most = 0

    def progressed(job_id: str, done: int, n_steps: int) -> None:
        nonlocal most
        active.add(job_id)
        most = max(most, len(active))

    def ended(result: JobResult) -> None:
        active.discard(result.job_id)
        order.append(result.job_id)

    assert train(base, jobs, RECIPE, PROMPT, on_progress=progressed, on_result=ended) == []
    assert most == RECIPE.pack_size
    assert sorted(order) == [job.job_id for job in jobs]
    steps = {job.job_id: plan_job(job, base, RECIPE, PROMPT).n_steps for job in jobs}
    assert order[0] == min((job.job_id for job in jobs[:3]), key=lambda name: steps[name])


def test_a_job_that_diverges_fails_alone(base: Base, make_split: MakeSplit) -> None:
    jobs = mixed_jobs(base, make_split)[:3]
    wild = Job("wild", jobs[0].split, jobs[0].layout, BOTH, seed=0, learning_rate=1e30)
    failed: dict[str, MilpError] = {}
    results = train(base, [jobs[0], wild, *jobs[1:]], RECIPE, PROMPT, on_failure=failed.__setitem__)
    assert list(failed) == ["wild"]
    assert "training diverged" in str(failed["wild"])
    for job, result in zip(jobs, results, strict=True):
        [alone] = train(base, [job], RECIPE, PROMPT)
        assert furthest(tensors_of(result), tensors_of(alone)) < 1e-5
    with pytest.raises(MilpError, match="diverged"):
        train(base, [wild], RECIPE, PROMPT)


def test_a_job_that_diverges_spreads_to_no_neighbour_wherever_it_lies_on_the_line(
    base: Base, make_split: MakeSplit
) -> None:
    """The first on the line is the one that padding would read from."""
    first, *jobs = mixed_jobs(base, make_split)[:3]
    wild = replace(first, job_id="wild", learning_rate=1e30)
    failed: dict[str, MilpError] = {}
    results = train(base, [wild, *jobs], RECIPE, PROMPT, on_failure=failed.__setitem__)
    assert list(failed) == ["wild"]
    for job, result in zip(jobs, results, strict=True):
        [alone] = train(base, [job], RECIPE, PROMPT)
        assert furthest(tensors_of(result), tensors_of(alone)) < 1e-5


def test_jobs_need_ids_of_their_own(base: Base, make_split: MakeSplit) -> None:
    job = mixed_jobs(base, make_split)[0]
    with pytest.raises(MilpError, match="share ids"):
        train(base, [job, job], RECIPE, PROMPT)


def test_hundreds_of_jobs_through_sixteen_slots_leave_memory_flat(base: Base, make_split: MakeSplit) -> None:
    section = TrainingSection(memory_epochs=1, instruction_epochs=1, batch_size=4, pack_size=16)
    layouts = [CanonicalLayout(tuple(i == k for i in range(4)), 2) for k in range(4)]
    split = [make_split(f"u-{i}", n_turns=1 + i % 3, n_train=2, n_val=1) for i in range(10)]
    process, resident = psutil.Process(), []

    def ended(result: JobResult) -> None:
        if int(result.job_id) % 40 == 39:
            gc.collect()
            resident.append(process.memory_info().rss / 2**20)

    jobs = [Job(str(i), split[i % 10], layouts[i % 4], BOTH, seed=i) for i in range(400)]
    train(base, jobs, section, PROMPT, on_result=ended)
    assert len(resident) == 10
    assert resident[-1] - resident[2] < 0.05 * resident[2] + 5, resident


# ------------------------------------------------------------------------------------------------- memory


def test_a_pass_that_does_not_fit_is_halved_and_no_job_is_lost(
    base: Base, make_split: MakeSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = mixed_jobs(base, make_split)
    section = RECIPE.model_copy(update={"pack_size": 6})
    expected = train(base, jobs, section, PROMPT)
    forward, refused = PackModule.forward, []

    def cramped(self: Any, batch: FlatBatch, *rest: Any) -> Tensor:
        loss = forward(self, batch, *rest)
        if len(batch.segments) > 2:
            loss.backward()  # gradients of a pass that was given up must not count
            refused.append(batch.n_tokens)
            raise torch.OutOfMemoryError("as a GPU would say")
        return loss

    monkeypatch.setattr(PackModule, "forward", cramped)
    results = train(base, jobs, section, PROMPT)
    assert refused
    assert len(refused) <= 2, "what was learnt of the memory is kept"
    for result, wanted in zip(results, expected, strict=True):
        assert furthest(tensors_of(result), tensors_of(wanted)) < 1e-5


def test_a_job_that_does_not_fit_alone_is_an_error_that_says_what_to_lower(
    base: Base, make_split: MakeSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, *_: Any) -> Tensor:
        raise torch.OutOfMemoryError("as a GPU would say")

    monkeypatch.setattr(PackModule, "forward", full)
    with pytest.raises(MilpError, match=r"lower training\.batch_size"):
        train(base, mixed_jobs(base, make_split), RECIPE, PROMPT)


@pytest.mark.parametrize("bits", ["0101", "0000"])
def test_a_job_outside_packs_that_does_not_fit_is_the_same_error(
    bits: str, base: Base, make_split: MakeSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("as a GPU would say")

    monkeypatch.setattr(stages.JobTraining, "run", full)
    monkeypatch.setattr(response_loss, "response_losses", full)
    failed: list[MilpError] = []
    section = RECIPE.model_copy(update={"deepspeed": DeepSpeedSection(zero_stage=2)})
    job = make_job(make_split(), bits)
    train(base, [job], section, PROMPT, on_failure=lambda _, error: failed.append(error))
    [error] = failed
    assert "lower training.batch_size" in str(error)
    assert error.__context__ is None, "the device's error would hold on to its memory"


def test_a_job_that_does_not_fit_alone_leaves_the_others_their_common_passes(
    base: Base, make_split: MakeSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *jobs = mixed_jobs(base, make_split)
    huge = replace(first, job_id="huge")
    forward, sizes = PackModule.forward, []

    def cramped(self: Any, batch: FlatBatch, *rest: Any) -> Tensor:
        if any(segment.rack.layout == huge.layout for segment in batch.segments):
            raise torch.OutOfMemoryError("as a GPU would say")
        sizes.append(len(batch.segments))
        return forward(self, batch, *rest)

    monkeypatch.setattr(PackModule, "forward", cramped)
    failed: dict[str, MilpError] = {}
    results = train(base, [huge, *jobs], RECIPE, PROMPT, on_failure=failed.__setitem__)
    assert list(failed) == ["huge"]
    assert len(results) == len(jobs)
    assert max(sizes) == RECIPE.pack_size


# ------------------------------------------------------------------------------------------------- racks


def interleaved(make_split: MakeSplit, n_jobs: int) -> list[Job]:
    """Jobs of four layouts in turn; each fourth is longer than the others."""
    layouts = [CanonicalLayout((False, True, True, True), rank) for rank in (2, 4, 8, 16)]
    splits = [make_split(f"u-{i}", n_turns=2 + 6 * (i % 4 == 3), n_train=1, n_val=1) for i in range(8)]
    return [Job(f"job-{i}", splits[i % 8], layouts[i % 4], BOTH, seed=i) for i in range(n_jobs)]


def modules_of(base: Base, jobs: list[Job]) -> set[str]:
    return {name for job in jobs for name in target_modules(job.layout, base.spec)}


class Watched:
    """A pack that is stepped to its end; what became of its jobs, and the slots that it had at most."""

    def __init__(self, base: Base, jobs: list[Job], size: int) -> None:
        section = RECIPE.model_copy(update={"memory_epochs": 1, "instruction_epochs": 1})
        self.ended: dict[str, Ended] = {}
        self.failed: dict[str, MilpError] = {}
        self.pack = Pack(
            base, section, PROMPT, Hooks(), on_ended=self._ended, on_failure=self._failed, size=size
        )
        self.pack.add(jobs)
        self.most_slots = 0
        with self.pack.on_base(modules_of(base, jobs)):
            while self.pack.has_jobs:
                self.pack.step()
                slots = sum(rack.n_slots for rack in self.pack._packed.racks.values())
                self.most_slots = max(self.most_slots, slots)
        self.n_racks = len(self.pack._packed.racks)

    def _ended(self, job: Ended) -> None:
        self.ended[job.job.job_id] = job

    def _failed(self, job: Job, error: MilpError) -> None:
        self.failed[job.job_id] = error


def test_layouts_in_turn_have_two_slots_a_trained_job_at_most(base: Base, make_split: MakeSplit) -> None:
    jobs = interleaved(make_split, 32)
    watched = Watched(base, jobs, size=4)
    assert len(watched.ended) == 32
    assert watched.most_slots <= 2 * 4
    assert watched.n_racks == 1


def test_a_call_trains_one_layout_after_the_other(
    base: Base, make_split: MakeSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []
    monkeypatch.setattr(PackedBase, "rack_for", watching(PackedBase.rack_for, begun))
    jobs = interleaved(make_split, 16)
    results = train(base, jobs, RECIPE.model_copy(update={"memory_epochs": 1}), PROMPT)
    assert [result.job_id for result in results] == [job.job_id for job in jobs]
    assert begun == [2] * 5 + [4] * 4 + [8] * 4 + [16] * 4  # the first rack comes before its first job


def watching(rack_for: Any, ranks: list[int]) -> Any:
    def watched(self: PackedBase, layout: CanonicalLayout, n_slots: int) -> Any:
        ranks.append(layout.rank)
        return rack_for(self, layout, n_slots)

    return watched


def test_a_rack_goes_with_the_last_job_of_its_layout_whatever_became_of_it(
    base: Base, make_split: MakeSplit
) -> None:
    jobs = interleaved(make_split, 4)
    jobs += [replace(job, job_id=f"more-{job.job_id}") for job in jobs]
    pack = Pack(base, RECIPE, PROMPT, Hooks(), on_ended=lambda _: None, on_failure=lambda *_: None, size=4)
    pack.add(jobs)
    with pack.on_base(modules_of(base, jobs)):
        pack.step()
        kept = jobs[0].layout
        assert len(pack._packed.racks) == 4
        pack.take_out({job.job_id for job in jobs if job.layout != kept})
        assert list(pack._packed.racks) == [kept]
        pack.take_out({job.job_id for job in jobs})
        pack.add(jobs[1:2])
        pack.step()
        assert list(pack._packed.racks) == [jobs[1].layout]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_rack_that_does_not_fit_loses_no_job(
    number: int, base: Base, make_split: MakeSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs, n_made = interleaved(make_split, 12), 0
    expected = Watched(base, jobs, size=4).ended

    def cramped(*arguments: Any, **options: Any) -> Rack:
        nonlocal n_made
        n_made += 1
        if n_made == number:
            raise torch.OutOfMemoryError("as a GPU would say")
        return Rack(*arguments, **options)

    monkeypatch.setattr(packed_base, "Rack", cramped)
    watched = Watched(base, jobs, size=4)
    assert watched.failed == {}
    assert watched.ended.keys() == expected.keys()
    assert watched.pack.size < 4
    for name, ended in watched.ended.items():
        assert furthest(ended.tensors, expected[name].tensors) < 1e-5


def test_a_job_whose_slot_does_not_fit_fails_with_what_to_lower(
    base: Base, make_split: MakeSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = interleaved(make_split, 8)
    huge = jobs[3].layout

    def cramped(layout: CanonicalLayout, *rest: Any, **options: Any) -> Rack:
        if layout == huge:
            raise torch.OutOfMemoryError("as a GPU would say")
        return Rack(layout, *rest, **options)

    monkeypatch.setattr(packed_base, "Rack", cramped)
    watched = Watched(base, jobs, size=4)
    assert watched.failed.keys() == {job.job_id for job in jobs if job.layout == huge}
    assert all("lower training.batch_size" in str(error) for error in watched.failed.values())
    assert len(watched.ended) == 6
    with pytest.raises(MilpError, match=r"lower training\.batch_size"):
        Watched(base, jobs[3:], size=4)


@pytest.mark.parametrize("method", ["_below", "_mean_losses"])
def test_states_and_losses_that_do_not_fit_are_worked_out_in_smaller_pieces(
    method: str, base: Base, make_split: MakeSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = interleaved(make_split, 8)
    expected = Watched(base, jobs, size=4).ended
    owner: Any = FlatPrefix if method == "_below" else PackedBase
    own, n_calls = getattr(owner, method), 0

    def cramped(self: Any, *arguments: Any) -> Any:
        nonlocal n_calls
        n_calls += 1
        if n_calls == 1:
            raise torch.OutOfMemoryError("as a GPU would say")
        return own(self, *arguments)

    monkeypatch.setattr(owner, method, cramped)
    watched = Watched(base, jobs, size=4)
    assert n_calls > 1
    assert watched.failed == {}
    for name, ended in expected.items():
        assert furthest(watched.ended[name].tensors, ended.tensors) < 1e-5
        assert watched.ended[name].validation_loss == pytest.approx(ended.validation_loss, abs=1e-5)
