"""Instruction only: an adapter trained on the user's past query → response pairs alone (stage 2 of MiLP).

An ablation of the MiLP paper: it learns how answers look, and the facts that training answers happen to tell.
Layout, recipe and seed are those of the full method, so that the data is all that differs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from milp_ray.methods.milp import train_adapters
from milp_ray.methods.protocol import Answerer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from milp_ray.methods.protocol import FitRequest, Personalizer


def fit(requests: Sequence[FitRequest]) -> list[Personalizer | None]:
    """Train the adapters; the empty layout has none and answers like the base."""
    adapters = train_adapters(requests, frozenset({"instruction"}))
    return [Answerer(request, adapter=adapter) for request, adapter in zip(requests, adapters, strict=True)]
