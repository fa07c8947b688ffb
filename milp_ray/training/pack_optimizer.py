"""AdamW for the slots of racks: each with its own clipping, learning rate and count of steps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from milp_ray.config.training import TrainingSection
from milp_ray.training.rack import Rack

_BETAS, _EPSILON = (0.9, 0.999), 1e-8


@dataclass(frozen=True, slots=True)
class SlotStep:
    """The step that a slot is about to take, the ``number``-th (from 1) of its stage, at its own rate."""

    rack: Rack
    slot: int
    number: int
    learning_rate: float


class SlotAdamW(torch.optim.Optimizer):
    """torch's AdamW kernel, a slot at a time; slots that :attr:`steps` does not name stay as they are.

    A slot's gradient is scaled down to a norm of ``section.max_grad_norm`` over all of the slot's numbers
    first, as ``torch.nn.utils.clip_grad_norm_`` does for one job's parameters.
    """

    def __init__(self, racks: Iterable[Rack], section: TrainingSection) -> None:
        super().__init__([{"params": [rack.weights]} for rack in racks], {})
        self._section = section
        self.steps: list[SlotStep] = []

    def add(self, rack: Rack) -> None:
        """Step a further rack's slots as well."""
        self.add_param_group({"params": [rack.weights]})

    def remove(self, rack: Rack) -> None:
        """Forget a rack."""
        self.param_groups = [g for g in self.param_groups if g["params"][0] is not rack.weights]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Step the slots of :attr:`steps` and set their gradients to zero; no closure is called."""
        for step in self.steps:
            rack, slot = step.rack, step.slot
            weights, gradient = rack.weights.detach()[slot], rack.gradients[slot]
            norm = torch.linalg.vector_norm(gradient)
            gradient.mul_((self._section.max_grad_norm / (norm + 1e-6)).clamp_(max=1.0))
            torch._fused_adamw_(
                [weights],
                [gradient],
                [rack.first_moments[slot]],
                [rack.second_moments[slot]],
                [],
                [torch.full((), float(step.number), device=weights.device)],
                lr=step.learning_rate,
                beta1=_BETAS[0],
                beta2=_BETAS[1],
                weight_decay=self._section.weight_decay,
                eps=_EPSILON,
                amsgrad=False,
                maximize=False,
            )
            gradient.zero_()
        for rack in {step.rack for step in self.steps}:
            rack.refresh([step.slot for step in self.steps if step.rack is rack])
