"""PLUM (Magister et al. 2024, arXiv 2411.13405): remembering conversations as questions and answers.

A user's history is cut into conversations; a teacher writes questions and answers about each, open ones and
such that are answered with yes or no, and as many about related things that were not discussed, without which
the model learns to say yes. One LoRA adapter goes through the conversations in order: each is a stage with a
learning-rate schedule and fresh optimizer moments of its own, and its pairs are not seen again. The loss is
a weighted cross-entropy in which the tokens of the instruction, of the question and of the answer count
differently. The answer to a query is given without any history in the prompt.

Where it departs from the paper: there a large language model is the teacher; here the teacher can be chosen,
one by rule being the default, and the layout is the one that the other methods have.
A user's past examples are not used, only their history. Three settings, all off by default, are no part of
the paper: each conversation may be trained on together with some pairs of earlier ones (experience replay,
Chaudhry et al. 2019, arXiv 1902.10486), with texts that the base writes by itself (pseudo-rehearsal, Robins
1995, doi 10.1080/09540099550039318) or the base's own distributions on these (Li & Hoiem 2016, arXiv
1606.09282), and with the adapter's own beliefs about a vocabulary (:mod:`milp_ray.methods.plum.rehearsal`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from milp_ray.errors import MilpError
from milp_ray.methods.plum.conversations import conversations
from milp_ray.methods.plum.lessons import drawn, lessons_of, own_texts_of
from milp_ray.methods.plum.sequences import scaled
from milp_ray.methods.plum.teacher import teacher_of
from milp_ray.methods.protocol import Answerer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from milp_ray.methods.plum.lessons import Lesson
    from milp_ray.methods.protocol import FitRequest, Personalizer
    from milp_ray.training.adapters import Adapter
    from milp_ray.training.data import Sequence as TokenSequence
    from milp_ray.training.job import Stage


def fit(requests: Sequence[FitRequest]) -> list[Personalizer | None]:
    """Write the questions and train an adapter each; without history the base answers."""
    adapters = train_adapters(requests)
    return [Answerer(request, adapter=adapter) for request, adapter in zip(requests, adapters, strict=True)]


def train_adapters(requests: Sequence[FitRequest]) -> list[Adapter | None]:
    """Each user's adapter after their last conversation; ``None`` where there is nothing to train.

    Raises:
        MilpError: the teacher fails, or finds no question about anybody; training diverges; or the settings
            ask of the base what it cannot give.
    """
    if not requests:
        return []
    section = requests[0].methods.plum
    teacher = teacher_of(section.teacher, section.questions_per_statement)
    own = _own_texts(requests)
    asked = {
        i: request
        for i, request in enumerate(requests)
        if request.split.history and not request.layout.is_empty
    }
    lessons = {i: found for i, request in asked.items() if (found := lessons_of(request, teacher))}
    kind = section.teacher.kind
    if asked and not lessons and kind != "rule":  # a rule finds nothing only where nothing is said
        raise MilpError(
            f"the teacher ({kind}) wrote no question in the form that it was asked for about any of "
            f"{len(asked)} users; use a larger model or a larger methods.plum.teacher.max_new_tokens"
        )
    taught = [(requests[i], found) for i, found in lessons.items()]
    adapters = dict(zip(lessons, _trained(taught, own), strict=True))
    return [adapters.get(i) for i in range(len(requests))]


def _trained(
    taught: Sequence[tuple[FitRequest, list[Lesson]]], own_texts: Sequence[TokenSequence]
) -> Sequence[Adapter | None]:
    from milp_ray.methods.plum.rehearsal import train_rehearsed
    from milp_ray.methods.plum.stages import Course, train_courses

    if taught and taught[0][0].methods.plum.rehearsal_rounds:
        return train_rehearsed(taught, own_texts)
    return train_courses([Course(one, stages_of(one, lessons, own_texts)) for one, lessons in taught])


def stages_of(
    request: FitRequest, lessons: Sequence[Lesson], own_texts: Sequence[TokenSequence] = ()
) -> tuple[Stage, ...]:
    """A user's conversations as stages, oldest first.

    Each has, besides its own pairs, as many of the earlier ones' and of ``own_texts`` as the section says.
    """
    from milp_ray.training.job import Stage

    section = request.methods.plum
    own_texts = own_texts_of(request, own_texts)
    stages: list[Stage] = []
    earlier: list[TokenSequence] = []
    for lesson in lessons:
        rng = lesson.rng()
        beside = drawn(earlier, section.earlier_pairs, rng) + drawn(own_texts, section.own_texts, rng)
        # The order of sequences is drawn by the stage's name, so that each has one of its own.
        name = f"conversation {lesson.number}"
        stages.append(Stage(name, (*lesson.sequences, *beside), section.epochs))
        earlier += lesson.sequences
    return tuple(stages)


def _own_texts(requests: Sequence[FitRequest]) -> list[TokenSequence]:
    """What the base writes by itself, where it is to be trained on: as many as the longest history draws."""
    section = requests[0].methods.plum
    if not section.own_texts:
        return []
    from milp_ray.methods.plum import own_texts
    from milp_ray.training.encode import with_reference

    base = requests[0].base
    stages = max(len(conversations(one.split.history, section.conversation)) for one in requests)
    n_texts = min(own_texts.MOST_TEXTS, section.own_texts * stages)
    texts = own_texts.written_by_itself(base, requests[0].seed, n_texts)
    if section.own_texts_target == "distribution":
        texts = with_reference(base, texts)
    if section.own_texts_weight != 1.0:
        texts = [scaled(text, section.own_texts_weight) for text in texts]
    return texts
