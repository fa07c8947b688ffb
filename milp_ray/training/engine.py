"""The DeepSpeed engine of one training stage, over the process group that is there; without one, alone.

Many engines follow each other in one process. DeepSpeed is imported by the first of them, and the process
group that it wants, unless several processes have made one, is made once and kept; everything else is taken
down with the engine.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import os
import socket
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from milp_ray.config.training import TrainingSection
from milp_ray.environment import environment
from milp_ray.errors import MilpError
from milp_ray.training.base import accelerator_choice

if TYPE_CHECKING:
    import torch
    from torch import nn

    from milp_ray.training.base import Base

_NEVER = 10**9  # steps between DeepSpeed's own reports


def linear_schedule(step: int, n_steps: int, warmup_ratio: float) -> float:
    """Factor on the learning rate at ``step`` (0-based): up over the warm-up, then down to 0 after the last.

    The warm-up takes ⌈ratio × n_steps⌉ steps; its first step already moves.
    """
    n_warmup = math.ceil(warmup_ratio * n_steps)
    if step < n_warmup:
        return (step + 1) / (n_warmup + 1)
    return max(0.0, (n_steps - step) / max(1, n_steps - n_warmup))


@contextmanager
def deepspeed_engine(
    module: nn.Module,
    parameters: Sequence[nn.Parameter],
    base: Base,
    section: TrainingSection,
    *,
    n_steps: int,
    first_step: int = 0,
) -> Iterator[Any]:
    """A DeepSpeed engine around ``module`` that trains ``parameters`` for ``n_steps`` optimizer steps.

    The optimizer is torch's AdamW over ``parameters`` alone, under :func:`linear_schedule`. On leaving, the
    engine's hooks are taken off the module and its buffers are freed.

    Args:
        module: called as ``engine(...)``; parameters that ask for no gradient are left alone.
        parameters: what is trained.
        base: says device and dtype.
        section: learning rate, decay, clipping, accumulation and the ``deepspeed`` section.
        n_steps: optimizer steps of the whole stage, for the schedule.
        first_step: of these, how many were done before (a stage that is continued).

    Raises:
        MilpError: the process already uses DeepSpeed on another kind of device.
    """
    deepspeed = _prepare_process(base.device)
    import torch

    optimizer = torch.optim.AdamW(
        parameters,
        lr=section.learning_rate,
        weight_decay=section.weight_decay,
        # One kernel for all tensors: five times faster on CPU than a loop over dozens of small ones.
        fused=True,
    )
    with _launcher_environment(base.device), warnings.catch_warnings():
        # ZeRO-3 calls torch.distributed by names that torch is about to change: DeepSpeed's to mend.
        warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)
        config = deepspeed_config(section, base.dtype)
        # ZeRO allocates a buffer of so many numbers, half a billion unless told; no more are ever reduced.
        config["zero_optimization"]["reduce_bucket_size"] = sum(p.numel() for p in parameters)
        with _quiet():
            if section.deepspeed.zero_stage == 3:
                _scatter(module, config, base)
            engine, *_ = deepspeed.initialize(
                model=module,
                optimizer=optimizer,
                model_parameters=list(parameters),
                lr_scheduler=lambda wrapped: torch.optim.lr_scheduler.LambdaLR(
                    wrapped, lambda step: linear_schedule(first_step + step, n_steps, section.warmup_ratio)
                ),
                config=config,
                dist_init_required=False,
            )
        _forget_warm_up(engine)
        with _taken_down(engine):
            yield engine


def _forget_modules() -> None:
    """Empty ZeRO-3's list of modules in a forward pass, on which it leaves every engine's outermost one.

    That module would keep the engine, and its part of the base, for as long as the process lives.
    """
    from deepspeed.runtime.zero import parameter_offload

    parameter_offload.FWD_MODULE_STACK.clear()


def copy_to_scatter(model: nn.Module) -> nn.Module:
    """A copy of a model for ZeRO-3 to scatter; frozen weights are shared with it until that happens.

    Scattering copies a weight's part and then lets the shared one go, weight after weight. So neither main
    memory nor the device ever holds the frozen weights a second time.
    """
    from torch import nn

    shared: dict[int, Any] = {
        id(p): nn.Parameter(p.data, requires_grad=False) for p in model.parameters() if not p.requires_grad
    }
    return copy.deepcopy(model, shared)


def _scatter(module: nn.Module, config: dict[str, Any], base: Base) -> None:
    """Leave each process its part of every weight, on the engine's device.

    ``deepspeed.initialize`` would do so, too, but would first put the whole module on the device.
    """
    from deepspeed import zero

    for parameter in module.parameters():
        parameter.data = parameter.data.to(base.dtype)
    for buffer in module.buffers():
        buffer.data = buffer.data.to(base.device)
    zero.Init(module=module, config_dict_or_path=config, dtype=base.dtype)


@contextmanager
def engine_around(module: nn.Module, optimizer: torch.optim.Optimizer, base: Base) -> Iterator[Any]:
    """A DeepSpeed engine (ZeRO 0) that steps ``optimizer`` as it is: its clipping and schedule are its own.

    The engine's hooks are taken off the module on leaving.

    Raises:
        MilpError: the process already uses DeepSpeed on another kind of device.
    """
    deepspeed = _prepare_process(base.device)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 0},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": _NEVER,
    }
    with _launcher_environment(base.device):
        with _quiet():
            engine, *_ = deepspeed.initialize(
                model=module, optimizer=optimizer, config=config, dist_init_required=False
            )
        engine.enable_backward_allreduce = False  # there is nobody to reduce with
        with _taken_down(engine):
            yield engine


@contextmanager
def _taken_down(engine: Any) -> Iterator[None]:
    """Take an engine's hooks off its module, and free its buffers, on leaving."""
    try:
        yield
    finally:
        for hook in (engine.module_forward_pre_hook, engine.module_forward_post_hook):
            if hook is not None:
                hook.remove()
        with _quiet():
            engine.destroy()
        _forget_modules()


