"""Which device a base lies on, in which precision, and how much of the device is this process's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from milp_ray.errors import MilpError

if TYPE_CHECKING:
    import torch

_DTYPES = ("float32", "bfloat16", "float16")
_USE_DEVICES = "use 'auto', 'cpu', 'cuda' or 'cuda:1'"


def device_of(name: str) -> str:
    """``base.device`` as torch's name of a device, "auto" decided.

    Raises:
        MilpError: it is none that a base can be trained on, or it is not there.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        asked = torch.device(name)
    except RuntimeError as error:
        raise MilpError(f"base.device {name!r} is no device; {_USE_DEVICES}") from error
    if asked.type not in ("cpu", "cuda") or (asked.type == "cpu" and asked.index):
        raise MilpError(f"base.device {name!r} is no device that a base can be trained on; {_USE_DEVICES}")
    if asked.type == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        raise MilpError(f"base.device is {name!r}, but torch sees no CUDA device; use 'cpu' or 'auto'")
    n_devices = torch.cuda.device_count()
    if asked.index is not None and asked.index >= n_devices:
        raise MilpError(
            f"base.device is {name!r}, but the last CUDA device that torch sees is 'cuda:{n_devices - 1}'; "
            "use that one, an earlier one, or 'auto'"
        )
    return name


def dtype_of(name: str, device: str) -> torch.dtype:
    """``base.dtype`` on a device, "auto" decided.

    Raises:
        MilpError: it is none of those that are known.
    """
    import torch

    if name == "auto":
        return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    if name not in _DTYPES:
        raise MilpError(f"base.dtype {name!r}: use 'auto' or one of {list(_DTYPES)}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def take_share(device: str, share: float) -> float:
    """Let this process allocate ``share`` of a GPU's memory at most; gives what share it has of the device.

    Processes that share a GPU do not see each other's memory grow: without a limit each would fill what was
    free when it began.
    """
    import torch

    asked = torch.device(device)
    if share >= 1.0 or asked.type != "cuda":
        return 1.0
    torch.cuda.set_per_process_memory_fraction(share, asked.index)
    return share
