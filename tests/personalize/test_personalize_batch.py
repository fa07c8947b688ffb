from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from milp_ray.config.base import BaseSection
from milp_ray.config.cluster import RaySection
from milp_ray.config.personalize import PersonalizeSection
from milp_ray.config.prompt import PromptSection
from milp_ray.config.training import TrainingSection
from milp_ray.errors import MilpError
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.personalize.batch import BatchInterrupted, BatchSummary, personalize, worker_pool
from milp_ray.personalize.pool import Outcome, WorkerPool
from milp_ray.personalize.recipe import Recipe
from milp_ray.personalize.store import AdapterStore
from milp_ray.rundir import RunFolder
from milp_ray.users.records import Turn, UserSplit

SECRET = "my pin is 4711"
LAYOUT = CanonicalLayout((False, True, False, True), rank=4)
SECTION = PersonalizeSection(n_workers=2, cpus_per_worker=0.5)

Make = Callable[..., UserSplit]


@pytest.fixture(scope="module")
def recipe(tiny_llama_dir: Path) -> Recipe:
    base = BaseSection(model=str(tiny_llama_dir), device="cpu")
    return Recipe(
        LAYOUT, base, TrainingSection(memory_epochs=1, instruction_epochs=1), PromptSection(), seed=5
    )


@pytest.fixture(scope="module")
def pool(ray_local: None, recipe: Recipe) -> Iterator[WorkerPool]:
    """Two workers with the tiny base, shared by the tests of this module."""
    with worker_pool(recipe.base, SECTION, RaySection()) as opened:
        yield opened


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def go(run: RunFolder, splits: Iterable[UserSplit], recipe: Recipe, pool: Any) -> BatchSummary:
    return personalize(run, splits, recipe, section=SECTION, ray=RaySection(), pool=pool)


def failures(run: RunFolder) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in run.failed_file.read_text().splitlines()]
    return {line["user_id"]: line for line in lines}


def published(run: RunFolder) -> dict[str, tuple[int, float]]:
    """Version and time of every user's adapter."""
    store = AdapterStore(run.adapters)
    return {u: (store.manifest(u).version, store.folder(u).stat().st_mtime) for u in store.users()}


def weights(run: RunFolder) -> dict[str, dict[str, bytes]]:
    store = AdapterStore(run.adapters)
    return {
        user: {name: t.numpy().tobytes() for name, t in store.load(user).tensors.items()}
        for user in sorted(store.users())
    }


class Meddling:
    """A pool whose function does something else first, or whose outcomes are watched."""

    def __init__(
        self,
        pool: WorkerPool,
        wrap: Callable[[Any], Any] = lambda function: function,
        on_outcome: Callable[[Outcome], None] = lambda outcome: None,
    ) -> None:
        self._pool = pool
        self._wrap = wrap
        self._on_outcome = on_outcome

    def start(self, n_workers: int) -> None:
        self._pool.start(n_workers)

    def map(self, function: Any, items: Any, **options: Any) -> Iterator[Outcome]:
        for outcome in self._pool.map(self._wrap(function), items, **options):
            self._on_outcome(outcome)
            yield outcome


# --------------------------------------------------------------------------------------------- the batch


@pytest.mark.ray
def test_every_user_gets_an_adapter_and_a_rerun_makes_none(
    run: RunFolder, recipe: Recipe, pool: WorkerPool, make_split: Make
) -> None:
    splits = [make_split(f"u-{i}") for i in range(4)]
    first = go(run, splits, recipe, pool)
    assert (first.done, first.skipped, first.failed, first.n_users) == (4, 0, 0, 4)
    assert min(first.steps, first.tokens, first.bytes, first.training_seconds, first.peak_rss_mib) > 0
    before = published(run)
    assert {user: version for user, (version, _) in before.items()} == {f"u-{i}": 1 for i in range(4)}

    second = go(run, (split for split in splits), recipe, None)
    assert (second.done, second.skipped, second.failed) == (0, 4, 0)
    assert published(run) == before
    assert run.failed_file.read_text() == ""


@pytest.mark.ray
def test_an_adapter_is_what_training_returns_for_the_users_own_data(
    run: RunFolder, recipe: Recipe, pool: WorkerPool, make_split: Make
) -> None:
    from milp_ray.training.base import load_base
    from milp_ray.training.job import Job
    from milp_ray.training.train import train

    split = make_split("u-0")
    go(run, [split, make_split("u-1")], recipe, pool)
    job = Job("alone", split, LAYOUT, frozenset({"memory", "instruction"}), recipe.seed_of("u-0"))
    [alone] = train(load_base(recipe.base), [job], recipe.training, recipe.prompt)
    assert alone.adapter is not None
    expected = {name: tensor.numpy().tobytes() for name, tensor in alone.adapter.tensors.items()}
    assert weights(run)["u-0"] == expected
    meta = AdapterStore(run.adapters).manifest("u-0").meta
    assert meta["validation_loss"] == alone.validation_loss
    assert meta["steps"] == alone.steps


