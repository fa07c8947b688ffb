"""Every method side by side: units, what is shared, seeds, resumption, and the files."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.inline import InlinePool

from milp_ray.compare_view import (
    difference_rows,
    kind_difference_rows,
    print_comparison,
    write_comparison,
)
from milp_ray.config.base import BaseSection
from milp_ray.config.evaluation import CompareSection, EvaluationSection
from milp_ray.config.methods import ALL_METHODS, MethodsSection
from milp_ray.config.prompt import PromptSection
from milp_ray.config.training import TrainingSection
from milp_ray.errors import MilpError
from milp_ray.evaluation.scores import as_table, read_scores, score_rows
from milp_ray.evaluation.side_by_side import Settings, _mean_over_seeds, side_by_side
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.methods.shared import Shared
from milp_ray.personalize.recipe import Recipe
from milp_ray.rundir import RunFolder
from milp_ray.users.records import Example, UserSplit

SOME = CompareSection(methods=("base", "milp", "shared_adapter"), n_seeds=2)
LAYOUT = CanonicalLayout((False, True, False, True), 2)


@pytest.fixture
def settings(tiny_llama_dir: Path) -> Settings:
    training = TrainingSection(memory_epochs=1, instruction_epochs=1, learning_rate=1e-2)
    section = BaseSection(model=str(tiny_llama_dir), device="cpu")
    return Settings(
        Recipe(LAYOUT, section, training, PromptSection(), seed=0),
        EvaluationSection(max_new_tokens=4, n_bootstrap=50),
        MethodsSection(),
    )


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


@pytest.fixture
def splits(make_split: Any) -> list[UserSplit]:
    made = [make_split(f"u-{i}", n_turns=3, n_train=2, n_val=1, n_test=2) for i in range(3)]
    return [replace(split, profile="Keeps a turtle.") for split in made]


@pytest.fixture
def own_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for modules ``own_methods.…``."""
    folder = tmp_path / "own_methods"
    folder.mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_methods", raising=False)
    return folder


def test_every_method_is_scored_on_every_user_and_told_with_its_costs(
    base: Any, run: RunFolder, splits: list[UserSplit], settings: Settings
) -> None:
    found = side_by_side(run, splits, settings, CompareSection(n_seeds=1), pool=InlinePool(base))
    assert tuple(found["methods"]) == ALL_METHODS
    table = read_scores(run.compare / "scores.parquet")
    keys = zip(table["user_id"].to_pylist(), table["method"].to_pylist(), strict=True)
    assert set(keys) == {(split.user_id, method) for split in splits for method in ALL_METHODS}
    assert len(table) == len(splits) * len(ALL_METHODS) * 2
    costs = found["costs"]
    assert costs["base"]["stored_bytes"] == 0
    assert costs["text_prompt"]["prompt_tokens"] > costs["base"]["prompt_tokens"]
    assert costs["milp"]["stored_bytes"] > costs["oracle_profile"]["stored_bytes"] > 0
    assert costs["shared_adapter"]["shared_bytes"] > 0 == costs["shared_adapter"]["stored_bytes"]
    assert costs["oppu"]["stored_bytes"] == costs["milp"]["stored_bytes"]


def test_seeds_change_what_is_trained_and_scores_are_their_means(
    base: Any, run: RunFolder, splits: list[UserSplit], settings: Settings
) -> None:
    pool = InlinePool(base)
    side_by_side(run, splits, settings, SOME, pool=pool)
    assert sorted(pool.keys) == sorted(
        [*(f"shared_adapter-{s}-0" for s in (0, 1)), "base-0-0"]
        + [f"{method}-{seed}-0" for method in ("milp", "shared_adapter") for seed in (0, 1)]
    )
    rows = {
        seed: read_scores(run.compare / "units" / f"milp-{seed}-0.parquet").to_pylist() for seed in (0, 1)
    }
    assert [row["loss"] for row in rows[0]] != [row["loss"] for row in rows[1]]
    means = {
        (row["user_id"], row["example"]): row["loss"]
        for row in read_scores(run.compare / "scores.parquet").to_pylist()
        if row["method"] == "milp"
    }
    for first, second in zip(rows[0], rows[1], strict=True):
        wanted = (first["loss"] + second["loss"]) / 2
        assert means[first["user_id"], first["example"]] == pytest.approx(wanted)


def test_the_same_call_again_does_nothing_and_a_changed_user_is_done_again(
    base: Any, run: RunFolder, splits: list[UserSplit], settings: Settings
) -> None:
    first = side_by_side(run, splits, settings, SOME, pool=InlinePool(base))
    again = InlinePool(base)
    second = side_by_side(run, splits, settings, SOME, pool=again)
    assert again.keys == []
    assert first == second
    changed = [replace(splits[0], history=splits[0].history[:1]), *splits[1:]]
    once_more = InlinePool(base)
    side_by_side(run, changed, settings, SOME, pool=once_more)
    assert len(once_more.keys) == 7


def test_what_is_shared_is_trained_on_all_users_and_kept(
    base: Any, run: RunFolder, splits: list[UserSplit], settings: Settings
) -> None:
    side_by_side(run, splits, settings, SOME, pool=InlinePool(base))
    folders = sorted((run.compare / "shared").iterdir())
    assert [folder.name.split("-")[:2] for folder in folders] == [
        ["shared_adapter", "0"],
        ["shared_adapter", "1"],
    ]
    shared = Shared.load(folders[0])
    assert shared.adapter is not None
    assert shared.adapter.layout == LAYOUT
    assert shared.facts["seconds"] > 0


