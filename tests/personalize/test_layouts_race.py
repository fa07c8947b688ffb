"""A race: the winner is what it would be alone, the others stop early, and one of them is published."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from milp_ray.config.base import BaseSection
from milp_ray.config.prompt import PromptSection
from milp_ray.config.training import TrainingSection
from milp_ray.errors import MilpError
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.personalize.intake import Item
from milp_ray.personalize.layouts import race
from milp_ray.personalize.layouts.race import CHOICE, Entrant, train_decided
from milp_ray.personalize.layouts.rule import NO_VALIDATION, Candidate, LayoutRule
from milp_ray.personalize.layouts.tally import LayoutTally
from milp_ray.personalize.making import make_adapters
from milp_ray.personalize.recipe import Maker, Recipe
from milp_ray.personalize.store import AdapterStore
from milp_ray.report.layouts_text import layout_rows, layout_sentences
from milp_ray.training.base import Base, load_base
from milp_ray.training.job import JobResult
from milp_ray.training.train import train
from milp_ray.users.records import UserSplit

Make = Callable[..., UserSplit]
PROMPT = PromptSection()
TRAINING = TrainingSection(memory_epochs=2, instruction_epochs=2, learning_rate=3e-2, batch_size=2)
BOTH = frozenset({"memory", "instruction"})
CHOSEN = Candidate(CanonicalLayout((False, True, False, True), 2), 100)
OTHERS = (
    Candidate(CanonicalLayout((True, True, True, True), 4), 400),
    Candidate(CanonicalLayout((False, False, False, True), 2), 50),
    Candidate(CanonicalLayout((True, False, False, False), 4), 60),
)
RULE = LayoutRule("race", CHOSEN, OTHERS)


@pytest.fixture(scope="module")
def base(tiny_llama_dir: Path) -> Base:
    return load_base(BaseSection(model=str(tiny_llama_dir), device="cpu"))


@pytest.fixture
def recipe(tiny_llama_dir: Path) -> Recipe:
    section = BaseSection(model=str(tiny_llama_dir), device="cpu")
    return Recipe(CHOSEN.layout, section, TRAINING, PROMPT, seed=5, rule=RULE)


def entrants(splits: Sequence[UserSplit], rule: LayoutRule = RULE) -> list[Entrant]:
    return [Entrant(split.user_id, split, BOTH, i, rule.decide(split)) for i, split in enumerate(splits)]


Found = dict[str, tuple[JobResult, Mapping[str, Any]]]


def run(
    base: Base, users: Sequence[Entrant], training: TrainingSection = TRAINING
) -> tuple[Found, dict[str, MilpError]]:
    found: Found = {}
    failed: dict[str, MilpError] = {}
    train_decided(
        base,
        users,
        training,
        PROMPT,
        on_result=lambda key, result, facts: found.update({key: (result, facts)}),
        on_failure=lambda key, error: failed.update({key: error}),
    )
    return found, failed


def alone(base: Base, user: Entrant, key: str, training: TrainingSection = TRAINING) -> JobResult:
    """The user's job under one layout, with nobody beside."""
    place = [layout.key for layout in user.decision.layouts].index(key)
    [result] = train(base, [user.job(place, "alone")], training, PROMPT)
    return result


@pytest.mark.parametrize("stages", ["sequential", "joint"])
def test_the_winner_has_the_weights_of_a_run_with_that_layout_for_all(
    base: Base, make_split: Make, stages: Any
) -> None:
    training = TRAINING.model_copy(update={"stages": stages, "memory_epochs": 4, "instruction_epochs": 4})
    users = entrants([make_split(f"u-{i}", n_turns=4 + i, n_val=3) for i in range(4)])
    found, failed = run(base, users, training)
    assert not failed
    assert len(found) == 4
    for user in users:
        result, facts = found[user.key]
        expected = alone(base, user, facts[CHOICE]["layout"], training)
        assert result.adapter is not None
        assert expected.adapter is not None
        assert result.adapter.layout.key == facts[CHOICE]["layout"]
        assert (result.steps, result.tokens) == (expected.steps, expected.tokens)
        for name, tensor in expected.adapter.tensors.items():
            torch.testing.assert_close(result.adapter.tensors[name], tensor, rtol=1e-5, atol=1e-6)
        assert result.validation_loss == pytest.approx(expected.validation_loss, rel=1e-5)


