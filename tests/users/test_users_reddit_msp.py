"""Rules of the reader of MSP's lines."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.published import SECRET, history, load, pairs, reasons

from milp_ray.config.users import SplitSection
from milp_ray.errors import MilpError
from milp_ray.users.splits import split_user


def write(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "train.txt"
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def test_references_are_the_history_once_each_and_the_response_an_example(tmp_path: Path) -> None:
    loaded = load("reddit_msp", write(tmp_path, "Where to?###To the sea.###\tI swim.\tI sail.\tI swim."))
    assert loaded.users[0].user_id == "msp-train-1"
    assert history(loaded, "msp-train-1") == ["I swim.", "I sail."]
    assert pairs(loaded, "msp-train-1") == [("Where to?", "To the sea.")]


def test_of_five_fields_only_the_user_s_own_references_count(tmp_path: Path) -> None:
    loaded = load("reddit_msp", write(tmp_path, "Where to?###To the sea.###I swim.###They fly.###Planes."))
    assert history(loaded, "msp-train-1") == ["I swim."]


def test_lines_with_the_same_references_are_one_user_s(tmp_path: Path) -> None:
    mine, other = "I swim.\tTo the sea.", "I fly."
    loaded = load(
        "reddit_msp",
        write(tmp_path, f"Where?###To the sea.###{mine}", f"A?###b###{other}", f"When?###Now.###{mine}"),
    )
    assert [user.user_id for user in loaded.users] == ["msp-train-1", "msp-train-2"]
    assert pairs(loaded, "msp-train-1") == [("Where?", "To the sea."), ("When?", "Now.")]
    assert history(loaded, "msp-train-1") == ["I swim."]


def test_without_a_training_share_the_response_is_tested_on(tmp_path: Path) -> None:
    [user] = load("reddit_msp", write(tmp_path, "Where to?###To the sea.###I swim.")).users
    split = split_user(user, SplitSection(train=0.0, validation=0.0))
    assert (len(split.history), len(split.train), len(split.test)) == (1, 0, 1)


def test_broken_lines_are_problems_and_others_go_on(tmp_path: Path) -> None:
    bad = [SECRET, f"{SECRET}### ###{SECRET}", f"###{SECRET}###a", f"{SECRET}###a### \t"]
    loaded = load("reddit_msp", write(tmp_path, *bad, "", "Where to?###To the sea.###I swim."))
    assert loaded.users[0].user_id == "msp-train-6"
    assert reasons(loaded) == {
        1: "the line has 1 fields between ###, not 3 or 5",
        2: "the response is empty",
        3: "the post is empty",
        4: "the line has no reference of the user",
    }


def test_a_file_of_another_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MilpError, match=r"no line of .*train\.txt is post###response###references"):
        load("reddit_msp", write(tmp_path, "a # b # c"))
