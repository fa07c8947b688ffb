"""Targets that are a distribution: what the base itself says at a place, and not the token that stands there.

Trained on texts so, an adapter is held to the base (Li & Hoiem 2016, arXiv 1606.09282): the loss of a target
is the divergence KL(p ‖ q) of the adapted base's distribution q from the base's own, p, which is 0 (up to
rounding) as long as nothing has changed, whatever the text. What is kept of p is the state that the base's
head makes it from.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Reference:
    """Places of a batch's targets that are tokens, of those that are distributions, and their states.

    (n_tokens,) and (n_distributions,) int64; (n_distributions, hidden).
    """

    tokens: Tensor
    distributions: Tensor
    states: Tensor

    def losses(self, nll: Tensor, divergences: Tensor) -> Tensor:
        """The losses of all targets in their order, from those of the two kinds."""
        found = nll.new_zeros(len(self.tokens) + len(self.distributions))
        return found.index_copy(0, self.tokens, nll).index_copy(0, self.distributions, divergences)


def reference_of(wanted: SequenceOf[tuple[int, Tensor | None]], device: torch.device) -> Reference | None:
    """That of sequences, (number of targets, reference) each, one after the other; ``None``: none has any."""
    states = [own for _, own in wanted if own is not None]
    if not states:
        return None
    is_own = torch.cat([torch.full((n_targets,), own is not None) for n_targets, own in wanted])
    kinds = ((~is_own).nonzero()[:, 0].to(device), is_own.nonzero()[:, 0].to(device))
    return Reference(*kinds, torch.cat(states).to(device))


def divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """KL(p ‖ q) in nats for rows of logits, of q and of p: (n, vocabulary) each → (n,) float32."""
    q, p = (functional.log_softmax(one.float(), 1) for one in (logits, wanted))
    return functional.kl_div(q, p, reduction="none", log_target=True).sum(1)
