"""MiLP (Memory-injected LLM Personalization, Zhang et al. 2024): the memory is kept in a LoRA adapter.

The adapter is trained on the user's history and then on past query → response pairs, under the layout that
the search has chosen, and answers the query without any history in the prompt. Where the paper departs from
this: it trains on one user's dialogues with a searched layout of that user; here one search serves everybody.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from milp_ray.methods.protocol import Answerer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from milp_ray.methods.protocol import FitRequest, Personalizer
    from milp_ray.training.adapters import Adapter
    from milp_ray.training.job import Job

BOTH = frozenset({"memory", "instruction"})


def fit(requests: Sequence[FitRequest]) -> list[Personalizer | None]:
    """Take the stored adapters, and train those that are missing."""
    adapters = stored_or_trained(requests)
    return [Answerer(request, adapter=adapter) for request, adapter in zip(requests, adapters, strict=True)]


def stored_or_trained(requests: Sequence[FitRequest]) -> list[Adapter | None]:
    """Each user's stored adapter, and one trained here where there is none; ``None``: the base alone."""
    missing = [request for request in requests if request.adapter is None]
    trained = iter(train_adapters(missing, BOTH))
    return [next(trained) if request.adapter is None else request.adapter for request in requests]


def train_adapters(requests: Sequence[FitRequest], parts: frozenset[str]) -> list[Adapter | None]:
    """Adapters trained on some of each user's data under the request's layout; all users share the recipe.

    ``None``, which is the base alone, for the empty layout and where the user has no data of these parts.
    """
    from milp_ray.training.train import train

    jobs = {str(i): job for i, request in enumerate(requests) if (job := _job(str(i), request, parts))}
    if not jobs:
        return [None] * len(requests)
    one = requests[0]
    results = train(one.base, list(jobs.values()), one.training, one.prompt)
    adapters = {result.job_id: result.adapter for result in results}
    return [adapters.get(str(i)) for i in range(len(requests))]


def _job(job_id: str, request: FitRequest, parts: frozenset[str]) -> Job | None:
    from milp_ray.training.job import Job

    data = {"memory": request.split.history, "instruction": request.split.train}
    parts = frozenset(part for part in parts if data[part])
    if request.layout.is_empty or not parts:
        return None
    split = request.split
    if request.training.early_stopping_patience is None:
        # Validation examples would be measured at the end and change nothing.
        split = replace(split, validation=())
    return Job(job_id=job_id, split=split, layout=request.layout, parts=parts, seed=request.seed)
