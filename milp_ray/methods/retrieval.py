"""Retrieval-augmented prompting: the few past turns that a query is about stand before it.

As LaMP does with its users' profiles (Salemi et al. 2024, arXiv 2304.11406): turns are ranked for each query
by recency, by BM25, by the base's hidden states or by all of them fused, the first k are taken, and as many
of them as fit the context are put before the query in time order. LaMP retrieves with Contriever; here the
default encoder is the frozen base itself, so that nothing else has to be there, and any sentence-transformers
model can take its place. Nothing is trained.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from milp_ray.methods.protocol import Answerer, fits, most_that_fits, text_bytes
from milp_ray.methods.ranking import ranking as ranking_of
from milp_ray.training.text import history_context, query_prompt

if TYPE_CHECKING:
    from collections.abc import Sequence

    from milp_ray.methods.protocol import ContextRule, FitRequest, Personalizer
    from milp_ray.methods.ranking import Ranking
    from milp_ray.users.records import Turn


def fit(requests: Sequence[FitRequest], *, ranking: str = "bm25") -> list[Personalizer | None]:
    """Nothing to train; a user's turns are indexed."""
    return [
        Answerer(
            request, context=retrieved(request, ranking), context_bytes=text_bytes(request.split.history)
        )
        for request in requests
    ]


def retrieved(request: FitRequest, ranking: str) -> ContextRule:
    """The context of the turns that a ranking finds for a query."""
    history, section = request.split.history, request.methods.retrieval
    rank = ranking_of(ranking, [turn.text for turn in history], request.base, section)
    return top_turns(request, history, rank, section.k)


def top_turns(request: FitRequest, turns: Sequence[Turn], rank: Ranking, k: int) -> ContextRule:
    """The context of the first ``k`` of the ranked turns, as many as fit, in time order."""
    base, prompt = request.base, request.prompt

    def context(query: str, reserve: int) -> str:
        def document(places: Sequence[int]) -> str:
            return history_context([turns[i] for i in sorted(places)], prompt)

        best = rank(query)[:k]
        count = most_that_fits(
            best,
            lambda places: query_prompt(query, prompt, document(places)),
            lambda text: fits(base, text, reserve),
        )
        return document(best[:count])

    return context
