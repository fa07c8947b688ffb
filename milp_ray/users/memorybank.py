"""MemoryBank's evaluation data (Zhong et al. 2024): ten days of talks of invented users with a companion.

Two kinds of files are read. ``memory_bank_en.json`` (or ``_cn``) is one JSON object::

    {"Emily": {"name": "Emily",
               "meta_information": {"personality": str, "hobbies": str, "speaking_style": str},
               "history": {"2023-04-27": [{"query": str, "response": str}, …], …}, …}, …}

and ``probing_questions_en.jsonl``, which may be gzipped or left out, has a line for each user:
``{"Emily": [question, …]}``. A user is ``memorybank-<name>``; the profile is ``meta_information`` in words.

- The published questions have **no answers**, so that they are no examples: they are told as a problem.
  Without answers the history is what the user said (the queries), in the order of days, and every query with
  the companion's reply is an example.
- A question may also be given as ``{"question": str, "answer": str}``. Who has such has these as examples,
  asked after the last day, and both sides of all talks as history: many ask what the *companion* once
  recommended.

``summary``, ``personality`` and ``overall_history`` are what a model made of the talks and are not read. A
talk's time is its day and a minute for each exchange before it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from milp_ray.errors import MilpError
from milp_ray.users.problems import Problem
from milp_ray.users.published import (
    Exchange,
    Found,
    clean_text,
    load_json,
    read_lines,
    without_responses,
)
from milp_ray.users.records import Example, Turn, User

DIALOGUE = "dialogue"
PROBING = "probing"

_HOLDS = "an object of users with their history (and .jsonl files of probing questions)"


def read_memorybank(paths: Sequence[Path]) -> Iterator[Found]:
    """Users, by their index, of all files but those named ``.jsonl`` or ``.jsonl.gz``, which hold questions.

    Raises:
        MilpError: a file of users is no JSON object, or there is none.
    """
    questions: dict[str, list[tuple[str, str]]] = {}
    memories = [path for path in paths if not path.name.endswith((".jsonl", ".jsonl.gz"))]
    if not memories:
        raise MilpError(f"users.paths names questions alone; users.format memorybank reads {_HOLDS}")
    for path in paths:
        if path not in memories:
            for number, problem in _read_questions(path, questions):
                yield path, number, problem
    for path in memories:
        people = load_json(path, "memorybank", _HOLDS)
        if not isinstance(people, dict):
            raise MilpError(f"users.paths: {path} holds no object; users.format memorybank reads {_HOLDS}")
        for index, (key, about) in enumerate(people.items()):
            name = clean_text(key)
            if name is None:
                yield path, index, Problem(path, index, "the name is empty or no valid Unicode")
            else:
                yield path, index, _user(path, index, name, about, questions.get(name, []))


def _read_questions(path: Path, into: dict[str, list[tuple[str, str]]]) -> Iterator[tuple[int, Problem]]:
    """Put questions with answers into a mapping by name; yield what is wrong, and how many have none."""
    for number, line in read_lines(path):
        if isinstance(line, Problem):
            yield number, line
            continue
        try:
            entries = json.loads(line)
        except (ValueError, RecursionError):
            yield number, Problem(path, number, "the line is no JSON")
            continue
        if not isinstance(entries, dict) or not all(isinstance(asked, list) for asked in entries.values()):
            yield number, Problem(path, number, "the line is no object of lists of questions")
            continue
        for name, asked in entries.items():
            answered = [pair for entry in asked if (pair := _answered(entry)) is not None]
            into.setdefault(name.strip(), []).extend(answered)
            if len(answered) < len(asked):
                reason = f"{len(asked) - len(answered)} of {len(asked)} questions have no answer: no examples"
                yield number, Problem(path, number, reason)


def _answered(entry: Any) -> tuple[str, str] | None:
    if not isinstance(entry, dict):
        return None
    question, answer = clean_text(entry.get("question")), clean_text(entry.get("answer"))
    return None if question is None or answer is None else (question, answer)


def _user(
    path: Path, index: int, name: str, about: Any, questions: Sequence[tuple[str, str]]
) -> User | Problem:
    user_id = f"memorybank-{name}"
    talks = _talks(about)
    if isinstance(talks, str):
        return Problem(path, index, talks, user_id)
    if questions:
        asked_at = talks[-1].time + timedelta(days=1)
        examples = tuple(Example(query, answer, asked_at, PROBING) for query, answer in questions)
        turns = [turn for talk in talks for turn in _both_sides(talk)]
    else:
        examples = tuple(Example(talk.query, talk.response, talk.time, DIALOGUE) for talk in talks)
        turns = [Turn(talk.query, time=talk.time) for talk in talks]
    return User(user_id, without_responses(turns, examples), examples, _profile(about))


def _both_sides(talk: Exchange) -> tuple[Turn, Turn]:
    return Turn(talk.query, time=talk.time), Turn(talk.response, role="assistant", time=talk.time)


def _talks(about: Any) -> list[Exchange] | str:
    """A user's exchanges in time order, or what is wrong with the user."""
    history = about.get("history") if isinstance(about, dict) else None
    if not isinstance(history, dict):
        return "history is missing or no object of days"
    found: list[Exchange] = []
    for number, (day, talks) in enumerate(history.items()):
        start = _day(day)
        if start is None:
            return f"day {number} of history is no date such as 2023-04-27"
        if not isinstance(talks, list):
            return f"day {number} of history is no list"
        for minute, talk in enumerate(talks):
            texts = talk if isinstance(talk, dict) else {}
            query, response = clean_text(texts.get("query")), clean_text(texts.get("response"))
            if query is None or response is None:
                return f"talk {minute} of day {number} has no query or no response"
            found.append(Exchange(query, response, start + timedelta(minutes=minute)))
    return sorted(found, key=lambda talk: talk.time) or "there is no talk"


def _day(text: str) -> datetime | None:
    try:
        day = datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC)
    except ValueError:
        return None
    return day if day.year < datetime.max.year else None  # minutes and days are added to it


def _profile(about: Mapping[str, Any]) -> str | None:
    facts = about.get("meta_information")
    if not isinstance(facts, dict):
        return None
    texts = {name: clean_text(value) for name, value in facts.items()}
    return clean_text("\n".join(f"{n.replace('_', ' ')}: {text}" for n, text in texts.items() if text))
