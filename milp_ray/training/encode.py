"""Texts as a frozen base's last hidden states: their mean, or those at targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from milp_ray.errors import MilpError
from milp_ray.training.data import Sequence as Tokens
from milp_ray.training.data import chunks, make_batch
from milp_ray.training.loss import model_inputs

if TYPE_CHECKING:
    from milp_ray.training.base import Base


def mean_states(base: Base, texts: Sequence[str], *, batch_size: int = 64) -> Tensor:
    """Mean over its tokens of the states that the base's last layer gives a text.

    A text longer than the base's context keeps its beginning; one without tokens is the start token alone, or
    zeros where the base has none.

    Returns:
        (n_texts, hidden) float32 on the CPU.
    """
    room = base.context_length - len(base.start_ids)
    ids = [(*base.start_ids, *own[:room]) for own in base.tokenize(list(texts))]
    found = torch.zeros(len(texts), base.model.config.hidden_size)
    encoder = base.model.base_model
    longest_first = sorted((i for i, own in enumerate(ids) if own), key=lambda i: -len(ids[i]))
    with torch.inference_mode():
        for some in chunks(longest_first, batch_size):
            batch = make_batch([Tokens(ids[i], len(ids[i]), "memory") for i in some], base)
            states = encoder(**model_inputs(batch, base.first_position)).last_hidden_state.float()
            # No real token of a causal model sees padding on the right; its own states are left out.
            lengths = torch.tensor([len(ids[i]) for i in some], device=states.device)
            real = torch.arange(states.shape[1], device=states.device) < lengths[:, None]
            means = (states * real[:, :, None]).sum(1) / lengths[:, None]
            found[list(some)] = means.cpu()
    return found


def with_reference(base: Base, sequences: Sequence[Tokens], *, batch_size: int = 16) -> list[Tokens]:
    """The same texts; what is learnt from them is what ``base``, without any adapter, says at each target.

    Their states, (n_targets, hidden) each, stay on the CPU in the base's precision.

    Raises:
        MilpError: the base does more with its last states than what its head answers.
    """
    found: list[Tokens] = []
    with torch.no_grad():  # and not inference mode: training reads the states
        _check_head(base, sequences[:1])
        for some in chunks(range(len(sequences)), batch_size):
            batch = make_batch([sequences[i] for i in some], base)
            states = base.model.base_model(**model_inputs(batch, base.first_position)).last_hidden_state
            for one, own in zip(batch.sequences, states, strict=True):
                # A copy: a view would keep the states of the whole batch.
                kept = own[one.target_from - 1 : len(one.ids) - 1].to("cpu", copy=True)
                found.append(replace(one, reference=kept))
    return found


def _check_head(base: Base, some: Sequence[Tokens]) -> None:
    """Some architectures scale or cap what their head answers, or have it under another name."""
    if not some:
        return
    inputs = model_inputs(make_batch(some, base), base.first_position)
    states, logits = base.model.base_model(**inputs).last_hidden_state, base.model(**inputs).logits
    head: Any = getattr(base.model, "lm_head", None)
    if head is None or not torch.allclose(head(states), logits, rtol=1e-2, atol=1e-2):
        raise MilpError(
            f"the base {base.model_id!r} ({base.spec.model_type}) does more with its last hidden states than "
            "apply a head to them, so that its distributions cannot be kept as states; set "
            "methods.plum.own_texts_target to token"
        )
