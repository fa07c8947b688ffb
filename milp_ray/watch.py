"""``milp-ray watch``: what a run does now, again and again, here or on a cluster.

All that is shown is in two small files of the run folder, which the run keeps up to date: ``status.json``
(:mod:`milp_ray.run_status`) and ``gauges.json`` (:mod:`milp_ray.gauges`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from milp_ray.errors import MilpError
from milp_ray.gauges import read_gauges
from milp_ray.run_status import RunStatus, read_status

if TYPE_CHECKING:
    from milp_ray.rundir import RunFolder


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A run at one moment: its status, and its gauges by name without their prefix."""

    run: str
    status: RunStatus
    gauges: Mapping[str, float]

    @property
    def has_ended(self) -> bool:
        """Whether nothing will change any more."""
        return self.status.state != "running"

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return {"run": self.run, "status": asdict(self.status), "gauges": dict(self.gauges)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Snapshot:
        """What :meth:`to_dict` gave."""
        return cls(values["run"], RunStatus(**values["status"]), values["gauges"])


class Lines:
    """Snapshots out of a job's output, which comes in pieces and has other lines in it, too.

    Args:
        take: called with every snapshot.
    """

    def __init__(self, take: Callable[[Snapshot], Any]) -> None:
        self.last_remark = ""  # the last line that was no snapshot
        self._take = take
        self._begun = ""

    def write(self, text: str) -> None:
        """The next piece."""
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            if line.startswith('{"run":'):
                self._take(Snapshot.from_dict(json.loads(line)))
            elif line.strip():
                self.last_remark = line.strip()


def snapshot(run: RunFolder) -> Snapshot:
    """A run as its folder tells.

    Raises:
        MilpError: no command was recorded on it, or a file was damaged.
    """
    status = read_status(run)
    if status is None:
        raise MilpError(f"{run.place}: no command was recorded on this run yet; `milp-ray run` is")
    return Snapshot(run.path.name, status, read_gauges(run))


def snapshots(run: RunFolder, every: float) -> Iterator[Snapshot]:
    """A run every so many seconds, until its command has ended; the last one is of the end."""
    while True:
        now = snapshot(run)
        yield now
        if now.has_ended:
            return
        time.sleep(every)
        run.refresh()
