"""Amazon's questions and reviews (McAuley and Yang 2016, Wan and McAuley 2016), joined on product and user.

``users.paths`` names three kinds of files, each in any number, a record a line, plain or gzipped::

    QA_<category>.json.gz (the files with multiple answers)
        {"asin": product, "questions": [{"questionText": str, "questionType": "yes/no" | "open-ended",
         "questionTime": str, "answers": [{"answerText": str, "answererID": user, "answerTime": str}]}]}
    reviews_<category>.json.gz
        {"reviewerID": user, "asin": product, "summary": str, "reviewText": str, "unixReviewTime": int}
    meta_<category>.json.gz (may be left out)
        {"asin": product, "title": str}

A file's kind is told by its records, and fields that are not named here are not read. The older files hold
Python literals instead of JSON; a line of at most 1 MiB is then read by ``ast.literal_eval``, which
evaluates nothing but literals.

As Deng et al. (2022) have it, a user is an answerer who has reviewed as well (``answererID`` =
``reviewerID``):

- **History**: the user's reviews of any product, with the product's title where metadata has one, in the
  order of time.
- **Examples**: question, after the product's title → the user's answer. Its time is that of the answer, or
  else that of the question. The tags "product" and "question_type" are there.

Dropped, and counted in problems of a whole file, are answers without an answerer, answerers who have
reviewed nothing (there is no memory to write), and reviewers who have answered nothing (there is no one to
test). Reviews that are an answer pasted are dropped, too. Answers repeated within or between the files count
once. In memory are the answers, and the reviews and titles that belong to them.
"""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from milp_ray.errors import MilpError
from milp_ray.users.problems import Problem
from milp_ray.users.published import (
    Found,
    clean_text,
    in_time_order,
    one_line,
    read_lines,
    spoken_responses,
    unix_time,
)
from milp_ray.users.records import Example, Turn, User
from milp_ray.users.splits import normalised

KIND = "product_question"

MOST_LITERAL_CHARACTERS = 1 << 20
_MOST_LOOKED_AT = 100  # lines of a file, to tell its kind
_QUESTIONS, _REVIEWS, _PRODUCTS = "questions", "reviews", "products"
_READS = "users.format amazon_qa reads McAuley's QA files with multiple answers, reviews and metadata"
_DAYS = ("%B %d, %Y", "%b %d, %Y", "%Y-%m-%d")  # June 6, 2014


@dataclass(frozen=True, slots=True)
class _Answer:
    product: str
    question: str
    question_type: str | None
    text: str
    time: datetime | None


@dataclass(frozen=True, slots=True)
class _Review:
    product: str
    summary: str | None
    text: str
    time: datetime | None


@dataclass
class _Person:
    path: Path
    line: int  # of the first answer
    answers: dict[tuple[str, str, str], _Answer] = field(default_factory=dict)
    reviews: list[_Review] = field(default_factory=list)


def read_amazon_qa(paths: Sequence[Path]) -> Iterator[Found]:
    """Answerers who have reviewed, in the order of their first answers; a place is the line of that.

    Raises:
        MilpError: a file is of none of the kinds, or there are no questions or no reviews.
    """
    kinds = {path: _kind(path) for path in paths}
    for wanted in (_QUESTIONS, _REVIEWS):
        if wanted not in kinds.values():
            raise MilpError(f"users.paths names no file of {wanted}; {_READS}")
    people: dict[str, _Person] = {}
    for path in _of(kinds, _QUESTIONS):
        for number, problem in _read_questions(path, people):
            yield path, number, problem
    for path in _of(kinds, _REVIEWS):
        for number, problem in _read_reviews(path, people):
            yield path, number, problem
    joined = {user_id: person for user_id, person in people.items() if person.reviews}
    titles: dict[str, str | None] = {}
    for person in joined.values():
        titles |= dict.fromkeys(answer.product for answer in person.answers.values())
        titles |= dict.fromkeys(review.product for review in person.reviews)
    for path in _of(kinds, _PRODUCTS):
        for number, problem in _read_titles(path, titles):
            yield path, number, problem
    if len(joined) < len(people):
        path = _of(kinds, _QUESTIONS)[0]
        yield path, 0, Problem(path, 0, f"{len(people) - len(joined)} answerers have no review: left out")
    for user_id, person in joined.items():
        yield person.path, person.line, _user(user_id, person, titles)


def _user(user_id: str, person: _Person, titles: Mapping[str, str | None]) -> User:
    examples = [
        Example(
            query=_titled(titles[answer.product], answer.question),
            response=answer.text,
            time=answer.time,
            kind=KIND,
            tags={"product": answer.product}
            | ({"question_type": answer.question_type} if answer.question_type else {}),
        )
        for answer in person.answers.values()
    ]
    responses = spoken_responses(examples)
    turns = [
        Turn(_titled(titles[review.product], _whole(review)), time=review.time)
        for review in person.reviews
        if normalised(review.text) not in responses
    ]
    return User(user_id, tuple(in_time_order(turns)), tuple(examples))


def _whole(review: _Review) -> str:
    return f"{review.summary}\n{review.text}" if review.summary else review.text


