"""From judgements to win rates with intervals, and how often the judge chose as people did."""

from __future__ import annotations

import json

import numpy as np
import pytest
from support.judgements import DRAWS, human, judgement, table

from milp_ray.evaluation.win_rate import agreement, win_rates
from milp_ray.report.win_rate_text import agreement_sentence, win_rate_table, win_rate_verdict


def test_every_user_weighs_the_same_and_wins_ties_and_losses_add_up() -> None:
    rows = [judgement("a", i, 1) for i in range(8)] + [judgement("b", 0, -1), judgement("b", 1, 0)]
    [rate] = win_rates(table(rows), DRAWS)
    assert (rate["n_wins"], rate["n_ties"], rate["n_losses"]) == (8, 1, 1)
    assert [rate[name]["mean"] for name in ("wins", "ties", "losses", "net")] == [0.5, 0.25, 0.25, 0.25]
    assert (rate["n_users"], rate["n_examples"]) == (2, 10)
    json.dumps(rate, allow_nan=False)


def test_judges_and_pairs_are_told_apart() -> None:
    rows = [judgement("a", 0, 1), judgement("a", 0, -1, judge="other"), judgement("a", 0, 0, method="base")]
    found = win_rates(table(rows), DRAWS)
    assert [(r["method"], r["judge"], r["net"]["mean"]) for r in found] == [
        ("base", "embedded", 0.0),
        ("milp", "embedded", 1.0),
        ("milp", "other", -1.0),
    ]
    assert found[0]["net"]["low"] is None


def test_the_verdict_waits_for_an_interval_off_zero() -> None:
    one_sided = win_rates(table([judgement(f"u{i}", 0, -1) for i in range(5)]), DRAWS)[0]
    mixed = win_rates(table([judgement(f"u{i}", 0, (-1) ** i) for i in range(6)]), DRAWS)[0]
    assert "prefers text prompt to MiLP" in win_rate_verdict(one_sided)
    assert "does not tell" in win_rate_verdict(mixed)


def test_the_page_has_a_row_a_judge_under_the_pair() -> None:
    rates = win_rates(table([judgement("a", 0, 1), judgement("a", 0, 1, judge="other")]), DRAWS)
    shown = win_rate_table(rates)
    assert shown is not None
    assert [row.label for row in shown.rows] == ["MiLP against text prompt", "embedded", "other"]
    assert win_rate_table([]) is None


# ---------------------------------------------------------------------------------------------- agreement


def test_agreement_is_accuracy_and_pearson_over_the_choices_that_both_made() -> None:
    judged, chosen = [1, 1, -1, 0, -1, 1], [1, 0, -1, -1, -1, 1]
    rows = [judgement(f"u{i % 3}", i, choice) for i, choice in enumerate(judged)]
    people = [human(f"u{i % 3}", i, choice) for i, choice in enumerate(chosen)]
    [found] = agreement(table(rows), [*people, human("stranger", 0, 1)], DRAWS)
    assert (found["n_choices"], found["n_matched"]) == (7, 6)
    assert found["accuracy"]["mean"] == pytest.approx(4 / 6, abs=1e-6)
    assert found["pearson"]["mean"] == pytest.approx(np.corrcoef(judged, chosen)[0, 1], abs=1e-6)
    assert found["pearson"]["low"] <= found["pearson"]["mean"] <= found["pearson"]["high"] <= 1.0
    assert "6 of 7" in agreement_sentence(found)


def test_a_choice_counts_in_either_order_of_the_methods_and_for_no_other_pair() -> None:
    rows = [judgement("a", 0, 1), judgement("a", 1, -1)]
    people = [human("a", 0, -1, "text_prompt", "milp"), human("a", 1, 1, "base", "milp")]
    [found] = agreement(table(rows), people, DRAWS)
    assert (found["n_matched"], found["accuracy"]["mean"]) == (1, 1.0)
    assert found["pearson"] is None  # one choice does not vary


def test_without_a_match_there_is_no_agreement_to_tell() -> None:
    [found] = agreement(table([judgement("a", 0, 1)]), [human("b", 0, 1)], DRAWS)
    assert (found["accuracy"], found["pearson"]) == (None, None)
    assert "compare user_id" in agreement_sentence(found)
