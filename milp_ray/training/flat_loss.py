"""Loss of the targets on a line of tokens, without keeping any logits.

The head is frozen: the gradient that goes back through it is (softmax − p) · W, where p is one at the token
that is wanted, or the distribution that is to be kept. It is worked out in the forward pass, chunk by chunk,
while the chunk's logits are in the cache. What is kept is as large as the hidden states, not as the
vocabulary. (The idea is Liger's fused linear cross-entropy, Hsu et al. 2024, arXiv 2410.10989; here there is
no weight gradient at all.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from milp_ray.training.reference import divergence

if TYPE_CHECKING:
    from milp_ray.training.base import Base
    from milp_ray.training.reference import Reference

# Numbers of logits in a chunk: what stays in a core's cache, and enough to fill a GPU.
_CHUNK = {"cpu": 2**18, "cuda": 2**26}
# Rows of a chunk at least: with fewer, a large head is read from memory again for next to no work.
_LEAST_ROWS = 64


class FlatLoss:
    """The head of a base and the loss behind it."""

    def __init__(self, base: Base) -> None:
        model: Any = base.model
        head: Any = getattr(model, "lm_head", None)
        # RoBERTa's head is a small network; it is run as it is. Others are one linear map.
        self._is_linear = isinstance(head, nn.Linear) and head is model.get_output_embeddings()
        self._head = head
        chunk = _CHUNK.get(base.device.type, 2**26)
        self._rows = max(_LEAST_ROWS, chunk // head.weight.shape[0]) if self._is_linear else 0

    def __call__(self, states: Tensor, labels: Tensor, reference: Reference | None = None) -> Tensor:
        """(n_targets, hidden) and (n_targets,) → (n_targets,) float32, in nats.

        Negative log-likelihoods, or of a target with a reference the divergence from that.
        """
        if reference is None:
            return self._nll(states, labels)
        tokens, distributions = reference.tokens, reference.distributions
        nll = self._nll(states[tokens], labels[tokens])
        return reference.losses(nll, self._divergence(states[distributions], reference.states))

    def _nll(self, states: Tensor, labels: Tensor) -> Tensor:
        if self._is_linear:
            nll: Tensor = _LinearNll.apply(states, self._head.weight, self._head.bias, labels, self._rows)
            return nll
        return functional.cross_entropy(self._head(states).float(), labels, reduction="none")

    def _divergence(self, states: Tensor, wanted: Tensor) -> Tensor:
        if self._is_linear:
            found: Tensor = _LinearDivergence.apply(
                states, self._head.weight, self._head.bias, wanted, self._rows
            )
            return found
        with torch.no_grad():
            logits = self._head(wanted)
        return divergence(self._head(states), logits)


class _BehindFrozenHead(torch.autograd.Function):
    """A loss of each row, whose gradient by the row's state was worked out with it."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (back,) = ctx.saved_tensors
        return back * gradient[:, None].to(back.dtype), None, None, None, None


class _LinearNll(_BehindFrozenHead):
    """−log softmax(W h + b)[label] for a frozen W."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, rows: int
    ) -> Tensor:
        wants = ctx.needs_input_grad[0]
        nll = torch.empty(states.shape[0], dtype=torch.float32, device=states.device)
        back = torch.empty_like(states) if wants else None
        for start in range(0, states.shape[0], rows):
            part = slice(start, start + rows)
            logits = functional.linear(states[part], weight, bias).float()
            own = labels[part, None]
            largest, wanted = logits.amax(1, keepdim=True), logits.gather(1, own)
            # One exponential serves both: softmax × total.
            shares = logits.sub_(largest).exp_()
            total = shares.sum(1, keepdim=True)
            nll[part] = total.log().add_(largest).sub_(wanted).squeeze(1)
            if back is not None:
                shares.scatter_add_(1, own, -total)
                torch.mm(shares.to(weight.dtype), weight, out=back[part])
                back[part].div_(total.to(back.dtype))
        if back is not None:
            ctx.save_for_backward(back)
        return nll


class _LinearDivergence(_BehindFrozenHead):
    """KL(p ‖ q) of q = softmax(W h + b) from p, which a frozen W makes of another state."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, wanted: Tensor, rows: int
    ) -> Tensor:
        wants = ctx.needs_input_grad[0]
        found = torch.empty(states.shape[0], dtype=torch.float32, device=states.device)
        back = torch.empty_like(states) if wants else None
        for start in range(0, states.shape[0], rows):
            part = slice(start, start + rows)
            q, p = (
                functional.linear(one[part], weight, bias).float().log_softmax(1) for one in (states, wanted)
            )
            shares = p.exp()
            found[part] = p.sub_(q).mul_(shares).sum(1)
            if back is not None:
                torch.mm(q.exp_().sub_(shares).to(weight.dtype), weight, out=back[part])
        if back is not None:
            ctx.save_for_backward(back)
        return found
