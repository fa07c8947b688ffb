"""One estimate, put together: what is known of the base and the users, and what follows."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, get_args

from milp_ray.config.personalize import AdapterPrecision
from milp_ray.errors import MilpError
from milp_ray.estimate.cost import (
    Machine,
    Work,
    answering_memory,
    in_packs,
    pack_size,
    placements,
    training_memory,
    trial_cost,
    user_cost,
)
from milp_ray.estimate.inputs import Cohort, KnownBase, Numbers, cohort, context_length, known_base
from milp_ray.estimate.paper import MemoryCurve, RankRow, memory_curve, rank_rows
from milp_ray.memory.layout import spread
from milp_ray.memory.space import SearchSpace
from milp_ray.personalize.layouts.rungs import race_cost
from milp_ray.personalize.store.precision import stored_bytes
from milp_ray.training.device_speed import Device, cpu_memory, device, measured_peak
from milp_ray.training.flops import Placement, Tokens, forward, training_step
from milp_ray.training.job import PARTS, planned_epochs
from milp_ray.training.pack_size import ON_CPU

if TYPE_CHECKING:
    from milp_ray.config import Config
    from milp_ray.training.memory_model import MemoryParts

PRECISIONS: tuple[AdapterPrecision, ...] = get_args(AdapterPrecision)
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says beside the configuration; ``None``: decided from it."""

    numbers: Numbers | None = None
    device: str | None = None
    n_devices: int | None = None
    peak: float | None = None
    share: float | None = None
    measure: bool = False
    rank: int | None = None
    n_lora_layers: int | None = None


@dataclass(frozen=True, slots=True)
class LayoutCost:
    """A layout's size, what training under it takes, and how many jobs fit a trial's part of a device."""

    placement: Placement
    parameters: int
    memory: MemoryParts
    pack_size: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """Everything that is printed. Bytes, FLOPs and seconds; ``memory_bytes`` is one device's."""

    name: str
    base: KnownBase
    cohort: Cohort
    machine: Machine
    memory_bytes: int
    search: Work
    batch: Work
    assumed: LayoutCost
    heaviest: LayoutCost
    answering: MemoryParts
    forward_a_token: float
    training_a_token: float
    rank_rows: list[RankRow]
    curve: MemoryCurve
    precision: AdapterPrecision

    @property
    def adapter_bytes(self) -> int:
        """Of one adapter of the assumed layout, as it is stored (``personalize.adapter_precision``)."""
        placement = self.assumed.placement
        return self.stored_bytes(placement.rank, placement.n_lora_layers)

    def stored_bytes(self, rank: int, n_lora_layers: int, precision: AdapterPrecision | None = None) -> int:
        """Of an adapter's weights in the store, under a precision (``None``: the configured one)."""
        shape = self.base.shape
        n_scales = 2 * rank * len(shape.ffn.modules) * n_lora_layers
        return stored_bytes(
            precision or self.precision, shape.adapter_parameters(rank, n_lora_layers), n_scales
        )

    def to_dict(self) -> dict[str, Any]:
        """In plain types, for JSON."""
        shape = asdict(self.base.shape)
        return {
            "name": self.name,
            "base": {
                "model": self.base.model,
                "source": self.base.source,
                **shape,
                "ffn": [list(module) for module in self.base.shape.ffn.modules],
                "n_layers": self.base.shape.n_layers,
            },
            "users": asdict(self.cohort) | {"trained_tokens": self.cohort.batch.trained_tokens},
            "device": asdict(self.machine.device)
            | {
                "memory": self.memory_bytes,
                "n_devices": self.machine.n_devices,
            },
            "search": asdict(self.search),
            "batch": asdict(self.batch),
            "layouts": {
                name: asdict(found) | {"memory": asdict(found.memory) | {"total": found.memory.total}}
                for name, found in (("assumed", self.assumed), ("heaviest", self.heaviest))
            },
            "answering_memory": asdict(self.answering) | {"total": self.answering.total},
            "adapter_precision": self.precision,
            "adapter_bytes": self.adapter_bytes,
            "adapter_bytes_by_precision": {
                name: self.stored_bytes(
                    self.assumed.placement.rank, self.assumed.placement.n_lora_layers, name
                )
                for name in PRECISIONS
            },
            "store_bytes": self.adapter_bytes * self.cohort.n_users,
            "flops_a_token": {"forward": self.forward_a_token, "training": self.training_a_token},
            "trainable_parameters": [asdict(row) for row in self.rank_rows],
            "memory_by_history": asdict(self.curve),
        }


