"""Earlier studies help where they are to the point and change nothing where they are not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from milp_ray.config.search import SearchSection, SurrogateSection
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.memory.space import SearchSpace
from milp_ray.search.candidates import initial_points
from milp_ray.search.features import CanonicalRows
from milp_ray.search.observations import Observation
from milp_ray.search.suggest import Question, Suggester
from milp_ray.search.surrogate import earlier_studies, fit

SPACE = SearchSpace(16, (2, 4, 8))
OBJECTIVES = ("validation_loss", "rouge_l")
SECTION = SurrogateSection(inference="map", n_ensemble=2)


def truth(layout: CanonicalLayout) -> np.ndarray:
    """Many layers matter, two of them together, so that a dozen trials alone tell little."""
    mask = np.array(layout.mask, dtype=float)
    gain = mask @ np.linspace(0.0, 1.0, 16) + 3.0 * mask[5] * mask[11]
    return np.array([8.0 - gain, 20.0 + 2.0 * mask[:8].sum() - 5.0 * mask[2]])


def study(n: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> tuple[Observation, ...]:
    """The same world in other units, as another user's or base's losses are, with noise."""
    rng = np.random.default_rng(seed)
    found = []
    for index, raw in enumerate(initial_points(SPACE, n, seed)):
        layout = SPACE.layout(raw).canonical()
        values = scale * truth(layout) + shift + 0.05 * rng.standard_normal(2)
        found.append(Observation(index, raw, layout, dict(zip(OBJECTIVES, values.tolist(), strict=True))))
    return tuple(found)


def shuffled(observations: tuple[Observation, ...], seed: int) -> tuple[Observation, ...]:
    """The values of other layouts."""
    order = np.random.default_rng(seed).permutation(len(observations))
    return tuple(
        replace(o, values=observations[other].values) for o, other in zip(observations, order, strict=True)
    )


def error(new: tuple[Observation, ...], *earlier: tuple[Observation, ...]) -> np.ndarray:
    """Share of the variance of the truth that the surrogate leaves unexplained, by objective."""
    models = earlier_studies(SPACE, OBJECTIVES, SECTION, earlier)
    fitted = fit(SPACE, OBJECTIVES, SECTION, new, 0, models)
    rows = CanonicalRows(SPACE).random(300, np.random.default_rng(9))
    expected = fitted.outputs.forward([truth(fitted.rows.decode(row)) for row in rows])
    mean = fitted.posterior.mean(fitted.features(rows)).mean(dim=1).numpy()
    return ((mean - expected) ** 2).mean(axis=1) / expected.var(axis=1)


def test_a_related_study_halves_the_error_of_few_trials() -> None:
    new, related = study(14, seed=1), study(60, seed=2, scale=3.0, shift=10.0)
    assert (error(new, related) < 0.5 * error(new)).all()


def test_an_unrelated_study_changes_nothing() -> None:
    new = study(14, seed=1)
    for seed in range(3):
        np.testing.assert_allclose(error(new, shuffled(study(60, seed=2), seed)), error(new), rtol=1e-6)


def test_the_related_one_of_two_is_taken() -> None:
    new, related = study(14, seed=1), study(60, seed=2)
    both = error(new, shuffled(related, 0), related)
    np.testing.assert_allclose(both, error(new, related), rtol=0.2)


def test_objectives_decide_for_themselves() -> None:
    """An earlier study whose scores alone are worthless."""
    new, related = study(14, seed=1), study(60, seed=2)
    mixed = tuple(
        replace(o, values={**(o.values or {}), "rouge_l": (other.values or {})["rouge_l"]})
        for o, other in zip(related, shuffled(related, 0), strict=True)
    )
    found, alone = error(new, mixed), error(new)
    assert found[0] < 0.5 * alone[0]
    assert found[1] == pytest.approx(alone[1], rel=1e-3)


def test_studies_without_values_are_no_studies() -> None:
    failed = tuple(replace(o, values=None) for o in study(5, seed=2))
    assert earlier_studies(SPACE, OBJECTIVES, SECTION, [failed]) is None


def test_the_suggester_asks_its_earlier_studies() -> None:
    new, related = study(14, seed=1), study(60, seed=2)
    asked = Question(new, 1, 3)
    section = SearchSection(objectives=OBJECTIVES, surrogate=SECTION)
    with_related = Suggester(SPACE, section, 0, (related,)).propose(asked)
    assert with_related == Suggester(SPACE, section, 0, (related,)).propose(asked)
    assert with_related != Suggester(SPACE, section, 0).propose(asked)

    def gain(raws: list[dict]) -> float:
        found = np.array([truth(SPACE.layout(raw).canonical()) for raw in raws])
        return float((found * [-1.0, 1.0]).sum(axis=1).max())

    rng = np.random.default_rng(0)
    by_chance = [gain([SPACE.sample(rng) for _ in range(3)]) for _ in range(100)]
    assert gain([p.raw for p in with_related]) > np.quantile(by_chance, 0.9)
    assert torch.get_num_threads() == 1
