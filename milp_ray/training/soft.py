"""Soft prompts: vectors that stand where embeddings of tokens would, right behind a sequence's start token.

A sequence keeps places for them, filled with a token of no meaning, so that lengths, positions and padding
are those of any other sequence; what enters the base is then embeddings instead of token ids.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from milp_ray.errors import MilpError
from milp_ray.training.loss import target_nll

if TYPE_CHECKING:
    from torch import nn

    from milp_ray.training.base import Base
    from milp_ray.training.data import Batch, Sequence


def soft_of_each(soft: Tensor | None, n_texts: int, base: Base) -> list[Tensor | None]:
    """The soft prompt of each of some texts, (n_soft, hidden) each.

    Args:
        soft: (n_soft, hidden), the same for all; (n_texts, n_soft, hidden), one each; ``None``: none.
        n_texts: how many there are.
        base: what they are for.

    Raises:
        MilpError: another shape, or vectors of another base's size.
    """
    if soft is None:
        return [None] * n_texts
    hidden = embedding_table(base).shape[1]
    wanted = (n_texts, *soft.shape[-2:])
    if soft.dim() not in (2, 3) or soft.shape[-1] != hidden or (soft.dim() == 3 and soft.shape != wanted):
        raise MilpError(
            f"a soft prompt of shape {tuple(soft.shape)}: for {n_texts} texts on this base give "
            f"(n_soft, {hidden}) or ({n_texts}, n_soft, {hidden})"
        )
    return [soft] * n_texts if soft.dim() == 2 else list(soft)


def embedding_table(base: Base) -> Tensor:
    """(n_tokens, hidden): the base's embeddings of tokens."""
    module: Any = base.model.get_input_embeddings()
    weight: Tensor = module.weight
    return weight


def n_soft_of(soft: Tensor | None) -> int:
    """Places that a soft prompt takes before each text."""
    return 0 if soft is None else int(soft.shape[-2])


def room_beside(n_soft: int, base: Base) -> int:
    """Most tokens of a sequence, the start token included, that has ``n_soft`` places as well.

    Raises:
        MilpError: the places leave no room for a prompt and a response.
    """
    room, least = base.context_length - n_soft, len(base.start_ids) + 2
    if room < least:
        raise MilpError(
            f"a soft prompt of {n_soft} vectors leaves no room for a prompt and a response in the base's "
            f"context of {base.context_length} tokens; use at most {base.context_length - least} "
            "(methods.user_encoder.n_soft)"
        )
    return room


def with_places(ids: SequenceOf[int], n_soft: int, base: Base) -> list[int]:
    """Token ids with ``n_soft`` places behind the start token."""
    first = len(base.start_ids)
    return [*ids[:first], *[base.pad_id] * n_soft, *ids[first:]]


def sequence_with_places(sequence: Sequence, n_soft: int, base: Base) -> Sequence:
    """A training text with ``n_soft`` places behind the start token; its targets stay the same."""
    ids = tuple(with_places(sequence.ids, n_soft, base))
    return replace(sequence, ids=ids, target_from=sequence.target_from + n_soft)


def embeddings(base: Base, ids: Tensor, begins: SequenceOf[int], soft: SequenceOf[Tensor | None]) -> Tensor:
    """What enters the base for token ids, with soft prompts in their places; gradients flow to these.

    Args:
        base: whose tokens.
        ids: (n_rows, length).
        begins: where each text begins, counted through all of ``ids`` row by row.
        soft: each text's soft prompt (n_soft, hidden), or ``None``.

    Returns:
        (n_rows, length, hidden) in the base's type.
    """
    table: Tensor = base.model.get_input_embeddings()(ids)
    placed = [(begin, one) for begin, one in zip(begins, soft, strict=True) if one is not None]
    if not placed:
        return table
    first = len(base.start_ids)
    places = torch.cat([torch.arange(len(one)) + begin + first for begin, one in placed]).to(ids.device)
    values = torch.cat([one.to(table.device, table.dtype) for _, one in placed])
    return table.flatten(0, 1).index_put((places,), values).view_as(table)


def soft_nll(base: Base, model: nn.Module, batch: Batch, soft: SequenceOf[Tensor | None]) -> Tensor:
    """Negative log-likelihood of every target of a batch behind each row's soft prompt.

    Args:
        base: the frozen base.
        model: it, or it with an adapter on.
        batch: sequences with places (:func:`sequence_with_places`).
        soft: (n_soft, hidden) of each row, or ``None``.

    Returns:
        (n_targets,) float32, in nats.
    """
    n_rows, length = batch.ids.shape
    begins = [row * length for row in range(n_rows)]
    return target_nll(model, batch, base.first_position, embeddings(base, batch.ids, begins, soft))
