"""Jobs: one user's adapter under one layout, planned into stages of sequences before anything is trained."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from milp_ray.config.prompt import PromptSection
from milp_ray.config.training import TrainingSection
from milp_ray.errors import MilpError
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.training.data import Sequence
from milp_ray.training.token_cache import UserTokens
from milp_ray.users.records import UserSplit

if TYPE_CHECKING:
    from milp_ray.training.adapters import Adapter
    from milp_ray.training.base import Base

MEMORY, INSTRUCTION, JOINT = "memory", "instruction", "joint"
PARTS = frozenset({MEMORY, INSTRUCTION})
TOO_LARGE = (
    "one job's batch alone does not fit the device's memory; lower training.batch_size or training.max_length"
)


@dataclass(frozen=True)
class Job:
    """Train one user's adapter under one layout.

    ``parts`` are the kinds of sequences to train on, of {"memory", "instruction"}. ``seed`` alone decides
    the initial weights, the order of sequences and dropout. ``learning_rate`` is the job's own, where it is
    not the recipe's. ``start`` is an adapter of the same layout whose weights the job begins with, in place
    of fresh ones; the optimizer and its schedule begin anew all the same. ``stages`` are sequences of the
    job's own, in place of those that ``split`` and ``parts`` would make; of the split there is then only the
    validation set.
    """

    job_id: str
    split: UserSplit
    layout: CanonicalLayout
    parts: frozenset[str]
    seed: int
    learning_rate: float | None = None
    start: Adapter | None = None
    stages: tuple[Stage, ...] | None = None


@dataclass
class JobResult:
    """What became of a job.

    ``adapter`` is ``None`` for the empty layout; ``validation_loss`` (mean nats a response token over the
    validation examples) where there are none. ``tokens`` were trained on, padding not counted; ``curve`` has
    one entry an epoch: stage, epoch, training_loss, validation_loss.
    """

    job_id: str
    adapter: Adapter | None
    validation_loss: float | None
    steps: int
    tokens: int
    seconds: float
    peak_rss_mib: float
    curve: list[dict[str, Any]]


@dataclass(frozen=True)
class PausedJob:
    """Where a job stands part of the way through its plan; nothing here is a result of the job.

    ``epoch`` epochs are done, of all stages together. ``validation_loss`` (mean nats a response token;
    ``None`` without validation examples) is that of the weights so far. ``steps`` and ``tokens`` count from
    the job's beginning, ``seconds`` from this call's.
    """

    job_id: str
    epoch: int
    validation_loss: float | None
    steps: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Stage:
    """Sequences that are gone through ``epochs`` times under one learning-rate schedule."""

    name: str
    sequences: tuple[Sequence, ...]
    epochs: int

    def steps_per_epoch(self, section: TrainingSection) -> int:
        """Optimizer steps of one epoch; the last one may have fewer batches than the others."""
        n_batches = math.ceil(len(self.sequences) / section.batch_size)
        return math.ceil(n_batches / section.gradient_accumulation)

    def n_steps(self, section: TrainingSection) -> int:
        """Optimizer steps of the whole stage."""
        return self.epochs * self.steps_per_epoch(section)


@dataclass(frozen=True)
class JobPlan:
    """A job in tokens: its stages that have sequences, its validation pairs, and the recipe with its rate.

    ``fingerprint`` is a hash of everything that the result depends on; ``n_steps`` are those of all stages.
    """

    job: Job
    section: TrainingSection
    stages: tuple[Stage, ...]
    validation: tuple[Sequence, ...]
    fingerprint: str
    n_steps: int


def plan_job(job: Job, base: Base, section: TrainingSection, prompt: PromptSection) -> JobPlan:
    """Check a job against the base and tokenise it.

    Raises:
        MilpError: the job's parts or layout do not fit this base, or ``max_length`` is above its context.
    """
    check_job(job, base, section)
    if job.learning_rate is not None:
        section = section.model_copy(update={"learning_rate": job.learning_rate})
    tokens = base.tokens.of(job.split, base, section, prompt)
    stages = _stages(job.parts, section, tokens) if job.stages is None else job.stages
    return JobPlan(
        job=job,
        section=section,
        stages=stages,
        validation=tokens.validation,
        fingerprint=_fingerprint(job, base, section, stages, tokens.validation),
        n_steps=sum(stage.n_steps(section) for stage in stages),
    )


def planned_epochs(section: TrainingSection, parts: frozenset[str]) -> int:
    """Epochs of all stages of a job with ``parts``, each of which has sequences."""
    epochs = {MEMORY: section.memory_epochs, INSTRUCTION: section.instruction_epochs}
    wanted = [epochs[part] for part in parts]
    return max(wanted) if section.stages == JOINT else sum(wanted)


def check_job(job: Job, base: Base, section: TrainingSection) -> None:
    """Refuse a job that does not fit the base.

    Raises:
        MilpError: its parts are unknown, its layout is for another base, it cannot begin with the weights
            that it is given, or ZeRO-3 scatters what its targets are made with.
    """
    from milp_ray.training.start import check_start

    if not job.parts or not job.parts <= PARTS:
        raise MilpError(f"a job's parts are {sorted(job.parts)}: give one or both of {sorted(PARTS)}")
    if job.layout.n_layers != base.n_layers:
        raise MilpError(
            f"layout {job.layout.key} is for {job.layout.n_layers} layers, but the base {base.model_id!r} "
            f"has {base.n_layers}; search a layout for this base"
        )
    if not job.layout.is_empty:
        base.shapes.check_rank(job.layout.rank)
    check_start(job, base, section)
    if section.deepspeed.zero_stage == 3 and any(
        one.reference is not None for stage in job.stages or () for one in stage.sequences
    ):
        raise MilpError(
            "training.deepspeed.zero_stage is 3, by which no process has the whole head that distributions "
            "are made with; set methods.plum.own_texts_target to token, or zero_stage to 2 or less"
        )


def pooled_stages(
    splits: Iterable[UserSplit],
    parts: frozenset[str],
    base: Base,
    section: TrainingSection,
    prompt: PromptSection,
) -> tuple[Stage, ...]:
    """The stages of one job over all of these users' data; no sequence holds texts of two of them."""
    tokens = [base.tokens.of(split, base, section, prompt) for split in splits]
    memory = tuple(sequence for one in tokens for sequence in one.memory)
    instruction = tuple(sequence for one in tokens for sequence in one.instruction)
    return _stages(parts, section, UserTokens(tokens[0].split, memory, instruction, ()))


