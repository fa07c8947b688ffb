"""What a search and a batch of users cost: FLOPs, time and memory, from sizes and counts. Pure.

Time is FLOPs over a share of the device's peak, and what each layer costs beside its arithmetic
(:mod:`milp_ray.training.device_speed`). Loading the base, fitting the search's model and moving data are not
in it. Memory is that of one device that holds everything: what ZeRO spreads or moves away is not taken off.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from milp_ray.errors import MilpError
from milp_ray.training import flops
from milp_ray.training.flops import Placement, Tokens
from milp_ray.training.memory_model import (
    JobLoad,
    MemoryParts,
    largest_pack,
    memory_of_generation,
    memory_of_pack,
)

if TYPE_CHECKING:
    from milp_ray.config.training import DeepSpeedSection
    from milp_ray.memory.space import SearchSpace
    from milp_ray.training.device_speed import Device
    from milp_ray.training.model_shape import ModelShape
    from milp_ray.training.workload import PassWork, UserWork

_N_SAMPLED = 256  # layouts that a search's mean is taken over
_MOST_KEPT_BYTES = 2**30  # of hidden states below the lowest LoRA that training keeps between epochs
# LoRA is trained in float32 whatever the base's precision.
LORA_BYTES = 4


@dataclass(frozen=True, slots=True)
class Machine:
    """Where it runs: ``portion`` of a device a worker (may be above 1), so many workers at a time."""

    device: Device
    n_devices: int
    portion: float
    n_workers: int

    @classmethod
    def of(cls, device: Device, n_devices: int, asked: float, most: int | None, *, threads: int) -> Machine:
        """As many workers as fit; one asks for ``asked`` GPUs, or so many cores of which it uses ``threads``.

        Raises:
            MilpError: not even one fits.
        """
        asked = asked or 1.0
        n_workers = math.floor(n_devices / asked + 1e-9)
        if n_workers < 1:
            raise MilpError(
                f"one worker asks for {asked:g} devices, of which there are {n_devices}; "
                f"give --devices {math.ceil(asked)} or more"
            )
        n_workers = min(n_workers, most or n_workers)
        # Threads beyond the cores do not make a worker faster.
        portion = asked if device.is_gpu else min(float(threads), n_devices / n_workers)
        return cls(device, n_devices, portion, n_workers)


@dataclass(frozen=True, slots=True)
class Cost:
    """FLOPs, seconds of one worker and trained tokens."""

    flops: float = 0.0
    seconds: float = 0.0
    tokens: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.seconds + other.seconds, self.tokens + other.tokens)

    def times(self, n: float) -> Cost:
        """``n`` times as much."""
        return Cost(n * self.flops, n * self.seconds, n * self.tokens)


@dataclass(frozen=True, slots=True)
class Work:
    """All of a stage: the mean of one piece (a trial, a user), the whole, and how long it is waited for."""

    n: int
    one: Cost
    whole: Cost
    n_workers: int
    wall_seconds: float

    @classmethod
    def of(cls, n: int, one: Cost, n_workers: int) -> Work:
        """``n`` pieces, ``n_workers`` at a time."""
        n_workers = min(n_workers, n)
        return cls(n, one, one.times(n), n_workers, one.seconds * math.ceil(n / n_workers))


def placements(space: SearchSpace, seed: int) -> list[Placement | None]:
    """Layouts drawn from the space as its first trials are; ``None`` is the empty one."""
    import numpy as np

    rng = np.random.default_rng(seed)
    layouts = [space.layout(space.sample(rng)).canonical() for _ in range(_N_SAMPLED)]
    return [
        None if layout.is_empty else Placement(layout.rank, len(layout.layers), layout.layers[0])
        for layout in layouts
    ]


def trial_cost(
    shape: ModelShape,
    machine: Machine,
    work: UserWork,
    drawn: Sequence[Placement | None],
    *,
    n_probe_users: int,
    batch_size: int,
    options: DeepSpeedSection,
    at_once: int = 1,
) -> Cost:
    """The mean over layouts of training every probe user, and of answering their validation queries.

    ``at_once`` jobs, and the queries of as many users, share a pass.
    """
    at_once = min(at_once, n_probe_users)
    costs = [
        _training(shape, machine, work, placement, options, at_once)
        + _answers(shape, machine, work, placement, batch_size, at_once)
        for placement in drawn
    ]
    return Cost(
        fmean(c.flops for c in costs), fmean(c.seconds for c in costs), fmean(c.tokens for c in costs)
    ).times(n_probe_users)


def user_cost(
    shape: ModelShape,
    machine: Machine,
    work: UserWork,
    placement: Placement,
    options: DeepSpeedSection,
    at_once: int = 1,
) -> Cost:
    """Making one user's adapter, its validation loss included, ``at_once`` of them in a pack."""
    return _training(shape, machine, work, placement, options, at_once)


