"""The stage: every user is scored once, failures stay with their user, and a rerun does only what changed."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from milp_ray.config.base import BaseSection
from milp_ray.config.evaluation import EvaluationSection
from milp_ray.config.methods import MethodsSection, RetrievalSection
from milp_ray.config.prompt import PromptSection
from milp_ray.config.training import TrainingSection
from milp_ray.errors import MilpError
from milp_ray.evaluation import stage
from milp_ray.evaluation.scores import read_scores
from milp_ray.evaluation.stage import FAILED_FILE, PARTS_FOLDER, evaluate
from milp_ray.evaluation.user import Subject, evaluate_users
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.personalize.pool import Outcome
from milp_ray.personalize.recipe import Recipe, fingerprint
from milp_ray.personalize.store import AdapterStore
from milp_ray.personalize.update.journal import KEPT, Journal
from milp_ray.personalize.worker import UserWorker
from milp_ray.rundir import RunFolder
from milp_ray.users.records import Turn, UserSplit

TRAINING = TrainingSection(memory_epochs=1, instruction_epochs=1, learning_rate=1e-2)
FAST = EvaluationSection(methods=("base", "text_prompt", "milp"), max_new_tokens=4, n_bootstrap=50)
LAYOUT = CanonicalLayout((False, True, False, True), 2)


@dataclass
class InlinePool:
    """The pool's contract in this process; ``scored`` are the users that reached a worker."""

    base: Any
    broken: set[str] = field(default_factory=set)
    stop_after: int | None = None
    scored: list[str] = field(default_factory=list)

    def map(
        self, function: Callable[..., Any], items: Iterable[Any], *, key: Any, size: Any, at_once: int
    ) -> Iterator[Outcome]:
        pickle.dumps(function)  # workers are other processes
        for item in items:
            assert size(item) > 0
            if self.stop_after is not None and len(self.scored) == self.stop_after:
                raise KeyboardInterrupt
            self.scored.append(key(item))
            [reply] = self._worker().run(self._broken_for(key(item), function), [item])
            status: Any = "done" if reply.error is None else "failed"
            yield Outcome(key(item), status, reply.value, error=reply.error, reason=reply.reason)

    def _worker(self) -> UserWorker:
        worker = UserWorker("inline")
        worker._state = self.base
        return worker

    def _broken_for(self, user: str, function: Any) -> Any:
        def choke(state: Any, items: Any, report: Any) -> None:
            raise ValueError("quotes a secret of the user")

        return choke if user in self.broken else function


@pytest.fixture
def recipe(tiny_llama_dir: Path) -> Recipe:
    return Recipe(
        LAYOUT, BaseSection(model=str(tiny_llama_dir), device="cpu"), TRAINING, PromptSection(), seed=0
    )


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "a=b")  # a name that Arrow would take for a partition of a data set


@pytest.fixture
def stored(run: RunFolder, recipe: Recipe, base: Any, splits: list[UserSplit]) -> AdapterStore:
    """A store with the adapter of every user."""
    from milp_ray.training.job import Job
    from milp_ray.training.train import train

    store = AdapterStore(run.adapters)
    for split in splits:
        job = Job("job", split, LAYOUT, frozenset({"memory"}), recipe.seed_of(split.user_id))
        [result] = train(base, [job], TRAINING, PromptSection())
        assert result.adapter is not None
        store.publish(split.user_id, result.adapter, {}, fingerprint=fingerprint(recipe.digest(), split))
    return store


def scored_users(run: RunFolder) -> set[str]:
    return set(read_scores(run.scores_file)["user_id"].to_pylist())


