"""Which layout of the front is chosen, and how the reason is worded."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from milp_ray.config.search import ChoiceSection
from milp_ray.errors import MilpError
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.search.choice import FrontPoint, choose, chosen_layout

OBJECTIVES = ("validation_loss", "rouge_l", "adapter_parameters")


def point(index: int, mask: str, loss: float, rouge: float, parameters: int) -> FrontPoint:
    layout = CanonicalLayout(tuple(bit == "1" for bit in mask), 8)
    values = {"validation_loss": loss, "rouge_l": rouge, "adapter_parameters": float(parameters)}
    return FrontPoint(index, layout, values)


EMPTY = point(3, "0000", 4.0, 1.0, 0)
FRONT = [
    point(0, "1111", 1.00, 40.0, 4000),
    point(5, "0111", 1.01, 41.0, 3000),
    point(2, "0011", 1.02, 35.0, 2000),
    point(9, "0001", 2.00, 20.0, 1000),
    EMPTY,
]


def chosen(rule: Any, **settings: Any) -> FrontPoint:
    return choose(FRONT, OBJECTIVES, ChoiceSection(rule=rule, **settings)).point


def test_best_loss_and_best_rouge_l() -> None:
    assert chosen("best_loss").index == 0
    assert chosen("best_rouge_l").index == 5


@pytest.mark.parametrize(("tolerance", "index"), [(0.0, 0), (0.015, 5), (0.03, 2), (2.0, 9)])
def test_smallest_within_takes_the_fewest_parameters_within_the_tolerance(
    tolerance: float, index: int
) -> None:
    assert chosen("smallest_within", tolerance=tolerance).index == index


def test_the_knee_gives_up_a_little_for_much() -> None:
    assert chosen("knee").index == 2


@pytest.mark.parametrize("rule", ["knee", "best_loss", "best_rouge_l", "smallest_within"])
def test_the_empty_layout_is_chosen_only_where_it_is_all_there_is(rule: Any) -> None:
    alluring = point(1, "0000", 0.0, 100.0, 0)
    section = ChoiceSection(rule=rule)
    assert choose([alluring, FRONT[0]], OBJECTIVES, section).point.index == 0
    alone = choose([alluring], OBJECTIVES, section)
    assert alone.layout.is_empty
    assert "base alone" in alone.reason


def test_ties_go_to_fewer_parameters_and_then_to_the_earlier_trial() -> None:
    tied = [point(4, "1100", 1.0, 9.0, 50), point(1, "0011", 1.0, 9.0, 50), point(0, "1111", 1.0, 9.0, 99)]
    for rule in ("best_loss", "best_rouge_l"):
        assert choose(tied, OBJECTIVES, ChoiceSection(rule=rule)).point.index == 1


def test_reasons_are_plain_words() -> None:
    choice = choose(FRONT, OBJECTIVES, ChoiceSection(rule="smallest_within", tolerance=0.03))
    assert choice.reason == (
        "With 2,000 parameters it is the smallest adapter on the front whose validation loss, 1.0200, is "
        "within 3.0% of the best, 1.0000."
    )


def test_what_is_written_gives_the_layout_back() -> None:
    choice = choose(FRONT, OBJECTIVES, ChoiceSection(rule="best_loss"))
    content = json.loads(json.dumps(choice.to_dict()))
    assert chosen_layout(content) == choice.layout
    assert content["rule"] == "best_loss"
    assert content["trial"] == 0
    assert content["adapter_parameters"] == 4000
    assert content["objectives"] == {"validation_loss": 1.0, "rouge_l": 40.0, "adapter_parameters": 4000.0}


def test_an_empty_front_is_an_error() -> None:
    with pytest.raises(MilpError, match="no trial"):
        choose([], OBJECTIVES, ChoiceSection())


def test_a_file_without_a_layout_is_an_error() -> None:
    with pytest.raises(MilpError, match="milp-ray choose"):
        chosen_layout({"rule": "knee"})


@pytest.mark.parametrize("rule", ["best_loss", "smallest_within"])
def test_a_layout_without_the_rule_s_value_is_not_chosen(rule: Any) -> None:
    less = {name: FRONT[0].values[name] for name in OBJECTIVES[1:]}
    diverged = replace(FRONT[0], values=less)
    section = ChoiceSection(rule=rule)
    assert choose([diverged, FRONT[1]], OBJECTIVES[1:], section).point.index == FRONT[1].index
    with pytest.raises(MilpError, match="no layout on the front has a value of validation_loss"):
        choose([diverged], OBJECTIVES[1:], section)