def training_memory(
    shape: ModelShape, work: UserWork, placement: Placement, options: DeepSpeedSection
) -> MemoryParts:
    """Peak memory of one job at a time."""
    return memory_of_pack(shape, _job_load(shape, work, placement, options), n_jobs=1)


def pack_size(
    shape: ModelShape, work: UserWork, placement: Placement, options: DeepSpeedSection, budget_bytes: int
) -> int:
    """How many such jobs fit into ``budget_bytes`` over one base."""
    return largest_pack(shape, _job_load(shape, work, placement, options), budget_bytes)


def answering_memory(shape: ModelShape, work: UserWork, placement: Placement, batch_size: int) -> MemoryParts:
    """Peak memory of answering a batch of a user's queries with the adapter, without their history."""
    queries = work.validation_queries
    return memory_of_generation(
        shape,
        n_rows=batch_size,
        prompt_tokens=math.ceil(queries.prompt_tokens),
        new_tokens=queries.longest_answer,
        adapter_parameters=shape.adapter_parameters(placement.rank, placement.n_lora_layers),
    )


def _job_load(shape: ModelShape, work: UserWork, placement: Placement, options: DeepSpeedSection) -> JobLoad:
    largest = work.largest
    kept = max((_kept_tokens(shape, stage.work, placement, options) for stage in work.stages), default=0)
    packs = in_packs(options)
    return JobLoad(
        rank=placement.rank,
        n_lora_layers=placement.n_lora_layers,
        lowest_layer=placement.lowest_layer,
        tokens_per_step=largest.step_tokens,
        # Packs compute LoRA in the base's precision and keep no logits; a job alone is PEFT's.
        targets_per_step=0 if packs else largest.step_targets,
        longest_row=largest.longest_row,
        kept_tokens=kept,
        lora_bytes=None if packs else LORA_BYTES,
        activation_checkpointing=options.activation_checkpointing,
    )


def in_packs(options: DeepSpeedSection) -> bool:
    """Whether jobs are trained many at a time, or one after the other."""
    return options.zero_stage == 0 and not options.activation_checkpointing


def _kept_tokens(shape: ModelShape, work: PassWork, placement: Placement, options: DeepSpeedSection) -> int:
    """Tokens whose states below the lowest LoRA training keeps; 0 where it runs what lies there each time."""
    bytes_kept = work.tokens * shape.hidden * shape.dtype_bytes
    # A job alone keeps what enters the lowest layer, and nothing lies below the first.
    nothing_below = placement.lowest_layer == 0 and not in_packs(options)
    if nothing_below or options.zero_stage == 3 or bytes_kept > _MOST_KEPT_BYTES:
        return 0
    return math.ceil(work.tokens)


def _training(
    shape: ModelShape,
    machine: Machine,
    work: UserWork,
    placement: Placement | None,
    options: DeepSpeedSection,
    at_once: int,
) -> Cost:
    device, b = machine.device, shape.dtype_bytes
    measured = _tokens(work.validation)
    total = flops.forward(shape, measured, placement)
    layer_passes = work.validation.passes * shape.n_layers / 3 / at_once
    if placement is None:
        return Cost(total, device.training_seconds(total, layer_passes, b, machine.portion))
    for stage in work.stages:
        tokens = _tokens(stage.work)
        kept = _kept_tokens(shape, stage.work, placement, options) > 0
        once = flops.below(shape, tokens, placement, attention_too=in_packs(options)) if kept else 0.0
        step = flops.training_step(shape, tokens, placement, checkpointing=options.activation_checkpointing)
        total += once + stage.epochs * (step - once)
        n_layers = shape.n_layers - (placement.lowest_layer if kept else 0)
        layer_passes += stage.epochs * stage.work.passes * n_layers / at_once
    seconds = device.training_seconds(total, layer_passes, b, machine.portion)
    return Cost(total, seconds, work.trained_tokens)


def _answers(
    shape: ModelShape,
    machine: Machine,
    work: UserWork,
    placement: Placement | None,
    batch_size: int,
    n_users: int,
) -> Cost:
    """One user's share of answering the queries of ``n_users``, whose rows share batches."""
    queries = work.validation_queries
    if not queries.queries:
        return Cost()
    total = flops.generation(
        shape,
        n_prompts=queries.queries,
        prompt_tokens=queries.prompt_tokens,
        new_tokens=queries.new_tokens,
        placement=placement,
    )
    steps = math.ceil(n_users * queries.queries / batch_size) * queries.longest_answer / n_users
    seconds = machine.device.decoding_seconds(
        total,
        steps * shape.n_layers,
        steps * shape.n_parameters * shape.dtype_bytes,
        shape.dtype_bytes,
        machine.portion,
    )
    return Cost(total, seconds)


def _tokens(work: PassWork) -> Tokens:
    return Tokens(work.padded, work.pairs, work.targets)
