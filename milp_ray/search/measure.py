"""What a trial measures: one layout, trained for every probe user, scored on their validation queries.

Free of Ray; :mod:`milp_ray.search.trial` runs it in Tune.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from milp_ray.errors import MilpError
from milp_ray.evaluation.metrics import persona_f1, rouge_1, rouge_l
from milp_ray.memory.architecture import adapter_parameters

if TYPE_CHECKING:
    from milp_ray.config import BaseSection, PromptSection, TrainingSection
    from milp_ray.memory.layout import CanonicalLayout
    from milp_ray.training.base import Base
    from milp_ray.training.train import JobResult
    from milp_ray.users.records import UserSplit

# Averaged over the probe users, with a standard error each.
_BY_USER = ("validation_loss", "rouge_l", "rouge_1", "persona_f1")


@dataclass(frozen=True)
class TrialTask:
    """What all trials of a study share; the probe users' ``splits`` hold no test examples."""

    base: BaseSection
    training: TrainingSection
    prompt: PromptSection
    stages: Literal["memory", "both"]
    max_new_tokens: int
    batch_size: int
    seed: int
    splits: tuple[UserSplit, ...]
    threads: int = 1


def measure(base: Base, layout: CanonicalLayout, task: TrialTask) -> dict[str, Any]:
    """Train ``layout`` for every probe user and score it; the empty layout is the base as it is.

    A user's training seed depends on the user's place alone, so that layouts are compared under the same
    draws (common random numbers) and a layout measured twice gives the same values.

    Returns:
        Means over the probe users of validation_loss, rouge_l, rouge_1 and persona_f1, each with its standard
        error ``…_sem`` (``None`` for one user); adapter_parameters of one user; seconds, tokens and steps of
        all; peak_rss_mib; and ``per_user``, the values by user in the order of ``task.splits``. No texts.

    Raises:
        MilpError: training diverged.
    """
    from milp_ray.training.train import Job, train

    started = time.perf_counter()
    parts = frozenset({"memory"} if task.stages == "memory" else {"memory", "instruction"})
    per_user: dict[str, list[float]] = {name: [] for name in _BY_USER}
    results: list[JobResult] = []
    for place, split in enumerate(task.splits):
        job = Job(f"probe-{place}", split, layout, parts, seed=_user_seed(task.seed, place))
        [result] = train(base, [job], task.training, task.prompt)
        if result.validation_loss is None:
            raise MilpError(f"probe user {place} has no validation examples: a trial cannot be measured")
        scores = {"validation_loss": result.validation_loss, **_text_scores(base, result, split, task)}
        for name in _BY_USER:
            per_user[name].append(scores[name])
        result.adapter = None  # one user's weights at a time
        results.append(result)
    summary: dict[str, Any] = {}
    for name, values in per_user.items():
        summary[name] = fmean(values)
        summary[f"{name}_sem"] = stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return summary | {
        "adapter_parameters": adapter_parameters(layout, base.shapes),
        "seconds": time.perf_counter() - started,
        "tokens": sum(result.tokens for result in results),
        "steps": sum(result.steps for result in results),
        "peak_rss_mib": max(result.peak_rss_mib for result in results),
        "per_user": per_user,
    }


def _text_scores(base: Base, result: JobResult, split: UserSplit, task: TrialTask) -> dict[str, float]:
    """Means over the user's validation queries."""
    from milp_ray.training.adapters import attached
    from milp_ray.training.generation import generate
    from milp_ray.training.text import query_prompt

    prompts = [query_prompt(example.query, task.prompt) for example in split.validation]
    with attached(base, result.adapter) as model:
        answers = generate(
            base, model, prompts, max_new_tokens=task.max_new_tokens, batch_size=task.batch_size
        )
    persona = [turn.text for turn in split.history] + ([split.profile] if split.profile else [])
    pairs = list(zip(answers, split.validation, strict=True))
    return {
        "rouge_l": fmean(rouge_l(answer, example.response) for answer, example in pairs),
        "rouge_1": fmean(rouge_1(answer, example.response) for answer, example in pairs),
        "persona_f1": fmean(persona_f1(answer, persona) for answer in answers),
    }


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
