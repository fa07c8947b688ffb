"""How this process is told from all others, also those of containers that look alike."""

from __future__ import annotations

import os
import secrets
import socket
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from milp_ray.errors import MilpError

# Containers may be alike in their host's name and in the process's number.
_PROCESS = secrets.token_hex(8)
# Two processes may reckon differently when the machine was started, from which a process's begin is told.
_SECONDS_APART = 2.0


def this_process() -> dict[str, Any]:
    """This process, in plain types.

    Returns:
        ``host``; ``machine``, within which process numbers mean the same, empty where the system does not
        say; ``pid``; ``process``, a random name; and ``began``, in Unix seconds.
    """
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "process": _PROCESS,
        "began": _began(os.getpid()),
    }


@cache
def _machine() -> str:
    """The system since its last start, and the namespace of process numbers in it: a container's own."""
    try:
        started = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{started}-{Path('/proc/self/ns/pid').stat().st_ino}"
    except (OSError, UnicodeDecodeError):
        return ""


@cache
def _began(pid: int) -> float:
    """Read once: the machine's clock may be set while the process works."""
    return round(float(psutil.Process(pid).create_time()), 2)


def send_signal(to: dict[str, Any], number: int) -> None:
    """Signal a process of this machine, as :func:`this_process` described it there.

    Raises:
        MilpError: it has ended, its number is another process's by now, or it is another user's.
    """
    try:
        process = psutil.Process(int(to["pid"]))
        if abs(process.create_time() - float(to["began"])) > _SECONDS_APART:
            raise MilpError(f"process {to['pid']} is another one by now: nothing was stopped")
        process.send_signal(number)
    except psutil.NoSuchProcess:
        raise MilpError(
            f"process {to['pid']} does not exist on this machine: it has ended, or works in a container; "
            "stop it there"
        ) from None
    except psutil.AccessDenied:
        raise MilpError(f"process {to['pid']} may not be stopped by this user; ask who started it") from None
