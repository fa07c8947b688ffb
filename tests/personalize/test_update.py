"""Updates: what is continued, what is kept, what is made anew, and that a killed one goes on."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from updated_user import more

from milp_ray.config.base import BaseSection
from milp_ray.config.cluster import RaySection
from milp_ray.config.personalize import PersonalizeSection
from milp_ray.config.prompt import PromptSection
from milp_ray.config.training import TrainingSection
from milp_ray.config.update import GuardSection, UpdateSection
from milp_ray.errors import MilpError
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.personalize import making
from milp_ray.personalize.batch import personalize, worker_pool
from milp_ray.personalize.pool import Outcome
from milp_ray.personalize.provenance import Provenance
from milp_ray.personalize.recipe import Recipe, fingerprint
from milp_ray.personalize.store import AdapterStore, StoreUnavailableError
from milp_ray.personalize.update import UpdateInterrupted, UpdateSummary, update, update_table
from milp_ray.personalize.update.worker import ABOVE_TOLERANCE
from milp_ray.personalize.worker import UserWorker
from milp_ray.rundir import RunFolder
from milp_ray.training.base import Base
from milp_ray.users.records import Example, Turn, UserSplit

LAYOUT = CanonicalLayout((False, True, False, True), rank=4)
WORKERS = PersonalizeSection(n_workers=2, cpus_per_worker=0.5)
LENIENT = UpdateSection(guard=GuardSection(tolerance=None))
IMPOSSIBLE = UpdateSection(guard=GuardSection(tolerance=-0.99))
SECRET = "my pin is 4711"

Make = Callable[..., UserSplit]


class InlinePool:
    """A pool without processes: every item by itself, in this one."""

    def __init__(self, base: Base, stop_after: int | None = None) -> None:
        self._worker = UserWorker("inline")
        self._worker._state = base
        self.stop_after = stop_after
        self.n_items = 0

    def start(self, n_workers: int) -> None:
        pass

    def map(self, function: Any, items: Iterable[Any], *, key: Any, **_: Any) -> Iterator[Outcome]:
        for item in items:
            if self.n_items == self.stop_after:
                raise KeyboardInterrupt
            self.n_items += 1
            [reply] = self._worker.run(function, [item])
            if reply.ends_all:
                raise MilpError(str(reply.reason))
            status: Any = "done" if reply.error is None else "failed"
            yield Outcome(key(item), status, reply.value, reply.error, reply.reason)


@pytest.fixture(scope="module")
def recipe(tiny_llama_dir: Path) -> Recipe:
    base = BaseSection(model=str(tiny_llama_dir), device="cpu")
    return Recipe(
        LAYOUT, base, TrainingSection(memory_epochs=1, instruction_epochs=1), PromptSection(), seed=5
    )


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


@pytest.fixture
def pool(base: Base) -> InlinePool:
    return InlinePool(base)


def make(run: RunFolder, splits: Iterable[UserSplit], recipe: Recipe, pool: Any) -> None:
    personalize(run, splits, recipe, section=WORKERS, ray=RaySection(), pool=pool)


def go(
    run: RunFolder,
    splits: Iterable[UserSplit],
    recipe: Recipe,
    pool: Any,
    section: UpdateSection = LENIENT,
) -> UpdateSummary:
    return update(run, splits, recipe, section=section, personalize=WORKERS, ray=RaySection(), pool=pool)


def lines(run: RunFolder) -> dict[str, dict[str, Any]]:
    found = [json.loads(line) for line in run.updates_file.read_text().splitlines()]
    return {line["user_id"]: line for line in found}


def counts(summary: UpdateSummary) -> dict[str, int]:
    return {outcome: n for outcome, n in summary.users.items() if n}


# --------------------------------------------------------------------------------------------- outcomes


def test_a_user_with_news_is_continued_and_others_cost_nothing(
    run: RunFolder, recipe: Recipe, pool: InlinePool, make_split: Make
) -> None:
    splits = [make_split("u-0"), make_split("u-1")]
    make(run, splits, recipe, pool)
    # No pool is given and none is opened: nobody has news.
    assert counts(go(run, splits, recipe, None)) == {"unchanged": 2}
    now = [splits[0], more(splits[1]), make_split("u-2")]
    summary = go(run, now, recipe, pool)
    assert counts(summary) == {"unchanged": 1, "updated": 1, "anew": 1}
    store = AdapterStore(run.adapters)
    manifest = store.manifest("u-1")
    assert (manifest.version, manifest.meta["continued_from"]) == (2, 1)
    assert manifest.meta["guard"]["n_examples"] > 0
    assert manifest.meta["guard"]["before"] != manifest.meta["guard"]["after"]
    assert manifest.fingerprint == fingerprint(recipe.digest(), now[1]), "evaluate takes it"
    assert counts(go(run, now, recipe, None)) == {"unchanged": 3}
    assert lines(run) == {}
    # What was held out for the guard is new to the next update.
    made_from = Provenance.from_meta(manifest.meta)
    assert made_from is not None
    assert splits[1].validation[0] in made_from.news(more(now[1], "My hat is red.")).new_examples


def test_the_guard_keeps_the_old_version_and_says_why(
    run: RunFolder, recipe: Recipe, pool: InlinePool, make_split: Make
) -> None:
    split = make_split("u-1")
    make(run, [split], recipe, pool)
    now = more(split, SECRET)
    summary = go(run, [now], recipe, pool, IMPOSSIBLE)
    assert counts(summary) == {"kept": 1}
    assert summary.reasons["kept"] == {ABOVE_TOLERANCE: 1}
    assert AdapterStore(run.adapters).versions("u-1") == [1]
    line = lines(run)["u-1"]
    assert (line["outcome"], line["reason"], line["version"]) == ("kept", ABOVE_TOLERANCE, 1)
    assert line["guard"]["tolerance"] == -0.99
    assert line["guard"]["after"] > 0.01 * line["guard"]["before"] > 0
    assert SECRET not in run.updates_file.read_text()
    # The same update is not tried again; another one is, and its success clears the line.
    tried = pool.n_items
    assert counts(go(run, [now], recipe, pool, IMPOSSIBLE)) == {"kept": 1}
    assert pool.n_items == tried
    assert counts(go(run, [now], recipe, pool)) == {"updated": 1}
    assert lines(run) == {}


@pytest.mark.parametrize("what", ["edited", "removed", "held out now", "another recipe", "no record"])
def test_who_cannot_be_continued_is_made_anew_and_it_is_said_why(
    run: RunFolder, recipe: Recipe, pool: InlinePool, make_split: Make, what: str
) -> None:
    split = make_split("u-1")
    make(run, [split], recipe, pool)
    now, new_recipe, said = more(split), recipe, "edited, removed, or are held out now"
    if what == "edited":
        now = replace(now, history=(Turn("My cat was red."), *now.history[1:]))
    elif what == "removed":
        now = replace(now, history=now.history[1:])
    elif what == "held out now":
        now = replace(now, train=now.train[1:], validation=(now.train[0],))
    elif what == "another recipe":
        new_recipe, said = replace(recipe, seed=6), "made by another recipe"
    else:
        store, said = AdapterStore(run.adapters), "does not say what it was made from"
        store.publish("u-1", store.load("u-1"), {"steps": 1}, fingerprint="earlier")
    summary = go(run, [now], new_recipe, pool, IMPOSSIBLE)
    assert counts(summary) == {"anew": 1}
    [reason] = summary.reasons["anew"]
    assert said in reason
    alone = RunFolder(run.path / "alone")
    make(alone, [now], new_recipe, pool)
    made, expected = (AdapterStore(one.adapters).load("u-1").tensors for one in (run, alone))
    assert all(bool((made[name] == expected[name]).all()) for name in expected)


def test_where_only_held_out_examples_are_new_the_weights_stay(
    run: RunFolder, recipe: Recipe, pool: InlinePool, make_split: Make
) -> None:
    split = make_split("u-1")
    make(run, [split], recipe, pool)
    now = replace(split, validation=(*split.validation, Example("Which hat?", "The red one.")))
    summary = go(run, [now], recipe, pool, UpdateSection())
    assert (counts(summary), summary.steps) == ({"updated": 1}, 0)
    store = AdapterStore(run.adapters)
    first, second = (store.load("u-1", version=version).tensors for version in (1, 2))
    assert all(bool((first[name] == second[name]).all()) for name in first)
    assert counts(go(run, [now], recipe, None)) == {"unchanged": 1}


def test_a_user_that_fails_is_listed_without_text_and_tried_again(
    run: RunFolder, recipe: Recipe, pool: InlinePool, make_split: Make
) -> None:
    nothing = make_split("nothing", n_turns=0, n_train=0)
    broken = replace(make_split("broken"), history=(Turn(SECRET),))
    make(run, [make_split("broken")], recipe, pool)
    path = AdapterStore(run.adapters).folder("broken") / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    summary = go(run, [nothing, broken, make_split("u-1"), make_split("u-1")], recipe, pool)
    assert counts(summary) == {"failed": 2, "anew": 2}
    assert summary.reasons["anew"]["the stored version is damaged"] == 1
    assert lines(run)["nothing"]["outcome"] == "failed"
    assert SECRET not in run.updates_file.read_text()
    mended = make_split("nothing")
    assert counts(go(run, [mended], recipe, pool)) == {"anew": 1}
    assert lines(run) == {}


def test_a_version_that_has_expired_is_made_anew_also_where_its_update_was_refused(
    run: RunFolder, recipe: Recipe, pool: InlinePool, make_split: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = [make_split("u-0"), make_split("u-1")]
    make(run, splits, recipe, pool)
    now = [splits[0], more(splits[1])]
    assert counts(go(run, now, recipe, pool, IMPOSSIBLE)) == {"unchanged": 1, "kept": 1}
    with monkeypatch.context() as patch:
        patch.setattr(AdapterStore, "is_expired", lambda store, manifest: manifest.version == 1)
        summary = go(run, now, recipe, pool, IMPOSSIBLE)
    assert summary.reasons == {"anew": {"the stored version has expired": 2}}
    assert lines(run) == {}
    assert counts(go(run, now, recipe, None, IMPOSSIBLE)) == {"unchanged": 2}


@pytest.mark.parametrize("call", ["has", "load", "publish"])
def test_a_store_that_fails_in_a_worker_ends_the_update_and_is_no_users_failure(
    run: RunFolder,
    recipe: Recipe,
    pool: InlinePool,
    make_split: Make,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
) -> None:
    splits = [make_split(f"u-{i}") for i in range(3)]
    make(run, splits, recipe, pool)
    now, before = [more(split) for split in splits], pool.n_items
    monkeypatch.setattr(making, "_SECONDS_BETWEEN_TRIES", ())

    def away(*_: Any, **__: Any) -> Any:
        raise StoreUnavailableError("the bucket is away")

    with monkeypatch.context() as patch:
        patch.setattr(AdapterStore, call, away)
        with pytest.raises(MilpError, match="the bucket is away"):
            go(run, now, recipe, pool)
    assert pool.n_items == before + 1, "the others are not trained for nothing"
    assert lines(run) == {}
    assert counts(go(run, now, recipe, pool)) == {"updated": 3}


def test_the_table_has_a_row_an_outcome_and_reason_and_the_counts_are_json() -> None:
    from io import StringIO

    from rich.console import Console

    summary, out = UpdateSummary(), StringIO()
    summary.count("updated", None, {"steps": 2, "tokens": 10, "seconds": 0.5})
    summary.count("kept", ABOVE_TOLERANCE)
    Console(file=out, width=120).print(update_table(summary))
    assert ABOVE_TOLERANCE in out.getvalue()
    found = json.loads(json.dumps(summary.to_dict()))
    assert (found["n_users"], found["updated"], found["kept"], found["failed"]) == (2, 1, 1, 0)


# ------------------------------------------------------------------------------ killed and interrupted


def test_an_interrupted_update_goes_on_where_it_was(
    run: RunFolder, recipe: Recipe, base: Base, make_split: Make
) -> None:
    splits = [make_split(f"u-{i}") for i in range(4)]
    make(run, splits, recipe, InlinePool(base))
    now = [more(split) for split in splits]
    with pytest.raises(UpdateInterrupted, match="2 adapters updated") as caught:
        go(run, now, recipe, InlinePool(base, stop_after=2))
    assert caught.value.summary.interrupted
    assert counts(go(run, now, recipe, InlinePool(base))) == {"unchanged": 2, "updated": 2}
    store = AdapterStore(run.adapters)
    assert [store.versions(split.user_id) for split in now] == [[1, 2]] * 4


def test_half_a_line_of_a_killed_update_is_no_obstacle(
    run: RunFolder, recipe: Recipe, pool: InlinePool, make_split: Make
) -> None:
    split = make_split("u-1")
    make(run, [split], recipe, pool)
    go(run, [more(split)], recipe, pool, IMPOSSIBLE)
    whole = run.updates_file.read_text()
    run.updates_file.write_text(whole + '{"user_id": "u-2", "outc')
    assert counts(go(run, [more(split)], recipe, None, IMPOSSIBLE)) == {"kept": 1}
    assert run.updates_file.read_text() == whole


class Dying:
    """A pool whose worker is killed once before and once after it has done its work."""

    def __init__(self, pool: Any, folder: Path) -> None:
        self._pool, self._folder = pool, folder

    def start(self, n_workers: int) -> None:
        self._pool.start(n_workers)

    def map(self, function: Any, items: Any, **options: Any) -> Iterator[Outcome]:
        folder = self._folder

        def once(name: str) -> None:
            if not (folder / name).exists():
                (folder / name).touch()
                os.kill(os.getpid(), signal.SIGKILL)

        def run_and_die(base: Any, tasks: Any, report: Any) -> None:
            once("before")
            function(base, tasks, report)
            once("after")

        yield from self._pool.map(run_and_die, items, **options)


@pytest.mark.slow
@pytest.mark.ray
def test_users_of_killed_workers_are_updated_exactly_once(
    run: RunFolder, recipe: Recipe, ray_local: None, make_split: Make, tmp_path: Path
) -> None:
    splits = [make_split(f"u-{i}") for i in range(3)]
    one = WORKERS.model_copy(update={"n_workers": 1})
    with worker_pool(recipe.base, one, RaySection()) as pool:
        make(run, splits, recipe, pool)
        now = [more(split) for split in splits]
        summary = go(run, now, recipe, Dying(pool, tmp_path))
    assert counts(summary) == {"updated": 3}
    assert summary.retried == 3
    store = AdapterStore(run.adapters)
    assert [store.versions(split.user_id) for split in now] == [[1, 2]] * 3
