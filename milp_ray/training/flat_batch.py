"""Sequences as flat lines of tokens: kept once a job, cut into the line of a step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor

from milp_ray.training.flat import FlatRows, flat_rows
from milp_ray.training.packed_lora import Segment

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from milp_ray.training.data import Sequence
    from milp_ray.training.reference import Reference

Owner = TypeVar("Owner")


class Texts:
    """A job's sequences, one after the other.

    ``states`` (n_tokens, hidden), where they are kept, are what enters the pack's lowest block with LoRA.
    ``weights`` are the targets' in each sequence; ``None``: all count alike.
    ``references`` are each one's, or ``None``.
    """

    def __init__(self, sequences: SequenceOf[Sequence]) -> None:
        self.lengths = [len(s.ids) for s in sequences]
        self.target_from = [s.target_from for s in sequences]
        self.starts = np.cumsum([0, *self.lengths]).tolist()
        self.tokens: NDArray[np.int64] = np.fromiter(
            (token for s in sequences for token in s.ids), dtype=np.int64, count=self.starts[-1]
        )
        self.states: Tensor | None = None
        self.weights: list[tuple[float, ...]] | None = None
        if any(s.weights is not None for s in sequences):
            self.weights = [s.target_weights for s in sequences]
        self.references = [s.reference for s in sequences]

    def __len__(self) -> int:
        return len(self.lengths)

    def n_targets(self, index: int) -> int:
        """Tokens of a sequence that count in the loss."""
        return self.lengths[index] - self.target_from[index]

    def weights_of(self, index: int) -> tuple[float, ...]:
        """How much each of a sequence's targets counts."""
        return (1.0,) * self.n_targets(index) if self.weights is None else self.weights[index]


@dataclass(frozen=True)
class FlatBatch:
    """The line of tokens of one pass.

    ids (n_tokens,) int64; rows: how they lie; targets (n_targets,): the tokens whose *next* one counts, and
    labels (n_targets,): that next one; states (n_tokens, hidden): what enters the lowest block with
    LoRA; segments: whose tokens; reference: of the targets that are distributions, in training.
    """

    ids: Tensor
    rows: FlatRows
    targets: Tensor
    labels: Tensor
    states: Tensor | None
    segments: list[Segment]
    reference: Reference | None = None

    @property
    def n_tokens(self) -> int:
        """Tokens of the line; none is padding."""
        return int(self.ids.shape[0])


@dataclass(frozen=True, slots=True)
class Part:
    """Sequences ``chosen`` of ``texts``, to be multiplied with a slot's LoRA (``None``: the base alone)."""

    texts: Texts
    chosen: tuple[int, ...]
    segment: Segment | None

    @property
    def n_tokens(self) -> int:
        """Tokens of the chosen sequences."""
        return sum(self.texts.lengths[i] for i in self.chosen)

    @property
    def n_targets(self) -> int:
        """Those that count in the loss."""
        return sum(self.texts.n_targets(i) for i in self.chosen)

    @property
    def total_weight(self) -> float:
        """The sum of their weights; their number, where all count alike."""
        if self.texts.weights is None:
            return self.n_targets
        return sum(sum(self.texts.weights[i]) for i in self.chosen)

    @property
    def target_weights(self) -> list[float]:
        """How much each of them counts."""
        return [weight for i in self.chosen for weight in self.texts.weights_of(i)]

    @property
    def wanted(self) -> list[tuple[int, Tensor | None]]:
        """Number of targets and reference of each of them."""
        return [(self.texts.n_targets(i), self.texts.references[i]) for i in self.chosen]


def flat_batch(parts: SequenceOf[Part], device: torch.device, states: Tensor | None = None) -> FlatBatch:
    """Put the sequences of several jobs on one line, job by job; ``segments`` get their places."""
    ids, targets, labels = [], [], []
    lengths: list[int] = []
    segments: list[Segment] = []
    at = 0
    for part in parts:
        texts, begin = part.texts, at
        for i in part.chosen:
            start, length, first = texts.starts[i], texts.lengths[i], texts.target_from[i]
            ids.append(texts.tokens[start : start + length])
            labels.append(texts.tokens[start + first : start + length])
            targets.append(np.arange(at + first - 1, at + length - 1))
            lengths.append(length)
            at += length
        if part.segment is not None:
            own = part.segment
            segments.append(Segment(own.rack, own.slot, begin, at, own.dropout_seed))

    def on_device(arrays: list[NDArray[np.int64]]) -> Tensor:
        return torch.from_numpy(np.concatenate(arrays)).to(device, non_blocking=True)

    return FlatBatch(
        ids=on_device(ids),
        rows=flat_rows(lengths, device),
        targets=on_device(targets),
        labels=on_device(labels),
        states=states,
        segments=segments,
    )


def pieces_of(texts: Texts, chosen: SequenceOf[int], most_tokens: int) -> Iterator[tuple[int, ...]]:
    """``chosen`` in order, in pieces of at most ``most_tokens`` tokens, or of one sequence."""
    piece: list[int] = []
    n_tokens = 0
    for index in chosen:
        if piece and n_tokens + texts.lengths[index] > most_tokens:
            yield tuple(piece)
            piece, n_tokens = [], 0
        piece.append(index)
        n_tokens += texts.lengths[index]
    if piece:
        yield tuple(piece)


def together(parts: Iterable[tuple[Owner, Part]], most_tokens: int) -> Iterator[list[tuple[Owner, Part]]]:
    """Parts for one pass each, in order: of at most ``most_tokens`` tokens, or a single part."""
    some: list[tuple[Owner, Part]] = []
    n_tokens = 0
    for owner, part in parts:
        if some and n_tokens + part.n_tokens > most_tokens:
            yield some
            some, n_tokens = [], 0
        some.append((owner, part))
        n_tokens += part.n_tokens
    if some:
        yield some
