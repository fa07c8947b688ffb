"""What a pack's training steps spend their time on, by torch's profiler.

Every operator counts with the time that it spends itself: a core's on a CPU, its kernels' on a GPU. What an
attention function does is attention, its gathering of rows included, and so is what goes back through it;
what the optimizer's step does is optimizer. All else goes by the operator's name. What is left of the wall
time is Python, autograd's and the dispatcher's overhead, and on a GPU whatever else leaves it idle.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from adapters.users import PROMPT
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, record_function

from milp_ray.config.training import TrainingSection
from milp_ray.training.base import Base
from milp_ray.training.job import JobPlan
from milp_ray.training.train import train

PRODUCTS, ATTENTION, ELEMENTWISE = "matrix products", "attention", "elementwise and reductions"
COPIES, OPTIMIZER, OVERHEAD = "copies, indexing, embedding", "optimizer", "Python and dispatch"
GROUPS = (PRODUCTS, ATTENTION, ELEMENTWISE, COPIES, OPTIMIZER, OVERHEAD)

# Operators by what they do; what stands in none of these is elementwise or a reduction.
_OF_PRODUCTS = """
    mm mv bmm addmm addmm_ addmv baddbmm baddbmm_
"""
_OF_COPIES = """
    copy_ index index_select index_copy index_copy_ index_put_ _index_put_impl_ gather scatter scatter_
    scatter_add_ cat stack embedding masked_select nonzero repeat_interleave constant_pad_nd fill_ zero_
    arange _local_scalar_dense
"""
# Views, allocations, and those that are made of others.
_OF_OVERHEAD = """
    view view_as _unsafe_view reshape _reshape_alias as_strided t transpose permute expand expand_as slice
    select narrow unsqueeze squeeze split split_with_sizes unflatten flatten unbind chunk repeat detach
    detach_ alias empty empty_like empty_strided new_empty new_empty_strided zeros zeros_like new_zeros full
    full_like new_full ones ones_like resize_ set_ resolve_conj resolve_neg to _to_copy contiguous clone
    linear matmul item lift_fresh is_nonzero result_type
