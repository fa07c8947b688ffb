"""The dashboard of a cluster that Ray's launcher brought up, reached through ssh by its launcher file."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from milp_ray.errors import MilpError

_OPEN_SECONDS = 120.0  # that ssh and a busy head node may take
_LOOK_SECONDS = 0.5
_AGAIN_SECONDS = 5.0  # after a lost connection
_STOP_SECONDS = 10.0
# Where `ray` keeps the token of clusters that want one.
_TOKEN = Path("~/.ray/auth_token")


@contextmanager
def dashboard_of(cluster: Path) -> Iterator[str]:
    """The dashboard's address on this machine, as long as the block runs.

    A connection that is lost is renewed. Where this machine has a token it is shown, as the clusters of
    ``cluster/`` want it.

    Args:
        cluster: a file of Ray's launcher.

    Raises:
        MilpError: there is no such file, or no dashboard behind it.
    """
    if not cluster.is_file():
        raise MilpError(f"{cluster}: there is no such file; cluster/ holds examples for Ray's launcher")
    if _TOKEN.expanduser().is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    port = _free_port()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        forward = _Forward(cluster, port, output)
        try:
            forward.wait_until_open()
            yield f"http://127.0.0.1:{port}"
        finally:
            forward.close()


class _Forward:
    """`ray dashboard`, started again whenever it ends."""

    def __init__(self, cluster: Path, port: int, output: IO[str]) -> None:
        self._cluster = cluster
        self._port = port
        self._output = output
        self._stop = threading.Event()
        self._process = self._start()
        self._thread = threading.Thread(target=self._keep_open, name="tunnel", daemon=True)

    def wait_until_open(self) -> None:
        """Wait for the first answer of the dashboard."""
        deadline = time.monotonic() + _OPEN_SECONDS
        while not _answers(self._port):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise MilpError(
                    f"no dashboard could be reached by {self._cluster} ({self._said()}); is the cluster up? "
                    f"`ray up {self._cluster}` starts it, `ray exec {self._cluster} 'ray status'` looks at it"
                )
            time.sleep(_LOOK_SECONDS)
        self._thread.start()

    def close(self) -> None:
        """End it, ssh included."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)

    def _start(self) -> subprocess.Popen[str]:
        ray = [sys.executable, "-m", "ray.scripts.scripts"]
        return subprocess.Popen(
            [*ray, "dashboard", str(self._cluster), "--port", str(self._port)],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # a Ctrl-C here is for the command, which may still have to ask something
        )

    def _keep_open(self) -> None:
        while not self._stop.wait(_LOOK_SECONDS):
            if self._process.poll() is not None and not self._stop.wait(_AGAIN_SECONDS):
                self._process = self._start()

    def _said(self) -> str:
        self._output.seek(0)
        lines = [line.strip() for line in self._output.read().splitlines() if line.strip()]
        return lines[-1][:300] if lines else "nobody answers"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(port: int) -> bool:
    """Whether a dashboard answers, if only that it wants a token."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/version", timeout=10):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
