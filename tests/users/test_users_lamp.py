"""Rules of the LaMP reader, on small questions of its tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.published import SECRET, history, load, pairs, reasons

from milp_ray.config.users import SplitSection
from milp_ray.errors import MilpError
from milp_ray.users.splits import split_user

FILMS = [
    {"id": "f2", "description": "Two friends drift apart.", "tag": "romance", "date": "2010-03-01"},
    {"id": "f1", "description": "A robot dreams.", "tag": "sci-fi", "date": "2009-05-04"},
]


def question(number: str = "210", **fields: Any) -> dict[str, Any]:
    return {"id": number, "input": "Which tag fits?", "profile": FILMS, **fields}


def write(
    tmp_path: Path, questions: Any, golds: Any, task: str = "LaMP_2", part: str = "dev"
) -> tuple[Path, ...]:
    paths = (tmp_path / f"{part}_questions.json", tmp_path / f"{part}_outputs.json")
    contents = (questions, {"task": task, "golds": golds})
    for path, content in zip(paths, contents, strict=True):
        path.write_text(json.dumps(content), encoding="utf-8")
    return paths


def gold(number: str = "210", output: Any = "comedy") -> dict[str, Any]:
    return {"id": number, "output": output}


def test_the_profile_is_the_history_by_date_and_the_question_an_example(tmp_path: Path) -> None:
    loaded = load("lamp", *write(tmp_path, [question()], [gold()]))
    [user] = loaded.users
    assert user.user_id == "lamp-LaMP-2-dev_questions-210"
    assert history(loaded, user.user_id) == [
        "description: A robot dreams.\ntag: sci-fi",
        "description: Two friends drift apart.\ntag: romance",
    ]
    assert pairs(loaded, user.user_id) == [("Which tag fits?", "comedy")]


@pytest.mark.parametrize(
    ("task", "measure", "answer"),
    [("LaMP_1", "label", "4"), ("LaMP-2", "label", "4"), ("LaMP_3", "rating", "4"), ("LaMP_7", "text", None)],
)
def test_the_task_is_told_and_what_it_is_scored_by(
    tmp_path: Path, task: str, measure: str, answer: str | None
) -> None:
    [user] = load("lamp", *write(tmp_path, [question()], [gold(output=4)], task)).users
    [example] = user.examples
    assert example.kind == task.replace("_", "-")
    assert example.tags == {"task": example.kind, "measure": measure}
    assert (example.response, example.answer) == ("4", answer)


def test_an_item_with_one_field_is_that_text(tmp_path: Path) -> None:
    loaded = load("lamp", *write(tmp_path, [question(profile=[{"id": "t", "text": "So tired!"}])], [gold()]))
    assert history(loaded, loaded.users[0].user_id) == ["So tired!"]


def test_questions_with_one_user_id_are_one_user_with_all_items(tmp_path: Path) -> None:
    more = [*FILMS, {"id": "f3", "description": "War.", "tag": "violence", "date": "2012"}]
    questions = [
        question("1", user_id=9),
        question("2", user_id=4),
        question("3", user_id=9, profile=more, input="And now?"),
    ]
    loaded = load("lamp", *write(tmp_path, questions, [gold("1"), gold("2"), gold("3", "action")]))
    nine, four = loaded.users
    assert (nine.user_id, four.user_id) == ("lamp-LaMP-2-dev_questions-9", "lamp-LaMP-2-dev_questions-4")
    assert len(nine.history) == 3
    assert pairs(loaded, nine.user_id) == [("Which tag fits?", "comedy"), ("And now?", "action")]


def test_an_item_with_a_text_that_is_to_be_generated_is_dropped(tmp_path: Path) -> None:
    papers = [
        {"id": "p1", "title": "On Boats", "abstract": "They float."},
        {"id": "p2", "title": "On Kites", "abstract": "They fly."},
    ]
    loaded = load("lamp", *write(tmp_path, [question(profile=papers)], [gold(output="On boats.")], "LaMP_5"))
    assert history(loaded, loaded.users[0].user_id) == ["title: On Kites\nabstract: They fly."]


def test_a_label_that_items_share_drops_none(tmp_path: Path) -> None:
    [user] = load("lamp", *write(tmp_path, [question()], [gold(output="sci-fi")])).users
    assert len(user.history) == 2


def test_without_a_training_share_the_question_is_tested_on(tmp_path: Path) -> None:
    [user] = load("lamp", *write(tmp_path, [question()], [gold()])).users
    split = split_user(user, SplitSection(train=0.0, validation=0.0))
    assert len(split.history) == 2
    assert (len(split.train), len(split.test)) == (0, 1)


def test_several_parts_are_read_one_after_the_other(tmp_path: Path) -> None:
    dev = write(tmp_path, [question()], [gold()])
    train = write(tmp_path, [question()], [gold()], part="train")
    assert [user.user_id.split("-")[3] for user in load("lamp", *dev, *train).users] == [
        "dev_questions",
        "train_questions",
    ]


def test_broken_questions_are_problems_and_others_go_on(tmp_path: Path) -> None:
    bad = [
        SECRET,
        question("1", input=" "),
        question("2", profile=SECRET),
        question("3", profile=[*FILMS, {"id": "x", "mood": SECRET}]),
        question("no gold"),
    ]
    golds = [gold(), gold("1"), gold("2"), gold("3"), SECRET]
    loaded = load("lamp", *write(tmp_path, [*bad, question()], golds))
    assert len(loaded.users) == 1
    found = reasons(loaded)
    assert list(found) == [0, 1, 2, 3, 4]
    assert found[3].startswith("question 3: profile[2] holds none of title, abstract, text")
    assert found[4] == "question 4: the outputs hold no gold output for it"


def test_files_that_are_no_pairs_are_refused(tmp_path: Path) -> None:
    questions, outputs = write(tmp_path, [question()], [gold()])
    with pytest.raises(MilpError, match=r"names 1 files; users\.format lamp reads pairs"):
        load("lamp", questions)
    with pytest.raises(MilpError, match="holds no list of questions"):
        load("lamp", outputs, questions)
    with pytest.raises(MilpError, match="holds no task with golds"):
        load("lamp", questions, questions)
    with pytest.raises(MilpError, match="none of 1 records"):
        load("lamp", *write(tmp_path, [question()], []))