"""
_GROUP_OF = {
    f"aten::{name}": group
    for group, names in ((PRODUCTS, _OF_PRODUCTS), (COPIES, _OF_COPIES), (OVERHEAD, _OF_OVERHEAD))
    for name in names.split()
}
IN_ATTENTION = "benchmark: attention"  # the range that an attention function runs in
_BACKWARD = "autograd::engine::evaluate_function: "
_MOST_STEPS = 32


@dataclass(frozen=True)
class Breakdown:
    """Seconds and operators of a step on average, of each of :data:`GROUPS`.

    ``slowdown`` is how many times longer the steps took than without the profiler.
    """

    pack_size: int
    n_steps: int
    seconds: dict[str, float]
    operators: dict[str, float]
    slowdown: float

    def figures(self) -> dict[str, Any]:
        """For the JSON line."""
        total = sum(self.seconds.values())
        return {
            "pack": self.pack_size,
            "steps": self.n_steps,
            "ms_a_step": round(1e3 * total, 2),
            "profiler_slowdown": round(self.slowdown, 3),
            "share": {group: round(spent / total, 4) for group, spent in self.seconds.items()},
        }

    def table(self) -> Table:
        """For people."""
        total = sum(self.seconds.values())
        slower = f"{self.slowdown:.2f} × the time without the profiler"
        table = Table(title=f"a step of pack {self.pack_size}: mean of {self.n_steps}, {slower}")
        for column in ("", "share", "ms a step", "operators a step"):
            table.add_column(column, justify="right" if column else "left")
        for group in GROUPS:
            spent = self.seconds[group]
            count = f"{self.operators[group]:,.0f}"
            table.add_row(group, f"{spent / total:.3f}", f"{1e3 * spent:.1f}", count)
        return table


def breakdown(base: Base, plans: Sequence[JobPlan], section: TrainingSection, pack_size: int) -> Breakdown:
    """Profile one pack through one epoch of each stage, or its first steps where these are many.

    The same is trained twice, at first without the profiler; callers have warmed up.
    """
    once = {"memory_epochs": 1, "instruction_epochs": 1, "pack_size": pack_size}
    short, some = section.model_copy(update=once), plans[:pack_size]
    plain, _, _ = _steps(base, some, short, None)
    activities = [ProfilerActivity.CPU]
    if base.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    profiler = profile(activities=activities)
    wall, n_steps, found = _steps(base, some, short, profiler)
    seconds, operators = grouped(found, on_gpu=base.device.type == "cuda")
    seconds[OVERHEAD] = max(0.0, wall - sum(seconds[group] for group in GROUPS if group != OVERHEAD))
    return Breakdown(
        pack_size,
        n_steps,
        {group: seconds[group] / n_steps for group in GROUPS},
        {group: operators[group] / n_steps for group in GROUPS},
        wall / plain,
    )


def _steps(
    base: Base, plans: Sequence[JobPlan], section: TrainingSection, profiler: profile | None
) -> tuple[float, int, list[Any]]:
    """Wall seconds from the first step's forward pass on, the number of steps, the profiler's events."""
    longest = max(plans, key=lambda plan: plan.n_steps).job.job_id
    began: list[float] = []
    ended: list[tuple[float, int]] = []

    def begin(*_: Any) -> None:
        if began or not torch.is_grad_enabled():  # without gradients: the layers below the lowest LoRA
            return
        if profiler is not None:
            profiler.start()
        began.append(_now(base))

    def step(job_id: str, done: int, planned: int) -> None:
        if job_id == longest and done == min(planned, _MOST_STEPS):
            ended.append((_now(base), done))
            if profiler is not None:
                profiler.stop()

    with ExitStack() as stack:
        stack.enter_context(_attention_marked())
        handle = base.model.base_model.register_forward_pre_hook(begin)
        stack.callback(handle.remove)
        train(base, [plan.job for plan in plans], section, PROMPT, on_progress=step)
    [start], [(end, n_steps)] = began, ended
    return end - start, n_steps, list(profiler.events() or ()) if profiler is not None else []


def _now(base: Base) -> float:
    if base.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def _attention_marked() -> Iterator[None]:
    """Attention functions that are registered with transformers meanwhile are seen by the profiler."""
    from transformers import AttentionInterface

    register = AttentionInterface.register

    def marked(name: str, function: Callable[..., Any]) -> None:
        def attend(*arguments: Any, **options: Any) -> Any:
            with record_function(IN_ATTENTION):
                return function(*arguments, **options)

        register(name, attend)

    with mock.patch.object(AttentionInterface, "register", marked):
        yield


def grouped(events: Iterable[Any], *, on_gpu: bool) -> tuple[Counter[str], Counter[str]]:
    """Seconds and numbers of operators of each group; what goes back counts as what it goes back through."""
    operators = sorted(
        (event for event in events if event.device_type == torch.autograd.DeviceType.CPU),
        key=lambda event: event.time_range.start,
    )
    # Autograd numbers its nodes; an operator carries the number of the next node to be made, so that the last
    # operator with a number has made that node. Going back, the node's event carries the number again.
    maker: dict[int, Any] = {}
    for event in operators:
        if event.sequence_nr >= 0 and _within(event, _BACKWARD) is None:
            maker[event.sequence_nr] = event
    seconds: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for event in operators:
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        group = _group(event, maker)
        seconds[group] += spent * 1e-6
        counts[group] += event.name.startswith("aten::")
    return seconds, counts


def _group(event: Any, maker: dict[int, Any]) -> str:
    if _within(event, "Optimizer.step#") is not None:
        return OPTIMIZER
    origin = event
    node = _within(event, _BACKWARD)
    if node is not None:
        origin = maker.get(node.sequence_nr, event)
    if _within(origin, IN_ATTENTION) is not None:
        return ATTENTION
    return _GROUP_OF.get(event.name, ELEMENTWISE if event.name.startswith("aten::") else OVERHEAD)


def _within(event: Any, name: str) -> Any:
    """The event, or the innermost one around it, whose name begins so."""
    while event is not None and not event.name.startswith(name):
        event = event.cpu_parent
    return event
