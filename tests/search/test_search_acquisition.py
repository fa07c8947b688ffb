"""The search over layouts finds the best one that may still be proposed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from milp_ray.memory.layout import CanonicalLayout
from milp_ray.memory.space import SearchSpace
from milp_ray.search.acquisition import Effort, NewLayouts
from milp_ray.search.features import CanonicalRows, Rows, row_keys
from milp_ray.search.nehvi import NoisyHypervolumeImprovement
from milp_ray.search.posterior import Posterior
from milp_ray.search.saas import Hyperparameters

CLIMB = Effort(try_all=0, n_random=64, n_front=2, n_kept=64)


def nothing(rows: CanonicalRows) -> Rows:
    return rows.encode([])


def test_the_climb_finds_the_best_of_a_large_space() -> None:
    rows = CanonicalRows(SearchSpace(32, (8, 16, 32, 64, 96)))
    target = rows.encode([CanonicalLayout(tuple(i in (3, 9, 10, 14, 30) for i in range(32)), 32)])[0]
    asked: list[bytes] = []

    def score(found: Rows) -> np.ndarray:
        asked.extend(row_keys(found))
        return -np.abs(found.astype(float) - target).sum(axis=1)

    new = NewLayouts(rows, (), nothing(rows), np.random.default_rng(0))
    best = new.take_best(score)
    assert best is not None
    assert rows.decode(best) == rows.decode(target)
    assert len(asked) == len(set(asked)) < 15000
    second = new.take_best(score)
    assert second is not None
    assert score(second[None])[0] == -1


@pytest.mark.parametrize("effort", [CLIMB, Effort()])
def test_nothing_unavailable_is_found_and_nothing_twice(effort: Effort) -> None:
    rows = CanonicalRows(SearchSpace(3, (2,)))
    everything = rows.all()
    new = NewLayouts(rows, row_keys(everything[2:]), everything[:1], np.random.default_rng(0), effort)
    found = [new.take_best(lambda x: x.sum(axis=1).astype(float)) for _ in range(3)]
    assert found[2] is None
    assert {row.tobytes() for row in found[:2] if row is not None} == set(row_keys(everything[:2]))


@settings(deadline=None, max_examples=20, derandomize=True)
@given(
    st.sampled_from(
        [
            SearchSpace(8, (2, 4, 8)),
            SearchSpace(9, (2, 4, 8, 16), factors=("layers", "rank"), fixed_number=3),
            SearchSpace(8, (4,), factors=("layers",)),
            SearchSpace(8, (2, 4, 8), factors=("number", "rank")),
        ]
    ),
    st.integers(0, 2**31 - 1),
)
def test_the_climb_finds_the_optimum_of_the_acquisition(space: SearchSpace, seed: int) -> None:
    """The acquisition of a random posterior, over a space that can be tried as a whole; two in a row."""
    rng = np.random.default_rng(seed)
    rows = CanonicalRows(space)
    observed = rows.random(10, rng)
    d = space.n_layers + 2
    found = Hyperparameters(
        weights=torch.from_numpy(0.3 * rng.random((2, 2, d)) * (rng.random((2, 2, d)) < 0.5)),
        outputscale=torch.ones(2, 2).double(),
        noise=torch.full((2, 2), 0.01).double(),
        roughness=torch.zeros(2, 2).double(),
        mean=torch.zeros(2, 2).double(),
    )
    features = torch.from_numpy(rows.features(observed))
    posterior = Posterior(features, torch.from_numpy(rng.normal(size=(2, 10))), found)
    corner = torch.full((2,), -1.0).double()
    acquisition = NoisyHypervolumeImprovement(
        posterior, features, features[:0], corner, n_more=2, seed=seed % 1000
    )

    def score(candidates: Rows) -> np.ndarray:
        return acquisition(torch.from_numpy(rows.features(candidates))).numpy()

    new = NewLayouts(rows, row_keys(observed), observed[:2], rng, CLIMB)
    unavailable = set(row_keys(observed))
    for _ in range(2):
        available = np.stack([row for row in rows.all() if row.tobytes() not in unavailable])
        best = new.take_best(score)
        assert best is not None
        assert best.tobytes() not in unavailable
        assert score(best[None])[0] == pytest.approx(score(available).max(), abs=1e-6)
        unavailable.add(best.tobytes())
        acquisition.add_pending(torch.from_numpy(rows.features(best[None]))[0])