def test_each_rung_keeps_the_better_half_by_the_users_own_loss(base: Base, make_split: Make) -> None:
    [user] = entrants([make_split(n_val=3)])
    found, _ = run(base, [user])
    standings = found[user.key][1][CHOICE]["standings"]
    assert [row["epoch"] for row in standings] == [4, 2, 1, 1]
    losses = {
        place: {p["epoch"] + 2 * (p["stage"] == "instruction"): p["validation_loss"] for p in curve}
        for place, curve in enumerate(
            train(base, [user.job(i, "x")], TRAINING, PROMPT, validate_every_epoch=True)[0].curve
            for i in range(4)
        )
    }
    first = sorted(losses, key=lambda place: losses[place][1])
    second = sorted(first[:2], key=lambda place: losses[place][2])
    keys = [layout.key for layout in user.decision.layouts]
    assert [row["layout"] for row in standings[:2]] == [keys[place] for place in second]
    assert {row["layout"] for row in standings[2:]} == {keys[place] for place in first[2:]}
    assert standings[3]["validation_loss"] == pytest.approx(losses[first[3]][1], rel=1e-4)


def test_what_was_paid_is_all_that_was_trained(base: Base, make_split: Make) -> None:
    [user] = entrants([make_split(n_val=3)])
    found, _ = run(base, [user])
    result, facts = found[user.key]
    choice = facts[CHOICE]
    assert choice["steps"] == sum(row["steps"] for row in choice["standings"]) > choice["own_steps"]
    assert choice["own_steps"] == result.steps
    assert choice["seconds"] > choice["own_seconds"] == pytest.approx(result.seconds, abs=1e-3)
    beside = choice["beside_chosen"]
    assert beside["taken"] <= beside["chosen"]


def test_of_equal_losses_the_smaller_adapter_wins_and_of_equal_sizes_the_chosen_one(
    base: Base, make_split: Make
) -> None:
    rate = TRAINING.model_copy(update={"learning_rate": 1e-30})  # nobody learns anything
    found, _ = run(base, entrants([make_split(n_val=3)]), rate)
    assert found["u-1"][1][CHOICE]["layout"] == OTHERS[1].layout.key
    even = LayoutRule("race", CHOSEN, tuple(replace(other, parameters=100) for other in OTHERS))
    found, _ = run(base, entrants([make_split(n_val=3)], even), rate)
    assert found["u-1"][1][CHOICE]["layout"] == CHOSEN.layout.key