def deepspeed_config(section: TrainingSection, dtype: torch.dtype) -> dict[str, Any]:
    """What DeepSpeed is given; clipping, accumulation and precision included."""
    import torch

    deepspeed = section.deepspeed
    zero: dict[str, Any] = {"stage": deepspeed.zero_stage}
    if deepspeed.offload_optimizer != "none":
        zero["offload_optimizer"] = {"device": deepspeed.offload_optimizer}
    if deepspeed.offload_parameters != "none":
        zero["offload_param"] = {"device": deepspeed.offload_parameters}
    return {
        # One micro-batch is one batch of sequences, whose number varies: DeepSpeed only counts with it.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": section.gradient_accumulation,
        "gradient_clipping": section.max_grad_norm,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # torch's AdamW: DeepSpeed's own compiles for a minute
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": _NEVER,
        "wall_clock_breakdown": False,
    }


def _forget_warm_up(engine: Any) -> None:
    """Set the moments and step counts that DeepSpeed leaves behind at its own start back to zero.

    In 16 bits without ZeRO it takes a step with empty gradients to allocate the moments. AdamW's bias
    correction would then be that of the second step, and the first updates several times too small.
    """
    for state in inner_optimizer(engine).state.values():
        for value in state.values():
            value.zero_()


def inner_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside DeepSpeed's wrappers: it holds the master weights and the moments."""
    optimizer = engine.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    found: torch.optim.Optimizer = optimizer
    return found


def stepped_parameters(engine: Any) -> list[torch.Tensor]:
    """The tensors that the inner optimizer steps and keeps moments of, in an order of their own.

    ZeRO-3 shows them to the optimizer during a step only and empties its groups in between.
    """
    partitions = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)
    if partitions is not None:
        return list(partitions)
    return [parameter for group in inner_optimizer(engine).param_groups for parameter in group["params"]]


def _prepare_process(device: torch.device) -> Any:
    """Import DeepSpeed for this kind of device and see that the process has a process group."""
    with accelerator_choice(device.type), _quiet():
        import deepspeed
        import torch.distributed as dist

        if not dist.is_initialized():
            # An in-memory store: no port, so processes on one machine cannot collide.
            backend = "nccl" if device.type == "cuda" else "gloo"
            excepthook = sys.excepthook
            store = dist.HashStore()  # type: ignore[attr-defined]  # public, but not in torch's stubs
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
            sys.excepthook = excepthook  # torch's own puts "[rank0]:" before every line of an error
        if not deepspeed.comm.is_initialized():
            _use_accelerator(device.type)
            # "None of DeepSpeed's compiled operators": finding out tries each compiler and library, and the
            # one that would be used compiles for 30 to 45 s, for messages between processes; there is one.
            deepspeed.ops.__compatible_ops__ = {}
            with _launcher_environment(device):
                deepspeed.init_distributed(dist_backend=None, verbose=False, auto_mpi_discovery=False)
    in_use = deepspeed.accelerator.get_accelerator().device_name()
    if in_use != device.type:
        raise MilpError(
            f"this process already runs DeepSpeed on {in_use!r} and cannot train on {device.type!r} as well; "
            "train on one kind of device a process"
        )
    return deepspeed


def _use_accelerator(kind: str) -> None:
    """Correct DeepSpeed's own choice, made when some other package imported it first."""
    from deepspeed.accelerator import get_accelerator, set_accelerator

    if get_accelerator().device_name() == kind:
        return
    if kind == "cpu":
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

        set_accelerator(CPU_Accelerator())
    elif kind == "cuda":
        from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

        set_accelerator(CUDA_Accelerator())


@contextmanager
def _launcher_environment(device: torch.device) -> Iterator[None]:
    """The variables that a launcher would set, for the time of an engine.

    They do not stay: a process started from here (a Ray worker) must not take them for its own.
    """
    import torch.distributed as dist

    variables = {
        "RANK": str(dist.get_rank()),
        "WORLD_SIZE": str(dist.get_world_size()),
        "LOCAL_RANK": str(device.index or 0),
    }
    if "MASTER_ADDR" not in os.environ:
        # Looked at and not used: the process group is there.
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    with environment(variables):
        yield


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def _quiet() -> Iterator[None]:
    """Let DeepSpeed report warnings only: its information goes to standard output, line by line."""
    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with contextlib.redirect_stdout(_Discard()):
        try:
            yield
        finally:
            logger.setLevel(level)


class _Discard:
    """A text stream that keeps nothing."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        return None