def make_estimate(config: Config, options: Options) -> Estimate:
    """What ``config`` will cost. Nothing is trained and no weights are read.

    Raises:
        MilpError: the base's sizes cannot be had, the users are not there, or an option is out of its range.
    """
    of_device = _device(config, options)
    dtype_bytes = _dtype_bytes(config, of_device)
    base = known_base(config.base, dtype_bytes)
    if options.measure:
        peak = measured_peak(on_gpu=of_device.is_gpu, dtype_bytes=dtype_bytes)
        of_device = device(_device_name(config, options), peak=peak, share=options.share)
    context = context_length(config, base.shape)
    users = cohort(config, base, options.numbers, context)
    shape, deepspeed = base.shape, config.training.deepspeed
    space = SearchSpace.for_base(config.space, shape.ffn)
    drawn = placements(space, config.seed)
    n_devices = options.n_devices or _n_devices(config, of_device)
    searching = _machine(config, of_device, n_devices, searching=True)
    making = _machine(config, of_device, n_devices, searching=False)
    heaviest = _heaviest(space)
    assumed = _assumed(space, heaviest, options)
    shape.ffn.check_rank(assumed.rank)
    memory_bytes = of_device.memory or cpu_memory()
    of_a_trial = _memory_of_process(searching, config.search.n_sharing, memory_bytes)
    of_a_worker = _memory_of_process(making, 1, memory_bytes)

    def layout_cost(placement: Placement) -> LayoutCost:
        return LayoutCost(
            placement,
            shape.adapter_parameters(placement.rank, placement.n_lora_layers),
            training_memory(shape, users.batch, placement, deepspeed),
            pack_size(shape, users.batch, placement, deepspeed, of_a_trial),
        )

    def at_once(budget_bytes: int) -> int:
        """Jobs that a process trains together."""
        if not in_packs(deepspeed):
            return 1
        found = pack_size(shape, users.batch, heaviest, deepspeed, budget_bytes)
        most = found if of_device.is_gpu else min(found, ON_CPU)
        return config.training.pack_size or max(1, most)

    a_trial = trial_cost(
        shape,
        searching,
        users.trial,
        drawn,
        n_probe_users=config.search.n_probe_users,
        batch_size=config.evaluation.batch_size,
        options=deepspeed,
        at_once=at_once(of_a_trial),
    )
    together = min(at_once(of_a_worker), users.n_users)
    a_user = user_cost(shape, making, users.batch, assumed, deepspeed, together)
    a_user = a_user.times(_times_trained(config))
    row = users.batch.largest.longest_row
    return Estimate(
        name=config.name,
        base=base,
        cohort=users,
        machine=searching,
        memory_bytes=memory_bytes,
        search=Work.of(config.search.n_trials, a_trial, searching.n_workers),
        batch=Work.of(users.n_users, a_user, making.n_workers),
        assumed=layout_cost(assumed),
        heaviest=layout_cost(heaviest),
        answering=answering_memory(shape, users.batch, assumed, config.evaluation.batch_size),
        forward_a_token=forward(shape, Tokens(1, row, 1)),
        training_a_token=training_step(shape, Tokens(1, row, 1), assumed),
        rank_rows=rank_rows(shape, config.space.ranks),
        curve=_curve(config, base, users, context),
        precision=config.personalize.adapter_precision,
    )


