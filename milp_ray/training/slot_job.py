"""One job in a slot: where it stands in its plan, and what comes next."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from milp_ray.errors import MilpError
from milp_ray.training.checkpoint import Progress, Tensors
from milp_ray.training.data import chunks, epoch_plan
from milp_ray.training.engine import linear_schedule
from milp_ray.training.flat_batch import Part, Texts
from milp_ray.training.pack_optimizer import SlotStep
from milp_ray.training.packed_lora import Segment

if TYPE_CHECKING:
    from milp_ray.config.training import TrainingSection
    from milp_ray.training.job import JobPlan, Stage
    from milp_ray.training.rack import Rack

Window = tuple[int, ...]  # the sequences of one optimizer step


@dataclass
class SlotJob:
    """A job that has a slot.

    ``windows`` are the steps of the epoch under way that are still to come; ``epoch_nll`` and
    ``epoch_weight`` sum up those that were taken, by the targets' weights. ``until_epoch`` is where the job
    pauses, counted through all stages (``None``: at its end).
    """

    plan: JobPlan
    rack: Rack
    slot: int
    progress: Progress
    until_epoch: int | None = None
    best: Tensors = field(default_factory=dict)
    windows: list[Window] = field(default_factory=list)
    epoch_nll: float = 0.0
    epoch_weight: float = 0.0
    seconds: float = 0.0
    has_trained: bool = False  # in this call

    def __post_init__(self) -> None:
        self.texts = [Texts(stage.sequences) for stage in self.plan.stages]
        self.validation = Texts(self.plan.validation)

    @property
    def section(self) -> TrainingSection:
        """The job's own recipe."""
        return self.plan.section

    @property
    def all_texts(self) -> list[Texts]:
        """The sequences of all stages, and those to validate with."""
        return [*self.texts, self.validation]

    @property
    def n_tokens(self) -> int:
        """Tokens of all sequences, each counted once."""
        return sum(sum(texts.lengths) for texts in self.all_texts)

    @property
    def stage(self) -> Stage:
        """The stage that the job is in."""
        return self.plan.stages[self.progress.stage]

    @property
    def is_over(self) -> bool:
        """Whether early stopping ends the stage."""
        patience = self.section.early_stopping_patience
        return patience is not None and self.progress.n_worse >= patience

    @property
    def last_epoch(self) -> int:
        """The epoch of this stage after which the stage ends or the job pauses."""
        return self.stage.epochs if self._until is None else min(self._until, self.stage.epochs)

    @property
    def pauses_here(self) -> bool:
        """Whether the job pauses in this stage, or at its end."""
        return self._until is not None and self._until <= self.stage.epochs

    @property
    def _until(self) -> int | None:
        if self.until_epoch is None:
            return None
        return self.until_epoch - sum(stage.epochs for stage in self.plan.stages[: self.progress.stage])

    def begin_epoch(self) -> None:
        """Lay out the steps of the next epoch: the job's seed, the stage and the epoch alone decide."""
        rng = random.Random(f"{self.plan.job.seed}/{self.stage.name}/{self.progress.epoch}")
        batches = epoch_plan(self.stage.sequences, self.section.batch_size, self.section.order, rng)
        self.windows = list(self._windows(batches))[::-1]
        self.epoch_nll, self.epoch_weight = 0.0, 0.0
        self.has_trained = True

    def _windows(self, batches: list[Window]) -> Iterator[Window]:
        for chosen in chunks(range(len(batches)), self.section.gradient_accumulation):
            yield tuple(index for i in chosen for index in batches[i])

    def next_part(self) -> Part:
        """The sequences of the step that comes next, longest first."""
        texts = self.texts[self.progress.stage]
        chosen = tuple(sorted(self.windows[-1], key=lambda i: -texts.lengths[i]))
        segment = Segment(self.rack, self.slot, 0, 0, self._dropout_seed() if self.section.dropout else 0)
        return Part(texts, chosen, segment)

    def validation_part(self) -> Part:
        """All validation sequences."""
        return Part(self.validation, tuple(range(len(self.validation))), Segment(self.rack, self.slot, 0, 0))

    def next_step(self) -> SlotStep:
        """What the optimizer is to do in the step that comes next."""
        done = self.progress.stage_steps
        factor = linear_schedule(done, self.stage.n_steps(self.section), self.section.warmup_ratio)
        return SlotStep(self.rack, self.slot, done + 1, self.section.learning_rate * factor)

    def count_step(self, part: Part) -> None:
        """A step on ``part`` was taken."""
        self.windows.pop()
        self.progress.steps += 1
        self.progress.stage_steps += 1
        self.progress.tokens += part.n_tokens
        self.epoch_weight += part.total_weight

    def tensors(self) -> Tensors:
        """What a checkpoint keeps beside the progress: weights, the best ones so far, and moments."""
        tensors = {f"lora.{name}": t for name, t in self.rack.read(self.slot).items()}
        tensors |= {f"best.{name}": t for name, t in self.best.items()}
        return tensors | {f"moments.{name}": t for name, t in self.rack.moments(self.slot).items()}

    def restore(self, tensors: Tensors) -> None:
        """Put back what :meth:`tensors` gave."""
        self.rack.load(self.slot, _named(tensors, "lora."))
        self.rack.restore(self.slot, _named(tensors, "moments."))
        self.best = _named(tensors, "best.")

    def check_finite(self, mean: float) -> None:
        """Refuse a training loss that is no number.

        Raises:
            MilpError: training has diverged.
        """
        if mean - mean != 0.0:  # inf or NaN
            raise MilpError(
                f"training diverged in epoch {self.progress.epoch} of the {self.stage.name} stage: the loss "
                "is no longer a number; lower "
                f"training.learning_rate (now {self.section.learning_rate:g}) or "
                f"training.lora_alpha.value (now {self.section.lora_alpha.value:g})"
            )

    def _dropout_seed(self) -> int:
        what = f"{self.plan.job.seed}/{self.stage.name}/{self.progress.stage_steps}"
        return int.from_bytes(hashlib.blake2b(what.encode(), digest_size=7).digest(), "little")


def _named(tensors: Tensors, head: str) -> Tensors:
    """Those whose names begin so, by the rest of them."""
    return {name.removeprefix(head): t for name, t in tensors.items() if name.startswith(head)}
