"""From users' answers to judgements: every query once, failures stay with their user, no text is kept."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.inline import InlinePool, damage
from support.judgements import PAIR

from milp_ray.config.evaluation import EvaluationSection
from milp_ray.config.methods import MethodsSection
from milp_ray.errors import MilpError
from milp_ray.evaluation.answers import answer_users
from milp_ray.evaluation.judgements import read_judgements
from milp_ray.evaluation.judges.embedded import PersonaJudge, ReferenceJudge
from milp_ray.evaluation.judging import judge_users, some_users
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.personalize.pool import Outcome
from milp_ray.personalize.recipe import Recipe
from milp_ray.personalize.store import AdapterStore
from milp_ray.users.records import UserSplit

SECTION = EvaluationSection(max_new_tokens=4, n_bootstrap=50)


class StoppedPool(InlinePool):
    """Is interrupted after its first item."""

    def map(self, function: Any, items: Any, **options: Any) -> Iterator[Outcome]:
        yield from super().map(function, list(items)[:1], **options)
        raise KeyboardInterrupt


def judged(
    file: Path, recipe: Recipe, store: AdapterStore, pool: Any, splits: Sequence[UserSplit], **options: Any
) -> Any:
    judge = options.pop("judge", ReferenceJudge())
    methods = options.pop("methods", PAIR)
    return judge_users(
        file,
        splits,
        recipe,
        SECTION,
        judge,
        methods=methods,
        settings=MethodsSection(),
        pool=pool,
        store=store,
        **options,
    )


def test_every_query_is_judged_and_no_text_is_kept(
    tmp_path: Path, recipe: Recipe, base: Any, store: AdapterStore, splits: list[UserSplit]
) -> None:
    file = tmp_path / "judgements.parquet"
    found = judged(file, recipe, store, InlinePool(base), splits, with_sheet=True)
    assert found.user_ids == {split.user_id for split in splits}
    assert (found.n_failed, len(found.sheet)) == (0, 6)
    rows = read_judgements(file).to_pylist()
    assert {(r["user_id"], r["example"]) for r in rows} == {(s.user_id, i) for s in splits for i in range(2)}
    scores = ReferenceJudge().prefer([line.question for line in found.sheet])
    assert [r["score"] for r in rows] == pytest.approx(scores)
    texts = [line.question.query for line in found.sheet] + [line.question.reference for line in found.sheet]
    assert not any(text.encode() in file.read_bytes() for text in texts)


def test_the_answers_are_those_that_evaluation_scores(
    recipe: Recipe, base: Any, store: AdapterStore, splits: list[UserSplit]
) -> None:
    from milp_ray.evaluation.scores import score_rows
    from milp_ray.evaluation.user import Subject, evaluate_users

    found: dict[int, Any] = {}
    answer_users(store, recipe, SECTION, MethodsSection(), PAIR, base, splits, found.__setitem__)
    subjects = [Subject(s, store.load(s.user_id), 0) for s in splits]
    expected = evaluate_users(base, subjects, PAIR, recipe.layout, recipe.training, recipe.prompt, SECTION)
    for place, split in enumerate(splits):
        answers = found[place]
        own = [
            row
            for method in PAIR
            for row in score_rows(
                split.user_id,
                method,
                split.test,
                answers.by_method[method],
                [(0.0, 1)] * 2,
                persona=answers.persona,
                history_fits=True,
            )
        ]
        assert [(r["rouge_l"], r["persona_f1"]) for r in own] == [
            (r["rouge_l"], r["persona_f1"]) for r in expected[place]
        ]


def test_reasons_are_counted_without_saying_whom_they_are_about(
    tmp_path: Path,
    recipe: Recipe,
    base: Any,
    store: AdapterStore,
    splits: list[UserSplit],
    make_split: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    damage(monkeypatch, "ann-1", "bob-2")
    others = [make_split(name, n_turns=2, n_train=1, n_val=0, n_test=1) for name in ("ann-1", "bob-2")]
    found = judged(tmp_path / "judgements.parquet", recipe, store, InlinePool(base), [*others, splits[0]])
    assert found.failed_reasons == {"the adapter of user …, version … is damaged": 2}
    assert found.n_failed == 2


def test_a_user_without_an_adapter_fails_and_the_others_are_judged(
    tmp_path: Path, recipe: Recipe, base: Any, store: AdapterStore, splits: list[UserSplit], make_split: Any
) -> None:
    file = tmp_path / "judgements.parquet"
    stranger = make_split("stranger", n_turns=2, n_train=1, n_val=0, n_test=1)
    found = judged(file, recipe, store, InlinePool(base), [stranger, splits[0]])
    assert (found.user_ids, found.n_failed) == ({splits[0].user_id}, 1)
    assert ["personalize" in reason for reason in found.failed_reasons] == [True]
    with pytest.raises(MilpError, match="1 users failed"):
        judged(file, recipe, store, InlinePool(base), [stranger])


def test_the_empty_layout_answers_as_the_base_does(
    tmp_path: Path, recipe: Recipe, base: Any, splits: list[UserSplit]
) -> None:
    file = tmp_path / "judgements.parquet"
    empty = replace(recipe, layout=CanonicalLayout((False,) * 4, 0))
    nothing = AdapterStore(tmp_path / "adapters")
    judged(file, empty, nothing, InlinePool(base), splits, methods=("milp", "base"))
    assert set(read_judgements(file)["choice"].to_pylist()) == {0}


def test_what_was_judged_before_an_interruption_is_kept(
    tmp_path: Path, recipe: Recipe, base: Any, store: AdapterStore, splits: list[UserSplit]
) -> None:
    file = tmp_path / "judgements.parquet"
    with pytest.raises(KeyboardInterrupt):
        judged(file, recipe, store, StoppedPool(base), splits)
    assert set(read_judgements(file)["user_id"].to_pylist()) == {"u-0"}


def test_who_is_not_judged_again_with_everybody_is_dropped_and_beside_a_sample_kept(
    tmp_path: Path, recipe: Recipe, base: Any, store: AdapterStore, splits: list[UserSplit]
) -> None:
    file = tmp_path / "judgements.parquet"
    judged(file, recipe, store, InlinePool(base), splits)
    judged(file, recipe, store, InlinePool(base), splits[:1], is_everybody=False)
    assert len(set(read_judgements(file)["user_id"].to_pylist())) == 3
    with pytest.raises(KeyboardInterrupt):
        judged(file, recipe, store, StoppedPool(base), splits[:2])
    assert len(set(read_judgements(file)["user_id"].to_pylist())) == 3
    judged(file, recipe, store, InlinePool(base), splits[:2])
    assert set(read_judgements(file)["user_id"].to_pylist()) == {s.user_id for s in splits[:2]}


def test_a_method_that_does_not_apply_is_counted(
    tmp_path: Path, recipe: Recipe, base: Any, store: AdapterStore, splits: list[UserSplit]
) -> None:
    bare = [replace(splits[0], profile=None), splits[1], replace(splits[2], test=())]
    methods = ("base", "oracle_profile")
    file = tmp_path / "judgements.parquet"
    found = judged(file, recipe, store, InlinePool(base), bare, methods=methods, judge=PersonaJudge())
    assert (found.user_ids, found.n_inapplicable) == ({splits[1].user_id}, 1)
    with pytest.raises(MilpError, match="no test examples"):
        judged(file, recipe, store, InlinePool(base), bare[2:])


def test_a_sample_of_users_is_seeded_and_keeps_their_order(splits: list[UserSplit]) -> None:
    two = some_users(splits, 2, seed=1)
    assert two == some_users(splits, 2, seed=1)
    assert [s for s in splits if s in two] == two
    assert some_users(splits, None, 0) == some_users(splits, 9, 0) == splits


def test_the_work_reaches_workers(recipe: Recipe, store: AdapterStore) -> None:
    work = partial(answer_users, store, recipe, SECTION, MethodsSection(), PAIR)
    assert pickle.loads(pickle.dumps(work)).func is answer_users