@pytest.mark.ray
def test_adapters_do_not_depend_on_the_number_of_workers_or_the_order(
    tmp_path: Path, recipe: Recipe, pool: WorkerPool, make_split: Make
) -> None:
    splits = [make_split(f"u-{i}", n_turns=3 + i) for i in range(4)]
    runs = [RunFolder(tmp_path / name) for name in ("two-workers", "one-worker", "another-seed")]
    go(runs[0], splits, recipe, pool)
    with worker_pool(recipe.base, replace_section(SECTION, n_workers=1), RaySection()) as single:
        go(runs[1], list(reversed(splits)), recipe, single)
    go(runs[2], splits, replace(recipe, seed=6), pool)
    assert weights(runs[0]) == weights(runs[1])
    assert all(weights(runs[0])[user] != weights(runs[2])[user] for user in weights(runs[0]))


def replace_section(section: PersonalizeSection, **changes: Any) -> PersonalizeSection:
    return section.model_copy(update=changes)


@pytest.mark.ray
def test_only_users_whose_data_changed_are_made_again(
    run: RunFolder, recipe: Recipe, pool: WorkerPool, make_split: Make
) -> None:
    splits = [make_split(f"u-{i}") for i in range(3)]
    go(run, splits, recipe, pool)
    before = published(run)
    splits[1] = replace(splits[1], history=(*splits[1].history, Turn("My oven is red.")))
    summary = go(run, splits, recipe, pool)
    assert (summary.done, summary.skipped) == (1, 2)
    after = published(run)
    assert after["u-1"][0] == 2
    assert (after["u-0"], after["u-2"]) == (before["u-0"], before["u-2"])


@pytest.mark.ray
def test_a_damaged_adapter_is_made_again(
    run: RunFolder, recipe: Recipe, pool: WorkerPool, make_split: Make
) -> None:
    splits = [make_split("u-0"), make_split("u-1")]
    go(run, splits, recipe, pool)
    before = weights(run)
    path = AdapterStore(run.adapters).folder("u-0") / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    summary = go(run, splits, recipe, pool)
    assert (summary.done, summary.skipped) == (1, 1)
    assert weights(run) == before


# ---------------------------------------------------------------------------------------------- failures


@pytest.mark.ray
def test_bad_users_fail_with_a_reason_while_others_go_on(
    run: RunFolder, recipe: Recipe, pool: WorkerPool, make_split: Make
) -> None:
    empty = make_split("nothing", n_turns=0, n_train=0)
    # Not what a reader lets through: a text that is none, which breaks inside training.
    broken = replace(make_split("broken"), history=(Turn(SECRET), Turn([SECRET])))
    only_history = make_split("history", n_train=0, n_val=0)
    only_examples = make_split("examples", n_turns=0)
    splits = [empty, make_split("u-1"), broken, only_history, only_examples, make_split("u-1")]
    sizes = replace(recipe)
    summary = go(run, splits, sizes, pool)
    assert (summary.done, summary.failed, summary.n_users) == (3, 3, 6)
    assert set(published(run)) == {"u-1", "history", "examples"}
    failed = failures(run)
    assert set(failed) == {"nothing", "broken", "u-1"}
    assert failed["nothing"]["reason"].startswith("the user has neither a history nor training examples")
    assert failed["u-1"]["reason"] == "the user id occurs more than once"
    assert "milp_ray/training/" in failed["broken"]["reason"]
    assert SECRET not in run.failed_file.read_text()

    again = go(run, [broken, make_split("nothing"), make_split("u-1")], recipe, pool)
    assert (again.done, again.skipped, again.failed) == (1, 1, 1)
    assert set(failures(run)) == {"broken"}, "failures that are mended are not listed any more"


def test_an_empty_layout_is_refused_before_anything_starts(run: RunFolder, recipe: Recipe) -> None:
    empty = replace(recipe, layout=CanonicalLayout((False,) * 4, 8))
    with pytest.raises(MilpError, match=r"empty one .* nothing to train"):
        go(run, [], empty, None)


