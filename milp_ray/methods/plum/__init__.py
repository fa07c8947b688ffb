"""PLUM (Magister et al. 2024, arXiv 2411.13405): remembering conversations as questions and answers.

A user's history is cut into conversations; a teacher writes questions and answers about each, open ones and
such that are answered with yes or no, and as many about related things that were not discussed, without which
the model learns to say yes. One LoRA adapter goes through the conversations in order: each is a stage with a
learning-rate schedule and fresh optimizer moments of its own, and its pairs are not seen again. The loss is
a weighted cross-entropy in which the tokens of the instruction, of the question and of the answer count
differently. The answer to a query is given without any history in the prompt.

Where it departs from the paper: there a large language model is the teacher; here the teacher can be chosen,
one by rule being the default, and the layout is the one that the other methods have.
A user's past examples are not used, only their history. Two settings, both off by default, are no part of
the paper: each conversation may be trained on together with some pairs of earlier ones (experience replay,
Chaudhry et al. 2019, arXiv 1902.10486) and with texts that the base writes by itself (pseudo-rehearsal,
Robins 1995, doi 10.1080/09540099550039318).
"""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

from milp_ray.errors import MilpError
from milp_ray.methods.plum.conversations import conversations
from milp_ray.methods.plum.qa import balanced, positive_only
from milp_ray.methods.plum.sequences import qa_sequences
from milp_ray.methods.plum.teacher import teacher_of
from milp_ray.methods.protocol import Answerer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from milp_ray.config.training import TrainingSection
    from milp_ray.methods.plum.qa import QAPair
    from milp_ray.methods.plum.teacher import Teacher
    from milp_ray.methods.protocol import FitRequest, Personalizer
    from milp_ray.training.adapters import Adapter
    from milp_ray.training.data import Sequence as TokenSequence
    from milp_ray.training.job import Job, Stage


def fit(requests: Sequence[FitRequest]) -> list[Personalizer | None]:
    """Write the questions and train an adapter each; without history the base answers."""
    adapters = train_adapters(requests)
    return [Answerer(request, adapter=adapter) for request, adapter in zip(requests, adapters, strict=True)]


def train_adapters(requests: Sequence[FitRequest]) -> list[Adapter | None]:
    """Each user's adapter after their last conversation; ``None`` where there is nothing to train.

    Raises:
        MilpError: the teacher fails, or finds no question about anybody; or training diverges.
    """
    from milp_ray.training.train import train

    if not requests:
        return []
    one = requests[0]
    teacher = teacher_of(one.methods.plum.teacher, one.methods.plum.questions_per_statement)
    own = _own_texts(requests)
    jobs = {i: job for i, request in enumerate(requests) if (job := _job(str(i), request, teacher, own))}
    n_asked = sum(bool(request.split.history) and not request.layout.is_empty for request in requests)
    kind = one.methods.plum.teacher.kind
    if n_asked and not jobs and kind != "rule":  # a rule finds nothing only where nothing is said
        raise MilpError(
            f"the teacher ({kind}) wrote no question in the form that it was asked for about any of "
            f"{n_asked} users; use a larger model or a larger methods.plum.teacher.max_new_tokens"
        )
    results = train(one.base, list(jobs.values()), _recipe(one), one.prompt) if jobs else []
    adapters = {int(result.job_id): result.adapter for result in results}
    return [adapters.get(i) for i in range(len(requests))]


def stages_of(
    request: FitRequest, teacher: Teacher, own_texts: Sequence[TokenSequence] = ()
) -> tuple[Stage, ...]:
    """A user's conversations as stages, oldest first; those about which nothing is asked are left out.

    Each has, besides its own pairs, as many of the earlier ones' and of ``own_texts`` as the section says.
    """
    from milp_ray.training.job import Stage

    section = request.methods.plum
    cut = conversations(request.split.history, section.conversation)
    written = teacher.pairs(cut, request.seed)
    # Of what was written for all users as many as for this one alone, whose adapter depends on nobody else.
    own_texts = own_texts[: section.own_texts * len(cut)]
    limit = request.training.max_length or request.base.context_length
    stages: list[Stage] = []
    earlier: list[TokenSequence] = []
    for conversation, pairs in zip(cut, written, strict=True):
        rng = Random(f"{request.seed}/{conversation.number}")
        kept = _chosen(pairs, section.negatives, rng)
        own = qa_sequences(kept, request.base, request.prompt, section, max_length=limit)
        if not own:
            continue
        beside = _drawn(earlier, section.earlier_pairs, rng) + _drawn(own_texts, section.own_texts, rng)
        # The order of sequences is drawn by the stage's name, so that each has one of its own.
        stages.append(Stage(f"conversation {conversation.number}", (*own, *beside), section.epochs))
        earlier += own
    return tuple(stages)


def _drawn(some: Sequence[TokenSequence], n: int, rng: Random) -> list[TokenSequence]:
    return rng.sample(some, min(n, len(some)))


def _own_texts(requests: Sequence[FitRequest]) -> list[TokenSequence]:
    """What the base writes by itself, where it is to be trained on: as many as the longest history draws."""
    section = requests[0].methods.plum
    if not section.own_texts:
        return []
    from milp_ray.methods.plum import own_texts

    stages = max(len(conversations(one.split.history, section.conversation)) for one in requests)
    n_texts = min(own_texts.MOST_TEXTS, section.own_texts * stages)
    return own_texts.written_by_itself(requests[0].base, requests[0].seed, n_texts)


def _chosen(pairs: Sequence[QAPair], negatives: bool, rng: Random) -> list[QAPair]:
    return balanced(pairs, rng) if negatives else positive_only(pairs)


def _job(
    job_id: str, request: FitRequest, teacher: Teacher, own_texts: Sequence[TokenSequence]
) -> Job | None:
    from dataclasses import replace

    from milp_ray.training.job import INSTRUCTION, Job

    if request.layout.is_empty or not request.split.history:
        return None
    stages = stages_of(request, teacher, own_texts)
    if not stages:
        return None
    # Validation examples are about the end of the history, and no stage may choose by them.
    split = replace(request.split, validation=())
    rate = request.methods.plum.learning_rate
    return Job(job_id, split, request.layout, frozenset({INSTRUCTION}), request.seed, rate, stages=stages)


def _recipe(request: FitRequest) -> TrainingSection:
    return request.training.model_copy(update={"early_stopping_patience": None})