def test_a_method_that_fails_is_named(
    base: Any, run: RunFolder, splits: list[UserSplit], settings: Settings, own_methods: Path
) -> None:
    (own_methods / "broken.py").write_text("def fit(requests):\n    raise ValueError('secret')\n")
    section = CompareSection(methods=("base", "own_methods.broken"), n_seeds=1)
    with pytest.raises(MilpError, match=r"own_methods\.broken-0-0: ValueError") as error:
        side_by_side(run, splits, settings, section, pool=InlinePool(base))
    assert "secret" not in str(error.value)


def test_users_without_test_examples_are_refused(
    base: Any, run: RunFolder, splits: list[UserSplit], settings: Settings
) -> None:
    bare = [replace(split, test=()) for split in splits]
    with pytest.raises(MilpError, match="none of 3 users has test examples"):
        side_by_side(run, bare, settings, SOME, pool=InlinePool(base))


def test_tables_values_and_figure_are_written_and_printed(
    base: Any, run: RunFolder, splits: list[UserSplit], settings: Settings
) -> None:
    found = side_by_side(run, splits, settings, SOME, pool=InlinePool(base))
    found = json.loads(json.dumps(found, allow_nan=False))
    written = write_comparison(run.compare, found)
    assert [path.name for path in written] == ["tables.md", "values.csv", "quality_over_cost.png"]
    text = written[0].read_text(encoding="utf-8")
    assert "## Quality" in text
    assert "| One adapter for all |" in text
    with written[1].open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert {line["method"] for line in lines} == {"base", "milp", "shared_adapter"}
    assert any(line["measure"] == "stored_bytes" for line in lines)
    console = Console(width=120, record=True)
    print_comparison(console, found)
    assert "MiLP minus every other method" in console.export_text()
    _, rows = difference_rows(found, "milp")
    assert [row[0] for row in rows] == ["Base alone", "One adapter for all"]


def test_differences_are_told_by_kind_of_query(
    base: Any, run: RunFolder, splits: list[UserSplit], settings: Settings
) -> None:
    def with_kinds(split: UserSplit) -> UserSplit:
        first, second = split.test
        asked = replace(first, kind="direct", answer="red"), replace(second, kind="generic", answer=None)
        return replace(split, test=asked)

    kinds = [with_kinds(split) for split in splits]
    found = side_by_side(run, kinds, settings, SOME, pool=InlinePool(base))
    header, rows = kind_difference_rows(found, "milp", "fits")
    assert "Fact accuracy: direct" in header
    assert "Fact accuracy: generic" not in header, "a generic query has no fact"
    assert header[-1] == "ROUGE-L: generic"
    assert [row[0] for row in rows] == ["Base alone", "One adapter for all"]
    assert all(len(row) == len(header) for row in rows)
    told = found["differences"]["milp - base"]["fits:generic"]["rouge_l"]["mean"]
    assert rows[0][-1].startswith(f"{told:+.1f}".replace("-", "−"))
    assert kind_difference_rows(found, "milp", "long") == (["Minus"], [])


def test_labels_have_a_table_of_their_own(
    base: Any, run: RunFolder, splits: list[UserSplit], settings: Settings
) -> None:
    def with_labels(split: UserSplit) -> UserSplit:
        first, second = split.test
        named = replace(first, response="drama", answer=None), replace(second, response="comedy", answer=None)
        return replace(split, test=named)

    task = EvaluationSection(
        max_new_tokens=4, n_bootstrap=50, task="classification", labels=("drama", "comedy")
    )
    labelled = [with_labels(split) for split in splits]
    found = side_by_side(run, labelled, replace(settings, evaluation=task), SOME, pool=InlinePool(base))
    text = write_comparison(run.compare, found)[0].read_text(encoding="utf-8")
    table = text[text.index("## Closed questions") :]
    assert "Macro-F1" in table.splitlines()[2]
    assert "| One adapter for all |" in table
    console = Console(width=120, record=True)
    print_comparison(console, found)
    assert "Closed questions" in console.export_text()
    again = InlinePool(base)
    other = task.model_copy(update={"labels": ("comedy", "drama")})
    side_by_side(run, labelled, replace(settings, evaluation=other), SOME, pool=again)
    assert again.keys, "scores hold the places of labels, so that other labels need other scores"


def test_what_a_seed_could_not_read_is_not_taken_from_another_seed() -> None:
    task = EvaluationSection(task="classification", labels=("comedy", "drama"))
    example = Example("?", "comedy")
    rows = [
        score_rows(
            "u", "milp", [example], [text], [(1.0, 1)], persona=frozenset(), history_fits=True, section=task
        )
        for text in ("no idea", "comedy")
    ]
    [row] = _mean_over_seeds(as_table([row for of_seed in rows for row in of_seed])).to_pylist()
    assert (row["wanted"], row["given"]) == (0.0, None)


def test_a_method_of_ones_own_is_scored_again_when_its_file_has_changed(
    base: Any, run: RunFolder, splits: list[UserSplit], settings: Settings, own_methods: Path
) -> None:
    file = own_methods / "silent.py"
    code = "from milp_ray.methods.protocol import Answerer\n\n\n"
    code += "def fit(requests):\n    return [Answerer(one) for one in requests]\n"
    file.write_text(code)
    section = CompareSection(methods=("base", "own_methods.silent"), n_seeds=1)
    side_by_side(run, splits, settings, section, pool=InlinePool(base))
    same, changed = InlinePool(base), InlinePool(base)
    side_by_side(run, splits, settings, section, pool=same)
    file.write_text(code + "\n# another version\n")
    side_by_side(run, splits, settings, section, pool=changed)
    assert (same.keys, changed.keys) == ([], ["own_methods.silent-0-0"])
