"""MiLP with retrieval: the user's adapter answers, with the turns that a query is about before it.

Two of the families that surveys of personalised models tell apart (Liu et al. 2025, arXiv 2502.11528) put
together: weights hold what was said often, and the prompt what was said once. The adapter is MiLP's own (the
stored one, where there is one), trained without such prompts, so that a user needs one adapter for both.
Turns are ranked by recency, BM25 and hidden states together (:mod:`milp_ray.methods.ranking`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from milp_ray.methods.milp import stored_or_trained
from milp_ray.methods.protocol import Answerer, text_bytes
from milp_ray.methods.retrieval import retrieved

if TYPE_CHECKING:
    from collections.abc import Sequence

    from milp_ray.methods.protocol import FitRequest, Personalizer


def fit(requests: Sequence[FitRequest]) -> list[Personalizer | None]:
    """As MiLP; and a user's turns are indexed."""
    return [
        Answerer(
            request,
            adapter=adapter,
            context=retrieved(request, "fusion"),
            context_bytes=text_bytes(request.split.history),
        )
        for request, adapter in zip(requests, stored_or_trained(requests), strict=True)
    ]
