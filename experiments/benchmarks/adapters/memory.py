"""The most memory that a side holds beside what was there before it."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from milp_ray.resident_memory import peak_memory, tree_mib

_MIB = 2**20
_INTERVAL = 0.5  # seconds between samples on a CPU; a sample takes some milliseconds


@dataclass
class Growth:
    """MiB above the beginning."""

    mib: float = 0.0


@contextmanager
def memory_growth(device: torch.device) -> Iterator[Growth]:
    """On a GPU torch's own count, on a CPU samples of the process; known when the block is left."""
    growth = Growth()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / _MIB
        yield growth
        growth.mib = torch.cuda.max_memory_allocated() / _MIB - before
        return
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # what the side before has freed goes back to the system
    before = tree_mib()
    with peak_memory(_INTERVAL) as peak:
        yield growth
    growth.mib = peak.mib - before
