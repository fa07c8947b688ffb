"""Rules of the MemoryBank reader, on two days of talks."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from support.published import SECRET, history, load, pairs, reasons

from milp_ray.errors import MilpError

DAYS = {
    "2023-04-28": [{"query": "I saw a squirrel.", "response": "How nice."}],
    "2023-04-27": [
        {"query": "I paint.", "response": "Read The Little Prince."},
        {"query": "And tea?", "response": "Try green tea."},
    ],
}


def write(tmp_path: Path, **people: Any) -> Path:
    path = tmp_path / "memory_bank_en.json"
    path.write_text(json.dumps(people), encoding="utf-8")
    return path


def ask(tmp_path: Path, *lines: Any) -> Path:
    path = tmp_path / "probing_questions_en.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def person(history: Any = DAYS, **fields: Any) -> dict[str, Any]:
    return {"name": "E", "summary": SECRET, "overall_history": SECRET, "history": history, **fields}


def test_talks_are_examples_in_the_order_of_days_and_queries_the_history(tmp_path: Path) -> None:
    facts = {"hobbies": "painting, tea", "speaking_style": "soft"}
    loaded = load("memorybank", write(tmp_path, **{" Emily ": person(meta_information=facts)}))
    [user] = loaded.users
    assert user.user_id == "memorybank-Emily"
    assert user.profile == "hobbies: painting, tea\nspeaking style: soft"
    assert history(loaded, user.user_id) == ["I paint.", "And tea?", "I saw a squirrel."]
    assert pairs(loaded, user.user_id) == [
        ("I paint.", "Read The Little Prince."),
        ("And tea?", "Try green tea."),
        ("I saw a squirrel.", "How nice."),
    ]


def test_published_questions_have_no_answers_and_are_told_as_problems(tmp_path: Path) -> None:
    questions = ask(tmp_path, {"Emily": ["Which book?", "Which tea?"]})
    loaded = load("memorybank", write(tmp_path, Emily=person()), questions)
    assert reasons(loaded) == {1: "2 of 2 questions have no answer: no examples"}
    assert len(loaded.users[0].examples) == 3


def test_answered_questions_are_the_examples_and_both_sides_the_history(tmp_path: Path) -> None:
    questions = ask(tmp_path, {"Emily": [{"question": "Which tea?", "answer": "Green."}, "Which book?"]})
    loaded = load("memorybank", questions, write(tmp_path, Emily=person(), Frank=person()))
    emily, frank = loaded.users
    assert pairs(loaded, emily.user_id) == [("Which tea?", "Green.")]
    assert [turn.role for turn in emily.history] == ["user", "assistant"] * 3
    assert emily.history[1].text == "Read The Little Prince."
    last, asked = emily.history[-1].time, emily.examples[0].time
    assert last is not None
    assert asked is not None
    assert last < asked
    assert emily.examples[0].kind == "probing"
    assert frank.examples[0].kind == "dialogue"
    assert reasons(loaded) == {1: "1 of 2 questions have no answer: no examples"}


def test_questions_may_be_gzipped(tmp_path: Path) -> None:
    plain = ask(tmp_path, {"Emily": [{"question": "Which tea?", "answer": "Green."}]})
    questions = tmp_path / "questions.jsonl.gz"
    questions.write_bytes(gzip.compress(plain.read_bytes()))
    loaded = load("memorybank", write(tmp_path, Emily=person()), questions)
    assert pairs(loaded, "memorybank-Emily") == [("Which tea?", "Green.")]
    assert reasons(loaded) == {}


def test_broken_users_and_lines_are_problems_and_others_go_on(tmp_path: Path) -> None:
    bad = {
        "a": SECRET,
        "b": person(history={SECRET: []}),
        "c": person(history={"2023-04-27": [{"query": SECRET}]}),
        "d": person(history={"2023-04-27": SECRET}),
        "e": person(history={}),
    }
    loaded = load("memorybank", write(tmp_path, Emily=person(), **bad))
    assert [user.user_id for user in loaded.users] == ["memorybank-Emily"]
    assert reasons(loaded) == {
        1: "history is missing or no object of days",
        2: "day 0 of history is no date such as 2023-04-27",
        3: "talk 0 of day 0 has no query or no response",
        4: "day 0 of history is no list",
        5: "there is no talk",
    }
    questions = tmp_path / "q.jsonl"
    questions.write_text(f'{{"{SECRET}\n["{SECRET}"]\n')
    assert reasons(load("memorybank", write(tmp_path, Emily=person()), questions)) == {
        1: "the line is no JSON",
        2: "the line is no object of lists of questions",
    }


def test_files_of_another_format_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("[1]")
    with pytest.raises(MilpError, match=r"x\.json holds no object; users\.format memorybank"):
        load("memorybank", path)
    with pytest.raises(MilpError, match="questions alone"):
        load("memorybank", ask(tmp_path, {}))


def test_the_real_files_are_read_whole(shared_dir: Path) -> None:
    folder = shared_dir / "data" / "memorybank"
    files = (folder / "memory_bank_en.json", folder / "probing_questions_en.jsonl")
    loaded = load("memorybank", *files)
    assert len(loaded.users) == 15
    assert sum(len(user.examples) for user in loaded.users) == 566
    assert len(loaded.problems) == 15
    assert all(user.profile for user in loaded.users)
