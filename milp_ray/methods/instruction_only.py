"""Instruction only: an adapter trained on the user's past query → response pairs alone (stage 2 of MiLP).

An ablation of the MiLP paper: it learns how answers look, and the facts that training answers happen to tell.
Layout, recipe and seed are those of the full method, so that the data is all that differs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from milp_ray.methods.milp import train_adapter
from milp_ray.methods.protocol import Answerer

if TYPE_CHECKING:
    from milp_ray.methods.protocol import FitRequest, Personalizer


def fit(request: FitRequest) -> Personalizer:
    """Train the adapter; the empty layout has none and answers like the base."""
    return Answerer(request, adapter=train_adapter(request, frozenset({"instruction"})))
