"""Figures of the report, and how numbers are written in them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from milp_ray.report.content import StudyContent
from milp_ray.report.importance_figure import importance_figure
from milp_ray.report.score_figures import differences_figure, kinds_figure, methods_figure, seconds_figure
from milp_ray.report.study_figures import hypervolume_figure, layout_figure, pareto_figure
from milp_ray.report.style import METHOD_COLOURS, duration, plus_minus, robust_limits, save, thousands


@pytest.mark.parametrize(
    "make",
    [
        lambda made: pareto_figure(made.trials()),
        lambda made: pareto_figure(made.trials(diverged=True)),
        lambda made: pareto_figure(made.trials(1)),
        lambda made: hypervolume_figure([0.0, 0.5, 0.5, 0.7], 2),
        lambda made: hypervolume_figure([0.0], 1),
        lambda made: hypervolume_figure([0.0, 0.5], 1, [(20.0, 0.1), (7300.0, 0.5)]),
        lambda made: layout_figure(made.trials(diverged=True)),
        lambda made: layout_figure(made.trials(1)),
        lambda made: methods_figure(made.comparison()),
        lambda made: methods_figure(made.comparison(1, ("base",), tagged=False)),
        lambda made: kinds_figure(made.comparison()),
        lambda made: kinds_figure(made.comparison(1)),
        lambda made: kinds_figure(made.comparison(tagged=False)),
        lambda made: differences_figure(made.comparison()),
        lambda made: seconds_figure({"search": 70.0, "evaluate": 0.0}),
    ],
)
def test_every_figure_is_a_picture_of_a_readable_size(made: Any, make: Any, tmp_path: Path) -> None:
    width, height = made.size_of(save(make(made), tmp_path / "figure.png"))
    assert 600 <= width <= 2400
    assert 150 <= height <= 2400


def test_the_same_figure_is_the_same_file(made: Any, tmp_path: Path) -> None:
    first, second = (save(pareto_figure(made.trials()), tmp_path / name) for name in ("a.png", "b.png"))
    assert first.read_bytes() == second.read_bytes()


def test_figures_that_would_say_nothing_are_not_drawn(made: Any) -> None:
    short = [r for r in made.scores(tagged=False) if r["history_fits"]]
    assert kinds_figure(made.comparison_of(short)) is None
    assert differences_figure(made.comparison(methods=("base",))) is None


def test_drawing_leaves_matplotlib_as_it_was() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    seconds_figure({"search": 1.0})
    assert dict(matplotlib.rcParams) == before


def test_a_method_has_one_colour_of_its_own(made: Any) -> None:
    assert set(METHOD_COLOURS) == set(made.methods)
    assert len(set(METHOD_COLOURS.values())) == len(made.methods)


def test_the_front_marks_what_is_on_it_and_what_was_chosen(made: Any) -> None:
    figure = pareto_figure(made.trials())
    by_label = {c.get_label(): len(c.get_offsets()) for c in figure.axes[0].collections}
    assert by_label == {
        "Initial": 8,
        "Proposed by the surrogate": 4,
        "Pareto front": 3,
        "Chosen layout": 1,
    }
    assert [axes.get_xlabel().partition(",")[0] for axes in figure.axes] == [
        "Validation loss (nats a token)",
        "Adapter parameters",
    ]


def test_the_front_tells_who_gave_a_layout_and_does_not_take_chance_for_the_surrogate(made: Any) -> None:
    generators = ["warm_start", "sobol", "random"]
    trials = [replace(t, generator=generators[t.index]) if t.index < 3 else t for t in made.trials()]
    counts = {c.get_label(): len(c.get_offsets()) for c in pareto_figure(trials).axes[0].collections}
    assert counts["Initial"] == 7
    assert counts["At random (no proposal)"] == 1
    assert counts["Proposed by the surrogate"] == 4


def test_a_trial_outside_both_axes_is_counted_once(made: Any) -> None:
    axes = pareto_figure(made.trials(diverged=True)).axes[0]
    [low, high], [bottom, top] = axes.get_xlim(), axes.get_ylim()
    assert not low <= 50.0 <= high
    assert not bottom <= 0.0 <= top
    assert [text.get_text() for text in axes.texts] == ["1 outside the axes"]


def test_diverged_trials_do_not_squash_the_others() -> None:
    low, high = robust_limits([1.0, 1.1, 1.2, 1.3, 80.0])
    assert low < 1.0
    assert 1.3 < high < 2.0
    low, high = robust_limits([5.0])
    assert low < 5.0 < high


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.42, "0.4 s"), (42.4, "42 s"), (185.0, "3 min 05 s"), (7800.0, "2 h 10 min")]
)
def test_durations_are_said_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_counts_are_short() -> None:
    assert [thousands(n) for n in (0, 950, 12_000, 1_540_000)] == ["0", "950", "12k", "1.5M"]


def test_the_layer_map_marks_the_chosen_layers_and_has_a_bar_a_factor(study: StudyContent) -> None:
    assert study.analysis is not None
    figure = importance_figure(study.analysis, study.chosen_mask)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Validation loss", "ROUGE-L"]
    for axes in figure.axes:
        assert [bar.get_height() for bar in axes.patches] == [0.1, 0.0, 0.8, 0.4, 0.05, 0.2]
        [marked] = [line for line in axes.lines if line.get_label() == "Layers of the chosen layout"]
        assert list(marked.get_xdata()) == [0, 1, 2]
    plain = importance_figure(study.analysis)
    assert not [line for line in plain.axes[0].lines if line.get_label() == "Layers of the chosen layout"]


def test_what_the_model_believes_of_the_front_is_inside_the_axes(made: Any) -> None:
    trials = made.trials()
    lowest = min(trial.values["validation_loss"] for trial in trials)
    believed = {"validation_loss": (lowest - 0.1, 0.05), "rouge_l": (40.0, 1.0)}
    axes = pareto_figure([replace(t, model=believed) if t.index == 4 else t for t in trials]).axes[0]
    [bars] = [c for c in axes.containers if c.get_label() == "Front as the model sees it (mean ± sd)"]
    assert list(bars.lines[0].get_xdata()) == [lowest - 0.1]
    assert axes.get_xlim()[0] < lowest - 0.15


@pytest.mark.parametrize(
    ("value", "spread", "text"),
    [
        (0.24891, 0.00182, "0.2489 ± 0.0018"),
        (55.394, 3.21, "55.4 ± 3.2"),
        (102559.4, 1538.2, "102,559 ± 1,538"),
        (8448.0, 0.0, "8,448"),
        (0.5, None, "0.5"),
        (1.56, 2e-16, "1.56"),
    ],
)
def test_a_value_is_written_to_the_second_digit_of_its_error(
    value: float, spread: float | None, text: str
) -> None:
    assert plus_minus(value, spread) == text
