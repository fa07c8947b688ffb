"""LaMP (Salemi et al. 2024): seven tasks, each a question to be answered as one user would.

``users.paths`` names pairs of files, ``<part>_questions.json`` and right after it ``<part>_outputs.json``::

    [{"id": "210", "input": str, "profile": [{"id": str, "text": str, …, "date": "2009-05-04"}, …]}, …]
    {"task": "LaMP_2", "golds": [{"id": "210", "output": str}, …]}

What a profile's items hold goes by the task: title and abstract of papers (LaMP-1, LaMP-5), description and
tag of films (LaMP-2; text, title and category of news in its first version), text and score of reviews
(LaMP-3), text and title of articles (LaMP-4) and of emails (LaMP-6), text of posts (LaMP-7).

- **History**: the profile, an item a turn (its fields by name, one a line), in the order of ``date`` where
  there is one.
- **Examples**: the question's input → its gold output. ``kind`` and the tag "task" are the task ("LaMP-2"),
  and the tag "measure" says what it is scored by: "label" (LaMP-1, LaMP-2), "rating" (LaMP-3) or "text".
  Where it is no text, ``answer`` is the output, so that fact accuracy is accuracy.

A question is a user, ``lamp-<task>-<file's stem>-<question's id>``; questions of one file with the same
``user_id`` are one, with the items of all their profiles. A user with one question has it for training under
the usual split. LaMP's own protocol, the profile to learn from and the question to be answered, is
``users.split: {train: 0, validation: 0}``; nothing is left to validate on then, so that the layout has to
come from a search over other users. Dropped are items of which a field is a gold output of the same user's
(a title that is to be generated); a question without a gold output (those of the test part) is a problem.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from milp_ray.errors import MilpError
from milp_ray.users.problems import Problem
from milp_ray.users.published import (
    Found,
    clean_text,
    in_time_order,
    load_json,
    spoken_responses,
    without_responses,
)
from milp_ray.users.records import Example, Turn, User
from milp_ray.users.splits import normalised

_ITEM_FIELDS = ("title", "abstract", "text", "description", "category", "tag", "score")
_MEASURES = {"LaMP-1": "label", "LaMP-2": "label", "LaMP-3": "rating"}
_HOLDS = "pairs of files: a list of questions, and after it the object with its golds"


def read_lamp(paths: Sequence[Path]) -> Iterator[Found]:
    """Users of pairs of files; a place is the index of the user's first question.

    Raises:
        MilpError: the files are no such pairs.
    """
    if len(paths) % 2:
        raise MilpError(f"users.paths names {len(paths)} files; users.format lamp reads {_HOLDS}")
    for questions_path, outputs_path in zip(paths[::2], paths[1::2], strict=True):
        questions = load_json(questions_path, "lamp", _HOLDS)
        if not isinstance(questions, list):
            raise MilpError(
                f"users.paths: {questions_path} holds no list of questions; users.format lamp reads {_HOLDS}"
            )
        task, golds = _read_outputs(outputs_path)
        for index, item in _users(questions_path, questions, task, golds):
            yield questions_path, index, item


def _read_outputs(path: Path) -> tuple[str, dict[str, str]]:
    """The task, such as "LaMP-2", and the gold output of each question's id."""
    outputs = load_json(path, "lamp", _HOLDS)
    task = clean_text(outputs.get("task")) if isinstance(outputs, dict) else None
    golds = outputs.get("golds") if isinstance(outputs, dict) else None
    if task is None or not isinstance(golds, list):
        raise MilpError(f"users.paths: {path} holds no task with golds; users.format lamp reads {_HOLDS}")
    found = {}
    for gold in golds:
        output = _scalar(gold.get("output")) if isinstance(gold, dict) else None
        own_id = _scalar(gold.get("id")) if isinstance(gold, dict) else None
        if own_id is not None and output is not None:
            found[own_id] = output
    return task.replace("_", "-"), found


def _users(
    path: Path, questions: list[Any], task: str, golds: Mapping[str, str]
) -> Iterator[tuple[int, User | Problem]]:
    people: dict[str, tuple[int, dict[str, _Item], list[Example]]] = {}
    for index, question in enumerate(questions):
        read = _question(question, task, golds)
        if isinstance(read, str):
            yield index, Problem(path, index, f"question {index}: {read}")
            continue
        own_id, example, items = read
        _, profile, examples = people.setdefault(own_id, (index, {}, []))
        profile.update(items)
        examples.append(example)
    for own_id, (index, profile, examples) in people.items():
        # A label is said of many items; a text that is to be generated belongs to one, which may stand here.
        golds_told = spoken_responses([example for example in examples if example.answer is None])
        turns = [item.turn() for item in profile.values() if not golds_told.intersection(item.normalised())]
        user_id = f"lamp-{task}-{path.stem}-{own_id}"
        yield index, User(user_id, without_responses(in_time_order(turns), examples), tuple(examples))


def _question(
    question: Any, task: str, golds: Mapping[str, str]
) -> tuple[str, Example, dict[str, _Item]] | str:
    """Whose question it is, the example, and the profile by the items' ids; or what is wrong."""
    own_id = _scalar(question.get("id")) if isinstance(question, dict) else None
    if own_id is None:
        return "it is no object with an id"
    query, output = clean_text(question.get("input")), golds.get(own_id)
    if query is None:
        return "input is missing or empty"
    if output is None:
        return "the outputs hold no gold output for it"
    profile = question.get("profile")
    if not isinstance(profile, list):
        return "profile is missing or no list"
    items = {}
    for position, item in enumerate(profile):
        read = _Item.of(item)
        if read is None:
            return f"profile[{position}] holds none of {', '.join(_ITEM_FIELDS)}"
        items[_scalar(item.get("id")) or f"{own_id}/{position}"] = read
    measure = _MEASURES.get(task, "text")
    answer = None if measure == "text" else output
    example = Example(query, output, None, task, answer, {"task": task, "measure": measure})
    return _scalar(question.get("user_id")) or own_id, example, items


@dataclass(frozen=True, slots=True)
class _Item:
    """One entry of a profile: its fields by name, and its date."""

    fields: dict[str, str]
    time: datetime | None

    @classmethod
    def of(cls, entry: Any) -> _Item | None:
        """Read an entry; ``None`` for one without a known field."""
        if not isinstance(entry, dict):
            return None
        fields = {name: _scalar(entry.get(name)) for name in _ITEM_FIELDS}
        given = {name: text for name, text in fields.items() if text is not None}
        return cls(given, _date(entry)) if given else None

    def turn(self) -> Turn:
        """The fields, one a line after its name; of a single field the text alone."""
        named = [f"{name}: {text}" for name, text in self.fields.items()]
        return Turn("\n".join(named if len(named) > 1 else self.fields.values()), time=self.time)

    def normalised(self) -> Iterator[str]:
        """Each field's text, to be compared."""
        return map(normalised, self.fields.values())


def _date(item: Mapping[str, Any]) -> datetime | None:
    """The time of an item's date: a year, a year and a month, or a day."""
    parts = str(item.get("date", "")).split("-")
    try:
        year, month, day = (int(part) for part in [*parts, "1", "1"][:3])
        return datetime(year, month, day, tzinfo=UTC)
    except (ValueError, OverflowError):
        return None


def _scalar(value: Any) -> str | None:
    """A text, or a number as one: scores and ids are given as either."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return clean_text(value)
