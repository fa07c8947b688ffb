"""MiLP (Memory-injected LLM Personalization, Zhang et al. 2024): the memory is kept in a LoRA adapter.

The adapter is trained on the user's history and then on past query → response pairs, under the layout that
the search has chosen, and answers the query without any history in the prompt. Where the paper departs from
this: it trains on one user's dialogues with a searched layout of that user; here one layout serves everybody.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from milp_ray.methods.protocol import Answerer

if TYPE_CHECKING:
    from milp_ray.methods.protocol import FitRequest, Personalizer
    from milp_ray.training.adapters import Adapter

BOTH = frozenset({"memory", "instruction"})


def fit(request: FitRequest) -> Personalizer:
    """Take the stored adapter, or train one where there is none."""
    adapter = request.adapter if request.adapter is not None else train_adapter(request, BOTH)
    return Answerer(request, adapter=adapter)


def train_adapter(request: FitRequest, parts: frozenset[str]) -> Adapter | None:
    """An adapter trained on some of the user's data under the request's layout.

    ``None``, which is the base alone, for the empty layout and where the user has no data of these parts.
    """
    from milp_ray.training.job import Job
    from milp_ray.training.train import train

    data = {"memory": request.split.history, "instruction": request.split.train}
    parts = frozenset(part for part in parts if data[part])
    if request.layout.is_empty or not parts:
        return None
    split = request.split
    if request.training.early_stopping_patience is None:
        # Validation examples would be measured at the end and change nothing.
        split = replace(split, validation=())
    job = Job(
        job_id="+".join(sorted(parts)), split=split, layout=request.layout, parts=parts, seed=request.seed
    )
    return train(request.base, [job], request.training, request.prompt)[0].adapter
