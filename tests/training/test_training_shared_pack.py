"""One pack for several callers: each gets what it would have computed by itself, whoever comes and goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from milp_ray.config.base import BaseSection
from milp_ray.config.prompt import PromptSection
from milp_ray.config.training import TrainingSection
from milp_ray.errors import MilpError
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.training.base import Base, load_base
from milp_ray.training.checkpoint import CheckpointFile
from milp_ray.training.generation import Questions, generate
from milp_ray.training.job import Job, JobResult
from milp_ray.training.pack import Pack
from milp_ray.training.shared_pack import SharedPack, TakenOut, _Prompts
from milp_ray.training.train import train, train_until

PROMPT = PromptSection()
RECIPE = TrainingSection(memory_epochs=4, batch_size=2, learning_rate=1e-2, memory_block_turns=2)
MEMORY = frozenset({"memory"})
LAYOUTS = [("0011", 4), ("1000", 2), ("0110", 4), ("0001", 8)]
Split = Callable[..., Any]


@pytest.fixture(scope="module")
def base(tiny_llama_dir: Path) -> Base:
    return load_base(BaseSection(model=str(tiny_llama_dir), device="cpu"))


@pytest.fixture
def shared(base: Base, tmp_path: Path) -> Iterator[SharedPack]:
    pack = SharedPack(base, RECIPE, PROMPT, tmp_path)
    yield pack
    pack.close()


def jobs_of(i: int, make_split: Split, learning_rate: float | None = None) -> list[Job]:
    """Two users' jobs of one layout; the ids are the same for every ``i``. The base is free once closed."""
    bits, rank = LAYOUTS[i]
    layout = CanonicalLayout(tuple(bit == "1" for bit in bits), rank)
    splits = [make_split(f"u-{user}", n_turns=3 + 2 * i + user, n_train=2) for user in range(2)]
    return [
        Job(f"probe-{user}", split, layout, MEMORY, seed=user, learning_rate=learning_rate)
        for user, split in enumerate(splits)
    ]


def assert_equal(results: list[JobResult], alone: list[JobResult]) -> None:
    for one, other in zip(results, alone, strict=True):
        assert (one.job_id, one.steps, one.tokens) == (other.job_id, other.steps, other.tokens)
        assert one.validation_loss == pytest.approx(other.validation_loss, abs=1e-5)
        assert one.adapter is not None
        assert other.adapter is not None
        for name, tensor in one.adapter.tensors.items():
            assert torch.allclose(tensor, other.adapter.tensors[name], atol=1e-5, rtol=0)


def test_callers_side_by_side_get_what_each_would_alone(
    base: Base, shared: SharedPack, make_split: Split
) -> None:
    """Lowest layers that differ, and a rung on the way for some; answers come from the shared base, too."""
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}

    def measured(i: int) -> tuple[list[JobResult], list[list[str]], float]:
        caller, jobs = shared.caller(f"trial-{i}"), jobs_of(i, make_split)
        if i % 2:
            for epoch in (1, 3):
                assert [part.epoch for part in caller.train_until(jobs, epoch)] == [epoch] * 2
        results = caller.train(jobs)
        asked = [Questions(["Question: what?\nAnswer:", "My"], result.adapter) for result in results]
        return results, caller.answers(asked, max_new_tokens=8, batch_size=4), caller.seconds

    with ThreadPoolExecutor(len(LAYOUTS)) as threads:
        found = list(threads.map(measured, range(len(LAYOUTS))))
    shared.close()
    for i, (results, answers, seconds) in enumerate(found):
        alone = train(base, jobs_of(i, make_split), RECIPE, PROMPT)
        assert_equal(results, alone)
        asked = [Questions(["Question: what?\nAnswer:", "My"], result.adapter) for result in alone]
        assert answers == generate(base, asked, max_new_tokens=8, batch_size=4)
        assert seconds > 0
    after = base.model.state_dict()
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


def test_a_job_that_diverges_fails_its_caller_alone(
    base: Base, shared: SharedPack, make_split: Split
) -> None:
    """And the layout that failed may be asked for again while the others go on."""

    def wild() -> None:
        for _ in range(2):
            with pytest.raises(MilpError, match="diverged"):
                shared.caller("wild").train(jobs_of(1, make_split, learning_rate=1e30))

    with ThreadPoolExecutor(2) as threads:
        failing = threads.submit(wild)
        results = threads.submit(shared.caller("tame").train, jobs_of(0, make_split)).result()
        failing.result()
    shared.close()
    assert_equal(results, train(base, jobs_of(0, make_split), RECIPE, PROMPT))


