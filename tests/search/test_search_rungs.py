"""Where rungs lie and which trials go on from them, against brute force."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from milp_ray.config.search import EarlyStoppingSection, SearchSection
from milp_ray.errors import MilpError
from milp_ray.search.rungs import RungRecord, epsilon_net, promoted, ranking, rung_epochs

Records = dict[int, tuple[float, ...]]

# A coarse grid makes ties and repeats common, which is where an order goes wrong.
COORDINATE = st.integers(0, 5).map(float)
RECORDS = st.sampled_from([1, 2, 3]).flatmap(
    lambda m: st.dictionaries(st.integers(0, 40), st.tuples(*[COORDINATE] * m), min_size=1, max_size=12)
)
ETA = st.sampled_from([1, 1.5, 2, 3, 4])


def dominates(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return all(x <= y for x, y in zip(a, b, strict=True)) and a != b


def depth(records: Records, index: int) -> int:
    """Number of the front that a record is on: the longest chain of records that dominate one another."""
    above = [i for i in records if dominates(records[i], records[index])]
    return 1 + max(depth(records, i) for i in above) if above else 0


# --------------------------------------------------------------------------------------------- the ranking


@given(RECORDS)
def test_a_ranking_goes_through_the_fronts_one_after_the_other(records: Records) -> None:
    order = list(ranking(records))
    assert sorted(order) == sorted(records)
    depths = [depth(records, index) for index in order]
    assert depths == sorted(depths)


@given(RECORDS)
def test_inside_a_front_the_first_objective_s_best_comes_first_then_always_the_furthest(
    records: Records,
) -> None:
    order = list(ranking(records))
    for level in {depth(records, index) for index in records}:
        front = [index for index in order if depth(records, index) == level]
        values = np.array([records[index] for index in front])
        span = np.ptp(values, axis=0)
        scaled = (values - values.min(axis=0)) / np.where(span > 0, span, 1.0)
        assert records[front[0]] == min(records[index] for index in front)
        for k in range(1, len(front)):
            gaps = [
                min(float(((scaled[i] - scaled[j]) ** 2).sum()) for j in range(k)) for i in range(len(front))
            ]
            furthest = max(gaps[k:])
            assert gaps[k] == pytest.approx(furthest, abs=1e-12)


@given(RECORDS, st.randoms(use_true_random=False))
def test_the_order_of_records_does_not_matter(records: Records, rng: random.Random) -> None:
    items = list(records.items())
    rng.shuffle(items)
    assert list(ranking(dict(items))) == list(ranking(records))


@given(st.lists(st.integers(0, 99), min_size=1, max_size=10, unique=True))
def test_equal_records_are_ranked_by_their_trial(trials: list[int]) -> None:
    assert list(ranking(dict.fromkeys(trials, (1.0, 2.0)))) == sorted(trials)


def test_one_objective_is_an_ordinary_ranking() -> None:
    assert list(ranking({0: (3.0,), 1: (1.0,), 2: (2.0,), 5: (1.0,)})) == [1, 5, 2, 0]


def test_an_epsilon_net_takes_the_ends_of_a_front_then_its_middle() -> None:
    front = np.array([[0.0, 100.0], [1.0, 90.0], [5.0, 50.0], [9.0, 10.0], [10.0, 0.0]])
    assert epsilon_net(front) == [0, 4, 2, 1, 3]
    assert epsilon_net(np.empty((0, 2))) == []


def test_the_scale_of_an_objective_does_not_matter() -> None:
    records = {0: (1.0, 9.0), 1: (2.0, 5.0), 2: (3.0, 4.0), 3: (4.0, 0.0), 4: (5.0, 1.0)}
    scaled = {index: (loss, 2.0**20 * size) for index, (loss, size) in records.items()}
    assert list(ranking(scaled)) == list(ranking(records))


# ----------------------------------------------------------------------------------------------- promotion


@given(RECORDS, ETA)
def test_the_best_nth_are_promoted_rounded_up(records: Records, eta: float) -> None:
    kept = [index for index in records if promoted(records, index, eta)]
    assert sorted(kept) == sorted(list(ranking(records))[: math.ceil(len(records) / eta)])
    assert len(kept) >= 1
    if eta == 1:
        assert len(kept) == len(records)


@given(RECORDS, ETA)
def test_no_trial_is_kept_where_one_that_dominates_it_is_stopped(records: Records, eta: float) -> None:
    for a in records:
        for b in records:
            if dominates(records[a], records[b]) and promoted(records, b, eta):
                assert promoted(records, a, eta)


@given(RECORDS, ETA)
def test_the_only_best_of_the_first_objective_is_never_stopped(records: Records, eta: float) -> None:
    least = min(values[0] for values in records.values())
    best = [index for index, values in records.items() if values[0] == least]
    if len(best) == 1:
        assert promoted(records, best[0], eta)


@given(st.dictionaries(st.integers(0, 40), st.tuples(COORDINATE, COORDINATE), min_size=4, max_size=12))
def test_of_two_objectives_both_ends_of_the_front_come_before_all_else(records: Records) -> None:
    """With half of four or more kept there is room for two."""
    ends = {min(records.values()), min(records.values(), key=lambda values: (values[1], values[0]))}
    for end in ends:
        assert any(promoted(records, index, 2) for index in records if records[index] == end)


def test_what_cannot_be_ranked_is_refused() -> None:
    with pytest.raises(ValueError, match="no record"):
        promoted({0: (1.0,)}, 1, 2)
    with pytest.raises(ValueError, match="finite"):
        promoted({0: (1.0,), 1: (math.nan,)}, 0, 2)
    for eta in (0.5, math.nan):
        with pytest.raises(ValueError, match="at least 1"):
            promoted({0: (1.0,)}, 0, eta)


# ----------------------------------------------------------------------------------------------- the rungs


def section(**changes: object) -> EarlyStoppingSection:
    return EarlyStoppingSection.model_validate({"enabled": True, **changes})


@pytest.mark.parametrize(
    ("first_rung", "eta", "n_epochs", "wanted"),
    [(1, 3, 10, (1, 3, 9)), (1, 3, 9, (1, 3)), (2, 2, 9, (2, 4, 8)), (2, 4, 3, (2,)), (1, 2, 2, (1,))],
)
def test_rungs_are_powers_below_the_end(
    first_rung: int, eta: int, n_epochs: int, wanted: tuple[int, ...]
) -> None:
    assert rung_epochs(section(first_rung=first_rung, eta=eta, n_rungs=9), n_epochs) == wanted
    assert rung_epochs(section(first_rung=first_rung, eta=eta, n_rungs=2), n_epochs) == wanted[:2]
    assert rung_epochs(section(first_rung=first_rung, eta=eta), n_epochs) == wanted[:1]


def test_without_early_stopping_there_are_no_rungs() -> None:
    assert rung_epochs(EarlyStoppingSection(first_rung=9), 3) == ()


def test_a_first_rung_beyond_the_trial_is_refused_with_what_to_change() -> None:
    with pytest.raises(
        MilpError, match=r"first_rung is 3, but .* 3 epochs in all .* raise search\.trial_epochs"
    ):
        rung_epochs(section(first_rung=3), 3)


def test_more_records_than_trials_are_refused() -> None:
    with pytest.raises(ValueError, match=r"min_records 9 is above n_trials 8"):
        SearchSection(n_trials=8, n_initial=4, early_stopping=section(min_records=9))
    assert SearchSection(n_trials=8, n_initial=4, early_stopping=section(min_records=9, enabled=False))


# ----------------------------------------------------------------------------------------------- a record

RECORD = RungRecord(
    trial=4,
    rung=1,
    epoch=3,
    adapter_parameters=100,
    validation_loss_at_rung=1.5,
    validation_loss_at_rung_sem=None,
    validation_loss_at_rung_by_user=(1.5,),
    seconds_at_rung=0.5,
    tokens_at_rung=10,
    steps_at_rung=2,
)


def test_a_record_survives_json_and_other_keys_beside_it() -> None:
    written = json.loads(json.dumps({**RECORD.to_dict(), "event": "trial_rung", "time": "now"}))
    assert RungRecord.from_dict(written) == RECORD


def test_the_parameters_count_where_they_are_an_objective() -> None:
    assert RECORD.objectives(["validation_loss", "rouge_l"]) == (1.5,)
    assert RECORD.objectives(["rouge_l", "adapter_parameters"]) == (1.5, 100.0)
