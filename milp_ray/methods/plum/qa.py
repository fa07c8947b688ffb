"""Question and answer pairs about a conversation, and the balance between what was discussed and what not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

Kind = Literal["open", "yes_no"]
KINDS: tuple[Kind, ...] = ("open", "yes_no")
YES, NO = "Yes.", "No."


@dataclass(frozen=True, slots=True)
class QAPair:
    """A question as the user would ask it, and its answer.

    ``is_positive``: it is about something that was discussed; a yes/no question is then answered with
    :data:`YES`, another one with :data:`NO`.
    """

    question: str
    answer: str
    kind: Kind
    is_positive: bool


def yes_no(question: str, is_positive: bool) -> QAPair:
    """A yes/no question with its answer."""
    return QAPair(question, YES if is_positive else NO, "yes_no", is_positive)


def balanced(pairs: Sequence[QAPair], rng: Random) -> list[QAPair]:
    """As many positive as negative pairs of each kind, in the order given; ``rng`` chooses what is left out.

    A question that is asked twice with different answers teaches nothing and is left out altogether.
    """
    answers: dict[str, set[str]] = {}
    for pair in pairs:
        answers.setdefault(pair.question, set()).add(pair.answer)
    clear = [pair for pair in dict.fromkeys(pairs) if len(answers[pair.question]) == 1]
    kept: set[int] = set()
    for kind in KINDS:
        sides = [
            [i for i, pair in enumerate(clear) if pair.kind == kind and pair.is_positive is positive]
            for positive in (True, False)
        ]
        size = min(map(len, sides))
        kept.update(i for side in sides for i in rng.sample(side, size))
    return [pair for i, pair in enumerate(clear) if i in kept]


def positive_only(pairs: Sequence[QAPair]) -> list[QAPair]:
    """The pairs about what was discussed, each once."""
    return [pair for pair in dict.fromkeys(pairs) if pair.is_positive]
