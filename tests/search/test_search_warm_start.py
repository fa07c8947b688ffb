"""What an earlier search hands to a new one."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from milp_ray.config.search import SearchSection
from milp_ray.errors import MilpError
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.memory.space import SearchSpace
from milp_ray.search.conductor import Conductor
from milp_ray.search.features import CanonicalRows
from milp_ray.search.journal import Journal
from milp_ray.search.suggest import InlineProposer
from milp_ray.search.warm_start import fingerprint, keep, kept_earlier, load_earlier, portfolio

SPACE = SearchSpace(4, (2, 4, 8))
OBJECTIVES = ("validation_loss", "adapter_parameters")


def earlier_run(folder: Path, space: SearchSpace = SPACE, seed: int = 0, **metrics: Any) -> Path:
    """A run folder with a search of 20 trials: loss and size conflict; trial 3 has failed."""
    rows = CanonicalRows(space)
    points = random.Random(seed).sample([rows.raw(row) for row in rows.all()], 20)
    with Journal(folder / "study" / "journal.jsonl") as journal:
        journal.append("study_started", digest="d", space={"n_layers": space.n_layers})
        for index, raw in enumerate(points):
            layout = space.layout(raw).canonical()
            named = {"layout": layout.to_dict(), "key": layout.key, "generator": "sobol"}
            journal.append("trial_suggested", index=index, batch=0, raw=raw, **named)
            if index == 3:
                journal.append("trial_failed", index=index, reason="OutOfMemoryError")
                continue
            size = len(layout.layers) * (layout.rank or 0)
            values = {"validation_loss": 3.0 - 0.05 * size + 0.2 * (0 in layout.layers)}
            journal.append(
                "trial_completed", index=index, metrics={**values, "adapter_parameters": size, **metrics}
            )
    return folder


def test_the_portfolio_is_the_earlier_fronts_in_turn(tmp_path: Path) -> None:
    runs = [earlier_run(tmp_path / "a", seed=0), earlier_run(tmp_path / "b", seed=1)]
    earlier = load_earlier(runs, SPACE, OBJECTIVES)
    assert [len(study.observations) for study in earlier] == [19, 19]
    keys = [SPACE.layout(point).canonical().key for point in portfolio(earlier, SPACE, 100)]
    fronts = [[layout.key for layout in study.front] for study in earlier]
    assert set(keys) == set(fronts[0]) | set(fronts[1])
    assert len(keys) == len(set(keys))
    assert keys[0] == fronts[0][0]
    assert keys[1] == next(key for key in [fronts[1][0], fronts[0][1]] if key != keys[0])


def test_a_portfolio_leaves_half_of_the_initial_trials_to_chance(tmp_path: Path) -> None:
    earlier = load_earlier([earlier_run(tmp_path / "a")], SPACE, OBJECTIVES)
    assert len(earlier[0].front) > 2
    assert len(portfolio(earlier, SPACE, 4)) == 2


def test_the_portfolio_is_tried_first_and_nothing_twice(tmp_path: Path) -> None:
    earlier = load_earlier([earlier_run(tmp_path / "a")], SPACE, OBJECTIVES)
    points = portfolio(earlier, SPACE, 8)
    header = {"digest": "d", "objectives": list(OBJECTIVES), "n_initial": 8}
    with Journal(tmp_path / "journal.jsonl") as journal:
        journal.append("study_started", **header)
        Conductor(
            journal, SPACE, SearchSection(n_trials=9, n_initial=8), 0, InlineProposer(list), portfolio=points
        )
        trials = journal.state.trials
    assert len(trials) == 8
    assert [trial.generator for trial in trials] == ["warm_start"] * len(points) + ["sobol"] * (
        8 - len(points)
    )
    assert [trial.layout.key for trial in trials[: len(points)]] == [
        SPACE.layout(point).canonical().key for point in points
    ]
    assert len({trial.layout.key for trial in trials}) == 8


def test_layouts_that_the_space_does_not_have_are_left_out(tmp_path: Path) -> None:
    run = earlier_run(tmp_path / "a")
    [study] = load_earlier([run], SearchSpace(4, (2, 4)), OBJECTIVES)
    assert {o.layout.rank for o in study.observations} <= {2, 4, None}
    assert 0 < len(study.observations) < 19


def test_the_empty_layout_is_no_advice(tmp_path: Path) -> None:
    run = earlier_run(tmp_path / "a")
    empty = CanonicalLayout((False,) * 4, None)
    with Journal(run / "study" / "journal.jsonl") as journal:
        index = len(journal.state.trials)
        named = {"layout": empty.to_dict(), "key": empty.key, "generator": "sobol"}
        raw = dict(SPACE.raw(empty))
        journal.append("trial_suggested", index=index, batch=0, raw=raw, **named)
        journal.append(
            "trial_completed", index=index, metrics={"validation_loss": 3.0, "adapter_parameters": 0}
        )
    [study] = load_earlier([run], SPACE, OBJECTIVES)
    assert empty in [o.layout for o in study.observations]
    assert empty not in study.front


def test_what_cannot_be_used_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(MilpError, match="none holds no search"):
        load_earlier([tmp_path / "none"], SPACE, OBJECTIVES)
    run = earlier_run(tmp_path / "a")
    with pytest.raises(MilpError, match="has 4 layers and this one has 6"):
        load_earlier([run], SearchSpace(6, (2, 4)), OBJECTIVES)
    with pytest.raises(MilpError, match=r"no trial of .* has values for validation_loss, rouge_l"):
        load_earlier([run], SPACE, ("validation_loss", "rouge_l"))


def test_the_fingerprint_is_of_what_is_used(tmp_path: Path) -> None:
    runs = [earlier_run(tmp_path / "a"), earlier_run(tmp_path / "b"), earlier_run(tmp_path / "c", seed=1)]
    a, b, c = (fingerprint(load_earlier([run], SPACE, OBJECTIVES)) for run in runs)
    assert a == b != c
    assert fingerprint([]) is None


def test_what_a_study_keeps_of_an_earlier_one_is_all_that_it_uses(tmp_path: Path) -> None:
    runs = [earlier_run(tmp_path / "a"), earlier_run(tmp_path / "b", seed=1)]
    earlier = load_earlier(runs, SPACE, OBJECTIVES)
    path = tmp_path / "study" / "earlier.json"
    assert kept_earlier(path, runs, SPACE, OBJECTIVES) is None
    keep(path, earlier)
    assert kept_earlier(path, runs, SPACE, OBJECTIVES) == earlier
    assert kept_earlier(path, runs[:1], SPACE, OBJECTIVES) is None, "it began with others"
    for damaged in ('{"run"', '[{"run": 3}, 4]'):
        path.write_text(damaged)
        with pytest.raises(MilpError, match=r"earlier\.json is damaged"):
            kept_earlier(path, runs, SPACE, OBJECTIVES)
