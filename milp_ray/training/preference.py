"""Direct preference optimisation of adapters: one answer to a query made likelier than another.

DPO (Rafailov et al. 2023, arXiv 2305.18290): with Δ the log-probability of an answer under the adapter minus
that under the reference, the loss of a pair is −log σ(β [Δ(chosen) − Δ(rejected)]). The reference is the base
with the adapter switched off, so that it costs no second model; as it never changes, its log-probabilities
are computed once.
"""

from __future__ import annotations

import random
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from milp_ray.training.adapters import Adapter, attached, lora_parameters, read_tensors
from milp_ray.training.data import chunks, make_batch
from milp_ray.training.fused import fused_operations
from milp_ray.training.loss import target_nll
from milp_ray.training.response_loss import losses_under
from milp_ray.training.small_module import Schedule, train_module

if TYPE_CHECKING:
    from milp_ray.training.base import Base
    from milp_ray.training.data import Sequence


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers behind one prompt, as tokens; the loss is over the answers alone."""

    chosen: Sequence
    rejected: Sequence


@dataclass(frozen=True, slots=True)
class PreferenceJob:
    """One adapter to begin with and the pairs to train it on; ``seed`` decides their order."""

    start: Adapter
    pairs: tuple[Pair, ...]
    seed: int


@dataclass(frozen=True, slots=True)
class PreferenceRecipe:
    """``beta`` is how dearly the adapter pays for leaving the reference; ``option`` names the learning rate's
    option, for messages.
    """

    beta: float
    n_epochs: int
    batch_size: int
    schedule: Schedule
    option: str


def train_preferences(base: Base, jobs: SequenceOf[PreferenceJob], recipe: PreferenceRecipe) -> list[Adapter]:
    """Train each adapter on its pairs, one after the other; the base is left as it was.

    One without pairs stays as it is.

    Raises:
        MilpError: an adapter does not fit the base, or training diverges.
    """
    reference = [_log_probabilities(base, None, job.pairs) for job in jobs]
    return [
        _trained(base, job, recipe, own) if job.pairs else job.start
        for job, own in zip(jobs, reference, strict=True)
    ]


class PreferenceLoss(nn.Module):
    """What DeepSpeed sees of a job: the LoRA weights, and a forward pass to the loss of some pairs.

    Args:
        model: the base with the adapter on.
        base: the base.
        pairs: of the job.
        reference: (2, n_pairs) log-probabilities of chosen and rejected answers without the adapter.
        beta: see :class:`PreferenceRecipe`.
    """

    def __init__(
        self, model: nn.Module, base: Base, pairs: SequenceOf[Pair], reference: Tensor, beta: float
    ) -> None:
        super().__init__()
        self.trained = nn.ParameterList(lora_parameters(model).values())
        # Beside the registry of modules: DeepSpeed goes through all parameters that it finds there.
        self.__dict__.update(model=model, base=base, pairs=pairs, reference=reference)
        self.beta = beta

    def forward(self, step: SequenceOf[int]) -> Tensor:
        """The mean loss of the pairs of these numbers: a scalar."""
        base: Base = self.__dict__["base"]
        chosen = [self.__dict__["pairs"][i] for i in step]
        batch = make_batch([p.chosen for p in chosen] + [p.rejected for p in chosen], base)
        nll = target_nll(self.__dict__["model"], batch, base.first_position)
        sums = torch.zeros(2 * len(step), device=nll.device).index_add(0, batch.rows, -nll)
        change = sums.view(2, -1) - self.__dict__["reference"][:, list(step)].to(nll.device)
        return -functional.logsigmoid(self.beta * (change[0] - change[1])).mean()


def _trained(base: Base, job: PreferenceJob, recipe: PreferenceRecipe, reference: Tensor) -> Adapter:
    rng = random.Random(f"{job.seed}/preference")
    steps: list[tuple[int, ...]] = []
    for _ in range(recipe.n_epochs):
        order = list(range(len(job.pairs)))
        rng.shuffle(order)
        steps += chunks(order, recipe.batch_size)
    with attached(base, job.start) as model, fused_operations(base):
        for weight in lora_parameters(model).values():
            weight.requires_grad_()  # an adapter that is there is put on to answer
        loss = PreferenceLoss(model, base, job.pairs, reference, recipe.beta)
        train_module(loss, steps, base, recipe.schedule, what="preferences", option=recipe.option)
        return Adapter(job.start.config, read_tensors(model), job.start.layout)


def _log_probabilities(base: Base, adapter: Adapter | None, pairs: SequenceOf[Pair]) -> Tensor:
    """(2, n_pairs): of the chosen and the rejected answers, summed over their tokens, in nats."""
    sequences = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    [losses] = losses_under(base, [adapter], [sequences])
    return torch.tensor([-nll for nll, _ in losses]).view(2, len(pairs))