def _stages(parts: frozenset[str], section: TrainingSection, tokens: UserTokens) -> tuple[Stage, ...]:
    """The stages of a job that have sequences."""
    found = {MEMORY: tokens.memory, INSTRUCTION: tokens.instruction}
    wanted = {name: sequences for name, sequences in found.items() if name in parts}
    epochs = {MEMORY: section.memory_epochs, INSTRUCTION: section.instruction_epochs}
    if section.stages == JOINT and len(wanted) > 1:
        n_epochs = planned_epochs(section, parts)
        stages = [Stage(JOINT, wanted[MEMORY] + wanted[INSTRUCTION], n_epochs)]
    else:
        stages = [Stage(name, sequences, epochs[name]) for name, sequences in wanted.items()]
    return tuple(stage for stage in stages if stage.sequences)


def _fingerprint(
    job: Job,
    base: Base,
    section: TrainingSection,
    stages: tuple[Stage, ...],
    validation: tuple[Sequence, ...],
) -> str:
    """Hash of everything that a job's result depends on, texts included (as tokens; not to be read back)."""
    from milp_ray.training.start import weights_digest

    made_from = {
        "base": [base.model_id, base.revision, str(base.dtype)],
        "layout": job.layout.to_dict(),
        "seed": job.seed,
        "section": section.model_dump(mode="json", exclude={"pack_size"}),
        "stages": [[s.name, s.epochs, [_hashed(q) for q in s.sequences]] for s in stages],
        "validation": [[q.ids, q.target_from] for q in validation],
    }
    if job.start is not None:
        made_from["start"] = weights_digest(job.start)
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def _hashed(sequence: Sequence) -> list[object]:
    """What of a training sequence makes a difference; weights and a reference only where there are any."""
    weights = [] if sequence.weights is None else [sequence.weights]
    reference = [] if sequence.reference is None else ["reference"]  # which follows from base and tokens
    return [sequence.ids, sequence.target_from, *weights, *reference]
