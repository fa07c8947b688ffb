"""Soft-fused prompting: soft prompts of several sources of one user, fused by learned weights for each query.

The family that surveys of personalised models call so (Liu et al. 2025, arXiv 2502.11528), as PERSOMA (Hebert
et al. 2024, arXiv 2408.00960) and ComMer (Zeldes et al. 2025, arXiv 2501.03276), which compress a user's
texts to soft prompts and merge these. One encoder (:mod:`milp_ray.methods.user_encoder`) makes a soft prompt
of each of :data:`SOURCES`; what stands before the query is their sum, weighted by a softmax, plus one that is
the same for all. The weights come from attention between the query's vector and the sources' soft prompts
through a bottleneck, as in ATTEMPT (Asai et al. 2022, arXiv 2205.11961). Encoder and weights are trained on
everybody's past examples through the frozen base, after the encoder's pretraining on all histories.

Where it departs: ComMer takes the mean where ATTEMPT learns weights; ATTEMPT mixes prompts of tasks, here it
is sources of one user; both encode with the language model itself, here turns are single vectors of it. A
profile is no source, since the one of the embedded users states the true facts.

Encoder and weights are trained on all users; the soft prompts are made of a user's own texts by them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from milp_ray.methods.protocol import Answerer, text_bytes
from milp_ray.methods.ranking import by_bm25
from milp_ray.methods.uelp import turn_vectors
from milp_ray.training.text import query_prompt, response_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from milp_ray.methods.fusion import Fusion
    from milp_ray.methods.protocol import FitRequest, Personalizer, SoftRule
    from milp_ray.methods.ranking import Ranking
    from milp_ray.methods.shared import Shared
    from milp_ray.methods.soft_training import PastExample, SoftModel
    from milp_ray.training.base import Base

SOURCES = ("history", "recent", "retrieved", "examples")


def share(requests: Sequence[FitRequest]) -> Shared:
    """Train encoder and weights; nothing is shared where nobody has past examples to train them on."""
    from milp_ray.methods.soft_training import train_shared

    return train_shared(requests, _new_model)


def fit(requests: Sequence[FitRequest]) -> list[Personalizer | None]:
    """Compute the vectors of each user's texts; soft prompts are made of them for each query."""
    from milp_ray.methods.soft_training import load_shared, shared_state

    state = shared_state(requests)
    if not state:
        return [Answerer(request) for request in requests]
    texts = user_texts(requests)
    fusion = _new_fusion(requests[0], texts)
    load_shared(fusion, state)
    return [
        Answerer(
            request,
            soft_rule=_rule(fusion, own, request.base),
            context_bytes=own.n_bytes + text_bytes(request.split.history),
        )
        for request, own in zip(requests, texts, strict=True)
    ]


@dataclass(frozen=True)
class UserTexts:
    """The vectors of a user's texts: history (n_turns, hidden) and past examples (n_examples, hidden) in time
    order, past queries (n_examples, hidden); and which turns are about a query.
    """

    history: Tensor
    examples: Tensor
    queries: Tensor
    past_turns: tuple[list[int], ...]  # the turns that are about each past query
    rank: Ranking
    n_recent: int
    n_retrieved: int

    @property
    def n_bytes(self) -> int:
        """Of the vectors that answers need."""
        return sum(t.numel() * t.element_size() for t in (self.history, self.examples))

    def of_past(self, place: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """A past query's vector and its sources; the example itself is left out of these."""
        others = [i for i in range(len(self.examples)) if i != place]
        return self.queries[place], self._sources(self.past_turns[place], self.examples[others])

    def of(self, query: str, vector: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """A new query's vector (hidden,) and its sources."""
        return vector, self._sources(self.about(query), self.examples)

    @cached_property
    def _recent(self) -> Tensor:
        return self.history[-self.n_recent :]

    def about(self, query: str) -> list[int]:
        """The turns with the query's rare words, in time order."""
        return sorted(self.rank(query)[: self.n_retrieved])

    def _sources(self, turns: list[int], examples: Tensor) -> tuple[Tensor, ...]:
        return self.history, self._recent, self.history[turns], examples


def user_texts(requests: Sequence[FitRequest]) -> list[UserTexts]:
    """Each user's texts as vectors; of their examples the training ones alone."""
    from milp_ray.methods.user_encoder import text_vectors

    one = requests[0]
    base, section, most = one.base, one.methods.soft_fused, one.methods.user_encoder.max_turns
    queries = [[example.query for example in request.split.train] for request in requests]
    pairs = [
        [query_prompt(e.query, r.prompt) + response_text(e.response) for e in r.split.train] for r in requests
    ]
    found = []
    for request, asked, history, query, example in zip(
        requests,
        queries,
        turn_vectors(requests),
        text_vectors(base, queries),
        text_vectors(base, pairs),
        strict=True,
    ):
        rank = by_bm25([turn.text for turn in request.split.history[-most:]])
        past = tuple(sorted(rank(text)[: section.n_retrieved]) for text in asked)
        found.append(UserTexts(history, example, query, past, rank, section.n_recent, section.n_retrieved))
    return found


def _new_model(requests: Sequence[FitRequest]) -> SoftModel:
    """Untrained encoder and weights."""
    from milp_ray.methods.soft_training import SoftModel

    base, texts = requests[0].base, user_texts(requests)
    fusion = _new_fusion(requests[0], texts)

    def soft_of(some: Sequence[PastExample]) -> Tensor:
        asked = [texts[example.user].of_past(example.place) for example in some]
        soft, _ = fusion.fused(asked, base.device)
        return soft

    return SoftModel(fusion, fusion.encoder, [own.history for own in texts], soft_of)


def _new_fusion(request: FitRequest, texts: Sequence[UserTexts]) -> Fusion:
    from milp_ray.methods.fusion import new_fusion

    vectors = [own.history for own in texts] + [own.examples for own in texts]
    section = request.methods
    return new_fusion(
        request.base, vectors, len(SOURCES), section.user_encoder, section.soft_fused, request.seed
    )


def _rule(fusion: Fusion, texts: UserTexts, base: Base) -> SoftRule:
    import torch

    from milp_ray.training.encode import mean_states

    def soft(queries: Sequence[str]) -> Tensor:
        asked = [
            texts.of(query, vector) for query, vector in zip(queries, mean_states(base, queries), strict=True)
        ]
        with torch.no_grad():
            found, _ = fusion.fused(asked, base.device)
        return found.cpu()

    return soft
