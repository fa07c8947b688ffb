"""Users of different layouts, decided by a portfolio, through the batch, answers, scores and updates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from milp_ray.config.base import BaseSection
from milp_ray.config.cluster import RaySection
from milp_ray.config.evaluation import EvaluationSection
from milp_ray.config.personalize import PersonalizeSection
from milp_ray.config.prompt import PromptSection
from milp_ray.config.training import TrainingSection
from milp_ray.config.update import GuardSection, UpdateSection
from milp_ray.evaluation.scores import read_scores
from milp_ray.evaluation.stage import evaluate
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.personalize.batch import BatchSummary, personalize
from milp_ray.personalize.layouts.portfolio import Portfolio
from milp_ray.personalize.layouts.race import CHOICE
from milp_ray.personalize.layouts.rule import NOT_SURE, SIMILAR_USERS, Candidate, LayoutRule
from milp_ray.personalize.pool import Outcome
from milp_ray.personalize.recipe import Maker, Recipe
from milp_ray.personalize.store import AdapterStore
from milp_ray.personalize.update import update
from milp_ray.personalize.worker import UserWorker
from milp_ray.report.layouts_text import layout_sentences
from milp_ray.rundir import RunFolder
from milp_ray.training.base import Base, load_base
from milp_ray.training.generation import Questions, generate
from milp_ray.training.job import Job
from milp_ray.training.train import train
from milp_ray.users.records import Turn, UserSplit
from milp_ray.users.traits import user_traits

Make = Callable[..., UserSplit]
WORKERS = PersonalizeSection(n_workers=1)
CHOSEN = Candidate(CanonicalLayout((False, True, False, True), 2), 100)
SHORT = Candidate(CanonicalLayout((False, False, False, True), 2), 50)
LONG = Candidate(CanonicalLayout((True, True, True, True), 4), 400)
TURNS = {"short": 3, "between": 14, "long": 60}
WANTED = {"short": SHORT, "between": CHOSEN, "long": LONG}


@dataclass
class InlinePool:
    """The pool's contract in this process, all items at once."""

    base: Base
    stop_after: int | None = None

    def start(self, n_workers: int) -> None:
        """Nothing to start."""

    def map(
        self, function: Any, items: Iterable[Any], *, key: Any, size: Any, at_once: int
    ) -> Iterator[Outcome]:
        worker = UserWorker("inline")
        worker._state = self.base
        given = list(items)[: self.stop_after]
        for item, reply in zip(given, worker.run(function, given), strict=True):
            status: Any = "done" if reply.error is None else "failed"
            yield Outcome(key(item), status, reply.value, reply.error, reply.reason)
        if self.stop_after is not None:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def base(tiny_llama_dir: Path) -> Base:
    return load_base(BaseSection(model=str(tiny_llama_dir), device="cpu"))


@pytest.fixture
def splits(make_split: Make) -> list[UserSplit]:
    return [make_split(name, n_turns=n) for name, n in TURNS.items()]


@pytest.fixture
def rule(make_split: Make) -> LayoutRule:
    """Of six probe users three are short and did better with SHORT, three are long and did so with LONG."""
    probes = [make_split(f"{kind}-{i}", n_turns=TURNS[kind]) for kind in ("short", "long") for i in range(3)]
    traits = [user_traits(split) for split in probes]
    gains = np.array([[-0.2, 0.2]] * 3 + [[0.2, -0.2]] * 3)
    chosen = np.full(6, 2.0)
    portfolio = Portfolio.of(traits, chosen[:, None] * (1 + gains), chosen)
    return LayoutRule("portfolio", CHOSEN, (SHORT, LONG), portfolio=portfolio)


@pytest.fixture
def recipe(tiny_llama_dir: Path, rule: LayoutRule) -> Recipe:
    section = BaseSection(model=str(tiny_llama_dir), device="cpu")
    training = TrainingSection(memory_epochs=1, instruction_epochs=1, learning_rate=1e-2)
    return Recipe(CHOSEN.layout, section, training, PromptSection(), seed=5, rule=rule)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def make(run: RunFolder, splits: list[UserSplit], recipe: Recipe, pool: Any) -> BatchSummary:
    return personalize(run, splits, recipe, section=WORKERS, ray=RaySection(), pool=pool)


def layouts(run: RunFolder) -> dict[str, CanonicalLayout]:
    store = AdapterStore(run.adapters)
    return {user: store.manifest(user).layout for user in store.users()}