def test_a_caller_that_leaves_takes_its_jobs_out_and_nothing_of_it_is_kept(
    base: Base, shared: SharedPack, make_split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaving = shared.caller("leaving")
    leaving.train_until(jobs_of(2, make_split), 1)
    assert len(list(tmp_path.iterdir())) == 2
    n_steps = 0
    step = Pack.step

    def counted(pack: Pack) -> None:
        nonlocal n_steps
        n_steps += 1
        step(pack)
        if n_steps == 1:
            leaving.close()

    monkeypatch.setattr(Pack, "step", counted)
    with pytest.raises(TakenOut):
        leaving.train(jobs_of(2, make_split))
    assert n_steps == 1
    results = shared.caller("next").train(jobs_of(2, make_split))
    shared.close()
    assert_equal(results, train(base, jobs_of(2, make_split), RECIPE, PROMPT))
    assert list(tmp_path.iterdir()) == []


def test_the_empty_layout_is_the_base_as_it_is(base: Base, shared: SharedPack, make_split: Split) -> None:
    empty = CanonicalLayout((False,) * 4, 0)
    jobs = [Job("probe-0", make_split("u-0"), empty, MEMORY, seed=0)]
    with ThreadPoolExecutor(2) as threads:
        training = threads.submit(shared.caller("a").train, jobs_of(0, make_split))
        [result] = threads.submit(shared.caller("b").train, jobs).result()
        training.result()
    shared.close()
    [alone] = train(base, jobs, RECIPE, PROMPT)
    assert result.adapter is None
    assert result.validation_loss == pytest.approx(alone.validation_loss, abs=1e-6)


def test_an_error_that_should_not_be_ends_everything_and_says_so(
    base: Base, make_split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(self: Pack) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(Pack, "step", lost)
    pack = SharedPack(base, RECIPE, PROMPT, tmp_path)
    with pytest.raises(RuntimeError, match="gone"):
        pack.caller("a").train(jobs_of(0, make_split))
    pack.close()
    assert pack.is_broken
    with pytest.raises(TakenOut):
        pack.caller("b").train(jobs_of(0, make_split))


def test_an_error_before_prompts_are_answered_reaches_who_asked(
    shared: SharedPack, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stuck(self: CheckpointFile) -> None:
        raise OSError("the folder cannot be read")

    monkeypatch.setattr(CheckpointFile, "remove", stuck)
    leaving = shared.caller("leaving")
    leaving.job_ids.add("leaving/probe-0")
    prompts = _Prompts(shared.caller("asking"), [Questions(["My"])], (2, 1))
    with shared._changed:  # the thread finds both in one look
        leaving.close()
        shared.submit(prompts)
    with pytest.raises(OSError, match="cannot be read"):
        prompts.future.result()
    shared.close()
    assert shared.is_broken


def test_a_caller_that_was_closed_asks_for_nothing_more(shared: SharedPack, make_split: Split) -> None:
    closed, jobs = shared.caller("closed"), jobs_of(0, make_split)
    prompts = _Prompts(closed, [Questions(["My"])], (2, 1))
    with shared._changed:
        shared.submit(prompts)
        closed.close()
    with pytest.raises(TakenOut):
        prompts.future.result()
    with pytest.raises(TakenOut):
        closed.train(jobs)
    with pytest.raises(TakenOut):
        closed.train_until(jobs, 1)
    with pytest.raises(TakenOut):
        closed.answers([Questions(["My"])], max_new_tokens=2, batch_size=1)
    assert len(shared.caller("open").train(jobs)) == 2


def test_jobs_that_cannot_be_packed_are_refused(base: Base, tmp_path: Path) -> None:
    spread = RECIPE.model_copy(update={"deepspeed": RECIPE.deepspeed.model_copy(update={"zero_stage": 2})})
    with pytest.raises(MilpError, match=r"leave search\.trials_per_gpu and trials_per_process out"):
        SharedPack(base, spread, PROMPT, tmp_path)


def test_a_pause_on_the_way_changes_no_bit(base: Base, shared: SharedPack, make_split: Split) -> None:
    jobs = jobs_of(0, make_split)
    caller = shared.caller("paused")
    caller.train_until(jobs, 2)
    paused = caller.train(jobs)
    straight = shared.caller("straight").train(jobs)
    for one, other in zip(paused, straight, strict=True):
        assert one.adapter is not None
        assert other.adapter is not None
        assert all(torch.equal(t, other.adapter.tensors[n]) for n, t in one.adapter.tensors.items())


def test_slots_count_the_jobs_of_all_callers(
    base: Base, make_split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for a single slot two callers' jobs go through one after the other."""
    one = RECIPE.model_copy(update={"pack_size": 1})
    most = 0
    step = Pack.step

    def watched(pack: Pack) -> None:
        nonlocal most
        step(pack)
        most = max(most, len(pack._active))

    monkeypatch.setattr(Pack, "step", watched)
    pack = SharedPack(base, one, PROMPT, tmp_path)
    with ThreadPoolExecutor(2) as threads:
        asked = [threads.submit(pack.caller(str(i)).train, jobs_of(i, make_split)) for i in range(2)]
        results = [future.result() for future in asked]
    pack.close()
    assert most == 1
    for i in range(2):
        assert_equal(results[i], train(base, jobs_of(i, make_split), one, PROMPT))


def test_train_until_gives_the_losses_of_the_same_jobs_alone(
    base: Base, shared: SharedPack, make_split: Split, tmp_path: Path
) -> None:
    jobs = jobs_of(3, make_split)
    together = shared.caller("a").train_until(jobs, 2)
    shared.close()
    alone = train_until(base, jobs, RECIPE, PROMPT, epoch=2, checkpoint_dir=tmp_path / "alone")
    for one, other in zip(together, alone, strict=True):
        assert (one.job_id, one.epoch, one.steps) == (other.job_id, other.epoch, other.steps)
        assert one.validation_loss == pytest.approx(other.validation_loss, abs=1e-5)
