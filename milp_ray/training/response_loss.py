"""How surprised a base is by wanted responses, or any texts, under many users' adapters at once."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from milp_ray.training.adapters import attached
from milp_ray.training.data import instruction_set
from milp_ray.training.flat import can_lie_flat, flat_attention
from milp_ray.training.flat_batch import Part, Texts, flat_batch, pieces_of, together
from milp_ray.training.flat_loss import FlatLoss
from milp_ray.training.fused import fused_operations
from milp_ray.training.loss import TargetLoss, sequence_losses
from milp_ray.training.seating import seated

if TYPE_CHECKING:
    from milp_ray.config import PromptSection
    from milp_ray.training.adapters import Adapter
    from milp_ray.training.base import Base
    from milp_ray.training.data import Sequence
    from milp_ray.users.records import Example

Loss = tuple[float, int]  # (sum of the tokens' negative log-likelihoods in nats, number of tokens)
_TOKENS_A_PASS = 4096  # for bases whose rows lie flat


@dataclass(frozen=True, slots=True)
class Wanted:
    """Examples for one adapter (``None``: the base), and a document before each question or none."""

    examples: SequenceOf[Example]
    contexts: SequenceOf[str] | None = None
    adapter: Adapter | None = None


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
        MilpError: an adapter does not fit the base.
    """
    sequences = [
        instruction_set(one.examples, base, prompt, max_length=base.context_length, contexts=one.contexts)
        for one in wanted
    ]
    return losses_under(base, [one.adapter for one in wanted], sequences, batch_size=batch_size)


def losses_under(
    base: Base,
    adapters: SequenceOf[Adapter | None],
    sequences: SequenceOf[SequenceOf[Sequence]],
    *,
    batch_size: int = 16,
) -> list[list[Loss]]:
    """How surprised the base is by the targets of each sequence, under the adapter whose sequences they are.

    Args:
        base: the frozen base, afterwards as it was.
        adapters: whose turn it is; ``None``: the base alone.
        sequences: for each of ``adapters`` its own.
        batch_size: as in :func:`response_losses`.

    Raises:
        MilpError: an adapter does not fit the base.
    """
    if can_lie_flat(base):
        return _flat_losses(base, adapters, sequences)
    found = []
    for adapter, own in zip(adapters, sequences, strict=True):
        with attached(base, adapter) as model:
            found.append(sequence_losses(base, TargetLoss(model, base.first_position), own, batch_size))
    return found


def _flat_losses(
    base: Base, adapters: SequenceOf[Adapter | None], sequences: SequenceOf[SequenceOf[Sequence]]
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
            states = view.hidden_states(batch.ids, batch.rows)
            nll = loss(states[batch.targets], batch.labels).double()
            rows = [(i, part.texts.n_targets(k)) for i, part in some for k in part.chosen]
            for (i, n), own in zip(rows, nll.split([n for _, n in rows]), strict=True):
                found[i].append((float(own.sum()), n))
    return found