def test_users_who_race_and_users_who_do_not_are_trained_in_one_call(
    base: Base, make_split: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(race, "_MOST_KEPT_BYTES", 1)  # a user at a time
    splits = [make_split("races", n_val=3), make_split("has-none", n_val=0), make_split("races-too", n_val=2)]
    users = entrants(splits)
    found, _ = run(base, users)
    assert set(found) == {"races", "has-none", "races-too"}
    said = found["has-none"][1][CHOICE]
    assert (said["layout"], said["reason"]) == (CHOSEN.layout.key, NO_VALIDATION)
    together = found["races"][0]
    monkeypatch.undo()
    assert together.steps == run(base, users)[0]["races"][0].steps


def test_with_a_single_epoch_layouts_are_compared_at_the_end(base: Base, make_split: Make) -> None:
    once = TRAINING.model_copy(update={"memory_epochs": 0, "instruction_epochs": 1})
    users = [replace(u, parts=frozenset({"instruction"})) for u in entrants([make_split(n_val=3)])]
    found, _ = run(base, users, once)
    result, facts = found["u-1"]
    losses = [alone(base, users[0], layout.key, once).validation_loss for layout in users[0].decision.layouts]
    assert result.validation_loss == pytest.approx(min(x for x in losses if x is not None), rel=1e-5)
    assert [row["epoch"] for row in facts[CHOICE]["standings"]] == [1] * 4


def test_a_layout_that_fails_leaves_the_race_and_a_user_fails_only_with_the_last(
    base: Base, make_split: Make
) -> None:
    foreign = Candidate(CanonicalLayout((True,) * 5, 2), 10)  # of a base with five layers
    [user] = entrants([make_split(n_val=3)], LayoutRule("race", CHOSEN, (foreign, OTHERS[0])))
    found, failed = run(base, [user])
    assert not failed
    assert found["u-1"][1][CHOICE]["layout"] != foreign.layout.key
    nobody = LayoutRule("race", foreign, (replace(foreign, layout=CanonicalLayout((True,) * 6, 2)),))
    found, failed = run(base, entrants([make_split(n_val=3)], nobody))
    assert not found
    assert "layers" in str(failed["u-1"])


# ------------------------------------------------------------------------------------------ in the batch


def make(base: Base, store: AdapterStore, recipe: Recipe, splits: Sequence[UserSplit]) -> dict[int, Any]:
    maker, replies = Maker(recipe), {}
    items = [Item(split, maker.of(split), recipe.parts(split)) for split in splits]
    make_adapters(store, recipe, base, items, lambda place, value: replies.update({place: value}))
    return replies


def test_only_the_winner_is_published_and_its_manifest_says_why(
    base: Base, recipe: Recipe, make_split: Make, tmp_path: Path
) -> None:
    store = AdapterStore(tmp_path / "store")
    splits = [make_split("u-0", n_val=3), make_split("u-1", n_val=3), make_split("u-2", n_val=0)]
    replies = make(base, store, recipe, splits)
    for split in splits:
        assert store.versions(split.user_id) == [1]
        manifest = store.manifest(split.user_id)
        choice = manifest.meta[CHOICE]
        assert manifest.layout.key == choice["layout"]
        assert choice["mode"] == "race"
        assert manifest.fingerprint == Maker(recipe).of(split).fingerprint
        assert store.load(split.user_id).layout == manifest.layout
        texts = [turn.text for turn in split.history] + [e.response for e in split.validation]
        assert not any(text in str(dict(manifest.meta)) for text in texts)
    again = make(base, store, recipe, splits)
    assert [store.versions(split.user_id) for split in splits] == [[1]] * 3
    tally = LayoutTally()
    for reply in again.values():
        tally.add(reply["layout"])
    found = tally.to_dict()
    assert found is not None
    assert (found["n_users"], found["n_compared"]) == (3, 2)
    assert found["steps_ratio"] > 1
    assert found["taken_loss"] <= found["chosen_loss"]
    assert replies[0]["layout"] == again[0]["layout"]
    assert sum(int(users) for _, users, _ in layout_rows(found)) == 3
    assert any("selected on these very examples" in sentence for sentence in layout_sentences(found))


def test_a_fingerprint_tells_a_race_from_a_layout_and_not_how_a_layout_was_come_by(
    recipe: Recipe, make_split: Make
) -> None:
    split, without = make_split(n_val=2), make_split(n_val=0)
    plain = replace(recipe, rule=None)
    refused = replace(recipe, rule=LayoutRule("portfolio", CHOSEN, refusal="too little"))

    def of(one: Recipe, user: UserSplit) -> str:
        return Maker(one).of(user).fingerprint

    assert of(plain, split) == of(refused, split) != of(recipe, split)
    assert of(plain, without) == of(recipe, without), "who does not race has the chosen layout either way"
    for rule in (replace(RULE, others=OTHERS[:2]), replace(RULE, reduction=3)):
        assert of(replace(recipe, rule=rule), split) != of(recipe, split)