def test_every_user_method_and_example_gets_a_row_and_no_row_holds_a_text(
    run: RunFolder, recipe: Recipe, base: Any, splits: list[UserSplit], stored: AdapterStore
) -> None:
    found = evaluate(run, splits, recipe, FAST, pool=InlinePool(base), store=stored)
    rows = read_scores(run.scores_file).to_pylist()
    assert {(r["user_id"], r["method"], r["example"]) for r in rows} == {
        (split.user_id, method, i) for split in splits for method in FAST.methods for i in range(2)
    }
    assert {r["attribute"] for r in rows} <= {e.tags["attribute"] for split in splits for e in split.test}
    texts = [t for s in splits for e in s.test for t in (e.query, e.response)]
    assert not any(text in str(value) for row in rows for value in row.values() for text in texts)
    assert (found["n_users"], found["n_failed"], found["n_reused"]) == (3, 0, 0)
    assert found["scores"]["milp"]["all"]["loss"]["n_examples"] == 6
    assert not (run.path / FAILED_FILE).exists()
    assert not (run.path / PARTS_FOLDER).exists()
    json.dumps(found)


def test_scoring_a_user_is_a_pure_function(base: Any, splits: list[UserSplit]) -> None:
    def score() -> list[dict[str, Any]]:
        methods = ("base", "memory_only")
        subjects = [Subject(splits[0], None, seed=1)]
        return evaluate_users(base, subjects, methods, LAYOUT, TRAINING, PromptSection(), FAST)[0]

    assert score() == score()


def test_users_scored_together_get_the_rows_that_each_gets_alone(base: Any, splits: list[UserSplit]) -> None:
    def score(*places: int) -> list[list[dict[str, Any]]]:
        methods = ("base", "text_prompt", "memory_only", "milp")
        subjects = [Subject(splits[place], None, seed=place) for place in places]
        return evaluate_users(base, subjects, methods, LAYOUT, TRAINING, PromptSection(), FAST)

    together, alone = score(0, 1, 2), [score(place)[0] for place in range(3)]
    for some, own in zip(together, alone, strict=True):
        for a, b in zip(some, own, strict=True):
            assert {**a, "loss": 0} == {**b, "loss": 0}
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)


def test_a_method_that_does_not_apply_gives_no_rows(base: Any, splits: list[UserSplit]) -> None:
    split = replace(splits[0], profile=None)
    subjects = [Subject(split, None, seed=1), Subject(splits[1], None, seed=1)]
    methods = ("base", "oracle_profile")
    rows, others = evaluate_users(base, subjects, methods, LAYOUT, TRAINING, PromptSection(), FAST)
    assert {row["method"] for row in others} == set(methods)
    assert {row["method"] for row in rows} == {"base"}


def test_a_rerun_scores_nothing_again_and_gives_the_same(
    run: RunFolder, recipe: Recipe, base: Any, splits: list[UserSplit], stored: AdapterStore
) -> None:
    first = evaluate(run, splits, recipe, FAST, pool=InlinePool(base), store=stored)
    pool = InlinePool(base)
    second = evaluate(run, splits, recipe, FAST, pool=pool, store=stored)
    assert pool.scored == []
    assert second == {**first, "n_reused": 3}


def test_what_decides_a_users_scores_decides_who_is_scored_again(
    run: RunFolder, recipe: Recipe, base: Any, splits: list[UserSplit]
) -> None:
    section = FAST.model_copy(update={"methods": ("base",)})
    evaluate(run, splits, recipe, section, pool=InlinePool(base))

    def again(changed: list[UserSplit], recipe: Recipe, section: EvaluationSection) -> list[str]:
        pool = InlinePool(base)
        evaluate(run, changed, recipe, section, pool=pool)
        return pool.scored

    other = replace(splits[1], test=splits[1].test[:1])
    assert again([splits[0], other, splits[2]], recipe, section) == ["u-1"]
    assert read_scores(run.scores_file).num_rows == 5
    assert again(splits, recipe, section.model_copy(update={"n_bootstrap": 60})) == ["u-1"]
    assert again(splits, recipe, section.model_copy(update={"max_new_tokens": 3})) == ["u-0", "u-1", "u-2"]
    assert again(splits[:2], recipe, section.model_copy(update={"max_new_tokens": 3})) == []
    assert scored_users(run) == {"u-0", "u-1"}


