"""Processes that a test has started, Ray's among them."""

from __future__ import annotations

import signal
import subprocess
from typing import Any

import psutil


def kill_family(process: subprocess.Popen[Any]) -> None:
    """SIGKILL a process and all that it has started, and wait for it."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        try:
            member.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    process.wait()
