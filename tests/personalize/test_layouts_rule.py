"""From a study to a decision about each user: what races, what is predicted from, and when neither can be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from milp_ray.config.personalize import PersonalizeSection
from milp_ray.errors import MilpError
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.personalize.governance.traces import without_place
from milp_ray.personalize.layouts.evidence import ALONE, NO_TRAITS, NOT_MEASURED, TOO_FEW, layout_rule
from milp_ray.personalize.layouts.rule import NO_VALIDATION, NOT_SURE, SIMILAR_USERS, Candidate
from milp_ray.personalize.layouts.rungs import Rung, race_cost, race_rungs
from milp_ray.users.records import UserSplit
from milp_ray.users.traits import user_traits

Make = Callable[..., UserSplit]
# Losses by user of three layouts, the second better for all by a tenth, the third worse.
LOSSES = {"1000-r8": [1.0, 2.0, 3.0, 4.0], "1100-r8": [0.9, 1.8, 2.7, 3.6], "0100-r8": [1.1, 2.2, 3.3, 4.4]}
CHOSEN = Candidate(CanonicalLayout((True, False, False, False), 8), 100)


def study(path: Path, *, traits: list[list[float]] | None = None, forgotten: int | None = None) -> Path:
    """A journal whose trials are all on the front: the lower the loss, the larger the adapter."""
    header = {"objectives": ["validation_loss", "adapter_parameters"], "n_initial": 3, "seed": 0, "worst": {}}
    events: list[dict[str, Any]] = [{"event": "study_started", "digest": "d", **header}]
    if traits is not None:
        named = zip(("log_words", "log_turns", "diversity"), zip(*traits, strict=True), strict=True)
        events.append(
            {"event": "users_described", "values": {f"{name}_by_user": list(own) for name, own in named}}
        )
    sizes = {"1000-r8": 100, "1100-r8": 200, "0100-r8": 50}
    for index, (key, losses) in enumerate(LOSSES.items()):
        layers = [i for i, bit in enumerate(key[:4]) if bit == "1"]
        layout = {"n_layers": 4, "layers": layers, "rank": 8}
        told = {"index": index, "batch": 0, "raw": {}, "layout": layout, "key": key, "generator": "sobol"}
        metrics = {"validation_loss": sum(losses) / 4, "adapter_parameters": sizes[key]}
        events.append({"event": "trial_suggested", **told})
        by_user = {"per_user": {"validation_loss": losses}}
        events.append({"event": "trial_completed", "index": index, "metrics": metrics | by_user})
    if forgotten is not None:
        events = [without_place(event, forgotten) for event in events]
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    return path


@pytest.fixture
def traits(make_split: Make) -> list[list[float]]:
    return [list(user_traits(make_split(f"u-{i}", n_turns=6 + i))) for i in range(4)]


def section(layout: Any, **more: Any) -> PersonalizeSection:
    return PersonalizeSection(layout=layout, **{"max_growth": None, **more})


def test_the_chosen_layout_races_against_the_fronts_best_by_loss(tmp_path: Path, make_split: Make) -> None:
    rule = layout_rule(study(tmp_path / "j"), CHOSEN, section("race"))
    assert [layout.key for layout in rule.decide(make_split()).layouts] == ["1000-r8", "1100-r8", "0100-r8"]
    two = layout_rule(tmp_path / "j", CHOSEN, section("race", race={"max_layouts": 2}))
    assert [layout.key for layout in two.decide(make_split()).layouts] == ["1000-r8", "1100-r8"]
    small = layout_rule(tmp_path / "j", CHOSEN, PersonalizeSection(layout="race"))
    assert [layout.key for layout in small.decide(make_split()).layouts] == ["1000-r8", "0100-r8"]
    alone = layout_rule(tmp_path / "j", CHOSEN, section("race", max_growth=0.1)).decide(make_split())
    assert (alone.layouts, alone.reason) == ((CHOSEN.layout,), ALONE)


def test_a_user_without_validation_examples_does_not_race(tmp_path: Path, make_split: Make) -> None:
    decision = layout_rule(study(tmp_path / "j"), CHOSEN, section("race")).decide(make_split(n_val=0))
    assert (decision.is_race, decision.layouts, decision.reason) == (False, (CHOSEN.layout,), NO_VALIDATION)


def test_a_portfolio_takes_what_similar_users_did_better_with(
    tmp_path: Path, make_split: Make, traits: list[list[float]]
) -> None:
    rule = layout_rule(study(tmp_path / "j", traits=traits), CHOSEN, section("portfolio"))
    decision = rule.decide(make_split("u-1", n_turns=7))
    assert decision.layouts == (CanonicalLayout((True, True, False, False), 8),)
    assert decision.reason == SIMILAR_USERS
    assert decision.facts["predicted_gain"] > decision.facts["error"] > 0
    assert rule.decide(make_split("u-1", n_turns=200)).reason == NOT_SURE


@pytest.mark.parametrize(
    ("described", "forgotten", "reason"),
    [(False, None, NO_TRAITS), (True, 2, None), (True, 0, None)],
)
def test_old_studies_and_forgotten_probe_users_leave_a_rule(
    tmp_path: Path,
    make_split: Make,
    traits: list[list[float]],
    described: bool,
    forgotten: int | None,
    reason: str | None,
) -> None:
    journal = study(tmp_path / "j", traits=traits if described else None, forgotten=forgotten)
    rule = layout_rule(journal, CHOSEN, section("portfolio"))
    assert rule.refusal == (reason or "")
    if reason:
        decision = rule.decide(make_split())
        assert (decision.layouts, decision.reason) == ((CHOSEN.layout,), reason)
    elif rule.portfolio is not None:
        assert len(rule.portfolio.relative) == 3, "the user who was forgotten is no evidence any more"
    race = layout_rule(journal, CHOSEN, section("race"))
    whole = layout_rule(study(tmp_path / "whole", traits=traits), CHOSEN, section("race"))
    assert race.others == whole.others, "who races does not change when a probe user is forgotten"


def test_too_little_to_predict_from_is_said(
    tmp_path: Path, traits: list[list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = study(tmp_path / "j", traits=traits)
    elsewhere = Candidate(CanonicalLayout((False, False, False, True), 8), 100)
    assert layout_rule(journal, elsewhere, section("portfolio")).refusal == NOT_MEASURED
    monkeypatch.setattr("milp_ray.personalize.layouts.evidence.MIN_USERS", 9)
    assert layout_rule(journal, CHOSEN, section("portfolio")).refusal == TOO_FEW


def test_a_run_without_a_study_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(MilpError, match=r"set personalize\.layout to 'chosen'"):
        layout_rule(tmp_path / "none.jsonl", CHOSEN, section("race"))


@pytest.mark.parametrize(
    ("n_layouts", "n_epochs", "reduction", "rungs"),
    [
        (4, 20, 2, (Rung(5, 2), Rung(10, 1))),
        (4, 6, 2, (Rung(2, 2), Rung(3, 1))),
        (3, 6, 2, (Rung(2, 2), Rung(3, 1))),
        (9, 9, 3, (Rung(1, 3), Rung(3, 1))),
        (4, 2, 2, (Rung(1, 1),)),  # too few epochs for two cuts
        (4, 1, 2, ()),  # compared at the end
        (1, 6, 2, ()),
    ],
)
def test_rungs_leave_one_layout_before_the_end(
    n_layouts: int, n_epochs: int, reduction: int, rungs: tuple[Rung, ...]
) -> None:
    assert race_rungs(n_layouts, n_epochs, reduction) == rungs


def test_what_a_race_costs() -> None:
    assert race_cost(1, 6, 2) == 1.0
    assert race_cost(4, 20, 2) == 2.0
    assert race_cost(4, 6, 2) == pytest.approx((4 * 2 + 2 * 1 + 1 * 3) / 6)
    assert race_cost(4, 1, 2) == 4.0
    with pytest.raises(ValueError, match="at least"):
        race_rungs(2, 0, 2)
