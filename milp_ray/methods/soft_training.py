"""What is common to methods that give the base a few vectors of users: pretraining, and training through it.

First the encoder learns from all users' histories alone to tell each next turn. Then everything that makes
the vectors is trained on the users' past examples: the loss is that of the wanted responses, computed by the
frozen base behind them as soft prompts, or looking at them by blocks of cross-attention, which are trained as
well; and what flows back through the base trains what made them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from milp_ray.errors import MilpError
from milp_ray.methods.shared import Shared
from milp_ray.methods.user_encoder import UserEncoder, padded
from milp_ray.training.cross_attention import cross_attended
from milp_ray.training.data import chunks, instruction_set, make_batch
from milp_ray.training.fused import fused_operations
from milp_ray.training.loss import target_nll
from milp_ray.training.small_module import Schedule, train_module
from milp_ray.training.soft import room_beside, sequence_with_places, soft_nll

if TYPE_CHECKING:
    from milp_ray.config.methods import UserEncoderSection
    from milp_ray.methods.protocol import FitRequest
    from milp_ray.training.base import Base
    from milp_ray.training.cross_attention import CrossAttention
    from milp_ray.training.data import Sequence as Tokens

_OPTION = "methods.user_encoder"


@dataclass(frozen=True, slots=True)
class PastExample:
    """A user's past example, as tokens with places for a soft prompt, if there is to be one; the user and the
    example by number.
    """

    user: int
    place: int
    tokens: Tokens


# The vectors (n, n_soft, size) of some examples.
SoftOf = Callable[[Sequence[PastExample]], Tensor]


@dataclass(frozen=True, slots=True)
class SoftModel:
    """What a method trains for all users together, fresh.

    ``module`` makes vectors of users, as ``soft_of`` says; ``encoder``, it or a part of it, is pretrained on
    ``histories``, the turns (n_turns, n_in) of each user. ``blocks``, a part of ``module``, are how the
    base looks at the vectors; ``None``: these are soft prompts.
    """

    module: nn.Module
    encoder: UserEncoder
    histories: Sequence[Tensor]
    soft_of: SoftOf
    blocks: CrossAttention | None = None


def train_shared(
    requests: Sequence[FitRequest], new_model: Callable[[Sequence[FitRequest]], SoftModel]
) -> Shared:
    """Train what ``new_model`` makes for the users; nothing is shared where nobody has past examples."""
    if not any(request.split.train for request in requests):
        return Shared()
    one = requests[0]
    base, section, seed = one.base, one.methods.user_encoder, one.seed
    model = new_model(requests)
    examples = past_examples(requests, section.n_soft if model.blocks is None else 0)
    pretrain(model.encoder, model.histories, base, section, seed)
    train_on_responses(model, examples, base, section, seed)
    return Shared(tensors={name: t.detach().cpu() for name, t in model.module.state_dict().items()})


def shared_state(requests: Sequence[FitRequest]) -> dict[str, Tensor]:
    """The state of the module that :func:`train_shared` trained; empty where nobody had past examples."""
    shared = requests[0].shared if requests else None
    return {} if shared is None else dict(shared.tensors)


def load_shared(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Give a fresh module the state that :func:`shared_state` found, and take its dropout off.

    Raises:
        MilpError: the state is that of a module of other parts or sizes.
    """
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise MilpError(
            "what the method trained on all users together was trained with other settings of "
            f"{_OPTION}, methods.uelp or methods.soft_fused, or on another base; make it anew"
        ) from error
    module.eval()


def past_examples(requests: Sequence[FitRequest], n_soft: int) -> list[PastExample]:
    """Everybody's training examples, with ``n_soft`` places in each; validation and test examples are not
    among them.

    Raises:
        MilpError: the places leave no room in the base's context.
    """
    found = []
    for user, request in enumerate(requests):
        base = request.base
        room = room_beside(n_soft, base)
        own = instruction_set(request.split.train, base, request.prompt, max_length=room)
        for place, one in enumerate(own):
            found.append(PastExample(user, place, sequence_with_places(one, n_soft, base)))
    return found