def test_each_user_gets_the_layout_of_similar_users_with_the_weights_it_has_for_all(
    run: RunFolder, splits: list[UserSplit], recipe: Recipe, base: Base
) -> None:
    summary = make(run, splits, recipe, InlinePool(base))
    assert layouts(run) == {name: wanted.layout for name, wanted in WANTED.items()}
    store = AdapterStore(run.adapters)
    reasons = {name: store.manifest(name).meta[CHOICE]["reason"] for name in TURNS}
    assert reasons == {"short": SIMILAR_USERS, "between": NOT_SURE, "long": SIMILAR_USERS}
    for split in splits:
        layout = WANTED[split.user_id].layout
        job = Job("alone", split, layout, recipe.parts(split), recipe.seed_of(split.user_id))
        [alone] = train(base, [job], recipe.training, recipe.prompt)
        assert alone.adapter is not None
        for name, tensor in store.load(split.user_id).tensors.items():
            torch.testing.assert_close(tensor, alone.adapter.tensors[name], rtol=1e-5, atol=1e-6)
    found = summary.layouts.to_dict()
    assert found is not None
    assert found["taken"] == {wanted.layout.key: 1 for wanted in WANTED.values()}
    assert (found["steps_ratio"], found["n_other"]) == (1.0, 2)
    assert found["parameters_ratio"] == pytest.approx(550 / 300)
    assert any("predicted" in sentence for sentence in layout_sentences(found))


def test_an_interrupted_batch_goes_on_to_the_same_result_and_another_mode_makes_only_what_differs(
    tmp_path: Path, splits: list[UserSplit], recipe: Recipe, base: Base
) -> None:
    whole, parted = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "parted")
    make(whole, splits, recipe, InlinePool(base))
    with pytest.raises(KeyboardInterrupt):
        make(parted, splits, recipe, InlinePool(base, stop_after=1))
    summary = make(parted, splits, recipe, InlinePool(base))
    assert (summary.done, summary.skipped) == (2, 1)
    assert summary.layouts.n_users == 3, "users who were finished before are counted"
    assert layouts(parted) == layouts(whole)
    one_for_all = make(whole, splits, replace(recipe, rule=None), InlinePool(base))
    assert (one_for_all.done, one_for_all.skipped) == (2, 1)
    assert set(layouts(whole).values()) == {CHOSEN.layout}


def test_scores_and_answers_are_of_each_users_own_layout(
    run: RunFolder, splits: list[UserSplit], recipe: Recipe, base: Base
) -> None:
    make(run, splits, recipe, InlinePool(base))
    store = AdapterStore(run.adapters)
    section = EvaluationSection(methods=("base", "milp"), max_new_tokens=4, n_bootstrap=50)
    found = evaluate(run, splits, recipe, section, pool=InlinePool(base), store=store)
    assert (found["n_users"], found["n_failed"]) == (3, 0)
    assert len(read_scores(run.scores_file)) == 3 * 2 * 2
    asked = [Questions(["What is the colour of my dog?"], store.load(name)) for name in TURNS]
    together = generate(base, asked, max_new_tokens=4, batch_size=8)
    assert together == [
        answer for one in asked for answer in generate(base, [one], max_new_tokens=4, batch_size=8)
    ]


def test_an_update_continues_each_users_own_layout(
    run: RunFolder, splits: list[UserSplit], recipe: Recipe, base: Base
) -> None:
    make(run, splits, recipe, InlinePool(base))
    grown = [replace(split, history=(*split.history, Turn("Now my dog is green."))) for split in splits]
    assert [Maker(recipe).of(split).decision.layouts for split in grown] == [
        (wanted.layout,) for wanted in WANTED.values()
    ]
    section = UpdateSection(guard=GuardSection(tolerance=None))
    pool: Any = InlinePool(base)
    summary = update(run, grown, recipe, section=section, personalize=WORKERS, ray=RaySection(), pool=pool)
    assert summary.users["updated"] == 3
    store = AdapterStore(run.adapters)
    for name, wanted in WANTED.items():
        manifest = store.manifest(name)
        assert (manifest.version, manifest.layout) == (2, wanted.layout)
        assert manifest.meta[CHOICE]["layout"] == wanted.layout.key
    assert make(run, grown, recipe, InlinePool(base)).skipped == 3
