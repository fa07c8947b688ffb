"""How fast a device is: published peaks, and what share of them training is assumed to reach.

The peaks are of dense matrix products, from NVIDIA's data sheets of the SXM modules (A100 80GB, H100, H200).
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace

from milp_ray.errors import MilpError


@dataclass(frozen=True, slots=True)
class Device:
    """One device; for a CPU, one core.

    ``peak`` and ``peak_float32`` are FLOP/s in bfloat16 and float32, ``bandwidth`` bytes/s from its memory,
    ``memory`` bytes. ``share`` is what part of the peak training is assumed to reach, and ``layer_seconds``
    what one layer's forward and backward cost beside their arithmetic (launches, Python): it is what small
    models spend most of their time on.
    """

    name: str
    peak: float
    peak_float32: float
    bandwidth: float
    memory: int
    share: float
    layer_seconds: float
    is_gpu: bool = True

    def flops(self, dtype_bytes: int) -> float:
        """Peak for numbers of so many bytes."""
        return self.peak if dtype_bytes < 4 else self.peak_float32

    def training_seconds(self, flops: float, layer_passes: float, dtype_bytes: int, portion: float) -> float:
        """Expected seconds of training with ``portion`` of the device to itself.

        ``layer_passes`` is layers × forward-and-backward passes.
        """
        return flops / (self.share * self.flops(dtype_bytes) * portion) + layer_passes * self.layer_seconds

    def decoding_seconds(
        self, flops: float, layer_passes: float, weight_bytes: float, dtype_bytes: int, portion: float
    ) -> float:
        """Expected seconds of generation: ``weight_bytes`` are read from memory in all, which often decides.

        A forward pass alone costs about a third of what one with its backward pass does.
        """
        arithmetic = flops / (self.share * self.flops(dtype_bytes) * portion)
        reading = weight_bytes / (_BANDWIDTH_SHARE * self.bandwidth * portion)
        return max(arithmetic, reading) + layer_passes * self.layer_seconds / 3


# Assumed, of the peak: users' batches are smaller than those of pretraining, and the gradient of a frozen map
# is the same kind of product. experiments/benchmarks/training.py prints the share that a machine reaches.
_GPU_SHARE = 0.35
_CPU_SHARE = 0.25
_BANDWIDTH_SHARE = 0.6
# Assumed, not measured: what launching a layer's kernels costs, forward and backward.
_GPU_LAYER_SECONDS = 1.5e-3
# Measured on one core with the embedded base; `milp-ray estimate experiments/demo.yaml` beside what the demo
# prints shows how well it fits.
_CPU_LAYER_SECONDS = 3.75e-3
_GIB = 2**30

DEVICES = {
    "a100": Device("A100 80GB", 312e12, 19.5e12, 2.04e12, 80 * _GIB, _GPU_SHARE, _GPU_LAYER_SECONDS),
    "h100": Device("H100", 989e12, 67e12, 3.35e12, 80 * _GIB, _GPU_SHARE, _GPU_LAYER_SECONDS),
    "h200": Device("H200", 989e12, 67e12, 4.8e12, 141 * 10**9, _GPU_SHARE, _GPU_LAYER_SECONDS),
    # A core of some 3 GHz with 16 float32 multiply-adds a cycle; without hardware for bfloat16.
    "cpu": Device("CPU core", 96e9, 96e9, 10e9, 0, _CPU_SHARE, _CPU_LAYER_SECONDS, is_gpu=False),
}


def device(name: str, *, peak: float | None = None, share: float | None = None) -> Device:
    """One of :data:`DEVICES`, with another peak (FLOP/s) or share where they are given.

    Raises:
        MilpError: there is no such device, or a number is out of its range.
    """
    found = DEVICES.get(name.lower())
    if found is None:
        raise MilpError(
            f"device {name!r} is not known; use one of {', '.join(DEVICES)}, with --flops for another's peak"
        )
    if peak is not None:
        if not 0 < peak < float("inf"):
            raise MilpError(f"a peak of {peak:g} FLOP/s: give a number above 0, for example 150e12")
        found = replace(found, name=f"{found.name} at {peak:.3g} FLOP/s", peak=peak, peak_float32=peak)
    if share is not None:
        if not 0 < share <= 1:
            raise MilpError(f"a share of {share:g} of the peak: give a number above 0 and up to 1")
        found = replace(found, share=share)
    return found


def cpu_memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def measured_peak(*, on_gpu: bool, dtype_bytes: int, seconds: float = 0.5) -> float:
    """FLOP/s of large matrix products on this machine, one thread of it on a CPU: a ceiling for training.

    Raises:
        MilpError: a GPU is meant, and torch sees none.
    """
    import torch

    if on_gpu and not torch.cuda.is_available():
        raise MilpError(
            "--measure for a GPU, but torch sees no CUDA device; leave --measure out, or use --flops"
        )
    size, dtype = (8192, torch.bfloat16) if on_gpu else (512, torch.float32)
    if on_gpu and dtype_bytes == 4:
        dtype = torch.float32
    n_threads = torch.get_num_threads()
    if not on_gpu:
        torch.set_num_threads(1)
    try:
        a = torch.randn(size, size, dtype=dtype, device="cuda" if on_gpu else "cpu")
        best, deadline = 0.0, time.perf_counter() + seconds
        while time.perf_counter() < deadline or best == 0.0:
            best = max(best, _product_flops(a, on_gpu))
        return best
    finally:
        torch.set_num_threads(n_threads)


def _product_flops(a: object, on_gpu: bool) -> float:
    """FLOP/s of four products of a square matrix with itself."""
    import torch

    assert isinstance(a, torch.Tensor)
    if on_gpu:
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(4):
        a @ a
    if on_gpu:
        torch.cuda.synchronize()
    return float(4 * 2 * a.shape[0] ** 3 / (time.perf_counter() - started))
