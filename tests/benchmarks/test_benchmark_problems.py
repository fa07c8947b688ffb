from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest
from comparison.measured import TABLE, LoraTable
from comparison.problem import Problem, best_hypervolume, front_of
from comparison.synthetic import Effect, Synthetic, few_layers, two_depths
from hypothesis import given, settings
from hypothesis import strategies as st

from milp_ray.memory.layout import CanonicalLayout
from milp_ray.memory.space import SearchSpace
from milp_ray.search.features import CanonicalRows
from milp_ray.search.front import hypervolume, pareto_front

SYNTHETIC = [few_layers(), two_depths()]


def small(objectives: tuple[str, ...], crowding: float = 0.0) -> Synthetic:
    """Five layers, two of which matter."""
    effects = {
        "validation_loss": Effect({0: 0.3, 2: 0.2}, {(0, 2): -0.1}, 2.0, crowding, 0.4, noise=0.05),
        "rouge_l": Effect({2: 0.3}, {(0, 2): -0.4}, 1.0, crowding, 0.8, noise=0.05),
    }
    return Synthetic("small", effects, objectives, space=SearchSpace(5, (8, 16, 32)))


@pytest.mark.parametrize("crowding", [0.0, 1.0])
@pytest.mark.parametrize(
    "objectives",
    [("validation_loss", "adapter_parameters"), ("validation_loss", "rouge_l", "adapter_parameters")],
)
def test_a_synthetic_front_is_the_front_of_all_layouts(objectives: tuple[str, ...], crowding: float) -> None:
    problem = small(objectives, crowding)
    rows = CanonicalRows(problem.space)
    layouts = [rows.decode(row) for row in rows.all()]
    assert len(layouts) == problem.space.n_canonical

    values = np.array([problem.truth(layout) for layout in layouts])

    expected = np.unique(values[pareto_front(values, problem.signs)].round(9), axis=0)
    np.testing.assert_allclose(np.unique(problem.front.round(9), axis=0), expected)


@pytest.mark.parametrize("problem", SYNTHETIC, ids=lambda p: p.name)
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=50)
def test_no_layout_is_better_than_the_front(problem: Problem, seed: int) -> None:
    layout = problem.space.layout(problem.space.sample(np.random.default_rng(seed))).canonical()
    volume = hypervolume([*problem.front, problem.truth(layout)], problem.signs, problem.reference)
    assert volume == pytest.approx(best_hypervolume(problem), rel=1e-12)


@pytest.mark.parametrize("problem", SYNTHETIC, ids=lambda p: p.name)
def test_objectives_conflict(problem: Problem) -> None:
    assert len(problem.front) >= 10


@pytest.mark.parametrize("problem", SYNTHETIC, ids=lambda p: p.name)
def test_a_trial_repeats_and_ends_at_the_mean_of_its_users(problem: Synthetic) -> None:
    layout = CanonicalLayout(tuple(i % 3 == 0 for i in range(32)), 32)
    one, other = problem.evaluate(layout), problem.evaluate(layout)
    np.testing.assert_array_equal(one.values, other.values)
    for column, name in enumerate(problem.objectives):
        if name in one.per_user:
            assert one.values[-1, column] == pytest.approx(np.mean(one.per_user[name]))
            assert one.values[-1, column] != problem.truth(layout)[column]
    assert one.seconds > one.train_seconds[-1]
    assert (np.diff(one.train_seconds) > 0).all()


def test_noise_is_as_large_as_it_says() -> None:
    problem = few_layers()
    rng = np.random.default_rng(0)
    layouts = [problem.space.layout(problem.space.sample(rng)).canonical() for _ in range(400)]
    errors = [problem.evaluate(layout).values[-1, 0] - problem.truth(layout)[0] for layout in layouts]
    assert np.std(errors) == pytest.approx(0.04 / problem.n_users**0.5, rel=0.15)
    assert abs(np.mean(errors)) < 0.005


def test_a_curve_comes_nearer_to_its_end_with_every_epoch() -> None:
    problem = two_depths()
    values = problem.evaluate(CanonicalLayout((True,) * 32, 8)).values
    assert (np.diff(values[:, 0]) < 0).all()  # a loss
    assert (np.diff(values[:, 1]) > 0).all()  # ROUGE-L


@given(seed=st.integers(0, 1000), n_points=st.integers(1, 1300))
@settings(max_examples=15)
def test_the_front_in_blocks_is_the_front(seed: int, n_points: int) -> None:
    values = np.random.default_rng(seed).integers(0, 60, (n_points, 2)).astype(float)
    signs = (1.0, -1.0)
    expected = np.unique(values[pareto_front(values, signs)], axis=0)
    np.testing.assert_array_equal(np.unique(front_of(values, signs), axis=0), expected)


# ------------------------------------------------------------------------------------------- measured table


@pytest.fixture(scope="module")
def table() -> LoraTable:
    return LoraTable()


def test_the_table_has_each_layer_alone_and_all_layers_at_every_rank(table: LoraTable) -> None:
    measured = {layout.key for layout in table.layouts}
    assert "empty" in measured
    ones = [tuple(i == layer for i in range(8)) for layer in range(8)]
    wanted = {CanonicalLayout(mask, rank).key for mask in [*ones, (True,) * 8] for rank in table.space.ranks}
    assert wanted <= measured
    assert table.space.ranks == (8, 16, 32, 64, 96)


def test_measured_curves_learn(table: LoraTable) -> None:
    """Nearly every layout ends below the base's loss, and most of them nearer to their end epoch by epoch."""
    base = table.truth(CanonicalLayout((False,) * 8, 0))[0]
    losses = np.array(
        [table.evaluate(layout).values[:, 0] for layout in table.layouts if not layout.is_empty]
    )
    assert np.isfinite(losses).all()
    assert (losses[:, -1] < base).mean() > 0.9
    assert (losses[:, -1] < losses[:, 0]).mean() > 0.9
    seconds = np.array(
        [table.evaluate(layout).train_seconds for layout in table.layouts if not layout.is_empty]
    )
    assert (np.diff(seconds, axis=1) > 0).all()


def test_layouts_differ_by_more_than_users_explain(table: LoraTable) -> None:
    """Once each user's mean is taken out, layouts tell much more than the interaction that is left."""
    rows = [row for row in pq.read_table(TABLE).to_pylist() if row["epoch"] == 4]
    assert len(rows) == len(table.layouts)
    by_user = np.array([row["validation_loss_by_user"] for row in rows])
    effect = by_user.mean(axis=1)
    rest = by_user - effect[:, None] - by_user.mean(axis=0) + by_user.mean()
    assert effect.std() > 2 * rest.std() / by_user.shape[1] ** 0.5


def test_a_layout_that_was_not_measured_is_answered_with_the_nearest(tmp_path: object) -> None:
    table = LoraTable()
    known = {layout.key for layout in table.layouts}
    layout = CanonicalLayout((True, False) * 4, 8)
    table._layouts = {key: value for key, value in table._layouts.items() if key != layout.key}
    nearest = table.measured(layout)
    assert nearest.key in known - {layout.key}
    distances = [table._distance(layout, other) for other in table._layouts.values()]
    assert table._distance(layout, nearest) == min(distances)
    assert table.measured(nearest) == nearest


def test_time_scale_scales_seconds_and_nothing_else(table: LoraTable) -> None:
    layout = CanonicalLayout((True,) * 8, 16)
    slow = LoraTable(time_scale=10.0).evaluate(layout)
    assert slow.seconds == pytest.approx(10.0 * table.evaluate(layout).seconds)
    np.testing.assert_array_equal(slow.values, table.evaluate(layout).values)
