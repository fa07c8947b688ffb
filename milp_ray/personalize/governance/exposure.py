"""How far a secret stands out from what might as well have been the secret: exposure, in bits.

After Carlini, Liu, Erlingsson, Kos and Song, *The Secret Sharer: Evaluating and Testing Unintended
Memorization in Neural Networks* (USENIX Security 2019, arXiv 1802.08232), definition 2: a secret is drawn
evenly from a declared space R, and its exposure under a model is log2 |R| − log2 rank, where rank 1 is the
text of R that surprises the model least.

R is too large to be gone through, so the rank is estimated by sampling (their section 4.3): the share of R
that surprises the model no more than the secret does is estimated on ``n_candidates`` other texts of R, the
secret counted among them. That assumes nothing about how log-perplexities are distributed (their other
estimate, by a skew-normal distribution, does), and cannot say more than log2(n_candidates + 1) bits.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def exposure(secrets: NDArray[np.float64], candidates: NDArray[np.float64]) -> NDArray[np.float64]:
    """Bits by which each secret stands out: 0 (the most surprising of all) to :func:`most_bits`.

    Texts as surprising as the secret count half, so that a model that tells no text from another exposes
    nothing to speak of (1 bit, less than chance does on average).

    Args:
        secrets: log-perplexities in nats, shape ``(…, n_secrets)``.
        candidates: those of other texts of the space, shape ``(…, n_candidates)``.

    Returns:
        Shape ``(…, n_secrets)``.
    """
    others, own = candidates[..., None, :], secrets[..., :, None]
    rank = 1.0 + (others < own).sum(axis=-1) + 0.5 * (others == own).sum(axis=-1)
    bits: NDArray[np.float64] = most_bits(candidates.shape[-1]) - np.log2(rank)
    return bits


def most_bits(n_candidates: int) -> float:
    """The largest exposure that so many candidates can show."""
    return math.log2(n_candidates + 1)


def chance_bits(n_candidates: int) -> float:
    """Mean exposure of a secret that the model knows nothing about: each rank is as likely as any other.

    It tends to 1 / ln 2 = 1.44 bits with many candidates.
    """
    return most_bits(n_candidates) - float(np.log2(np.arange(1, n_candidates + 2)).mean())