def pretrain(
    encoder: UserEncoder, vectors: Sequence[Tensor], base: Base, section: UserEncoderSection, seed: int
) -> list[float]:
    """Next-turn prediction over users' turns (n_turns, n_in) each; the losses of the steps, in nats."""
    users = [i for i, own in enumerate(vectors) if len(own) > 1]
    steps = _steps(users, section.pretraining_epochs, section.batch_size, f"{seed}/pretraining")

    def loss(step: Sequence[int]) -> Tensor:
        return encoder.next_turn_loss(*padded([vectors[i] for i in step], base.device))

    schedule = Schedule(section.pretraining_learning_rate, section.weight_decay)
    option = f"{_OPTION}.pretraining_learning_rate"
    with training_mode(encoder, seed):
        return train_module(
            _Loss(encoder, loss), steps, base, schedule, what="the user encoder", option=option
        )


def train_on_responses(
    model: SoftModel, examples: Sequence[PastExample], base: Base, section: UserEncoderSection, seed: int
) -> list[float]:
    """Train ``model.module`` through the frozen base.

    Gives the losses of the steps, mean nats a token.
    """
    module, blocks = model.module, model.blocks
    steps = _steps_by_user(examples, section, f"{seed}/responses")

    def loss(step: Sequence[int]) -> Tensor:
        chosen = [examples[i] for i in step]
        batch = make_batch([one.tokens for one in chosen], base)
        vectors = list(model.soft_of(chosen))
        if blocks is None:
            return soft_nll(base, base.model, batch, vectors).mean()
        view.show(vectors)
        return target_nll(base.model, batch, base.first_position).mean()

    schedule = Schedule(section.learning_rate, section.weight_decay)
    option = f"{_OPTION}.learning_rate"
    what = "soft prompts" if blocks is None else "cross-attention"
    with training_mode(module, seed), fused_operations(base), cross_attended(base, blocks) as view:
        return train_module(_Loss(module, loss), steps, base, schedule, what=what, option=option)


class _Loss(nn.Module):
    """What DeepSpeed sees: the module that is trained, and a forward pass to the loss of a step."""

    def __init__(self, module: nn.Module, loss: Callable[[Sequence[int]], Tensor]) -> None:
        super().__init__()
        self.module = module
        self._loss = loss

    def forward(self, step: Sequence[int]) -> Tensor:
        return self._loss(step)


@contextmanager
def training_mode(module: nn.Module, seed: int) -> Iterator[None]:
    """Dropout on and drawn from ``seed``; off afterwards, and torch's generators as they were."""
    devices = [p.device.index or 0 for p in module.parameters() if p.device.type == "cuda"][:1]
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        module.train()
        try:
            yield
        finally:
            module.eval()


def _steps_by_user(
    examples: Sequence[PastExample], section: UserEncoderSection, seed: str
) -> list[tuple[int, ...]]:
    """Batches of all epochs, a user's examples in groups: few histories are encoded a step."""
    rng = random.Random(seed)
    steps: list[tuple[int, ...]] = []
    n_users = -(-section.batch_size // section.examples_of_user)
    for _ in range(section.epochs):
        order = list(range(len(examples)))
        rng.shuffle(order)
        order.sort(key=lambda i: examples[i].user)  # stable: the shuffle decides within a user
        groups = [
            own[start : start + section.examples_of_user]
            for _, found in groupby(order, key=lambda i: examples[i].user)
            for own in [list(found)]
            for start in range(0, len(own), section.examples_of_user)
        ]
        rng.shuffle(groups)
        for chosen in chunks(range(len(groups)), n_users):
            steps.append(tuple(i for k in chosen for i in groups[k]))
    return steps


def _steps(items: Sequence[int], n_epochs: int, batch_size: int, seed: str) -> list[tuple[int, ...]]:
    """Batches of all epochs, shuffled anew for each; ``seed`` alone decides."""
    rng = random.Random(seed)
    steps: list[tuple[int, ...]] = []
    for _ in range(n_epochs):
        order = list(items)
        rng.shuffle(order)
        steps += chunks(order, batch_size)
    return steps
