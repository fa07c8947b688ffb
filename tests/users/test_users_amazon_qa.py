"""Rules of the reader of Amazon's questions, reviews and metadata, on a few records."""

from __future__ import annotations

import gzip
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from support.published import SECRET, history, load, pairs, reasons

from milp_ray.errors import MilpError
from milp_ray.users.amazon_qa import MOST_LITERAL_CHARACTERS, parse_record


def answer(
    user: str | None, text: str = "Yes, it does.", time: str | None = "June 6, 2014"
) -> dict[str, Any]:
    found = {"answerText": text, "answererID": user, "answerTime": time, "helpful": [0, 0]}
    return {name: value for name, value in found.items() if value is not None}


def asked(*answers: Any, text: str = "Does it float?", product: str = "B1") -> dict[str, Any]:
    question = {
        "questionText": text,
        "questionType": "yes/no",
        "questionTime": "May 2, 2014",
        "answers": list(answers),
    }
    return {"asin": product, "questions": [question]}


def review(user: str, text: str = "Solid.", time: int = 1_388_534_400, **fields: Any) -> dict[str, Any]:
    return {"reviewerID": user, "asin": "B1", "reviewText": text, "unixReviewTime": time, **fields}


def write(tmp_path: Path, name: str, *records: Any, literal: bool = False) -> Path:
    lines = [r if isinstance(r, str) else repr(r) if literal else json.dumps(r) for r in records]
    content = "".join(line + "\n" for line in lines).encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


@pytest.mark.parametrize("literal", [False, True])
@pytest.mark.parametrize("suffix", ["json", "json.gz"])
def test_answers_reviews_and_products_are_joined(tmp_path: Path, suffix: str, literal: bool) -> None:
    files = (
        write(tmp_path, f"meta_B.{suffix}", {"asin": "B1", "title": "Toy\n boat"}, literal=literal),
        write(
            tmp_path,
            f"reviews_B.{suffix}",
            review("A1", "It's quick.", 1_388_620_800, summary="Fun"),
            review("A1", "Wet.", 1_388_534_400, asin="B9"),
            literal=literal,
        ),
        write(tmp_path, f"QA_B.{suffix}", asked(answer("A1")), literal=literal),
    )
    loaded = load("amazon_qa", *files)
    [user] = loaded.users
    assert user.user_id == "A1"
    assert history(loaded, "A1") == ["Wet.", "Toy boat: Fun\nIt's quick."]
    assert pairs(loaded, "A1") == [("Toy boat: Does it float?", "Yes, it does.")]
    [example] = user.examples
    assert example.time == datetime(2014, 6, 6, tzinfo=UTC)
    assert example.tags == {"product": "B1", "question_type": "yes/no"}
    assert not loaded.problems


def test_an_answer_without_a_time_has_that_of_its_question(tmp_path: Path) -> None:
    qa = write(tmp_path, "QA.json", asked(answer("A1", time=None)))
    [user] = load("amazon_qa", qa, write(tmp_path, "r.json", review("A1"))).users
    assert user.examples[0].time == datetime(2014, 5, 2, tzinfo=UTC)


def test_who_answers_and_reviews_nothing_or_the_other_way_round_is_left_out_and_counted(
    tmp_path: Path,
) -> None:
    qa = write(tmp_path, "QA.json", asked(answer("A1"), answer("A2"), answer(None)))
    reviews = write(tmp_path, "r.json", review("A1"), review("A3"), review("A3"))
    loaded = load("amazon_qa", qa, reviews)
    assert [user.user_id for user in loaded.users] == ["A1"]
    assert [(problem.path, problem.reason) for problem in loaded.problems] == [
        (qa, "1 answers have no answererID: left out"),
        (reviews, "2 reviews are of reviewers without an answer: left out"),
        (qa, "1 answerers have no review: left out"),
    ]


def test_an_answer_given_twice_counts_once(tmp_path: Path) -> None:
    one, two = (write(tmp_path, f"QA{i}.json", asked(answer("A1"))) for i in range(2))
    loaded = load("amazon_qa", one, two, write(tmp_path, "r.json", review("A1")))
    assert len(loaded.users[0].examples) == 1


def test_an_answer_pasted_into_a_review_is_not_in_the_history(tmp_path: Path) -> None:
    qa = write(tmp_path, "QA.json", asked(answer("A1", "It floats well.")))
    reviews = write(tmp_path, "r.json", review("A1", "It floats well!", summary="Fun"), review("A1", "Blue."))
    products = write(tmp_path, "m.json", {"asin": "B1", "title": "Boat"})
    assert history(load("amazon_qa", qa, reviews, products), "A1") == ["Boat: Blue."]


def test_broken_records_are_problems_and_others_go_on(tmp_path: Path) -> None:
    qa = write(
        tmp_path,
        "QA.json",
        asked(answer("A1")),
        SECRET,
        f"{{'asin': '{SECRET}' + 'x'}}",
        {"questions": SECRET},
        asked(answer("A1", " ")),
        asked(answer("A1"), text=""),
        asked(SECRET),
    )
    reviews = write(tmp_path, "r.json", review("A1"), review("A1", ""), SECRET)
    loaded = load("amazon_qa", qa, reviews)
    assert [user.user_id for user in loaded.users] == ["A1"]
    assert [(Path(problem.path).stem, problem.line) for problem in loaded.problems] == [
        *(("QA", line) for line in range(2, 8)),
        ("r", 2),
        ("r", 3),
    ]
    assert "questions[0]: answers[0].answerText is missing or empty" in reasons(loaded).values()


def test_a_file_is_known_by_its_first_record_that_says_what_it_is(tmp_path: Path) -> None:
    qa = write(tmp_path, "QA.json", SECRET, {"mood": SECRET}, asked(answer("A1")))
    loaded = load("amazon_qa", qa, write(tmp_path, "r.json", "{", review("A1")))
    assert [problem.line for problem in loaded.problems] == [1, 2, 1]


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    qa = write(tmp_path, "QA.json", asked(answer("A1")))
    reviews = write(tmp_path, "r.json", review("A1"))
    single = write(tmp_path, "qa_single.json", {"asin": "B1", "question": "Why?", "answer": "So."})
    with pytest.raises(MilpError, match=r"no file of reviews; users\.format amazon_qa reads"):
        load("amazon_qa", qa)
    with pytest.raises(MilpError, match="no file of questions"):
        load("amazon_qa", reviews)
    with pytest.raises(MilpError, match=r"qa_single\.json does not say who answered"):
        load("amazon_qa", single, reviews)
    with pytest.raises(MilpError, match=r"x\.json is no file of questions, reviews or products"):
        load("amazon_qa", qa, write(tmp_path, "x.json", SECRET))


@pytest.mark.parametrize(
    "line",
    [
        "__import__('os').getcwd()",
        "{'a': open('x')}",
        "['a']",
        "(" * 5000,
        "{'a': '\\",
        "",
        repr({"a": "x" * MOST_LITERAL_CHARACTERS}),
    ],
)
def test_a_line_is_a_literal_object_of_bounded_length_or_nothing(line: str) -> None:
    assert parse_record(line) is None


def test_both_ways_of_writing_a_record_give_the_same() -> None:
    record = {"asin": "B1", "helpful": [0, 1], "reviewText": 'It\'s "fine" \\ ünïque', "overall": 5.0}
    assert parse_record(repr(record)) == parse_record(json.dumps(record)) == record
