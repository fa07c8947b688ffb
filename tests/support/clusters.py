"""A Ray cluster of several nodes on this machine, and processes that work while something goes wrong."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from milp_ray.environment import environment
from support.processes import kill_family

STORE = 80 << 20  # bytes of a node's object store: about the least that Ray takes
_PATIENCE = 240.0  # seconds after which a test says that what it waits for does not come


class Nodes:
    """A head without CPUs, and nodes that come and go; each is a raylet with processes of its own."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "include_dashboard": False, **_of_a_node()}
        self._cluster: Any = _patiently(lambda: Cluster(initialize_head=True, head_node_args=head))
        self.address: str = self._cluster.address

    def add(self, num_cpus: float = 1) -> Any:
        """Add a node and wait until the cluster knows it."""
        return _patiently(lambda: self._cluster.add_node(num_cpus=num_cpus, **_of_a_node()))

    def kill(self, node: Any) -> None:
        """SIGKILL to every process of a node at once, as if its machine had lost its power."""
        raylet = _raylet(node)
        for process in [raylet, *raylet.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        node.all_processes["raylet"][0].process.wait()

    def workers(self, node: Any, *names: str) -> list[psutil.Process]:
        """Processes on a node whose name, as Ray shows it to the system, contains one of ``names``."""
        children = _raylet(node).children(recursive=True)
        return [child for child in children if any(name in _title(child) for name in names)]

    def close(self) -> None:
        """End every process of the cluster, the stopped ones too."""
        for node in [*self._cluster.worker_nodes, self._cluster.head_node]:
            if node is not None and "raylet" in node.all_processes:
                with suppress(psutil.NoSuchProcess):
                    self.kill(node)
        self._cluster.shutdown()


def _of_a_node() -> dict[str, Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {"object_store_memory": STORE, "dashboard_agent_listen_port": port}


def _patiently(start: Callable[[], Any], attempts: int = 4) -> Any:
    """On a busy machine a raylet may give up on its helpers, and Ray on the raylet: once more, then."""
    for attempt in range(1, attempts + 1):
        try:
            return start()
        except Exception as error:
            if attempt == attempts or "timed out during startup" not in str(error):
                raise


def _raylet(node: Any) -> psutil.Process:
    [raylet] = node.all_processes["raylet"]
    return psutil.Process(raylet.process.pid)


def _title(process: psutil.Process) -> str:
    try:
        words = process.cmdline()
    except psutil.NoSuchProcess:
        return ""
    return words[0] if words and words[0].startswith("ray::") else ""


@contextmanager
def own_ray_folder() -> Iterator[None]:
    """Ray's files in a folder of their own, its name short enough for sockets: nobody else joins it."""
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:
        # A raylet ends itself where its helpers are not there in time, as on a busy machine.
        patience = {"RAY_agent_register_timeout_ms": "300000"}
        with environment({"RAY_TMPDIR": folder, **patience}):
            yield


class Driver:
    """A Python process on a cluster, and what it prints as it comes, each line with its time."""

    def __init__(self, *arguments: object, address: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "RAY_ADDRESS": address, "MILP_LOG": "json"},
        )
        self._lines: list[str] = []
        self._events: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def events(self, kind: str) -> list[dict[str, Any]]:
        """What it has logged of a kind so far; ``at`` is when, in seconds since 1970."""
        return [event for event in list(self._events) if event.get("event") == kind]

    def wait_for(self, condition: Callable[[], object], seconds: float = _PATIENCE) -> None:
        """Wait until something is so, while the process works."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"it ended with {self.process.returncode}:\n{self.told}"
            assert time.monotonic() < deadline, f"nothing after {seconds:.0f} s:\n{self.told}"
            time.sleep(0.02)

    def result(self, seconds: float = _PATIENCE) -> int:
        """Wait for its end; its exit code."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it works still after {seconds:.0f} s:\n{self.told}") from None
        self._reader.join(10)
        return code

    def kill(self) -> None:
        """SIGKILL to it and what it has started."""
        if self.process.poll() is None:
            kill_family(self.process)

    @property
    def told(self) -> str:
        """All that it has printed."""
        return "".join(self._lines)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.append(line)
            if line.startswith("{"):
                with suppress(ValueError):
                    self._events.append({**json.loads(line), "at": time.time()})


class Throttled:
    """Processes that get a share of the time only: SIGSTOP and SIGCONT by turns.

    Args:
        processes: says which, anew at each turn, since others may have come.
        share: of the time in which they may work; 0: they are stopped for good.
    """

    def __init__(self, processes: Callable[[], list[psutil.Process]], share: float) -> None:
        self._processes, self._share = processes, share
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._alternate, daemon=True)

    def __enter__(self) -> Throttled:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _alternate(self, period: float = 0.5) -> None:
        while not self._is_over.is_set():
            _send(self._processes(), signal.SIGSTOP)
            self._is_over.wait(period * (1 - self._share))
            if self._share:
                _send(self._processes(), signal.SIGCONT)
                self._is_over.wait(period * self._share)


def _send(processes: list[psutil.Process], number: int) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def trial_ends(journal: Path) -> dict[int, float]:
    """Trial → when it was completed, in seconds since 1970."""
    from milp_ray.search.journal import read_events
    from milp_ray.search.timeline import event_times

    events = read_events(journal)
    found: dict[int, float] = {}
    for event, at in zip(events, event_times(events), strict=True):
        if event["event"] == "trial_completed":
            assert event["index"] not in found, f"trial {event['index']} was completed twice"
            found[event["index"]] = at
    return found
