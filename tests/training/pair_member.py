"""One process of a group that a test starts: joins it and does what it is told, until it is told nothing.

    python pair_member.py RANK SIZE SOCKET STORE

SOCKET is where the test listens, STORE the file through which the processes find each other.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import signal
import sys
from functools import lru_cache
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from milp_ray.config.base import BaseSection
from milp_ray.config.prompt import PromptSection
from milp_ray.training import stages
from milp_ray.training.adapters import save_adapter
from milp_ray.training.base import Base, load_base
from milp_ray.training.train import Job, train, train_until


class Killed(Exception):
    """Stands for the end of every process at once."""


@lru_cache
def base_at(folder: str, dtype: str) -> Base:
    return load_base(BaseSection(model=folder, device="cpu", dtype=dtype))


def digest(base: Base) -> str:
    """Hash of the base's weights and of what a job could leave behind on it."""
    sha = hashlib.sha256()
    for name, tensor in sorted(base.model.state_dict().items()):
        sha.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    for name, module in base.model.named_modules():
        hooks = [len(getattr(module, kind)) for kind in ("_forward_hooks", "_forward_pre_hooks")]
        sha.update(f"{name} {type(module).__name__} {module.training} {hooks}".encode())
    return sha.hexdigest()


def run_job(
    folder: str,
    job: Job,
    section: Any,
    *,
    dtype: str = "float32",
    until: int | None = None,
    kill_at_step: int | None = None,
    sigkill_rank: int | None = None,
    save_to: Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train, and tell all that a test may ask about it."""
    base = base_at(folder, dtype)
    before = digest(base)
    told: list[int] = []
    step, numbers = stages.JobTraining._step, itertools.count(1)

    def dies(self: Any, engine: Any, window: Any) -> torch.Tensor:
        if next(numbers) == kill_at_step:
            if sigkill_rank is not None:
                if sigkill_rank == dist.get_rank():
                    os.kill(os.getpid(), signal.SIGKILL)
            else:
                raise Killed
        return step(self, engine, window)

    options["on_progress"] = lambda _, done, __: told.append(done)
    known: dict[str, Any] = {}
    with patch.object(stages.JobTraining, "_step", dies):
        try:
            if until is not None:
                [part] = train_until(base, [job], section, PromptSection(), epoch=until, **options)
                known["paused"] = part
            else:
                [result] = train(base, [job], section, PromptSection(), **options)
                adapter = result.adapter
                known["loss"] = result.validation_loss
                known["curve"] = result.curve
                known["steps"], known["tokens"] = result.steps, result.tokens
                if adapter is not None:
                    known["tensors"] = {name: t.numpy() for name, t in adapter.tensors.items()}
                    if save_to is not None and dist.get_rank() == 0:
                        save_adapter(adapter, save_to)
        except Killed:
            known["killed"] = True
    return known | {"told": told, "untouched": digest(base) == before}


def main() -> None:
    rank, size, socket, store = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=int(size))
    with Client(socket) as connection:
        connection.send(int(rank))
        while (arguments := connection.recv()) is not None:
            try:
                connection.send(run_job(**arguments))
            except Exception as error:
                connection.send(error)


if __name__ == "__main__":
    main()
