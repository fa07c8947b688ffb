"""Which of a user's turns a query is about: rankings by recency, words, hidden states, or all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from milp_ray.errors import MilpError

if TYPE_CHECKING:
    import torch

    from milp_ray.config.methods import RetrievalSection
    from milp_ray.training.base import Base

# Places of the texts, the most relevant first; it may leave out what is of no relevance at all.
Ranking = Callable[[str], list[int]]


def ranking(name: str, texts: Sequence[str], base: Base, section: RetrievalSection) -> Ranking:
    """A ranking of texts that stand in time order.

    Args:
        name: recency, bm25, dense or fusion.
        texts: the user's turns.
        base: what makes vectors, where ``section.encoder`` is "base".
        section: the encoder and the constant of fusion.
    """
    if name == "recency":
        return by_recency(texts)
    if name == "bm25":
        return by_bm25(texts)
    if name == "dense":
        return by_vectors(texts, encoder(section.encoder, base))
    if name == "fusion":
        parts = [ranking(one, texts, base, section) for one in ("recency", "bm25", "dense")]
        return fused(parts, section.fusion_constant)
    raise MilpError(f"ranking {name!r}: use recency, bm25, dense or fusion")


def by_recency(texts: Sequence[str]) -> Ranking:
    """The latest first, whatever the query."""
    newest_first = list(reversed(range(len(texts))))
    return lambda query: newest_first


def by_bm25(texts: Sequence[str]) -> Ranking:
    """Okapi BM25 (Robertson and Zaragoza 2009) by the ``bm25s`` package.

    Texts without a common word are left out. Among equals the later one comes first: what was said last is
    more likely still true.
    """
    import bm25s

    words = bm25s.tokenize(list(texts), stopwords="en", show_progress=False, return_ids=False)
    if not any(words):
        return lambda query: []
    index = bm25s.BM25()
    index.index(words, show_progress=False)

    def rank(query: str) -> list[int]:
        [asked] = bm25s.tokenize([query], stopwords="en", show_progress=False, return_ids=False)
        known = [word for word in asked if word in index.vocab_dict]
        if not known:
            return []
        scores = index.get_scores(known).tolist()
        found = [i for i, score in enumerate(scores) if score > 0.0]
        return sorted(found, key=lambda i: (-scores[i], -i))

    return rank


def by_vectors(texts: Sequence[str], encode: Callable[[Sequence[str]], torch.Tensor]) -> Ranking:
    """By the cosine between vectors from which the mean of the texts' is taken.

    Hidden states of a language model all point into much the same direction, which says nothing.
    """
    import torch.nn.functional as functional

    if not texts:
        return lambda query: []
    vectors = encode(texts)
    centre = vectors.mean(0)
    directions = functional.normalize(vectors - centre, dim=1)

    def rank(query: str) -> list[int]:
        own = functional.normalize(encode([query]) - centre, dim=1)[0]
        found: list[int] = (directions @ own).argsort(descending=True, stable=True).tolist()
        return found

    return rank


def fused(parts: Sequence[Ranking], constant: float) -> Ranking:
    """Reciprocal rank fusion (Cormack, Clarke and Büttcher 2009): the sum of 1 / (constant + rank)."""

    def rank(query: str) -> list[int]:
        scores: dict[int, float] = {}
        for part in parts:
            for place, i in enumerate(part(query), start=1):
                scores[i] = scores.get(i, 0.0) + 1.0 / (constant + place)
        return sorted(scores, key=lambda i: (-scores[i], -i))

    return rank


def encoder(name: str, base: Base) -> Callable[[Sequence[str]], torch.Tensor]:
    """What makes vectors of texts: the base, or a sentence-transformers model.

    Raises:
        MilpError: the package is not installed, or does not find the model.
    """
    if name == "base":
        from milp_ray.training.encode import mean_states

        return lambda texts: mean_states(base, texts)
    model = _sentence_transformer(name, str(base.device))
    return lambda texts: model.encode(list(texts), convert_to_tensor=True, show_progress_bar=False).cpu()


@lru_cache(maxsize=1)
def _sentence_transformer(name: str, device: str) -> Any:
    """The model, which is loaded once for all users."""
    try:
        from sentence_transformers import SentenceTransformer
    except ModuleNotFoundError as error:
        raise MilpError(
            f"methods.retrieval.encoder is {name!r}, which needs the package sentence-transformers; install "
            "it, or use 'base'"
        ) from error
    try:
        return SentenceTransformer(name, device=device, model_kwargs={"use_safetensors": True})
    except (OSError, ValueError) as error:
        raise MilpError(
            f"methods.retrieval.encoder {name!r} cannot be loaded ({type(error).__name__}); give a folder or "
            "an id of a sentence-transformers model with safetensors weights"
        ) from error
