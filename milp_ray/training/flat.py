"""Rows of any length as one flat line of tokens, so that nothing is computed for padding.

Everything in a transformer but attention treats tokens alone: norms, linear maps, the head. So the rows of a
step lie one after the other, (1, n_tokens), and only attention sees them as rows: it gathers those of similar
length into buckets, pads there, and puts the answers back. A row's bucket depends on its own length alone,
so that its result does not depend on what else is in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from dataclasses import dataclass, field
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
# Up to this length plain matrix products are quicker on CPU than the fused kernel, made for long rows.
_SHORT = 64


@dataclass(frozen=True)
class Bucket:
    """Rows padded to one length; ``padding`` (n_padded,) are the places, of n_rows × length, of no token."""

    n_rows: int
    length: int
    padding: Tensor


@dataclass
class FlatRows:
    """Rows that lie one after the other: ``positions`` (1, n_tokens) count from each row's first token.

    ``gather`` (n_places,) is the token that each place of all buckets, one after the other, reads (the row's
    first where there is none), ``places`` (n_tokens,) the place of each token.
    """

    positions: Tensor
    buckets: tuple[Bucket, ...]
    gather: Tensor
    places: Tensor
    _by_heads: dict[int, HeadRows] = field(default_factory=dict)

    def by_heads(self, n_heads: int) -> HeadRows:
        """Where each head of each token lies; worked out once, as every layer asks."""
        found = self._by_heads.get(n_heads)
        if found is None:
            found = self._by_heads[n_heads] = HeadRows.of(self, n_heads)
        return found


@dataclass(frozen=True)
class HeadRows:
    """A line (n_tokens × heads, size) and its buckets, (n_rows, heads, length, size) each.

    ``gather`` (Σ n_rows × heads × length,) and ``places`` (n_tokens × heads,) are those of
    :class:`FlatRows` for a head's numbers; ``padding`` has a bucket's padded places each.
    """

    n_heads: int
    shapes: tuple[tuple[int, int, int], ...]  # (n_rows, heads, length) of each bucket
    gather: Tensor
    places: Tensor
    padding: tuple[Tensor, ...]

    @staticmethod
    def of(rows: FlatRows, n_heads: int) -> HeadRows:
        """Spread tokens' places over their heads."""
        heads = torch.arange(n_heads, device=rows.gather.device)
        gather, place_of_head, padding = [], [], []
        first = 0
        for bucket in rows.buckets:
            n_places = bucket.n_rows * bucket.length
            tokens = rows.gather[first : first + n_places].view(bucket.n_rows, 1, bucket.length)
            gather.append((tokens * n_heads + heads[:, None]).flatten())
            places = torch.arange(n_places, device=heads.device)
            row, within = places // bucket.length, places % bucket.length
            by_head = (row[:, None] * n_heads + heads) * bucket.length + within[:, None]
            place_of_head.append(by_head + first * n_heads)
            padding.append(by_head[bucket.padding].flatten())
            first += n_places
        return HeadRows(
            n_heads,
            tuple((bucket.n_rows, n_heads, bucket.length) for bucket in rows.buckets),
            torch.cat(gather),
            torch.cat(place_of_head)[rows.places].flatten(),
            tuple(padding),
        )

    def take(self, line: Tensor) -> tuple[Tensor, ...]:
        """(n_tokens, heads, size) → (n_rows, heads, length, size) of each bucket."""
        size = line.shape[-1]
        sizes = [math.prod(shape) for shape in self.shapes]
        parts = line.reshape(-1, size).index_select(0, self.gather).split(sizes)
        return tuple(part.view(*shape, size) for part, shape in zip(parts, self.shapes, strict=True))

    def put(self, parts: SequenceOf[Tensor]) -> Tensor:
        """What :meth:`take` took apart, without the padded places, as (n_tokens, heads, size)."""
        size = parts[0].shape[-1]
        flat = [part.reshape(-1, size) for part in parts]
        line = flat[0] if len(flat) == 1 else torch.cat(flat)
        return line.index_select(0, self.places).view(-1, self.n_heads, size)