def _memory_of_process(machine: Machine, n_sharing: int, memory_bytes: int) -> int:
    """Bytes of a device's memory for one process, whose base ``n_sharing`` workers share."""
    part = machine.portion if machine.device.is_gpu else 1 / machine.n_workers
    return int(memory_bytes * min(1.0, part * n_sharing))


def _curve(config: Config, base: KnownBase, users: Cohort, context: int) -> MemoryCurve:
    """Histories up to twice the context, so that its end is seen."""
    queries = users.batch.validation_queries
    return memory_curve(
        base.shape,
        config.space.ranks,
        longest_history=2 * context,
        query_tokens=math.ceil(queries.prompt_tokens + queries.new_tokens),
        context_length=context,
    )


def _heaviest(space: SearchSpace) -> Placement:
    """The layout of the space with the largest adapter.

    Raises:
        MilpError: the space holds the empty layout alone.
    """
    largest = {parameter.name: parameter.values[-1] for parameter in space.parameters()}
    layout = space.layout(largest).canonical()
    if layout.is_empty:
        raise MilpError(
            "the search space holds no layout with a LoRA: check space.fixed_layers and space.fixed_number"
        )
    return Placement(layout.rank, len(layout.layers), layout.layers[0])


def _assumed(space: SearchSpace, heaviest: Placement, options: Options) -> Placement:
    """The layout that users are assumed to get: that of the options, else the middle of the space."""
    rank, n_lora_layers, lowest = heaviest.rank, heaviest.n_lora_layers, heaviest.lowest_layer
    if "rank" in space.factors:
        rank = space.ranks[len(space.ranks) // 2]
    if options.n_lora_layers is not None or {"layers", "number"} & set(space.factors):
        n_lora_layers = options.n_lora_layers or (n_lora_layers + 1) // 2
        if n_lora_layers > space.n_layers:
            raise MilpError(
                f"--lora-layers {n_lora_layers}: the base has {space.n_layers} layers; "
                f"use 1 to {space.n_layers}"
            )
        lowest = spread(space.n_layers, n_lora_layers)[0]
    return Placement(options.rank or rank, n_lora_layers, lowest)


def _times_trained(config: Config) -> float:
    """How often a user is trained over, counting the layouts that race for one as far as they get."""
    section = config.personalize
    if section.layout != "race":
        return 1.0
    n_epochs = max(1, planned_epochs(config.training, PARTS))
    return race_cost(section.race.max_layouts, n_epochs, section.race.reduction)


def _device_name(config: Config, options: Options) -> str:
    """As asked for; else a GPU where the configuration wants one, the paper's."""
    if options.device is not None:
        return options.device
    wants_gpu = config.search.held_gpus > 0 or config.personalize.gpus_per_worker > 0
    return "a100" if wants_gpu or config.base.device.startswith("cuda") else "cpu"


def _device(config: Config, options: Options) -> Device:
    if options.measure and options.peak is not None:
        raise MilpError("--measure and --flops both give the device's peak; leave one of them out")
    return device(_device_name(config, options), peak=options.peak, share=options.share)


def _dtype_bytes(config: Config, of_device: Device) -> int:
    """Of a weight: ``base.dtype``, whose "auto" is float32 on a CPU and bfloat16 on a GPU."""
    return _DTYPE_BYTES.get(config.base.dtype, 2 if of_device.is_gpu else 4)


def _n_devices(config: Config, of_device: Device) -> int:
    if of_device.is_gpu:
        return config.ray.num_gpus or 1
    return config.ray.num_cpus or os.cpu_count() or 1


def _machine(config: Config, of_device: Device, n_devices: int, *, searching: bool) -> Machine:
    if searching:
        section = config.search
        asked = (section.held_gpus if of_device.is_gpu else section.cpus_per_trial) / section.n_sharing
        most = section.max_concurrent_trials
    else:
        batch = config.personalize
        asked = batch.gpus_per_worker if of_device.is_gpu else batch.cpus_per_worker
        most = batch.n_workers
    return Machine.of(of_device, n_devices, asked, most, threads=config.ray.threads_per_worker)
