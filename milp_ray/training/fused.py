"""A transformer's small operations in fewer passes over memory.

Root-mean-square norms and rotary positions do little arithmetic, but transformers writes them as a dozen
elementwise operations each, and autograd doubles those: in a small base's steps it shows. Their weights are
frozen, so that each is one node here, with its backward pass written out. The values are those of
transformers but for rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from milp_ray.training.base import Base

# Architectures with Llama's norm and rotary positions, under names that begin like this.
_LIKE_LLAMA = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}


@contextmanager
def fused_operations(base: Base) -> Iterator[None]:
    """Run the base's norms and rotary positions fused for the time; other architectures are left alone."""
    model_type = base.spec.model_type
    if model_type not in _LIKE_LLAMA:
        yield
        return
    norm_class = f"{_LIKE_LLAMA[model_type]}RMSNorm"
    norms = [module for module in base.model.modules() if type(module).__name__ == norm_class]
    code = import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    with ExitStack() as stack:
        for norm in norms:
            stack.enter_context(_replaced(norm, "forward", partial(_normalise, norm)))
        stack.enter_context(_replaced(code, "apply_rotary_pos_emb", _rotate_both))
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def _normalise(norm: nn.Module, states: Tensor) -> Tensor:
    """Weight · x / √(mean x² + ε), in float32 until the weight is multiplied."""
    out: Tensor = _Norm.apply(states, norm.weight, norm.variance_epsilon)
    return out


class _Norm(torch.autograd.Function):
    """(…, hidden) → (…, hidden), for a frozen weight (hidden,)."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = states.float()
        size = wide.shape[-1]
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(size)
        scale = scale.add_(epsilon).rsqrt_()
        ctx.save_for_backward(states, weight, scale)
        return (wide * scale).to(states.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        # With r = 1/√(mean x² + ε) and g the gradient × weight: dx = r g − x r³ (g · x) / n.
        states, weight, scale = ctx.saved_tensors
        wide, coming = states.float(), (gradient * weight).float()
        along = torch.linalg.vecdot(coming, wide).unsqueeze(-1).mul_(scale.pow(3).div_(-wide.shape[-1]))
        return coming.mul_(scale).addcmul_(wide, along).to(states.dtype), None, None


def _rotate_both(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Rotary positions: query and key (rows, heads, length, size), cos and sin (rows, length, size)."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _Rotation.apply(query, cos, sin), _Rotation.apply(key, cos, sin)


class _Rotation(torch.autograd.Function):
    """Each pair (x_i, x_{i + size/2}) turned by its token's angle; going back, turned the other way."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(states, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(gradient, cos, sin, -1.0), None, None


def _turn(states: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    # cos and sin hold each angle twice, once for either half.
    half = states.shape[-1] // 2
    out = states * cos
    out[..., :half].addcmul_(states[..., half:], sin[..., half:], value=-direction)
    out[..., half:].addcmul_(states[..., :half], sin[..., :half], value=direction)
    return out