def flat_rows(lengths: SequenceOf[int], device: torch.device) -> FlatRows:
    """Rows of ``lengths`` tokens, each at least 1, in this order on the line."""
    sizes = torch.tensor(lengths)
    starts = sizes.cumsum(0) - sizes
    row_of = torch.repeat_interleave(torch.arange(len(lengths)), sizes)
    within = torch.arange(int(sizes.sum())) - starts[row_of]
    by_length: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        by_length.setdefault(padded_length(length), []).append(row)
    place_of_row = torch.zeros(len(lengths), dtype=torch.long)
    n_places = 0
    for length, rows in sorted(by_length.items()):
        place_of_row[rows] = n_places + torch.arange(len(rows)) * length
        n_places += len(rows) * length
    places = place_of_row[row_of] + within
    gather, is_padding = torch.empty(n_places, dtype=torch.long), torch.ones(n_places, dtype=torch.bool)
    is_padding[places] = False
    buckets, first = [], 0
    for length, rows in sorted(by_length.items()):
        # Padding reads the row's own first token: another row's may be no number, and a weight of zero times
        # that is none either.
        gather[first : first + len(rows) * length] = starts[rows].repeat_interleave(length)
        own = is_padding[first : first + len(rows) * length]
        buckets.append(Bucket(len(rows), length, torch.nonzero(own).squeeze(1).to(device)))
        first += len(rows) * length
    gather[places] = torch.arange(len(places))
    return FlatRows(within[None].to(device), tuple(buckets), gather.to(device), places.to(device))


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

    def hidden_states(self, ids: Tensor, rows: FlatRows, embeddings: Tensor | None = None) -> Tensor:
        """Last hidden states (n_tokens, hidden) of tokens (n_tokens,) that lie as ``rows`` says.

        ``embeddings`` (n_tokens, hidden) enter the base in place of the tokens'.
        """
        entering = {"input_ids": ids[None]} if embeddings is None else {"inputs_embeds": embeddings[None]}
        self.rows = rows
        try:
            positions = rows.positions + self._base.first_position
            output = self._model(**entering, position_ids=positions, use_cache=False)
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
    # In memory a token's heads lie next to each other: this way round, they are taken without a copy before.
    lines = [t.squeeze(0).transpose(0, 1) for t in (query, key, value)]
    queries, keys, values = (_Take.apply(line, rows.by_heads(line.shape[1])) for line in lines)
    answers = [_causal(q, k, v, scale) for q, k, v in zip(queries, keys, values, strict=True)]
    out: Tensor = _Put.apply(rows.by_heads(query.shape[1]), *answers)
    return out[None], None


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attention of one bucket: (n_rows, heads, length, size) each and back."""
    n_rows, n_heads, length, _ = query.shape
    is_grouped = key.shape[1] != n_heads
    if query.device.type == "cpu" and length <= _SHORT:
        if is_grouped:
            key, value = (t.repeat_interleave(n_heads // t.shape[1], dim=1) for t in (key, value))
        query, key, value = (t.flatten(0, 1) for t in (query, key, value))
        hidden = _hidden_from(length, query.dtype).expand(n_rows * n_heads, -1, -1)
        scores = torch.baddbmm(hidden, query, key.mT, alpha=scale)
        return torch.bmm(scores.softmax(-1), value).unflatten(0, (n_rows, n_heads))
    return functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=is_grouped
    )


_masks: dict[tuple[int, torch.dtype], Tensor] = {}


def _hidden_from(length: int, dtype: torch.dtype) -> Tensor:
    """−inf where a token stands behind the one that looks: (1, length, length) on the CPU."""
    found = _masks.get((length, dtype))
    if found is None:
        found = torch.full((1, length, length), float("-inf"), dtype=dtype).triu_(1)
        _masks[length, dtype] = found
    return found


class _Take(torch.autograd.Function):
    """:meth:`HeadRows.take`.

    Padded places read their row's first token: real ones never look at them, so nothing flows back there.
    """

    @staticmethod
    def forward(ctx: Any, line: Tensor, rows: HeadRows) -> tuple[Tensor, ...]:
        ctx.rows = rows
        return rows.take(line)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.rows.put(gradients), None


class _Put(torch.autograd.Function):
    """:meth:`HeadRows.put`; no gradient enters the padded places."""

    @staticmethod
    def forward(ctx: Any, rows: HeadRows, *parts: Tensor) -> Tensor:
        ctx.rows = rows
        return rows.put(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        parts = ctx.rows.take(gradient)
        for part, padding in zip(parts, ctx.rows.padding, strict=True):
            part.view(-1, part.shape[-1]).index_fill_(0, padding, 0.0)
        return None, *parts
