"""What there is to learn from a user's conversations: each one's own pairs, as training sequences."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from milp_ray.methods.plum.conversations import conversations
from milp_ray.methods.plum.qa import balanced, positive_only
from milp_ray.methods.plum.sequences import qa_sequences

if TYPE_CHECKING:
    from collections.abc import Sequence

    from milp_ray.methods.plum.qa import QAPair
    from milp_ray.methods.plum.teacher import Teacher
    from milp_ray.methods.protocol import FitRequest
    from milp_ray.training.data import Sequence as TokenSequence


@dataclass(frozen=True)
class Lesson:
    """What is trained on of the pairs that the teacher wrote about a conversation."""

    number: int  # of the conversation
    written: tuple[QAPair, ...]  # all of the teacher's
    pairs: tuple[QAPair, ...]  # those that were chosen
    sequences: tuple[TokenSequence, ...]  # the chosen ones in tokens
    _chooser: Random  # as it was when it had chosen them

    def rng(self) -> Random:
        """Draws whatever is trained on beside, the same each time."""
        return copy(self._chooser)


def lessons_of(request: FitRequest, teacher: Teacher) -> list[Lesson]:
    """A user's conversations, oldest first; those about which nothing is asked are left out.

    Raises:
        MilpError: the teacher cannot be asked, or sequences of ``training.max_length`` tokens hold nothing.
    """
    section = request.methods.plum
    cut = conversations(request.split.history, section.conversation)
    if section.rehearsal_rounds:  # what is not kept the teacher does not remember, either
        written = [pairs for conversation in cut for pairs in teacher.pairs([conversation], request.seed)]
    else:
        written = teacher.pairs(cut, request.seed)
    found = [lesson_of(request, one.number, pairs) for one, pairs in zip(cut, written, strict=True) if pairs]
    return [lesson for lesson in found if lesson.sequences]


def lesson_of(request: FitRequest, number: int, written: Sequence[QAPair]) -> Lesson:
    """What is trained on of the pairs about the conversation of this number.

    Raises:
        MilpError: sequences of ``training.max_length`` tokens hold nothing.
    """
    section, rng = request.methods.plum, Random(f"{request.seed}/{number}")
    kept = balanced(written, rng) if section.negatives else positive_only(written)
    own = qa_sequences(kept, request.base, request.prompt, section, max_length=most_tokens(request))
    return Lesson(number, tuple(written), tuple(kept), tuple(own), rng)


def own_texts_of(request: FitRequest, texts: Sequence[TokenSequence]) -> Sequence[TokenSequence]:
    """Of texts written for all users as many as for this one, whose adapter depends on nobody else."""
    section = request.methods.plum
    return texts[: section.own_texts * len(conversations(request.split.history, section.conversation))]


def most_tokens(request: FitRequest) -> int:
    """The longest that a training sequence may be."""
    return request.training.max_length or request.base.context_length


def drawn(some: Sequence[TokenSequence], n: int, rng: Random) -> list[TokenSequence]:
    """``n`` of them at random, or all."""
    return rng.sample(some, min(n, len(some)))
