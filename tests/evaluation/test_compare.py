"""From rows to tables: the right rows in the right means, and sensible tables for data without tags."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from milp_ray.config.evaluation import EvaluationSection
from milp_ray.errors import MilpError
from milp_ray.evaluation.compare import compare, main_measure, measured
from milp_ray.evaluation.measures import MEASURES
from milp_ray.evaluation.scores import (
    LATER_COLUMNS,
    as_table,
    read_scores,
    read_users_scored,
    score_rows,
    write_scores,
)
from milp_ray.evaluation.tables import kind_rows, terminal_tables
from milp_ray.users.records import Example

SECTION = EvaluationSection(n_bootstrap=200)


def row(user: str, method: str, example: int = 0, **changes: Any) -> dict[str, Any]:
    return {
        "user_id": user,
        "method": method,
        "example": example,
        "kind": "example",
        "exposure": "none",
        "order": "none",
        "mentions": "none",
        "attribute": "none",
        "history_fits": True,
        "loss": 1.0,
        "n_tokens": 4,
        "rouge_1": 50.0,
        "rouge_l": 40.0,
        "persona_f1": 2.0,
        "fact_accuracy": None,
        **dict.fromkeys(LATER_COLUMNS),
        **changes,
    }


def compared(rows: list[dict[str, Any]]) -> dict[str, Any]:
    found = compare(as_table(rows), SECTION, seed=0)
    json.dumps(found, allow_nan=False)
    return found


@pytest.fixture
def world() -> list[dict[str, Any]]:
    """Four users, two of them with long histories, three methods, all kinds; milp is right, base never is."""
    rows = []
    for u in range(4):
        for method, right in (("base", 0.0), ("text_prompt", 1.0 if u < 2 else 0.0), ("milp", 1.0)):
            for i, (kind, exposure) in enumerate(
                [("direct", "seen"), ("direct", "unseen"), ("changed", "unseen"), ("generic", "none")]
            ):
                rows.append(
                    row(
                        f"u{u}",
                        method,
                        i,
                        kind=kind,
                        exposure=exposure,
                        history_fits=u < 2,
                        order="fact_first" if i % 2 else "choice_first",
                        rouge_l=30.0 + 10 * right + u,
                        fact_accuracy=None if kind == "generic" else right,
                    )
                )
    return rows


def test_every_user_weighs_the_same_however_many_examples() -> None:
    rows = [row("a", "base", i, rouge_l=0.0) for i in range(9)] + [row("b", "base", rouge_l=100.0)]
    cell = compared(rows)["scores"]["base"]["all"]["rouge_l"]
    assert (cell["mean"], cell["n_users"], cell["n_examples"]) == (50.0, 2, 10)


def test_a_users_loss_is_a_mean_over_tokens() -> None:
    rows = [row("a", "base", 0, loss=1.0, n_tokens=1), row("a", "base", 1, loss=2.0, n_tokens=3)]
    assert compared(rows)["scores"]["base"]["all"]["loss"]["mean"] == pytest.approx(1.75)


def test_an_example_without_an_answer_counts_neither_way() -> None:
    rows = [row("a", "base", 0, fact_accuracy=1.0), row("a", "base", 1)]
    cell = compared(rows)["scores"]["base"]["all"]["fact_accuracy"]
    assert (cell["mean"], cell["n_examples"]) == (1.0, 1)


def test_slices_hold_their_rows_alone(world: list[dict[str, Any]]) -> None:
    found = compared(world)
    accuracy = {
        key: cells["fact_accuracy"]["mean"]
        for key, cells in found["scores"]["text_prompt"].items()
        if "fact_accuracy" in cells
    }
    assert accuracy["all"] == accuracy["unseen"] == accuracy["direct/unseen"] == 0.5
    assert accuracy["fits:all"] == accuracy["fits:changed"] == 1.0
    assert accuracy["long:all"] == accuracy["long:direct/seen"] == 0.0
    assert "generic" not in accuracy
    assert found["slices"]["long:direct/unseen"] == {
        "label": "direct, unseen",
        "history": "long",
        "kind": "direct",
        "exposure": "unseen",
        "tag": "",
        "value": "",
        "n_users": 2,
        "n_examples": 2,
    }
    assert {"order:choice_first", "order:fact_first"} <= found["slices"].keys()
    assert (found["n_users"], found["n_users_fits"], found["n_users_long"]) == (4, 2, 2)


def test_differences_are_paired_inside_users(world: list[dict[str, Any]]) -> None:
    found = compared(world)["differences"]
    # Users differ in ROUGE-L, the difference between the methods does not: its interval is a point.
    assert found["milp - base"]["all"]["rouge_l"] == {"mean": 10.0, "low": 10.0, "high": 10.0, "n_users": 4}
    assert found["milp - text_prompt"]["fits:all"]["fact_accuracy"]["mean"] == 0.0
    assert found["milp - text_prompt"]["long:all"]["fact_accuracy"]["mean"] == 1.0


def test_differences_leave_out_users_that_lack_one_of_the_methods() -> None:
    rows = [row("a", "base", rouge_l=10.0), row("a", "milp", rouge_l=30.0), row("b", "milp", rouge_l=90.0)]
    cell = compared(rows)["differences"]["milp - base"]["all"]["rouge_l"]
    assert (cell["mean"], cell["n_users"]) == (20.0, 1)


def test_the_order_of_rows_does_not_matter(world: list[dict[str, Any]]) -> None:
    assert compared(world) == compared(world[::-1])


def test_data_without_kinds_answers_or_tags_has_a_table_of_what_is_measured() -> None:
    rows = [row(f"u{i}", method, history_fits=False) for i in range(3) for method in ("base", "milp")]
    found = compared(rows)
    assert set(found["slices"]) == {"all", "long:all"}
    assert measured(found) == ["rouge_l", "rouge_1", "persona_f1", "loss"]
    assert main_measure(found) == "rouge_l"
    titles = [str(table.title) for table in terminal_tables(found)]
    assert len(titles) == 2
    assert "Paired differences" in titles[1]


def test_one_user_has_means_without_intervals_in_every_table(world: list[dict[str, Any]]) -> None:
    found = compared([r for r in world if r["user_id"] == "u0"])
    assert found["scores"]["milp"]["all"]["rouge_l"]["low"] is None
    assert "100 [" not in printed(found)


def test_a_kind_named_like_a_slice_does_not_hide_it() -> None:
    rows = [row("a", "base", i, kind=kind, rouge_l=10.0 * i) for i, kind in enumerate(("all", "unseen", "x"))]
    found = compared(rows)["scores"]["base"]
    assert found["all"]["rouge_l"]["n_examples"] == 3
    assert found["x"]["rouge_l"]["mean"] == 20.0
    assert "unseen" not in found


def printed(found: dict[str, Any], width: int = 120) -> str:
    console = Console(width=width, record=True, file=None, force_terminal=False)
    with console.capture() as capture:
        for table in terminal_tables(found):
            console.print(table)
    return capture.get()


def test_the_terminal_tables_fit_120_columns_and_cut_nothing(world: list[dict[str, Any]]) -> None:
    everything = [
        {**r, "method": method, "loss": 12.345, "persona_f1": 12.34}
        for r in world
        if r["method"] == "milp"
        for method in ("base", "text_prompt", "oracle_profile", "memory_only", "instruction_only", "milp")
    ]
    text = printed(compared(everything))
    assert max(map(len, text.splitlines())) <= 120
    assert "…" not in text
    for words in ("Oracle profile", "history fits the context", "history longer", "MiLP − text prompt"):
        assert words in text


def test_generic_queries_stand_among_the_kinds_with_their_rouge(world: list[dict[str, Any]]) -> None:
    rows = {r.key: r for r in kind_rows(compared(world), "long")}
    assert rows["long:generic"].measure == "rouge_l"
    assert rows["long:direct/seen"].indented
    assert "long:changed/unseen" not in rows  # all that there is of changed is unseen


def test_the_table_names_no_winner_among_less_than_two_and_never_the_oracle() -> None:
    rows = [
        row("a", "base", rouge_l=10.0),
        row("a", "milp", rouge_l=20.0),
        row("a", "oracle_profile", rouge_l=90.0),
    ]
    from milp_ray.evaluation.tables import best_method

    assert best_method(compared(rows), "all", "rouge_l") == "milp"
    assert best_method(compared(rows[:1]), "all", "rouge_l") is None


@pytest.mark.parametrize(
    ("measure", "value", "signed", "text"),
    [
        ("fact_accuracy", 0.834, False, "83"),
        ("fact_accuracy", -0.001, True, "+0"),
        ("rouge_l", -3.25, True, "−3.2"),
        ("loss", 1.234, False, "1.23"),
        ("loss", None, False, "–"),
    ],
)
def test_numbers_are_shown_in_their_unit(measure: str, value: float | None, signed: bool, text: str) -> None:
    assert MEASURES[measure].show(value, signed=signed) == text


# ------------------------------------------------------------------------------------------ scores files


def test_rows_come_back_as_they_were_written(tmp_path: Path, world: list[dict[str, Any]]) -> None:
    path = tmp_path / "scores.parquet"
    write_scores(path, world, {"u0": "made from", "nobody": "nothing"})
    assert read_scores(path).to_pylist() == world
    assert read_users_scored(path) == {"u0": "made from", "nobody": "nothing"}


def test_a_failed_write_leaves_the_earlier_file(tmp_path: Path, world: list[dict[str, Any]]) -> None:
    path = tmp_path / "scores.parquet"
    write_scores(path, world)

    def broken() -> Any:
        yield as_table(world)
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        write_scores(path, broken())
    assert read_scores(path).num_rows == len(world)
    assert [p.name for p in tmp_path.iterdir()] == ["scores.parquet"]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: None, "run the evaluate stage"),
        (lambda path: path.write_bytes(b"no parquet at all"), "damaged"),
    ],
)
def test_scores_that_cannot_be_read_are_told_by_name(
    tmp_path: Path, spoil: Callable[[Path], None], words: str
) -> None:
    path = tmp_path / "scores.parquet"
    spoil(path)
    with pytest.raises(MilpError, match=words) as caught:
        read_scores(path)
    assert str(path) in str(caught.value)


def test_a_score_row_measures_the_answer_against_the_example() -> None:
    example = Example(
        "Which pet?", "You have a turtle.", kind="direct", answer="turtle", tags={"exposure": "unseen"}
    )
    [scored] = score_rows(
        "u",
        "milp",
        [example],
        ["A turtle."],
        [(3.0, 6)],
        persona=frozenset({"turtle", "city"}),
        history_fits=True,
    )
    assert scored["fact_accuracy"] == 1.0
    assert scored["loss"] == 0.5
    assert scored["persona_f1"] == pytest.approx(100 * 2 / 3)
    assert (scored["exposure"], scored["order"]) == ("unseen", "none")
    assert 0 < scored["rouge_l"] < 100
    assert not {"query", "response", "answer"} & scored.keys()