@pytest.mark.ray
def test_a_base_that_is_not_there_ends_the_batch(
    run: RunFolder, recipe: Recipe, ray_local: None, make_split: Make
) -> None:
    lost = replace(recipe, base=BaseSection(model="./no/such/base"))
    one = replace_section(SECTION, n_workers=1)
    with pytest.raises(MilpError, match="no/such/base"):
        personalize(run, [make_split("u-1")], lost, section=one, ray=RaySection())


# ------------------------------------------------------------------------------ killed and interrupted


@pytest.mark.slow
@pytest.mark.ray
def test_users_of_killed_workers_are_done_exactly_once(
    run: RunFolder, recipe: Recipe, pool: WorkerPool, make_split: Make, tmp_path: Path
) -> None:
    def dying(function: Any) -> Any:
        def once(name: str) -> bool:
            if (tmp_path / name).exists():
                return False
            (tmp_path / name).touch()
            return True

        def run_and_die(base: Any, items: Any, report: Any) -> None:
            users = {item.split.user_id for item in items}
            if "before" in users and once("before"):
                os.kill(os.getpid(), signal.SIGKILL)
            function(base, items, report)
            if "after" in users and once("after"):
                os.kill(os.getpid(), signal.SIGKILL)

        return run_and_die

    splits = [make_split(user_id) for user_id in ("before", "after", "u-1", "u-2")]
    summary = go(run, splits, recipe, Meddling(pool, wrap=dying))
    assert (tmp_path / "before").exists()
    assert (tmp_path / "after").exists()
    assert (summary.done, summary.failed) == (4, 0)
    assert summary.retried >= 2, "they, and those that were in their company"
    assert {user: version for user, (version, _) in published(run).items()} == {
        "before": 1, "after": 1, "u-1": 1, "u-2": 1
    }  # fmt: skip


def slow(recipe: Recipe) -> Recipe:
    """Enough steps a user for an interruption to come in the middle of one, and one user after the other."""
    training = TrainingSection(memory_epochs=20, instruction_epochs=20, batch_size=2, pack_size=1)
    return replace(recipe, training=training)


DRIVER = """
import pickle, sys
from milp_ray.config.cluster import RaySection
from milp_ray.config.personalize import PersonalizeSection
from milp_ray.personalize.batch import personalize

run, splits, recipe = pickle.load(open(sys.argv[1], "rb"))
personalize(run, splits, recipe, section=PersonalizeSection(n_workers=1), ray=RaySection(num_cpus=1))
"""


@pytest.mark.slow
@pytest.mark.ray
def test_after_kill_9_of_the_driver_the_rest_is_made(
    run: RunFolder, recipe: Recipe, pool: WorkerPool, make_split: Make, tmp_path: Path
) -> None:
    import pickle

    import psutil

    recipe = slow(recipe)
    splits = [make_split(f"u-{i}") for i in range(5)]
    (tmp_path / "arguments").write_bytes(pickle.dumps((run, splits, recipe)))
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(tmp_path / "arguments")])
    try:
        deadline = time.monotonic() + 200
        while len(before := published(run)) < 2:
            assert driver.poll() is None, "the driver ended too early"
            assert time.monotonic() < deadline, "the driver makes no adapters"
            time.sleep(0.05)
        family = psutil.Process(driver.pid).children(recursive=True)
        # Ray's agents notice the end of their node only after a minute; they write no adapters.
        family = [process for process in family if "Agent" not in process.name()]
    finally:
        driver.kill()
        driver.wait()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive, "processes of the killed session live on"
    before = published(run)
    assert 2 <= len(before) < 5
    summary = go(run, splits, recipe, pool)
    assert (summary.done, summary.skipped, summary.failed) == (5 - len(before), len(before), 0)
    after = published(run)
    assert {user: after[user] for user in before} == before
    assert {version for version, _ in after.values()} == {1}


@pytest.mark.ray
def test_ctrl_c_keeps_what_is_done(
    run: RunFolder, recipe: Recipe, pool: WorkerPool, make_split: Make
) -> None:
    splits = [make_split(f"u-{i}") for i in range(9)]
    # Sent from another thread while the batch waits for its workers, as a terminal does it.
    timers: list[threading.Timer] = []

    def interrupt_once(outcome: Outcome) -> None:
        assert not outcome.failed, outcome
        if not timers:
            timers.append(threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)))
            timers[0].start()

    # A shell starts what it puts in the background with the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(BatchInterrupted, match="the same command goes on from here") as caught:
            go(run, splits, slow(recipe), Meddling(pool, on_outcome=interrupt_once))
    finally:
        signal.signal(signal.SIGINT, before)
    summary = caught.value.summary
    assert summary.interrupted
    assert 0 < summary.done < 9
    # Workers may have published what the batch was no longer there to count.
    assert summary.done <= len(published(run)) < 9