def test_a_user_that_fails_is_recorded_without_its_text_and_the_others_go_on(
    run: RunFolder, recipe: Recipe, base: Any, splits: list[UserSplit], stored: AdapterStore
) -> None:
    pool = InlinePool(base, broken={"u-1"})
    found = evaluate(run, splits, recipe, FAST, pool=pool, store=stored)
    assert (found["n_users"], found["n_failed"]) == (2, 1)
    [line] = (run.path / FAILED_FILE).read_text().splitlines()
    assert json.loads(line)["user_id"] == "u-1"
    assert "secret" not in line
    # The next call tries the failed user alone, and forgets the failure.
    pool = InlinePool(base)
    assert evaluate(run, splits, recipe, FAST, pool=pool, store=stored)["n_users"] == 3
    assert pool.scored == ["u-1"]
    assert not (run.path / FAILED_FILE).exists()


def test_an_interrupted_stage_goes_on_where_it_stood(
    run: RunFolder, recipe: Recipe, base: Any, splits: list[UserSplit], stored: AdapterStore
) -> None:
    with pytest.raises(KeyboardInterrupt):
        evaluate(run, splits, recipe, FAST, pool=InlinePool(base, stop_after=2), store=stored)
    pool = InlinePool(base)
    found = evaluate(run, splits, recipe, FAST, pool=pool, store=stored)
    assert pool.scored == ["u-2"]
    assert (found["n_users"], found["n_reused"]) == (3, 2)


def test_a_stage_killed_between_parts_keeps_the_parts(
    run: RunFolder, recipe: Recipe, base: Any, splits: list[UserSplit], monkeypatch: pytest.MonkeyPatch
) -> None:
    section = FAST.model_copy(update={"methods": ("base",)})
    monkeypatch.setattr(stage, "_PART_USERS", 1)
    monkeypatch.setattr(stage._Ledger, "merge", lambda self: (_ for _ in ()).throw(SystemExit))
    with pytest.raises(SystemExit):
        evaluate(run, splits, recipe, section, pool=InlinePool(base))
    assert len(list((run.path / PARTS_FOLDER).glob("*.parquet"))) == 3
    monkeypatch.undo()
    pool = InlinePool(base)
    evaluate(run, splits, recipe, section, pool=pool)
    assert pool.scored == []
    assert read_scores(run.scores_file).num_rows == 6


def test_an_adapter_made_under_another_recipe_is_not_scored_as_this_ones(
    run: RunFolder, recipe: Recipe, base: Any, splits: list[UserSplit], stored: AdapterStore
) -> None:
    other = replace(recipe, layout=CanonicalLayout((True, False, False, False), 2))
    with pytest.raises(MilpError, match="personalize"):
        evaluate(run, splits, other, FAST, pool=InlinePool(base), store=stored)


def test_a_user_without_an_adapter_fails_with_the_advice_to_personalize(
    run: RunFolder, recipe: Recipe, base: Any, splits: list[UserSplit], stored: AdapterStore
) -> None:
    stored.delete("u-0")
    found = evaluate(run, splits, recipe, FAST, pool=InlinePool(base), store=stored)
    assert found["n_failed"] == 1
    [reason] = found["failed_reasons"]
    assert "personalize" in reason
    assert "u-0" not in reason  # so that the same failure of many users is one reason


def test_users_without_test_examples_are_counted_and_nobody_with_any_is_an_error(
    run: RunFolder, recipe: Recipe, base: Any, splits: list[UserSplit]
) -> None:
    bare = [replace(split, test=()) for split in splits]
    section = FAST.model_copy(update={"methods": ("base",)})
    found = evaluate(run, [*bare[:2], splits[2]], recipe, section, pool=InlinePool(base))
    assert (found["n_users"], found["n_without_test"]) == (1, 2)
    with pytest.raises(MilpError, match="test examples"):
        evaluate(run, bare, recipe, section, pool=InlinePool(base))


