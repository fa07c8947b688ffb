"""The MiLP paper's two tables of costs, beside what follows from the bases' own sizes.

**Trainable parameters** (the paper's Table 7). One adapter has r × Σ(in + out) numbers for each layer that
carries it. Of the table one figure is at hand, 50.38 M, without the base and the layout that it is of; no
rank of the paper's range on all layers gives it for either of the LLaMA2 bases. It is quoted, not followed.

**Memory of prompted and of parameterised memory** (the paper's Figure 3, after its Equations 5 and 6). The
equations below are this package's own derivation, not the paper's. With h tokens of history, q of query and
answer, and κ = 2 · layers · k · b bytes of keys and values a token, one user's answer takes, beside the base:

* prompted: κ · (h + q): the history is read into the cache with every query, and grows it;
* parameterised: 4 · r · n · Σ(in + out) + κ · q: the adapter in float32, whatever the history.

They are equal at h* = adapter bytes / κ tokens. A prompt ends at the base's context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from milp_ray.training.memory_model import kv_bytes_a_token

if TYPE_CHECKING:
    from milp_ray.training.model_shape import ModelShape

PAPER = "Zhang, Kim and Liu, arXiv 2404.03565"
PAPER_TABLE_7 = 50.38e6  # trainable parameters
PAPER_RANKS = (8, 16, 32, 64, 96)
_ADAPTER_BYTES = 4
_N_POINTS = 65


@dataclass(frozen=True, slots=True)
class RankRow:
    """Trainable parameters of one rank: on one layer, on half of them, on all."""

    rank: int
    one_layer: int
    half: int
    all_layers: int


@dataclass(frozen=True, slots=True)
class Nearest:
    """The layout whose size comes nearest to a number, and the rank on all layers that it would take."""

    n_lora_layers: int
    rank: int
    parameters: int
    rank_on_all_layers: float


@dataclass(frozen=True, slots=True)
class MemoryCurve:
    """Bytes of one user's memory over tokens of history; the adapter's do not depend on them.

    ``prompted`` has one entry a ``history``; ``parameterised`` one number a rank on all layers, and
    ``equal_at`` the history (in tokens) whose prompt takes as much as that rank.
    """

    history: tuple[int, ...]
    prompted: tuple[int, ...]
    parameterised: dict[int, int]
    equal_at: dict[int, float]
    context_length: int
    query_tokens: int


def rank_rows(shape: ModelShape, ranks: Sequence[int]) -> list[RankRow]:
    """Our side of Table 7, for the ranks that the base's maps can have."""
    return [
        RankRow(
            rank,
            shape.adapter_parameters(rank, 1),
            shape.adapter_parameters(rank, shape.n_layers // 2),
            shape.adapter_parameters(rank, shape.n_layers),
        )
        for rank in ranks
        if rank <= shape.ffn.max_rank
    ]


def nearest_layout(shape: ModelShape, ranks: Sequence[int], parameters: float) -> Nearest:
    """Which number of layers and rank come nearest to so many trainable numbers."""
    pairs = [(n, rank) for rank in ranks for n in range(1, shape.n_layers + 1)]
    n, rank = min(pairs, key=lambda pair: abs(shape.adapter_parameters(pair[1], pair[0]) - parameters))
    return Nearest(
        n, rank, shape.adapter_parameters(rank, n), parameters / shape.adapter_parameters(1, shape.n_layers)
    )


def memory_curve(
    shape: ModelShape,
    ranks: Sequence[int],
    *,
    longest_history: int,
    query_tokens: int,
    context_length: int,
) -> MemoryCurve:
    """Our side of Figure 3: histories of 0 to ``longest_history`` tokens, of which a prompt holds some."""
    a_token = kv_bytes_a_token(shape)
    history = tuple(longest_history * i // (_N_POINTS - 1) for i in range(_N_POINTS))
    adapters = {
        rank: _ADAPTER_BYTES * shape.adapter_parameters(rank, shape.n_layers)
        for rank in ranks
        if rank <= shape.ffn.max_rank
    }
    return MemoryCurve(
        history=history,
        prompted=tuple(a_token * (h + query_tokens) for h in history),
        parameterised={rank: size + a_token * query_tokens for rank, size in adapters.items()},
        equal_at={rank: size / a_token for rank, size in adapters.items()},
        context_length=context_length,
        query_tokens=query_tokens,
    )
