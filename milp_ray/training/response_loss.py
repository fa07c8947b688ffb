"""How surprised a base is by wanted responses, or any texts, under many users' adapters at once."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from milp_ray.training.adapters import attached
from milp_ray.training.data import chunks, instruction_set, make_batch
from milp_ray.training.flat import can_lie_flat, flat_attention
from milp_ray.training.flat_batch import Part, Texts, flat_batch, pieces_of, together
from milp_ray.training.flat_loss import FlatLoss
from milp_ray.training.fused import fused_operations
from milp_ray.training.loss import TargetLoss, sequence_losses
from milp_ray.training.seating import seated
from milp_ray.training.soft import embeddings, n_soft_of, sequence_with_places, soft_nll, soft_of_each

if TYPE_CHECKING:
    from torch import Tensor, nn

    from milp_ray.config.prompt import PromptSection
    from milp_ray.training.adapters import Adapter
    from milp_ray.training.base import Base
    from milp_ray.training.data import Sequence
    from milp_ray.training.flat_batch import FlatBatch
    from milp_ray.users.records import Example

Loss = tuple[float, int]  # (sum of the tokens' negative log-likelihoods in nats, number of tokens)
_TOKENS_A_PASS = 4096  # for bases whose rows lie flat


@dataclass(frozen=True, slots=True)
class Wanted:
    """Examples for one adapter (``None``: the base), and a document before each question or none.

    ``soft``, a soft prompt behind the start token, is (n_soft, hidden) for all of them, or
    (n_examples, n_soft, hidden).
    """

    examples: SequenceOf[Example]
    contexts: SequenceOf[str] | None = None
    adapter: Adapter | None = None
    soft: Tensor | None = None


def response_losses(
    base: Base, wanted: SequenceOf[Wanted], prompt: PromptSection, *, batch_size: int = 16
) -> list[list[Loss]]:
    """How surprised the base is by each example's response.

    Args:
        base: the frozen base, afterwards as it was.
        wanted: the examples, and under which adapter.
        prompt: the fixed phrases.
        batch_size: rows of one forward pass, for bases whose rows must be padded; the result does not depend
            on it (beyond rounding).

    Returns:
        For each entry and example the sum of its response tokens' negative log-likelihoods in nats (the end
        token included) and the number of those tokens.

    Raises:
        MilpError: an adapter or a soft prompt does not fit the base.
    """
    sequences = [_sequences(one, base, prompt) for one in wanted]
    soft = [soft_of_each(one.soft, len(one.examples), base) for one in wanted]
    return losses_under(base, [one.adapter for one in wanted], sequences, soft, batch_size=batch_size)


def _sequences(wanted: Wanted, base: Base, prompt: PromptSection) -> list[Sequence]:
    n_soft = n_soft_of(wanted.soft)
    room = base.context_length - n_soft
    found = instruction_set(wanted.examples, base, prompt, max_length=room, contexts=wanted.contexts)
    return [sequence_with_places(one, n_soft, base) for one in found] if n_soft else found


def losses_under(
    base: Base,
    adapters: SequenceOf[Adapter | None],
    sequences: SequenceOf[SequenceOf[Sequence]],
    soft: SequenceOf[SequenceOf[Tensor | None]] | None = None,
    *,
    batch_size: int = 16,
) -> list[list[Loss]]:
    """How surprised the base is by the targets of each sequence, under the adapter whose sequences they are.

    Args:
        base: the frozen base, afterwards as it was.
        adapters: whose turn it is; ``None``: the base alone.
        sequences: for each of ``adapters`` its own.
        soft: the soft prompt of each sequence that has places for one; ``None``: of none.
        batch_size: as in :func:`response_losses`.

    Raises:
        MilpError: an adapter does not fit the base.
    """
    if soft is None:
        soft = [[None] * len(own) for own in sequences]
    if can_lie_flat(base):
        return _flat_losses(base, adapters, sequences, soft)
    found = []
    for adapter, own, own_soft in zip(adapters, sequences, soft, strict=True):
        with attached(base, adapter) as model:
            if any(one is not None for one in own_soft):
                found.append(_padded_soft_losses(base, model, own, own_soft, batch_size))
            else:
                found.append(sequence_losses(base, TargetLoss(model, base.first_position), own, batch_size))
    return found


def _padded_soft_losses(
    base: Base,
    model: nn.Module,
    sequences: SequenceOf[Sequence],
    soft: SequenceOf[Tensor | None],
    batch_size: int,
) -> list[Loss]:
    found: list[Loss] = []
    with torch.no_grad():
        for chosen in chunks(range(len(sequences)), batch_size):
            batch = make_batch([sequences[i] for i in chosen], base)
            nll = soft_nll(base, model, batch, [soft[i] for i in chosen]).double()
            sums = torch.zeros(len(chosen), dtype=nll.dtype, device=nll.device)
            sums.index_add_(0, batch.rows, nll)
            n_targets = [sequence.n_targets for sequence in batch.sequences]
            found += zip(sums.tolist(), n_targets, strict=True)
    return found


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
