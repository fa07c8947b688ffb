"""Rows of any length as one flat line of tokens, so that nothing is computed for padding.

Everything in a transformer but attention treats tokens alone: norms, linear maps, the head. So the rows of a
step lie one after the other, (1, n_tokens), and only attention sees them as rows: it gathers those of similar
length into buckets, pads there, and puts the answers back. A row's bucket depends on its own length alone,
so that its result does not depend on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

if TYPE_CHECKING:
    from milp_ray.training.base import Base

# Architectures whose attention goes through transformers' attention interface and asks no more of it than
# causal attention over the row: no window below the row's length, no soft cap, no bias by position.
FLAT_MODEL_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3", "gpt2", "roberta", "xlm-roberta"})
_ATTENTION = "milp_flat"
# Padded lengths are multiples of the step beside the first limit they fit: attention over a padded
# row costs the square of its length, while a further bucket costs a few kernels.
_STEPS = ((64, 8), (128, 16), (512, 32), (2048, 64))
_LONG_STEP = 256
# Up to this length plain matrix products are quicker on CPU than the fused kernel, which is made for long
# rows: 4.0 ms against 7.4 ms for 64 rows of 28 tokens, forward and backward.
_SHORT = 64


@dataclass(frozen=True)
class Bucket:
    """Rows padded to one length. ``tokens`` (n_tokens,) are theirs on the line, ``places`` (n_tokens,) where
    each lies among the bucket's n_rows × length padded places, ``gather`` (n_rows × length,) the token that
    each padded place reads (the row's first where there is none).
    """

    n_rows: int
    length: int
    tokens: Tensor
    places: Tensor
    gather: Tensor


@dataclass(frozen=True)
class FlatRows:
    """Rows that lie one after the other: ``positions`` (1, n_tokens) count from each row's first token."""

    positions: Tensor
    buckets: tuple[Bucket, ...]


def flat_rows(lengths: SequenceOf[int], device: torch.device) -> FlatRows:
    """Rows of ``lengths`` tokens, each at least 1, in this order on the line."""
    sizes = torch.tensor(lengths)
    starts = sizes.cumsum(0) - sizes
    row_of = torch.repeat_interleave(torch.arange(len(lengths)), sizes)
    within = torch.arange(int(sizes.sum())) - starts[row_of]
    by_length: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        by_length.setdefault(padded_length(length), []).append(row)
    buckets = []
    for length, rows in sorted(by_length.items()):
        place_of_row = torch.zeros(len(lengths), dtype=torch.long)
        place_of_row[rows] = torch.arange(len(rows)) * length
        chosen = torch.zeros(len(lengths), dtype=torch.bool)
        chosen[rows] = True
        tokens = torch.nonzero(chosen[row_of]).squeeze(1)
        places = place_of_row[row_of[tokens]] + within[tokens]
        # Padding reads the row's own first token: another row's may be no number, and a weight of zero times
        # that is none either.
        gather = starts[rows].repeat_interleave(length)
        gather[places] = tokens
        buckets.append(Bucket(len(rows), length, tokens.to(device), places.to(device), gather.to(device)))
    return FlatRows(within[None].to(device), tuple(buckets))


def padded_length(length: int) -> int:
    """What attention pads a row of ``length`` tokens to."""
    step = next((step for limit, step in _STEPS if length <= limit), _LONG_STEP)
    return -(-length // step) * step


def can_lie_flat(base: Base) -> bool:
    """Whether the base's rows can be laid on one line; others are padded and run one batch at a time."""
    config = base.model.config
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return base.spec.model_type in FLAT_MODEL_TYPES and (window is None or window >= base.context_length)


@contextmanager
def flat_attention(base: Base) -> Iterator[FlatView]:
    """Let the base's attention work on lines of tokens; :meth:`FlatView.show` says how the next one lies."""
    from transformers import AttentionInterface

    AttentionInterface.register(_ATTENTION, _attend)
    config = base.model.config
    before = config._attn_implementation
    view = FlatView(base, before)
    config._attn_implementation = _ATTENTION
    _views.append(view)
    try:
        yield view
    finally:
        _views.pop()
        config._attn_implementation = before


_views: list[FlatView] = []


class FlatView:
    """A base whose rows lie on one line."""

    def __init__(self, base: Base, ordinary_attention: str) -> None:
        self._base = base
        self._ordinary_attention = ordinary_attention
        self._model: Any = base.model.base_model
        self.rows: FlatRows | None = None

    def hidden_states(self, ids: Tensor, rows: FlatRows) -> Tensor:
        """Last hidden states (n_tokens, hidden) of tokens (n_tokens,) that lie as ``rows`` says."""
        self.rows = rows
        try:
            positions = rows.positions + self._base.first_position
            output = self._model(input_ids=ids[None], position_ids=positions, use_cache=False)
        finally:
            self.rows = None
        states: Tensor = output.last_hidden_state
        return states[0]

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Let the base see rows as it does otherwise, for the time."""
        config = self._base.model.config
        config._attn_implementation = self._ordinary_attention
        try:
            yield
        finally:
            config._attn_implementation = _ATTENTION


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within rows; (1, heads, n_tokens, size) each, gives (1, n_tokens, heads, size)."""
    rows = _views[-1].rows
    if rows is None:
        raise RuntimeError("tokens reached attention without a word on how they lie")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    queries, keys, values = (_Gather.apply(t[0], rows.buckets) for t in (query, key, value))
    answers = [
        _causal(q, k, v, bucket, scale)
        for q, k, v, bucket in zip(queries, keys, values, rows.buckets, strict=True)
    ]
    out: Tensor = _Scatter.apply(rows.buckets, query.shape[2], *answers)
    return out[None], None


def _causal(query: Tensor, key: Tensor, value: Tensor, bucket: Bucket, scale: float) -> Tensor:
    """Attention of one bucket: (heads, n_rows × length, size) each and back."""
    n_heads, size = query.shape[0], value.shape[-1]
    if query.device.type == "cpu" and bucket.length <= _SHORT:
        shape = (n_heads * bucket.n_rows, bucket.length, -1)
        if key.shape[0] != n_heads:
            key, value = (t.repeat_interleave(n_heads // t.shape[0], dim=0) for t in (key, value))
        hidden = _hidden_from(bucket.length, query.dtype)
        scores = torch.baddbmm(
            hidden.expand(shape[0], -1, -1), query.reshape(shape), key.reshape(shape).mT, alpha=scale
        )
        answer = torch.bmm(scores.softmax(-1), value.reshape(shape))
    else:
        # (n_rows, heads, length, size), as torch's kernels want it.
        q, k, v = (
            t.view(t.shape[0], bucket.n_rows, bucket.length, -1).transpose(0, 1) for t in (query, key, value)
        )
        answer = functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=k.shape[1] != n_heads
        ).transpose(0, 1)
    return answer.reshape(n_heads, -1, size)


_masks: dict[tuple[int, torch.dtype], Tensor] = {}


def _hidden_from(length: int, dtype: torch.dtype) -> Tensor:
    """−inf where a token stands behind the one that looks: (1, length, length) on the CPU."""
    found = _masks.get((length, dtype))
    if found is None:
        found = torch.full((1, length, length), float("-inf"), dtype=dtype).triu_(1)
        _masks[length, dtype] = found
    return found


class _Gather(torch.autograd.Function):
    """(heads, n_tokens, size) → one (heads, n_rows × length, size) a bucket.

    Padded places read their row's first token: real ones never look at them, so nothing flows back there.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, buckets: tuple[Bucket, ...]) -> tuple[Tensor, ...]:
        ctx.buckets, ctx.shape = buckets, states.shape
        return tuple(states.index_select(1, bucket.gather) for bucket in buckets)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        out = gradients[0].new_empty(ctx.shape)
        for bucket, gradient in zip(ctx.buckets, gradients, strict=True):
            out.index_copy_(1, bucket.tokens, gradient.index_select(1, bucket.places))
        return out, None


class _Scatter(torch.autograd.Function):
    """What :class:`_Gather` took apart, put together as (n_tokens, heads, size)."""

    @staticmethod
    def forward(ctx: Any, buckets: tuple[Bucket, ...], n_tokens: int, *answers: Tensor) -> Tensor:
        ctx.buckets = buckets
        out = answers[0].new_empty((n_tokens, answers[0].shape[0], answers[0].shape[2]))
        for bucket, answer in zip(buckets, answers, strict=True):
            out.transpose(0, 1).index_copy_(1, bucket.tokens, answer.index_select(1, bucket.places))
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        by_head = gradient.transpose(0, 1)
        parts = []
        for bucket in ctx.buckets:
            n_places = bucket.n_rows * bucket.length
            part = gradient.new_zeros((by_head.shape[0], n_places, by_head.shape[2]))
            parts.append(part.index_copy_(1, bucket.places, by_head.index_select(1, bucket.tokens)))
        return None, None, *parts
