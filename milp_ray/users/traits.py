"""A user's history in a few numbers, by which similar users are known. Pure; no text comes out of it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from milp_ray.users.records import UserSplit

TRAITS = ("log_words", "log_turns", "diversity")
_WORD = re.compile(r"\w+")


def user_traits(split: UserSplit) -> tuple[float, ...]:
    """The numbers named by :data:`TRAITS`, of what training sees of a user: history and training examples.

    Words are counted rather than tokens, so that no base is needed. ``log_words`` and ``log_turns`` are
    log(1 + n), an example counting as a turn. ``diversity`` is Herdan's C, log(different words) / log(words):
    a type-token ratio that does not fall with the length alone; 1 for fewer than two words.
    """
    n_words, different = 0, set()
    for text in _texts(split):
        words = _WORD.findall(text.casefold())
        n_words += len(words)
        different.update(words)
    diversity = math.log(len(different)) / math.log(n_words) if n_words > 1 else 1.0
    n_turns = len(split.history) + len(split.train)
    return math.log1p(n_words), math.log1p(n_turns), diversity


def _texts(split: UserSplit) -> Iterable[str]:
    for turn in split.history:
        yield turn.text
    for example in split.train:
        yield example.query
        yield example.response