def test_methods_that_apply_to_nobody_are_named(
    run: RunFolder, recipe: Recipe, base: Any, splits: list[UserSplit]
) -> None:
    section = FAST.model_copy(update={"methods": ("oracle_profile",)})
    without = [replace(split, profile=None) for split in splits]
    with pytest.raises(MilpError, match="oracle_profile apply to none of 3 users"):
        evaluate(run, without, recipe, section, pool=InlinePool(base))


def test_what_the_methods_have_to_set_reaches_them_and_decides_who_is_scored_again(
    run: RunFolder, recipe: Recipe, base: Any, splits: list[UserSplit], monkeypatch: pytest.MonkeyPatch
) -> None:
    from milp_ray.evaluation import user

    asked: list[int] = []
    real = user.fit_users

    def fit_users(name: str, requests: Any, shared: Any) -> Any:
        asked.extend(request.methods.retrieval.k for request in requests)
        return real(name, requests, shared)

    monkeypatch.setattr(user, "fit_users", fit_users)
    section = FAST.model_copy(update={"methods": ("retrieval_bm25",)})
    one = MethodsSection(retrieval=RetrievalSection(k=1))
    for settings in (None, None, one, one):
        evaluate(run, splits, recipe, section, pool=InlinePool(base), settings=settings)
    assert asked == [RetrievalSection().k] * 3 + [1] * 3


def test_the_stages_function_reaches_workers(recipe: Recipe) -> None:
    work = partial(stage._score, None, recipe, FAST, MethodsSection())
    assert pickle.loads(pickle.dumps(work)).func is stage._score


# ------------------------------------------------------------------------------ data newer than the adapter


def refuse(run: RunFolder, recipe: Recipe, split: UserSplit, version: int) -> None:
    """Note what an update notes that the guard has refused."""
    with Journal(run.updates_file) as journal:
        made_from = fingerprint(recipe.digest(), split)
        journal.add(split.user_id, KEPT, "worse", version=version, fingerprint=made_from, decision="d")


def test_who_keeps_an_older_version_after_a_refused_update_is_scored_with_it_and_counted(
    run: RunFolder, recipe: Recipe, base: Any, splits: list[UserSplit], stored: AdapterStore
) -> None:
    newer = replace(splits[0], history=(*splits[0].history, Turn("My hat is new.")))
    now = [newer, *splits[1:]]
    found = evaluate(run, now, recipe, FAST, pool=InlinePool(base), store=stored)
    assert (found["n_failed"], found["n_kept_versions"]) == (1, 0)

    refuse(run, recipe, newer, version=1)
    pool = InlinePool(base)
    found = evaluate(run, now, recipe, FAST, pool=pool, store=stored)
    assert pool.scored == ["u-0"]
    assert (found["n_users"], found["n_failed"], found["n_kept_versions"]) == (3, 0, 1)
    again = evaluate(run, now, recipe, FAST, pool=InlinePool(base), store=stored)
    assert (again["n_reused"], again["n_kept_versions"]) == (3, 1)

    # A version that was made since takes the place of the refusal, though its line is still there.
    stored.publish("u-0", stored.load("u-0"), {}, fingerprint=fingerprint(recipe.digest(), newer))
    pool = InlinePool(base)
    found = evaluate(run, now, recipe, FAST, pool=pool, store=stored)
    assert pool.scored == ["u-0"]
    assert (found["n_failed"], found["n_kept_versions"]) == (0, 0)


def test_a_refused_update_excuses_no_other_data_and_no_other_recipe(
    run: RunFolder, recipe: Recipe, base: Any, splits: list[UserSplit], stored: AdapterStore
) -> None:
    newer = replace(splits[0], history=(*splits[0].history, Turn("My hat is new.")))
    newest = replace(newer, history=(*newer.history, Turn("My hat is old.")))
    refuse(run, recipe, newer, version=1)
    other = replace(recipe, seed=7)
    for data, how in ((newest, recipe), (newer, other)):
        with pytest.raises(MilpError, match="another layout, recipe or data"):
            evaluate(run, [data], how, FAST, pool=InlinePool(base), store=stored)
