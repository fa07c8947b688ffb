"""The most memory that this process has held, of the machine and of its GPU."""

from __future__ import annotations

import resource
import sys

import torch

_MIB = 2**20


def peak_rss_mib() -> float:
    """Largest resident memory of this process so far; Linux counts KiB, macOS bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (_MIB if sys.platform == "darwin" else 2**10)


def peak_gpu_mib() -> float | None:
    """Most memory that torch has held for tensors on a GPU so far; ``None``: this process uses none."""
    if not torch.cuda.is_initialized():
        return None
    return max(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())) / _MIB
