"""What a user is: a history of turns and query → response examples, both in time order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime


@dataclass(frozen=True, slots=True)
class Turn:
    """One utterance of a history."""

    text: str
    role: str = "user"
    time: datetime | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """One query with the response that the user wants.

    ``answer`` is the word or phrase that a right response must contain (fact accuracy); ``None`` where
    nothing is known about it. ``tags`` group examples in evaluation and never reach training or a prompt.
    ``rejected`` is an answer that the user has turned down: preference alignment alone reads it.
    """

    query: str
    response: str
    time: datetime | None = None
    kind: str = "example"
    answer: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    rejected: str | None = None


@dataclass(frozen=True, slots=True)
class User:
    """One person. ``consent`` is ``None`` where the source says nothing about it."""

    user_id: str
    history: tuple[Turn, ...] = ()
    examples: tuple[Example, ...] = ()
    profile: str | None = None
    consent: bool | None = None


@dataclass(frozen=True, slots=True)
class UserSplit:
    """A user whose examples are split in time order, and whose history holds nothing of what is held out."""

    user_id: str
    profile: str | None
    history: tuple[Turn, ...]
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
