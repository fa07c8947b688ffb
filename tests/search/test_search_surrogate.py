"""What the surrogate sees, where it looks, and what it proposes. Ax and BoTorch are imported once, here."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from botorch.acquisition.multi_objective import logei
from botorch.utils.multi_objective.box_decompositions.non_dominated import FastNondominatedPartitioning
from hypothesis import given, settings
from hypothesis import strategies as st

from milp_ray.config import SearchSection, SurrogateSection
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.memory.space import SearchSpace
from milp_ray.search.acquisition import NewLayouts
from milp_ray.search.boxes import nondominated_boxes
from milp_ray.search.candidates import initial_points
from milp_ray.search.features import CanonicalFeatures, feature_options
from milp_ray.search.front import hypervolume, reference_point
from milp_ray.search.nehvi import SweepPartitioning
from milp_ray.search.observations import Observation, standard_errors
from milp_ray.search.suggest import RANDOM, SAAS_NEHVI, Question, Suggester

OBJECTIVES = ("validation_loss", "rouge_l", "adapter_parameters")
SIGNS = (1.0, -1.0, 1.0)
SPACES = [
    SearchSpace(5, (2, 4, 8)),
    SearchSpace(5, (2, 4, 8), factors=("layers", "rank"), fixed_number=2),
    SearchSpace(5, (2, 4), factors=("layers",)),
    SearchSpace(6, (2, 4), factors=("number", "rank"), fixed_layers=(0, 2, 3, 5)),
    SearchSpace(4, (8,), factors=("layers", "number")),
    SearchSpace(3, (2, 4, 8), factors=("rank",)),
]


# ------------------------------------------------------------------------------------------------ features


@given(st.sampled_from(SPACES), st.integers(0, 2**31 - 1))
def test_features_are_the_canonical_layout(space: SearchSpace, seed: int) -> None:
    rng = np.random.default_rng(seed)
    points = [space.sample(rng) for _ in range(6)]
    layouts = NewLayouts(space, frozenset(), ())
    columns = [p.name for p in space.parameters() if len(p.values) > 1]
    transform = CanonicalFeatures(**feature_options(space, columns))
    rows = torch.tensor([layouts.encode(point) for point in points], dtype=torch.double)
    features = transform.transform(rows.view(2, 3, -1)).view(6, -1)
    for row, point in zip(features.tolist(), points, strict=True):
        layout = space.layout(point).canonical()
        searched_rank = "rank" in space.factors and len(space.ranks) > 1 and not layout.is_empty
        rank = space.ranks.index(layout.rank) / (len(space.ranks) - 1) if searched_rank else 0.0
        assert row == [*map(float, layout.mask), sum(layout.mask) / space.n_layers, rank]


@given(st.sampled_from(SPACES), st.integers(0, 2**31 - 1))
def test_ax_encoding_loses_nothing(space: SearchSpace, seed: int) -> None:
    layouts = NewLayouts(space, frozenset(), ())
    point = space.sample(np.random.default_rng(seed))
    assert layouts.decode(layouts.encode(point)) == point


# --------------------------------------------------------------------------------------------------- boxes

ROWS = st.lists(st.lists(st.integers(-1, 5).map(float), min_size=3, max_size=3), max_size=7)


@settings(deadline=None)
@given(ROWS)
def test_boxes_tile_exactly_what_no_point_dominates(rows: list[list[float]]) -> None:
    """Counted in unit cells: one that is not dominated lies in exactly one box, any other in none."""
    lower, upper = nondominated_boxes(rows, [0.0, 0.0, 0.0])
    corners = np.stack(np.meshgrid(*[np.arange(6.0)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    inside = ((corners[:, None] >= lower) & (corners[:, None] + 1 <= upper)).all(axis=2).sum(axis=1)
    points = np.array(rows, dtype=float).reshape(-1, 3)
    dominated = (corners[:, None] + 1 <= points).all(axis=2).any(axis=1)
    assert (inside == np.where(dominated, 0, 1)).all()
    assert len(lower) <= 2 * len(rows) + 1


def test_the_sweep_agrees_with_botorch() -> None:
    rng = np.random.default_rng(0)
    values = torch.tensor(rng.normal(size=(30, 3)) + 0.5)
    reference = torch.zeros(3, dtype=torch.double)

    def volume(partitioning: FastNondominatedPartitioning) -> float:
        lower, upper = partitioning.get_hypercell_bounds().clamp_max(9.0)
        return float((upper - lower).prod(dim=-1).sum())

    ours = SweepPartitioning(reference, Y=values)
    theirs = FastNondominatedPartitioning(reference, Y=values)
    assert volume(ours) == pytest.approx(volume(theirs))
    assert volume(ours) == pytest.approx(9.0**3 - hypervolume(values.numpy(), [-1.0] * 3, [0.0] * 3))


# --------------------------------------------------------------------------------------- the local search


def test_the_local_search_finds_the_best_of_a_large_space() -> None:
    space = SearchSpace(16, (8, 16, 32, 64, 96))
    target = CanonicalLayout(tuple(index in (3, 9, 10, 14) for index in range(16)), 32)
    layouts = NewLayouts(space, frozenset(), (CanonicalLayout((True,) * 16, 8),))
    asked: list[str] = []

    def score(points: list) -> list[float]:
        found = [space.layout(point).canonical() for point in points]
        asked.extend(layout.key for layout in found)
        return [
            -sum(a != b for a, b in zip(layout.mask, target.mask, strict=True)) - abs(layout.rank - 32) / 8
            for layout in found
        ]

    best = layouts.best(score, set(), np.random.default_rng(0))
    assert best is not None
    assert space.layout(best).canonical() == target
    assert len(asked) == len(set(asked)) < 1500


def test_nothing_seen_or_taken_is_found() -> None:
    space = SearchSpace(3, (2,))
    keys = {"100-r2", "010-r2", "001-r2", "110-r2", "011-r2", "101-r2", "111-r2", "empty"}
    layouts = NewLayouts(space, frozenset(keys - {"011-r2", "empty"}), ())
    best = layouts.best(lambda points: [1.0] * len(points), {"empty"}, np.random.default_rng(0))
    assert best is not None
    assert layouts.key(best) == "011-r2"
    assert layouts.best(lambda points: [1.0], {"empty", "011-r2"}, np.random.default_rng(0)) is None


# --------------------------------------------------------------------------------------------------- noise


def observation(index: int, point: dict, space: SearchSpace, per_user: dict, **values: float) -> Observation:
    means = {name: float(np.mean(users)) for name, users in per_user.items()}
    return Observation(index, point, space.layout(point).canonical(), {**means, **values}, per_user)


def test_a_hard_user_is_no_noise_between_layouts() -> None:
    space = SearchSpace(4, (2, 4))
    points = initial_points(space, 3, 0)
    loss = [[1.0, 5.0], [2.0, 6.0], [3.0, 7.0]]  # the second user is 4 nats harder, under every layout
    trials = [observation(i, p, space, {"validation_loss": loss[i]}) for i, p in enumerate(points)]
    assert standard_errors(trials, ["validation_loss"]) == {"validation_loss": pytest.approx(0.0)}


def test_the_interaction_of_user_and_layout_is_noise() -> None:
    space = SearchSpace(8, (2, 4))
    rng = np.random.default_rng(0)
    trials = [
        observation(i, p, space, {"validation_loss": list(rng.normal(0.0, 0.3, 8) + 5 * np.arange(8))})
        for i, p in enumerate(initial_points(space, 60, 0))
    ]
    errors = standard_errors(trials, ["validation_loss", "adapter_parameters"])
    assert errors is not None
    assert errors["validation_loss"] == pytest.approx(0.3 / 8**0.5, rel=0.1)
    assert errors["adapter_parameters"] == 0.0


def test_one_probe_user_tells_no_noise_of_any_objective() -> None:
    space = SearchSpace(4, (2, 4))
    points = initial_points(space, 3, 0)
    trials = [observation(i, p, space, {"validation_loss": [1.0 + i]}) for i, p in enumerate(points)]
    assert standard_errors(trials, ["validation_loss", "adapter_parameters"]) is None


# ----------------------------------------------------------------------------------------------- proposals


def world(space: SearchSpace, layout: CanonicalLayout) -> dict[str, list[float]]:
    """A deterministic stand-in for training: upper layers and rank help, with small differences by user."""
    gain = sum((i + 1) * bit for i, bit in enumerate(layout.mask)) / sum(range(1, space.n_layers + 1))
    users = np.array([0.0, 0.3, -0.2])
    loss = 3.0 - 2.0 * gain**0.5 - 0.01 * layout.rank * gain + users
    return {"validation_loss": list(loss), "rouge_l": list(20 + 30 * gain + users * gain)}


def question(space: SearchSpace, n: int, batch: int = 1, ask: int = 3) -> Question:
    observations = []
    for index, point in enumerate(initial_points(space, n, 0)):
        layout = space.layout(point).canonical()
        size = float(sum(layout.mask) * layout.rank)
        observations.append(observation(index, point, space, world(space, layout), adapter_parameters=size))
    values = [[(o.values or {})[name] for name in OBJECTIVES] for o in observations]
    largest = float(space.n_layers * space.ranks[-1])
    reference = tuple(reference_point(values, SIGNS, [None, None, largest]))
    return Question(tuple(observations), reference, batch, ask)


def suggester(
    space: SearchSpace, inference: str = "map", seed: int = 0, objectives: tuple[str, ...] = OBJECTIVES
) -> Suggester:
    surrogate = SurrogateSection(inference=inference, n_ensemble=2, warmup_steps=8, num_samples=8, thinning=4)
    return Suggester(space, SearchSection(objectives=objectives, surrogate=surrogate), seed)


def test_proposals_are_new_different_and_the_same_every_time() -> None:
    space = SearchSpace(6, (2, 4, 8))
    asked = question(space, 10)
    proposals = suggester(space).propose(asked)
    keys = [space.layout(p.raw).canonical().key for p in proposals]
    assert [p.generator for p in proposals] == [SAAS_NEHVI] * 3
    assert len(set(keys)) == 3
    assert not set(keys) & {o.key for o in asked.observations}
    assert suggester(space).propose(asked) == proposals


def test_the_fully_bayesian_surrogate_proposes_new_layouts() -> None:
    space = SearchSpace(4, (2, 4))
    asked = question(space, 6, ask=2)
    asked = replace(asked, reference=(asked.reference or ())[:2])
    proposals = suggester(space, "nuts", objectives=OBJECTIVES[:2]).propose(asked)
    keys = {space.layout(p.raw).canonical().key for p in proposals}
    assert [p.generator for p in proposals] == [SAAS_NEHVI] * 2
    assert len(keys - {o.key for o in asked.observations}) == 2


def test_proposals_improve_the_front_more_than_chance() -> None:
    space = SearchSpace(8, (2, 4, 8, 16))
    asked = question(space, 12, ask=4)

    def volume_with(points: list[dict]) -> float:
        layouts = [space.layout(point).canonical() for point in points]
        new = [
            [*(float(np.mean(v)) for v in world(space, x).values()), sum(x.mask) * x.rank] for x in layouts
        ]
        old = [[(o.values or {})[name] for name in OBJECTIVES] for o in asked.observations]
        return hypervolume([*old, *new], SIGNS, asked.reference or ())

    proposed = volume_with([p.raw for p in suggester(space).propose(asked)])
    rng = np.random.default_rng(0)
    by_chance = [volume_with([space.sample(rng) for _ in range(4)]) for _ in range(100)]
    assert proposed > np.quantile(by_chance, 0.9)


def test_failed_trials_are_not_proposed_again() -> None:
    space = SearchSpace(3, (2, 4))
    asked = question(space, 9, ask=99)
    failed = tuple(
        Observation(o.index, o.raw, o.layout, None if o.index % 3 == 0 else o.values, o.per_user)
        for o in asked.observations
    )
    proposals = suggester(space).propose(Question(failed, asked.reference, 1, 99))
    keys = {space.layout(p.raw).canonical().key for p in proposals}
    assert len(keys) == len(proposals) == space.n_canonical - 9
    assert not keys & {o.key for o in failed}


def test_chance_proposes_where_there_is_nothing_to_fit() -> None:
    space = SearchSpace(4, (2, 4))
    proposals = suggester(space).propose(Question((), None, 1, 3))
    assert [p.generator for p in proposals] == [RANDOM] * 3
    assert proposals == suggester(space).propose(Question((), None, 1, 3))
    assert proposals != suggester(space, seed=1).propose(Question((), None, 1, 3))


def test_no_compiler_is_run() -> None:
    """BoTorch would compile a kernel behind a lock that a killed search leaves for ever."""
    assert "milp_ray.search.nehvi" in sys.modules
    assert logei._load_attempted
    assert logei._C is None
