"""Training of a small module beside the frozen base, such as an encoder of users, in the DeepSpeed engine."""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from milp_ray.errors import MilpError
from milp_ray.training.engine import engine_around, linear_schedule

if TYPE_CHECKING:
    from milp_ray.training.base import Base


@dataclass(frozen=True, slots=True)
class Schedule:
    """AdamW's settings; the rate rises over the warm-up's share of the steps, then falls to 0."""

    learning_rate: float
    weight_decay: float = 0.0
    warmup_ratio: float = 0.1
    max_grad_norm: float = 1.0


def train_module(
    module: nn.Module, steps: SequenceOf[Any], base: Base, schedule: Schedule, *, what: str, option: str
) -> list[float]:
    """Take one optimizer step for each entry of ``steps``, on the loss that ``module`` makes of it.

    The module's parameters stay in float32, whatever the base's type; whether its dropout is on is its own
    state. The base must stay outside of its registry of modules.

    Args:
        module: ``module(step)`` is a scalar; parameters that ask for no gradient are left alone.
        steps: what each step is about, in order.
        base: says the device.
        schedule: of the optimizer.
        what: names the training in a message.
        option: the configuration's name of the learning rate, for a message.

    Returns:
        The loss of each step.

    Raises:
        MilpError: a loss is no longer a number, or the process uses DeepSpeed on another kind of device.
    """
    if not steps:
        return []
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=schedule.learning_rate, weight_decay=schedule.weight_decay, fused=True
    )
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: linear_schedule(step, len(steps), schedule.warmup_ratio)
    )
    losses = []
    with engine_around(module, optimizer, base) as engine:
        for step in steps:
            loss = engine(step)
            engine.backward(loss)
            nn.utils.clip_grad_norm_(parameters, schedule.max_grad_norm)
            engine.step()
            rate.step()
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise MilpError(
                    f"training of {what} diverged in step {len(losses)} of {len(steps)}: the loss is no "
                    f"longer a number; lower {option} (now {schedule.learning_rate:g})"
                )
    return losses
