"""What a surrogate says about its factors and about layouts, against worlds whose truth is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from milp_ray.config.search import SurrogateSection
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.memory.space import SearchSpace
from milp_ray.search.analysis import Analysis, analyse
from milp_ray.search.candidates import initial_points
from milp_ray.search.features import CanonicalRows
from milp_ray.search.observations import Observation

SPACE = SearchSpace(6, (2, 4, 8))
OBJECTIVES = ("validation_loss", "rouge_l")
SECTION = SurrogateSection(inference="map", n_ensemble=2)


def truth(layout: CanonicalLayout) -> dict[str, float]:
    """The loss falls by layer 4 alone; the score by the rank of layer 1, so by both of them together."""
    return {
        "validation_loss": 4.0 - 2.0 * layout.mask[4],
        "rouge_l": 30.0 + 10.0 * layout.mask[1] * SPACE.ranks.index(layout.rank or 2),
    }


def observe(space: SearchSpace, n: int) -> list[Observation]:
    layouts = [(point, space.layout(point).canonical()) for point in initial_points(space, n, 0)]
    return [Observation(i, raw, layout, truth(layout)) for i, (raw, layout) in enumerate(layouts)]


def study(layouts: list[CanonicalLayout], seed: int = 0) -> Analysis:
    return analyse(SPACE, OBJECTIVES, SECTION, observe(SPACE, 60), layouts, seed)


def test_the_factors_that_decide_are_found_and_shares_are_shares() -> None:
    found = study([])
    loss, score = found.objectives
    assert (loss.objective, score.objective) == OBJECTIVES
    names = [importance.factor for importance in loss.importances]
    assert names == [*(f"layer {i}" for i in range(6)), "n", "rank"]
    of_loss = {importance.factor: importance for importance in loss.importances}
    of_score = {importance.factor: importance for importance in score.importances}
    # n decides with it: where there are fewer LoRAs than active layers it says whether layer 4 keeps its own.
    assert max((name for name in names if name != "n"), key=lambda name: of_loss[name].total) == "layer 4"
    assert of_loss["rank"].total < 0.02 < 0.2 < of_loss["layer 4"].main
    assert of_score["layer 1"].total > 0.2
    assert of_score["rank"].total > 0.1
    assert of_score["rank"].total - of_score["rank"].main > 0.05  # it matters where layer 1 carries a LoRA
    for importance in (*loss.importances, *score.importances):
        assert 0.0 <= importance.main <= importance.total + 0.05
        assert importance.low - 1e-9 <= importance.total <= importance.high + 1e-9
        assert importance.total < 1.05
    assert found.n_observations == 60
    assert study([]) == found


def test_what_no_factor_tells_is_told_as_such() -> None:
    """A sixth of the score's variance is each layout's own; of the loss nothing is."""
    rng = np.random.default_rng(1)
    observed = observe(SPACE, 120)
    spread = float(np.std([o.values["rouge_l"] for o in observed if o.values]))
    own = rng.normal(0.0, spread * 0.2**0.5, len(observed))
    rough = [
        replace(o, values={**o.values, "rouge_l": o.values["rouge_l"] + more})
        for o, more in zip(observed, own, strict=True)
        if o.values
    ]
    loss, score = analyse(SPACE, OBJECTIVES, SECTION, rough, [], 0).objectives
    assert loss.unexplained[2] < 0.02
    share, low, high = score.unexplained
    assert low <= share <= high
    assert share == pytest.approx(1 / 6, abs=0.1)


def test_layouts_are_predicted_in_the_objectives_units() -> None:
    layouts = [
        CanonicalLayout((True, False, False, False, True, False), 4),
        CanonicalLayout((False, True, False, True, False, False), 8),
    ]
    found = study(layouts)
    for layout, loss, score in zip(
        layouts, found.objectives[0].predictions, found.objectives[1].predictions, strict=True
    ):
        assert loss.mean == pytest.approx(truth(layout)["validation_loss"], abs=0.3)
        assert score.mean == pytest.approx(truth(layout)["rouge_l"], abs=3.0)
        assert 0 < loss.sd < 0.5
        assert 0 < score.sd < 5.0


def test_a_held_factor_is_not_analysed() -> None:
    space = SearchSpace(6, (2, 4, 8), factors=("number", "rank"), fixed_layers=(0, 1, 4))
    found = analyse(space, OBJECTIVES[:1], SECTION, observe(space, 9), [], 0)
    assert [importance.factor for importance in found.objectives[0].importances] == ["n", "rank"]


def test_too_few_values_are_an_error() -> None:
    failed = [Observation(o.index, o.raw, o.layout, None) for o in observe(SPACE, 3)[1:]]
    with pytest.raises(ValueError, match="1 trials have values"):
        analyse(SPACE, OBJECTIVES, SECTION, [*observe(SPACE, 1), *failed], [], 0)


def test_raw_layouts_become_the_rows_of_their_canonical_form() -> None:
    rng = np.random.default_rng(0)
    points = [SPACE.sample(rng) for _ in range(50)]
    rows = CanonicalRows(SPACE)
    active = np.array([[point[f"layer_{i}"] for i in range(6)] for point in points], dtype=np.uint8)
    number = np.array([point["n_loras"] for point in points])
    rank = np.array([SPACE.ranks.index(int(point["rank"])) for point in points])
    expected = rows.encode([SPACE.layout(point).canonical() for point in points])
    np.testing.assert_array_equal(rows.canonical(active, number, rank), expected)
