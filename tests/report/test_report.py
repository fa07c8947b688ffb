"""The report: figures are pictures, the page holds the tables, and neither holds a user's text."""

from __future__ import annotations

import json
import random
import re
import struct
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from milp_ray.config import Config, EvaluationSection
from milp_ray.evaluation.compare import compare
from milp_ray.evaluation.scores import as_table, write_scores
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.report.content import ReportContent, StudyContent, failed_reasons, study_content, summary_of
from milp_ray.report.html import facts, findings, render
from milp_ray.report.importance_figure import importance_figure
from milp_ray.report.score_figures import differences_figure, kinds_figure, methods_figure, seconds_figure
from milp_ray.report.stage import write_page, write_report
from milp_ray.report.study_figures import Trial, hypervolume_figure, layout_figure, pareto_figure
from milp_ray.report.study_text import cost_sentences
from milp_ray.report.style import METHOD_COLOURS, duration, plus_minus, robust_limits, save, thousands
from milp_ray.search.insight import load_study

METHODS = ("base", "text_prompt", "oracle_profile", "memory_only", "instruction_only", "milp")
KINDS = (
    ("direct", "seen"),
    ("direct", "unseen"),
    ("implicit", "unseen"),
    ("changed", "unseen"),
    ("generic", "none"),
)


def scored(n_users: int = 5, methods: tuple[str, ...] = METHODS, tagged: bool = True) -> list[dict[str, Any]]:
    """Rows of made-up scores: every second user has a long history."""
    rng = random.Random(0)
    rows = []
    for u in range(n_users):
        for strength, method in enumerate(methods):
            for i, (kind, exposure) in enumerate(KINDS):
                rows.append(
                    {
                        "user_id": f"u{u}",
                        "method": method,
                        "example": i,
                        "kind": kind if tagged else "example",
                        "exposure": exposure if tagged else "none",
                        "order": ("fact_first", "choice_first")[i % 2] if tagged else "none",
                        "mentions": "none",
                        "attribute": ("pet", "diet")[i % 2] if tagged else "none",
                        "history_fits": u % 2 == 0,
                        "loss": 3.0 - 0.2 * strength + 0.1 * rng.random(),
                        "n_tokens": 6,
                        "rouge_1": 20.0 + 5 * strength + rng.random(),
                        "rouge_l": 18.0 + 5 * strength + rng.random(),
                        "persona_f1": 1.0 + 0.3 * strength,
                        "fact_accuracy": float(rng.random() < strength / 5)
                        if tagged and kind != "generic"
                        else None,
                    }
                )
    return rows


def comparison_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return compare(as_table(rows), EvaluationSection(n_bootstrap=50), seed=0)


def make_trials(n: int = 12, diverged: bool = False) -> list[Trial]:
    rng = random.Random(1)
    trials = []
    for i in range(n):
        mask = tuple(rng.random() < 0.5 for _ in range(4))
        loss = 2.0 - 0.2 * sum(mask) + 0.1 * rng.random()
        values = {"validation_loss": loss, "rouge_l": 60 - 15 * loss, "adapter_parameters": 100.0 * sum(mask)}
        generator = "sobol" if i < 8 else "saas_nehvi"
        trials.append(
            Trial(i, generator, mask, rng.choice((8, 16)), values, on_front=i % 4 == 0, chosen=i == 4)
        )
    if diverged:
        values = {"validation_loss": 50.0, "rouge_l": 0.0, "adapter_parameters": 400.0}
        trials.append(Trial(n, "saas_nehvi", (True,) * 4, 16, values))
    return trials


@pytest.fixture(scope="module")
def study(
    study_events: Any, make_study_run: Any, build_analysis: Any, tmp_path_factory: pytest.TempPathFactory
) -> StudyContent:
    """Ten trials with values, one that failed and one that was stopped; trial 6 was chosen; with a model."""
    run = make_study_run(tmp_path_factory.mktemp("studied"), study_events())
    return study_content(load_study(run), {"trial": 6}, build_analysis)


