"""Losses of responses, with logits at target positions only.

A small model's logits are its largest tensors: on CPU most of a step's time would go into rows of the
vocabulary that nothing is compared with.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from milp_ray.training.data import Batch, Sequence, chunks, make_batches
from milp_ray.training.reference import divergence

if TYPE_CHECKING:
    from milp_ray.training.base import Base
    from milp_ray.training.frozen import FrozenPrefix


class TargetLoss(nn.Module):
    """A causal LM that answers with the negative log-likelihood of a batch's targets.

    The model is held beside the registry of modules, unless ``registered``: DeepSpeed goes through all
    parameters of what it is given several times a step, and only ``trained`` concern it. ZeRO-3 must know
    the whole model. With ``prefix`` the layers below the lowest LoRA are replayed
    (:mod:`milp_ray.training.frozen`).
    """

    model: nn.Module

    def __init__(
        self,
        model: nn.Module,
        first_position: int,
        prefix: FrozenPrefix | None = None,
        *,
        trained: SequenceOf[nn.Parameter] = (),
        registered: bool = False,
    ) -> None:
        super().__init__()
        if registered:
            self.model = model
        else:
            self.__dict__["model"] = model
            self.trained = nn.ParameterList(trained)
        self.first_position = first_position
        self.prefix = prefix

    def forward(self, batches: SequenceOf[Batch], scale: float | None = None) -> Tensor:
        """Negative log-likelihoods in nats of the targets of a batch's pieces, one piece after the other.

        (n_targets,), or with ``scale``, in training, the weighted sum of their losses × ``scale`` (a scalar).
        """
        losses = []
        for batch in batches:
            if self.prefix is not None:
                self.prefix.show(batch)
            if scale is None:
                losses.append(target_nll(self.model, batch, self.first_position))
                continue
            loss = _training_loss(self.model, batch, self.first_position)
            losses.append(loss if batch.weights is None else loss * batch.weights)
        return torch.cat(losses) if scale is None else torch.cat(losses).sum() * scale


def target_nll(
    model: nn.Module, batch: Batch, first_position: int, embeddings: Tensor | None = None
) -> Tensor:
    """Negative log-likelihood of every target of a batch: (n_targets,) float32, in nats.

    The model is asked for the logits of ``batch.keep`` alone; an architecture that cannot choose positions
    answers with all of them, of which those are taken. ``embeddings`` (n_rows, length, hidden) enter it in
    place of the batch's token ids.
    """
    logits = _target_logits(model, batch, first_position, embeddings)
    return functional.cross_entropy(logits.float(), batch.labels, reduction="none")


def _training_loss(model: nn.Module, batch: Batch, first_position: int) -> Tensor:
    """The same, but of a target with a reference the divergence from that."""
    reference = batch.reference
    if reference is None:
        return target_nll(model, batch, first_position)
    logits = _target_logits(model, batch, first_position)
    tokens, distributions = reference.tokens, reference.distributions
    nll = functional.cross_entropy(logits[tokens].float(), batch.labels[tokens], reduction="none")
    head: Any = model.lm_head
    with torch.no_grad():
        wanted = head(reference.states)
    return reference.losses(nll, divergence(logits[distributions], wanted))


def _target_logits(
    model: nn.Module, batch: Batch, first_position: int, embeddings: Tensor | None = None
) -> Tensor:
    """(n_targets, vocabulary)."""
    inputs = model_inputs(batch, first_position)
    if embeddings is not None:
        inputs["inputs_embeds"] = embeddings
        del inputs["input_ids"]
    logits: Tensor = model(**inputs, logits_to_keep=batch.keep).logits
    return logits[batch.keep] if logits.dim() == 3 else logits


def model_inputs(batch: Batch, first_position: int) -> dict[str, Any]:
    """What a causal LM is called with; no mask, see :mod:`milp_ray.training.data`."""
    inputs: dict[str, Any] = {"input_ids": batch.ids, "use_cache": False}
    if first_position:
        # RoBERTa would work them out from the padding token, which may be a real token of the text.
        inputs["position_ids"] = positions(batch.ids, first_position)
    return inputs


def positions(ids: Tensor, first_position: int) -> Tensor:
    """Position ids of sequences that begin at their row's first token: the shape of ``ids``."""
    return (torch.arange(ids.shape[1], device=ids.device) + first_position).expand(ids.shape[0], -1)


def sequence_losses(
    base: Base, loss: Callable[[SequenceOf[Batch]], Tensor], sequences: SequenceOf[Sequence], batch_size: int
) -> list[tuple[float, int]]:
    """(sum of the targets' negative log-likelihoods in nats, number of targets) of each sequence.

    ``loss`` is a :class:`TargetLoss`, or an engine around one.
    """
    losses: list[tuple[float, int]] = []
    longest_first = sorted(range(len(sequences)), key=lambda i: -len(sequences[i].ids))
    with torch.no_grad():
        for indices in chunks(longest_first, batch_size):
            for batch in make_batches(sequences, indices, base):
                sums = torch.zeros(len(batch.sequences), dtype=torch.float64, device=base.device)
                sums.index_add_(0, batch.rows, loss([batch]).double())
                n_targets = [sequence.n_targets for sequence in batch.sequences]
                losses.extend(zip(sums.tolist(), n_targets, strict=True))
    # Pieces keep the order, longest first.
    in_order = dict(zip(longest_first, losses, strict=True))
    return [in_order[i] for i in range(len(sequences))]


def mean_token_loss(losses: SequenceOf[tuple[float, int]]) -> float | None:
    """Mean cross-entropy a token over all examples together; ``None`` without any token."""
    n_tokens = sum(n for _, n in losses)
    return sum(total for total, _ in losses) / n_tokens if n_tokens else None
