"""The report: the page holds the tables, and nothing in it is a user's text."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from milp_ray.config import Config
from milp_ray.evaluation.scores import write_scores
from milp_ray.personalize import tally
from milp_ray.report.content import ReportContent, StudyContent, failed_reasons, study_content, summary_of
from milp_ray.report.html import facts, findings, render
from milp_ray.report.stage import write_page, write_report
from milp_ray.report.study_text import cost_sentences
from milp_ray.search.insight import load_study


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


def test_the_page_is_whole_and_loads_nothing_but_its_figures(made: Any, written_page: Path) -> None:
    path = written_page
    page = Page(path.read_text("utf-8"))
    assert page.open == []
    assert len(page.images) == 8
    assert page.loaded == page.images
    for image in page.images:
        assert not image.startswith(("/", "http"))
        assert made.size_of(path.parent / image)[0] >= 600
    assert "<script" not in path.read_text("utf-8")


def test_the_page_holds_the_tables(written_page: Path, content: ReportContent) -> None:
    page = Page(written_page.read_text("utf-8"))
    rows = {row[0]: row[1:] for row in reversed(page.rows) if row}  # of rows with one name the first
    mean = content.comparison["scores"]["milp"]["all"]["rouge_l"]["mean"]
    assert f"{mean:.1f}" in rows["MiLP"]
    assert any("history fits the context" in caption for caption in page.captions)
    assert any("history longer than the context" in caption for caption in page.captions)
    assert any("front" in caption for caption in page.captions)
    chosen = content.chosen["layout"]["key"]
    assert rows[f"{chosen} (chosen)"][:2] == ["6", "1.56"]
    assert rows["Layer 2"][:2] == ["0.80", "0.40 to 0.90"]
    assert {"MiLP − base alone", "MiLP − text prompt"} <= rows.keys()


def test_what_stands_in_the_data_cannot_break_the_page(made: Any, content: ReportContent) -> None:
    rows = [
        {**row, "kind": "<script>alert(1)</script>" if row["example"] else "direct"} for row in made.scores()
    ]
    shown = ReportContent(name="<b>x</b>", comparison=made.comparison_of(rows), failures=content.failures)
    text = render(shown, {})
    assert "<script>alert" not in text
    assert "<b>x</b>" not in text
    assert "training &lt;diverged&gt;" in text


def test_a_run_with_nothing_but_a_name_has_a_page() -> None:
    assert Page(render(ReportContent(name="early"), {})).rows == []


def test_the_findings_tell_defeats_as_well(made: Any) -> None:
    rows = made.scores(methods=("milp", "text_prompt", "base"))  # later methods are the stronger ones here
    [first, *_] = findings(made.comparison_of(rows))
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
    assert summary["unexplained"]["rouge_l"] == [0.35, 0.25, 0.45]
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


def test_a_value_that_is_no_number_and_no_objective_is_left_out(
    study_events: Any, make_study_run: Any, build_analysis: Any, tmp_path: Path
) -> None:
    events = study_events(6, is_finished=True)
    next(e for e in events if e["event"] == "trial_completed")["metrics"]["adapter_parameters"] = None
    found = study_content(load_study(make_study_run(tmp_path, events)), None, build_analysis)
    assert ["adapter_parameters" in trial.values for trial in found.trials] == [False] + [True] * 5


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


def test_failures_are_counted_by_reason(tmp_path: Path) -> None:
    path = tmp_path / "failed.jsonl"
    assert failed_reasons(path) == {}
    path.write_text("".join(json.dumps({"user_id": f"u{i}", "reason": "ab"[i > 0]}) + "\n" for i in range(3)))
    assert failed_reasons(path) == {"b": 2, "a": 1}


def test_no_user_is_named_on_the_page(content: ReportContent, tmp_path: Path) -> None:
    path = tmp_path / "failed.jsonl"
    lines = [{"user_id": f"ann-{n}", "reason": f'user "ann-{n}" has no history of {n} turns'} for n in (1, 2)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    reasons = failed_reasons(path)
    assert list(reasons.values()) == [2]
    versions = {"probe_users": ["ann-1", "ann-2", "ann-3"], "seed": 7}
    page = render(replace(content, failures={"personalize": reasons}, versions=versions), {})
    assert "ann-" not in page
    assert ["probe_users", "3"] in Page(page).rows


def test_there_are_no_more_rows_of_reasons_than_anybody_reads(tmp_path: Path) -> None:
    path = tmp_path / "failed.jsonl"
    words = ["".join(letters) for letters in product("abcdefgh", repeat=2)]
    path.write_text("".join(json.dumps({"reason": word}) + "\n" for word in words))
    reasons = failed_reasons(path)
    assert len(reasons) == tally.MOST_REASONS + 1
    assert sum(reasons.values()) == len(words)


def test_a_run_folder_with_scores_alone_gets_summary_and_page(made: Any, tmp_path: Path) -> None:
    from milp_ray.rundir import RunFolder

    run = RunFolder.create(Config(name="only-scores", output_dir=tmp_path))
    write_scores(run.scores_file, made.scores())
    page = write_report(run)
    assert page == run.report / "index.html"
    summary = json.loads(run.summary_file.read_text("utf-8"))
    assert (summary["n_users"], summary["n_trials"]) == (5, None)
    assert not re.search(r"\bu[0-9]\b", page.read_text("utf-8"))
