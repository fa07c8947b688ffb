"""Where a job stands after an epoch, in one file that is whole or not there.

The file is safetensors: weights, moments and the generator's state as tensors, everything else as JSON in
its header. It is continued only by the very same job: ``fingerprint`` says what the job was made from.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

_KEY = "progress"
Tensors = dict[str, "torch.Tensor"]


@dataclass
class Progress:
    """How far a job is: ``epoch`` epochs of stage ``stage`` are done.

    ``best_loss`` and ``n_worse`` are early stopping's; ``curve`` has one entry an epoch.
    """

    fingerprint: str
    stage: int = 0
    epoch: int = 0
    steps: int = 0
    stage_steps: int = 0
    tokens: int = 0
    best_loss: float | None = None
    n_worse: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)

    def begin_stage(self, stage: int) -> None:
        """Count epochs, steps and early stopping's losses of another stage from nothing."""
        self.stage = stage
        self.epoch = self.stage_steps = self.n_worse = 0
        self.best_loss = None


class Checkpoint(Protocol):
    """Where one job is kept."""

    def write(self, progress: Progress, tensors: Tensors) -> None:
        """Replace what was kept."""

    def read(self, fingerprint: str) -> tuple[Progress, Tensors] | None:
        """What was written last, or ``None`` if nothing was or it belongs to a job made from other things."""


class KeptJobs:
    """Jobs that pause, in this process's memory: nothing of a user reaches a disk, and a kill forgets all."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[Progress, Tensors]] = {}

    def forget(self, job_id: str) -> None:
        """Nobody goes on with a job."""
        self.found.pop(job_id, None)


@dataclass(frozen=True, slots=True)
class _InMemory:
    """The checkpoint of one of :class:`KeptJobs`."""

    kept: KeptJobs
    job_id: str

    def write(self, progress: Progress, tensors: Tensors) -> None:
        # The tensors are copies already; the progress is the job's own, which goes on.
        self.kept.found[self.job_id] = copy.deepcopy(progress), dict(tensors)

    def read(self, fingerprint: str) -> tuple[Progress, Tensors] | None:
        progress, tensors = self.kept.found.get(self.job_id, (None, {}))
        if progress is None or progress.fingerprint != fingerprint:
            return None
        return copy.deepcopy(progress), dict(tensors)

    def remove(self) -> None:
        self.kept.forget(self.job_id)


def checkpoint_at(place: Path | KeptJobs, job_id: str) -> CheckpointFile | _InMemory:
    """Where a job is kept, in a folder or in memory."""
    return _InMemory(place, job_id) if isinstance(place, KeptJobs) else CheckpointFile(place, job_id)


class CheckpointFile:
    """The checkpoint of one job in a folder that many jobs share."""

    def __init__(self, folder: Path, job_id: str) -> None:
        # Job ids hold user ids, which may hold anything: slashes, "..", text that must not be seen.
        name = hashlib.sha256(job_id.encode()).hexdigest()[:32]
        self.path = folder / f"{name}.safetensors"

    def write(self, progress: Progress, tensors: Tensors) -> None:
        """Replace the checkpoint, on disk before it counts."""
        from safetensors.torch import save_file

        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(f".{os.getpid()}.part")
        save_file(tensors, part, metadata={_KEY: json.dumps(asdict(progress))})
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, self.path)

    def read(self, fingerprint: str) -> tuple[Progress, Tensors] | None:
        """What was written last, or ``None`` if nothing was or it belongs to a job made from other things."""
        from safetensors import SafetensorError, safe_open

        if not self.path.is_file():
            return None
        try:
            with safe_open(self.path, framework="pt", device="cpu") as file:
                progress = Progress(**json.loads(file.metadata()[_KEY]))
                if progress.fingerprint != fingerprint:
                    return None
                return progress, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError):
            return None  # damaged or of another version: the job starts anew

    def remove(self) -> None:
        """The job is done."""
        self.path.unlink(missing_ok=True)


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Sequence[torch.Tensor]) -> Tensors:
    """Copies of the parameters that an optimizer steps (master weights, under ZeRO) and of its moments."""
    tensors: Tensors = {}
    for i, parameter in enumerate(parameters):
        tensors[f"optimizer.{i}.weights"] = parameter.detach().cpu().clone().contiguous()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{i}.state.{key}"] = value.detach().cpu().clone().contiguous()
    return tensors


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Sequence[torch.Tensor], tensors: Tensors
) -> None:
    """Put back what :func:`optimizer_tensors` gave of an optimizer and parameters made the same way."""
    import torch

    is_fused = any(group.get("fused") for group in optimizer.param_groups)
    for i, parameter in enumerate(parameters):
        head = f"optimizer.{i}."
        with torch.no_grad():
            parameter.copy_(tensors[head + "weights"])
        states = {n: t for n, t in tensors.items() if n.startswith(head + "state.")}
        for name, value in states.items():
            key = name.removeprefix(head + "state.")
            # AdamW counts its steps on the CPU, unless its kernel is a fused one.
            on_device = key != "step" or is_fused
            optimizer.state[parameter][key] = value.to(parameter.device if on_device else "cpu")