@pytest.fixture(scope="module")
def content(study: StudyContent) -> ReportContent:
    return ReportContent(
        name="demo",
        study=study,
        chosen={
            "layout": {**CanonicalLayout((True, True, True, False), 8).to_dict(), "key": "1110-r8"},
            "rule": "best_loss",
            "reason": "It is the lowest.",
            "adapter_parameters": 12345,
            "trial": 6,
        },
        comparison=comparison_of(scored()),
        seconds={"search": 71.2, "personalize": 30.0},
        peak_rss_mib=2048.0,
        failures={"personalize": {"training <diverged>": 2}},
        versions={"milp_ray": "0.1.0", "packages": {"torch": "2.13.0"}},
        config_yaml="name: demo\n",
    )


def picture_size(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", head[16:24])
    return width, height


# ---------------------------------------------------------------------------------------------- figures


@pytest.mark.parametrize(
    "make",
    [
        lambda: pareto_figure(make_trials()),
        lambda: pareto_figure(make_trials(diverged=True)),
        lambda: pareto_figure(make_trials(1)),
        lambda: hypervolume_figure([0.0, 0.5, 0.5, 0.7], 2),
        lambda: hypervolume_figure([0.0], 1),
        lambda: hypervolume_figure([0.0, 0.5], 1, [(20.0, 0.1), (7300.0, 0.5)]),
        lambda: layout_figure(make_trials(diverged=True)),
        lambda: layout_figure(make_trials(1)),
        lambda: methods_figure(comparison_of(scored())),
        lambda: methods_figure(comparison_of(scored(1, ("base",), tagged=False))),
        lambda: kinds_figure(comparison_of(scored())),
        lambda: kinds_figure(comparison_of(scored(1))),
        lambda: kinds_figure(comparison_of(scored(tagged=False))),
        lambda: differences_figure(comparison_of(scored())),
        lambda: seconds_figure({"search": 70.0, "evaluate": 0.0}),
    ],
)
def test_every_figure_is_a_picture_of_a_readable_size(make: Any, tmp_path: Path) -> None:
    width, height = picture_size(save(make(), tmp_path / "figure.png"))
    assert 600 <= width <= 2400
    assert 150 <= height <= 2400


def test_the_same_figure_is_the_same_file(tmp_path: Path) -> None:
    first, second = (save(pareto_figure(make_trials()), tmp_path / name) for name in ("a.png", "b.png"))
    assert first.read_bytes() == second.read_bytes()


def test_figures_that_would_say_nothing_are_not_drawn() -> None:
    short = [r for r in scored(tagged=False) if r["history_fits"]]
    assert kinds_figure(comparison_of(short)) is None
    assert differences_figure(comparison_of(scored(methods=("base",)))) is None


def test_drawing_leaves_matplotlib_as_it_was() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    seconds_figure({"search": 1.0})
    assert dict(matplotlib.rcParams) == before


def test_a_method_has_one_colour_of_its_own() -> None:
    assert set(METHOD_COLOURS) == set(METHODS)
    assert len(set(METHOD_COLOURS.values())) == len(METHODS)


def test_the_front_marks_what_is_on_it_and_what_was_chosen() -> None:
    figure = pareto_figure(make_trials())
    by_label = {c.get_label(): len(c.get_offsets()) for c in figure.axes[0].collections}
    assert by_label == {
        "Initial (Sobol)": 8,
        "Proposed by the surrogate": 4,
        "Pareto front": 3,
        "Chosen layout": 1,
    }
    assert [axes.get_xlabel().partition(",")[0] for axes in figure.axes] == [
        "Validation loss (nats a token)",
        "Adapter parameters",
    ]


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


# ------------------------------------------------------------------------------------------------- page


class Page(HTMLParser):
    """Tags that are open, pictures, table rows, and what a browser would load."""

    VOID = ("meta", "img", "link", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[str] = []
        self.loaded: list[str] = []
        self.rows: list[list[str]] = []
        self.captions: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(given["src"] or "")
            assert given["alt"]
        self.loaded += [v for k, v in attrs if k in ("src", "href") and v]
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "tr" in self.open and data.strip():
            self.rows[-1].append(data.strip())
        if self.open and self.open[-1] == "caption":
            self.captions.append(data)


@pytest.fixture(scope="module")
def written_page(content: ReportContent, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(content, tmp_path_factory.mktemp("run") / "report")


def test_the_page_is_whole_and_loads_nothing_but_its_figures(written_page: Path) -> None:
    path = written_page
    page = Page(path.read_text("utf-8"))
    assert page.open == []
    assert len(page.images) == 8
    assert page.loaded == page.images
    for image in page.images:
        assert not image.startswith(("/", "http"))
        assert picture_size(path.parent / image)[0] >= 600
    assert "<script" not in path.read_text("utf-8")


def test_the_page_holds_the_tables(written_page: Path, content: ReportContent) -> None:
    page = Page(written_page.read_text("utf-8"))
    rows = {row[0]: row[1:] for row in page.rows if row}
    mean = content.comparison["scores"]["milp"]["all"]["rouge_l"]["mean"]  # type: ignore[index]
    assert f"{mean:.1f}" in rows["MiLP"]
    assert any("history fits the context" in caption for caption in page.captions)
    assert any("history longer than the context" in caption for caption in page.captions)
    assert any("front" in caption for caption in page.captions)
    chosen = content.chosen["layout"]["key"]  # type: ignore[index]
    assert rows[f"{chosen} (chosen)"][:2] == ["6", "1.56"]
    assert rows["Layer 2"][:2] == ["0.80", "0.40 to 0.90"]
    assert {"MiLP − base alone", "MiLP − text prompt"} <= rows.keys()


def test_what_stands_in_the_data_cannot_break_the_page(content: ReportContent) -> None:
    rows = [{**row, "kind": "<script>alert(1)</script>" if row["example"] else "direct"} for row in scored()]
    shown = ReportContent(name="<b>x</b>", comparison=comparison_of(rows), failures=content.failures)
    text = render(shown, {})
    assert "<script>alert" not in text
    assert "<b>x</b>" not in text
    assert "training &lt;diverged&gt;" in text


def test_a_run_with_nothing_but_a_name_has_a_page() -> None:
    assert Page(render(ReportContent(name="early"), {})).rows == []


def test_the_findings_tell_defeats_as_well() -> None:
    rows = scored(methods=("milp", "text_prompt", "base"))  # later methods are the stronger ones here
    [first, *_] = findings(comparison_of(rows))
    assert "MiLP is behind base alone" in first
    assert "ahead" not in first


def test_the_facts_count_failed_and_stopped_trials_too(content: ReportContent) -> None:
    found = {name: (value, remark) for name, value, remark in facts(content)}
    assert found["Trials"] == ("12", "4 on the front, 1 stopped early, 1 failed")
    assert found["Time"] == ("1 min 41 s", "peak memory 2.0 GiB")


# ------------------------------------------------------------------------------------------------ a run


def test_the_summary_has_what_programs_ask_for(content: ReportContent, study: StudyContent) -> None:
    summary = summary_of(content)
    json.dumps(summary, allow_nan=False)
    assert (summary["n_trials"], summary["n_failed_trials"], summary["n_stopped_trials"]) == (12, 1, 1)
    assert (summary["n_users"], summary["hypervolume"]) == (5, study.hypervolumes[-1])
    assert [point["key"] for point in summary["front"]] == ["1110-r8", "1100-r8", "0101-r8", "1000-r8"]
    assert summary["front"][0]["adapter_parameters"] == 300
    assert summary["importance"]["rouge_l"]["layer 2"] == [0.8, 0.4, 0.9]
    assert (summary["search_cost"]["trial_seconds"], summary["search_cost"]["idle_share"]) == (84.0, 0.0)
    assert summary["scores"]["milp"]["direct"]["fact_accuracy"].keys() == {
        "mean", "low", "high", "n_users", "n_examples",
    }  # fmt: skip
    assert "milp - text_prompt" in summary["differences"]
    assert [point["trial"] for point in summary["front"]] == [6, 2, 9, 0]
    assert summary["chosen"]["trial"] == 6
    assert (summary["seconds"]["search"], summary["peak_rss_mib"]) == (71.2, 2048.0)
    assert summary["failed_users"] == {"personalize": 2}


def test_a_study_leaves_failed_trials_out_and_keeps_values_in_step(
    study_events: Any, make_study_run: Any, build_analysis: Any, tmp_path: Path
) -> None:
    events = study_events(6, is_finished=True)
    [place] = [i for i, e in enumerate(events) if e["event"] == "trial_completed" and e["index"] == 2]
    events[place] = {"event": "trial_failed", "index": 2, "reason": "diverged", "time": events[place]["time"]}
    study = load_study(make_study_run(tmp_path, events))
    found = study_content(study, {"trial": 5}, build_analysis)
    assert [trial.index for trial in found.trials] == [0, 1, 3, 4, 5]
    assert (found.n_failed, found.n_stopped, found.n_ended, found.n_initial) == (1, 0, 6, 3)
    assert found.hypervolumes == tuple(study.result.history[i] for i in (0, 1, 3, 4, 5))
    assert [trial.index for trial in found.trials if trial.chosen] == [5]
    assert found.chosen_mask == (False, True, True, False)
    on_front = [trial for trial in found.trials if trial.on_front]
    assert {trial.index for trial in on_front} == {point.index for point in study.result.front}
    assert all(bool(trial.model) == trial.on_front for trial in found.trials)


def test_a_study_without_an_analysis_has_its_page_which_says_why(
    study_events: Any, make_study_run: Any, tmp_path: Path
) -> None:
    run = make_study_run(tmp_path, study_events(3))
    page = write_report(run)
    text = page.read_text("utf-8")
    assert "says nothing of single layers here: 3 trials have values" in text
    assert sorted(path.stem for path in (run.report / "figures").iterdir()) == [
        "front",
        "hypervolume",
        "layout",
    ]
    assert "Importance" not in text
    assert json.loads(run.summary_file.read_text("utf-8"))["importance"] is None


def test_a_study_before_its_first_value_has_its_page(
    study_events: Any, make_study_run: Any, tmp_path: Path
) -> None:
    page = Page(write_report(make_study_run(tmp_path, study_events(0)[:2])).read_text("utf-8"))
    assert (page.images, page.open) == ([], [])


def test_the_cost_of_a_search_in_sentences(study: StudyContent) -> None:
    text = " ".join(cost_sentences(study.status))
    assert text == (
        "The search took 56 s; its trials worked for 1 min 24 s (84 CPU-seconds). 75% of the time of its 2 "
        "slots was spent in trials; while trials were still to be proposed, 0.0% of it stood idle. Proposing "
        "1 batch took 1.5 s, the longest 1.5 s. 1 trial was stopped early, and no value of theirs counts."
    )
    held = replace(study.status, n_sessions=2, gpu_seconds=42.0, max_block_seconds=0.126)
    text = " ".join(cost_sentences(held))
    assert "56 s in 2 sessions" in text
    assert "84 CPU-seconds and 42 GPU-seconds" in text
    assert "never held up for longer than 0.13 s" in text
    unknown = replace(study.status, n_slots=None, utilisation=None, idle_share=None, proposal_seconds=None)
    assert "slots" not in " ".join(cost_sentences(unknown))


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


def test_what_the_model_believes_of_the_front_is_inside_the_axes() -> None:
    trials = make_trials()
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


def test_failures_are_counted_by_reason(tmp_path: Path) -> None:
    path = tmp_path / "failed.jsonl"
    assert failed_reasons(path) == {}
    path.write_text("".join(json.dumps({"user_id": f"u{i}", "reason": "ab"[i > 0]}) + "\n" for i in range(3)))
    assert failed_reasons(path) == {"b": 2, "a": 1}


def test_a_run_folder_with_scores_alone_gets_summary_and_page(tmp_path: Path) -> None:
    from milp_ray.rundir import RunFolder

    run = RunFolder.create(Config(name="only-scores", output_dir=tmp_path))
    write_scores(run.scores_file, scored())
    page = write_report(run)
    assert page == run.report / "index.html"
    summary = json.loads(run.summary_file.read_text("utf-8"))
    assert (summary["n_users"], summary["n_trials"]) == (5, None)
    assert not re.search(r"\bu[0-9]\b", page.read_text("utf-8"))
