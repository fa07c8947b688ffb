"""How surprised a base is by wanted responses, or any texts, under many users' adapters at once."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from milp_ray.training.cross_attention import cross_attended, latents_of_each, only_blocks
from milp_ray.training.data import chunks, instruction_set, make_batch
from milp_ray.training.flat import can_lie_flat, flat_attention
from milp_ray.training.flat_batch import Part, Texts, flat_batch, pieces_of, together
from milp_ray.training.flat_loss import FlatLoss
from milp_ray.training.fused import fused_operations
from milp_ray.training.seating import seated
from milp_ray.training.soft import (
    embeddings,
    n_soft_of,
    room_beside,
    sequence_with_places,
    soft_nll,
    soft_of_each,
)

if TYPE_CHECKING:
    from torch import Tensor

    from milp_ray.config.prompt import PromptSection
    from milp_ray.training.adapters import Adapter
    from milp_ray.training.base import Base
    from milp_ray.training.cross_attention import Latents
    from milp_ray.training.data import Sequence
    from milp_ray.training.flat_batch import FlatBatch
    from milp_ray.users.records import Example

Loss = tuple[float, int]  # (sum of the tokens' negative log-likelihoods in nats, number of tokens)
_TOKENS_A_PASS = 4096  # for bases whose rows lie flat


@dataclass(frozen=True, slots=True)
class Wanted:
    """Examples for one adapter (``None``: the base), and a document before each question or none.

    ``soft``, a soft prompt behind the start token, is (n_soft, hidden) for all of them, or
    (n_examples, n_soft, hidden). ``latents`` are what the base looks at from within its layers; all entries
    of one call that have any look at as many, by the same blocks.
    """

    examples: SequenceOf[Example]
    contexts: SequenceOf[str] | None = None
    adapter: Adapter | None = None
    soft: Tensor | None = None
    latents: Latents | None = None


def response_losses(
    base: Base, wanted: SequenceOf[Wanted], prompt: PromptSection, *, batch_size: int = 16
) -> list[list[Loss]]:
    """How surprised the base is by each example's response.

    Args:
        base: the frozen base, afterwards as it was.
        wanted: the examples, and under which adapter.
        prompt: the fixed phrases.
        batch_size: rows of one forward pass, where rows must be padded: on some bases, and where latents are
            looked at. The result does not depend on it (beyond rounding).

    Returns:
        For each entry and example the sum of its response tokens' negative log-likelihoods in nats (the end
        token included) and the number of those tokens.

    Raises:
        MilpError: an adapter, a soft prompt or latents do not fit the base or each other, or a soft prompt
            leaves no room in the context.
    """
    sequences = [_sequences(one, base, prompt) for one in wanted]
    soft = [soft_of_each(one.soft, len(one.examples), base) for one in wanted]
    latents = [one.latents for one in wanted]
    adapters = [one.adapter for one in wanted]
    return losses_under(base, adapters, sequences, soft, latents, batch_size=batch_size)


def _sequences(wanted: Wanted, base: Base, prompt: PromptSection) -> list[Sequence]:
    n_soft = n_soft_of(wanted.soft)
    room = room_beside(n_soft, base)
    found = instruction_set(wanted.examples, base, prompt, max_length=room, contexts=wanted.contexts)
    return [sequence_with_places(one, n_soft, base) for one in found] if n_soft else found


def losses_under(
    base: Base,
    adapters: SequenceOf[Adapter | None],
    sequences: SequenceOf[SequenceOf[Sequence]],
    soft: SequenceOf[SequenceOf[Tensor | None]] | None = None,
    latents: SequenceOf[Latents | None] | None = None,
    *,
    batch_size: int = 16,
) -> list[list[Loss]]:
    """How surprised the base is by the targets of each sequence, under the adapter whose sequences they are.

    Args:
        base: the frozen base, afterwards as it was.
        adapters: whose turn it is; ``None``: the base alone.
        sequences: for each of ``adapters`` its own.
        soft: the soft prompt of each sequence that has places for one; ``None``: of none.
        latents: what the sequences of each of ``adapters`` look at; ``None``: all at nothing.
        batch_size: as in :func:`response_losses`.

    Raises:
        MilpError: an adapter or latents do not fit the base or each other.
    """
    if soft is None:
        soft = [[None] * len(own) for own in sequences]
    if latents is None:
        latents = [None] * len(sequences)
    # Blocks of cross-attention see rows, and not a line of tokens.
    if can_lie_flat(base) and only_blocks(latents) is None:
        return _flat_losses(base, adapters, sequences, soft)
    return _padded_losses(base, adapters, sequences, soft, latents, batch_size)


def _padded_losses(
    base: Base,
    adapters: SequenceOf[Adapter | None],
    sequences: SequenceOf[SequenceOf[Sequence]],
    soft: SequenceOf[SequenceOf[Tensor | None]],
    latents: SequenceOf[Latents | None],
    batch_size: int,
) -> list[list[Loss]]:
    looked_at = [latents_of_each(one, len(own)) for one, own in zip(latents, sequences, strict=True)]
    found: list[dict[int, Loss]] = [{} for _ in sequences]
    # Which entry's, and which of its sequences.
    places = [(i, k) for i, own in enumerate(sequences) for k in range(len(own))]
    places.sort(key=lambda place: -len(sequences[place[0]][place[1]].ids))
    with (
        seated(base, adapters) as seating,
        fused_operations(base),
        cross_attended(base, only_blocks(latents)) as view,
        torch.no_grad(),
    ):
        for some in chunks(range(len(places)), batch_size):
            # Rows of one adapter next to each other.
            rows = sorted((places[j] for j in some), key=lambda place: (seating.place(place[0]), *place))
            batch = make_batch([sequences[i][k] for i, k in rows], base)
            seating.show([i for i, _ in rows], batch.ids.shape[1])
            view.show([looked_at[i][k] for i, k in rows])
            nll = soft_nll(base, base.model, batch, [soft[i][k] for i, k in rows]).double()
            n_targets = [sequence.n_targets for sequence in batch.sequences]
            for (i, k), own, n in zip(rows, nll.split(n_targets), n_targets, strict=True):
                found[i][k] = (float(own.sum()), n)
    return [[own[k] for k in range(len(own))] for own in found]


def _flat_losses(
    base: Base,
    adapters: SequenceOf[Adapter | None],
    sequences: SequenceOf[SequenceOf[Sequence]],
    soft: SequenceOf[SequenceOf[Tensor | None]],
) -> list[list[Loss]]:
    loss = FlatLoss(base)
    found: list[list[Loss]] = [[] for _ in sequences]
    with (
        seated(base, adapters) as seating,
        fused_operations(base),
        flat_attention(base) as view,
        torch.no_grad(),
    ):
        pieces: list[tuple[int, Part]] = []
        for i in sorted(range(len(sequences)), key=seating.place):
            texts = Texts(sequences[i])
            for chosen in pieces_of(texts, range(len(texts)), _TOKENS_A_PASS):
                pieces.append((i, Part(texts, chosen, seating.segment(i))))
        for some in together(pieces, _TOKENS_A_PASS):
            batch = flat_batch([part for _, part in some], base.device)
            seating.context.segments = batch.segments
            own_soft = [soft[i][k] for i, part in some for k in part.chosen]
            states = view.hidden_states(batch.ids, batch.rows, _entering(base, batch, some, own_soft))
            nll = loss(states[batch.targets], batch.labels).double()
            rows = [(i, part.texts.n_targets(k)) for i, part in some for k in part.chosen]
            for (i, n), own in zip(rows, nll.split([n for _, n in rows]), strict=True):
                found[i].append((float(own.sum()), n))
    return found


def _entering(
    base: Base, batch: FlatBatch, parts: SequenceOf[tuple[int, Part]], soft: SequenceOf[Tensor | None]
) -> Tensor | None:
    """The embeddings of a line that has soft prompts in it; ``None`` where its tokens do."""
    if all(one is None for one in soft):
        return None
    lengths = [part.texts.lengths[k] for _, part in parts for k in part.chosen]
    begins = [0, *accumulate(lengths)][:-1]
    return embeddings(base, batch.ids[None], begins, soft)[0]
