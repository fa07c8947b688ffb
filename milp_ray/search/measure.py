"""What a trial measures: one layout, trained for every probe user, scored on their validation queries.

With rungs it is measured in parts: at each rung every probe user is trained up to it and only the validation
loss is taken, which is cheap; answers are generated at the end alone. Free of Ray;
:mod:`milp_ray.search.trial` runs it in Tune.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from milp_ray.errors import MilpError
from milp_ray.evaluation.metrics import persona_f1, rouge_1, rouge_l
from milp_ray.memory.architecture import adapter_parameters
from milp_ray.search.rungs import RUNG
from milp_ray.search.trainers import OwnTrainer, Trainer
from milp_ray.training.peaks import peak_gpu_mib

if TYPE_CHECKING:
    from milp_ray.config.base import BaseSection
    from milp_ray.config.prompt import PromptSection
    from milp_ray.config.training import TrainingSection
    from milp_ray.memory.layout import CanonicalLayout
    from milp_ray.training.base import Base
    from milp_ray.training.job import Job, JobResult
    from milp_ray.users.records import UserSplit

# Averaged over the probe users, with a standard error each.
_BY_USER = ("validation_loss", "rouge_l", "rouge_1", "persona_f1")

BEGAN = "began"  # when a trial's process and base were there, in seconds of the epoch


@dataclass(frozen=True)
class TrialTask:
    """What all trials of a study share; the probe users' ``splits`` hold no test examples.

    ``rungs`` are epochs, ascending and below the end of training (:mod:`milp_ray.search.rungs`).
    ``gpu_share`` is the part of a GPU that a process of a trial has.
    """

    base: BaseSection
    training: TrainingSection
    prompt: PromptSection
    stages: Literal["memory", "both"]
    max_new_tokens: int
    batch_size: int
    seed: int
    splits: tuple[UserSplit, ...]
    threads: int = 1
    rungs: tuple[int, ...] = ()
    gpu_share: float = 1.0


def measure(base: Base, layout: CanonicalLayout, task: TrialTask) -> dict[str, Any]:
    """Train ``layout`` for every probe user and score it, without a pause; see :meth:`Measurement.finish`."""
    with Measurement(base, layout, task) as measurement:
        return measurement.finish()


class Measurement:
    """The measurement of one layout, to be gone on with rung by rung.

    A user's training seed depends on the user's place alone, so that layouts are compared under the same
    draws (common random numbers) and a layout measured twice gives the same values. Between rungs the users'
    adapters and optimizers are kept in a temporary folder that only this process's user may read; it is
    removed by :meth:`close`, or when the process ends (not when it is killed). Without a rung nothing is
    written. Of several processes that measure together (:mod:`milp_ray.training.distributed`) one
    ``scores_texts``; the others say 0, which nobody reads. ``trainer``: who trains; nobody else in this
    process unless given.
    """

    def __init__(
        self,
        base: Base,
        layout: CanonicalLayout,
        task: TrialTask,
        *,
        scores_texts: bool = True,
        trainer: Trainer | None = None,
    ) -> None:
        self._base = base
        self._trainer = trainer or OwnTrainer(base, task.training, task.prompt)
        self._scores_texts = scores_texts
        self._layout = layout
        self._task = task
        self._n_rungs_done = 0
        self._began = time.time()

    @property
    def has_rungs_left(self) -> bool:
        """Whether :meth:`next_rung` comes next, and not yet :meth:`finish`."""
        return self._n_rungs_done < len(self._task.rungs)

    def next_rung(self) -> dict[str, Any]:
        """Train every probe user up to the next rung.

        Returns:
            The values of a :class:`milp_ray.search.rungs.RungRecord`, less the trial. No texts.

        Raises:
            IndexError: there is no rung left.
            MilpError: training diverged.
        """
        rung = self._n_rungs_done
        epoch = self._task.rungs[rung]
        paused = self._trainer.train_until(self._jobs(), epoch)
        losses = [
            _required(part.validation_loss, place, f"after epoch {part.epoch}")
            for place, part in enumerate(paused)
        ]
        self._n_rungs_done += 1
        return {
            RUNG: rung,
            "epoch": epoch,
            "adapter_parameters": adapter_parameters(self._layout, self._base.shapes),
            "validation_loss_at_rung": fmean(losses),
            "validation_loss_at_rung_sem": _standard_error(losses),
            "validation_loss_at_rung_by_user": losses,
            "seconds_at_rung": self._trainer.seconds,
            "tokens_at_rung": sum(part.tokens for part in paused),
            "steps_at_rung": sum(part.steps for part in paused),
        }

    def finish(self) -> dict[str, Any]:
        """Train every probe user to the end and score the layout; the empty layout is the base as it is.

        The values are the same, bit for bit, whatever rungs there were.

        Returns:
            Means over the probe users of validation_loss, rouge_l, rouge_1 and persona_f1, each with its
            standard error ``…_sem`` (``None`` for one user); adapter_parameters of one user; seconds, tokens
            and steps of all; peak_rss_mib, and peak_gpu_mib (``None`` on CPUs); began, the second of the
            epoch at which process and base were there; and ``per_user``, the values by user in the order of
            ``task.splits``. No texts.

        Raises:
            MilpError: training diverged.
        """
        results = self._trainer.train(self._jobs())
        losses = [
            _required(result.validation_loss, place, "at the end") for place, result in enumerate(results)
        ]
        scores = {name: [0.0] * len(results) for name in _BY_USER}
        if self._scores_texts:
            scores |= _text_scores(self._trainer, results, self._task)
        per_user = scores | {"validation_loss": losses}
        summary: dict[str, Any] = {}
        for name in _BY_USER:
            values = per_user[name]
            summary[name] = fmean(values)
            summary[f"{name}_sem"] = _standard_error(values)
        return summary | {
            "adapter_parameters": adapter_parameters(self._layout, self._base.shapes),
            "seconds": self._trainer.seconds,
            "tokens": sum(result.tokens for result in results),
            "steps": sum(result.steps for result in results),
            "peak_rss_mib": max(result.peak_rss_mib for result in results),
            "peak_gpu_mib": peak_gpu_mib(),
            BEGAN: self._began,
            "per_user": per_user,
        }

    def close(self) -> None:
        """Remove what was kept between rungs; the measurement cannot be gone on with."""
        self._trainer.close()

    def __enter__(self) -> Measurement:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _jobs(self) -> list[Job]:
        from milp_ray.training.job import Job

        parts = trial_parts(self._task.stages)
        return [
            Job(f"probe-{place}", split, self._layout, parts, seed=_user_seed(self._task.seed, place))
            for place, split in enumerate(self._task.splits)
        ]


def trial_parts(stages: Literal["memory", "both"]) -> frozenset[str]:
    """The parts that the jobs of a trial train, for ``search.trial_stages``."""
    return frozenset({"memory"} if stages == "memory" else {"memory", "instruction"})


def _required(loss: float | None, place: int, when: str) -> float:
    if loss is None:
        raise MilpError(f"probe user {place} has no validation examples: a trial cannot be measured")
    if not math.isfinite(loss):
        raise MilpError(
            f"training diverged: {when} the validation loss of probe user {place} is no longer a number; "
            "lower training.learning_rate or training.lora_alpha.value"
        )
    return loss


def _standard_error(values: Sequence[float]) -> float | None:
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def _text_scores(trainer: Trainer, results: Sequence[JobResult], task: TrialTask) -> dict[str, list[float]]:
    """For each user the means over the validation queries."""
    from milp_ray.training.generation import Questions
    from milp_ray.training.text import query_prompt

    asked = [
        Questions([query_prompt(example.query, task.prompt) for example in split.validation], result.adapter)
        for split, result in zip(task.splits, results, strict=True)
    ]
    answers = trainer.answers(asked, max_new_tokens=task.max_new_tokens, batch_size=task.batch_size)
    scores: dict[str, list[float]] = {"rouge_l": [], "rouge_1": [], "persona_f1": []}
    for own, split in zip(answers, task.splits, strict=True):
        persona = [turn.text for turn in split.history] + ([split.profile] if split.profile else [])
        pairs = list(zip(own, split.validation, strict=True))
        scores["rouge_l"].append(fmean(rouge_l(answer, example.response) for answer, example in pairs))
        scores["rouge_1"].append(fmean(rouge_1(answer, example.response) for answer, example in pairs))
        scores["persona_f1"].append(fmean(persona_f1(answer, persona) for answer in own))
    return scores


def _user_seed(seed: int, place: int) -> int:
    return int(np.random.SeedSequence([seed, place]).generate_state(1)[0])


def check_probe_users(splits: Sequence[UserSplit]) -> None:
    """Refuse probe users that no trial could be measured on.

    Raises:
        MilpError: there is none, or one has no validation examples.
    """
    if not splits:
        raise MilpError("the search has no probe users: give users with validation examples")
    without = [split.user_id for split in splits if not split.validation]
    if without:
        raise MilpError(
            f"{len(without)} of {len(splits)} probe users have no validation examples: choose users with "
            "some, or raise users.split.validation"
        )