def _titled(title: str | None, text: str) -> str:
    return f"{title}: {text}" if title else text


def _kind(path: Path) -> str:
    """Which of the kinds the first of a file's records is of that is of any."""
    for number, line in read_lines(path):
        if number > _MOST_LOOKED_AT:
            break
        record = (None if isinstance(line, Problem) else parse_record(line)) or {}
        if "questions" in record:
            return _QUESTIONS
        if "reviewerID" in record:
            return _REVIEWS
        if "question" in record or "questionText" in record:
            raise MilpError(f"users.paths: {path} does not say who answered (answererID); {_READS}")
        if "asin" in record:
            return _PRODUCTS
    raise MilpError(f"users.paths: {path} is no file of questions, reviews or products; {_READS}")


def _of(kinds: Mapping[Path, str], wanted: str) -> list[Path]:
    return [path for path, kind in kinds.items() if kind == wanted]


def parse_record(line: str) -> dict[str, Any] | None:
    """The object of a line of JSON, or else of a Python literal of bounded length; ``None`` for neither."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = _literal(line)
    return record if isinstance(record, dict) else None


def _literal(line: str) -> Any:
    if len(line) > MOST_LITERAL_CHARACTERS:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of backslashes that begin no escape; they quote the line
            return ast.literal_eval(line.strip())
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any] | Problem]]:
    for number, line in read_lines(path):
        record = line if isinstance(line, Problem) else parse_record(line)
        yield (
            number,
            record or Problem(path, number, "the line is neither a JSON object nor a Python literal"),
        )


def _read_questions(path: Path, people: dict[str, _Person]) -> Iterator[tuple[int, Problem]]:
    """Put a file's answers to their answerers; yield what is wrong, and how many answers are nobody's."""
    n_nobody = 0
    for number, record in _records(path):
        if isinstance(record, Problem):
            yield number, record
            continue
        product, questions = clean_text(record.get("asin")), record.get("questions")
        if product is None or not isinstance(questions, list):
            yield number, Problem(path, number, "asin is missing, or questions is no list")
            continue
        for position, question in enumerate(questions):
            found = _answers(product, question)
            if isinstance(found, str):
                yield number, Problem(path, number, f"questions[{position}]: {found}")
                continue
            n_nobody += sum(user_id is None for user_id, _ in found)
            for user_id, answer in found:
                if user_id is not None:
                    key = (answer.product, answer.question, answer.text)
                    people.setdefault(user_id, _Person(path, number)).answers.setdefault(key, answer)
    if n_nobody:
        yield 0, Problem(path, 0, f"{n_nobody} answers have no answererID: left out")


def _answers(product: str, question: Any) -> list[tuple[str | None, _Answer]] | str:
    """Answerer (``None``: not told) and answer of each, or what is wrong with the question."""
    if not isinstance(question, dict) or not isinstance(question.get("answers"), list):
        return "it is no object with a list of answers"
    text = clean_text(question.get("questionText"))
    if text is None:
        return "questionText is missing or empty"
    asked = _day(question.get("questionTime"))
    question_type = clean_text(question.get("questionType"))
    found = []
    for position, answer in enumerate(question["answers"]):
        said = clean_text(answer.get("answerText")) if isinstance(answer, dict) else None
        if said is None:
            return f"answers[{position}].answerText is missing or empty"
        entry = _Answer(product, text, question_type, said, _day(answer.get("answerTime")) or asked)
        found.append((clean_text(answer.get("answererID")), entry))
    return found


def _read_reviews(path: Path, people: dict[str, _Person]) -> Iterator[tuple[int, Problem]]:
    """Put a file's reviews to those who have answered; yield what is wrong, and how many are of others."""
    n_others = 0
    for number, record in _records(path):
        if isinstance(record, Problem):
            yield number, record
            continue
        user_id = clean_text(record.get("reviewerID"))
        person = people.get(user_id) if user_id is not None else None
        if person is None:
            n_others += 1
            continue
        product, text = clean_text(record.get("asin")), clean_text(record.get("reviewText"))
        if product is None or text is None:
            yield number, Problem(path, number, "asin or reviewText is missing or empty")
            continue
        summary, time = clean_text(record.get("summary")), unix_time(record.get("unixReviewTime"))
        person.reviews.append(_Review(product, summary, text, time))
    if n_others:
        yield 0, Problem(path, 0, f"{n_others} reviews are of reviewers without an answer: left out")


def _read_titles(path: Path, titles: dict[str, str | None]) -> Iterator[tuple[int, Problem]]:
    """Fill in the titles of products that are asked for."""
    for number, record in _records(path):
        if isinstance(record, Problem):
            yield number, record
            continue
        product, title = record.get("asin"), clean_text(record.get("title"))
        if isinstance(product, str) and product.strip() in titles and title is not None:
            titles[product.strip()] = one_line(title)


def _day(value: Any) -> datetime | None:
    if not isinstance(value, str):
        return None
    for form in _DAYS:
        try:
            return datetime.strptime(value.strip(), form).replace(tzinfo=UTC)
        except ValueError:
            continue
    return None
