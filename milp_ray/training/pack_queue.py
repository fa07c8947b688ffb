"""Jobs that wait for slots of a pack, and how many slots a rack of theirs may have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from milp_ray.memory.layout import CanonicalLayout
    from milp_ray.training.job import Job
    from milp_ray.training.rack import Rack

Waiting = tuple["Job", int | None]  # and the epoch at which it pauses


class PackQueue:
    """Jobs in the order in which they get slots.

    A rack is as wide as its layout's jobs could use, since one that is too narrow would hold them up to the
    last. What is bounded is how many there are at a time: racks have two slots a job that is trained at most,
    so that the next layout can begin while the last jobs of the one before it end.
    """

    def __init__(self) -> None:
        self._waiting: list[Waiting] = []
        self._unfinished: Counter[CanonicalLayout] = Counter()  # jobs that have a slot, too

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def jobs(self) -> list[Job]:
        """Those that wait."""
        return [job for job, _ in self._waiting]

    def add(self, jobs: Iterable[Job], until_epoch: int | None) -> None:
        """Let jobs wait behind the others."""
        for job in jobs:
            self._waiting.append((job, until_epoch))
            self._unfinished[job.layout] += 1

    def take_out(self, job_ids: Collection[str]) -> list[Job]:
        """Forget jobs that wait; the caller says of each that it is finished."""
        gone = [job for job in self.jobs if job.job_id in job_ids]
        self._waiting = [entry for entry in self._waiting if entry[0].job_id not in job_ids]
        return gone

    def put_back(self, entry: Waiting) -> None:
        """A job could not get its slot now: it is the first again."""
        self._waiting.insert(0, entry)

    def finished(self, job: Job) -> bool:
        """A job needs no slot any more; whether it was the last one of its layout."""
        self._unfinished[job.layout] -= 1
        return not self._unfinished[job.layout]

    def is_waited_for(self, layout: CanonicalLayout) -> bool:
        """Whether jobs of a layout have slots or wait for them."""
        return bool(self._unfinished[layout])

    def n_slots(self, layout: CanonicalLayout, size: int) -> int:
        """Of a new rack, in a pack of ``size``: as many as jobs of the layout could use."""
        return max(1, min(size, self._unfinished[layout]))

    def next(self, racks: Mapping[CanonicalLayout, Rack], size: int) -> Waiting | None:
        """Take the first that finds a free slot in its layout's rack, or room for a rack."""
        in_use = sum(rack.n_slots for layout, rack in racks.items() if self.is_waited_for(layout))
        for i, (job, _) in enumerate(self._waiting):
            rack = racks.get(job.layout)
            if rack is None:
                has_room = not in_use or in_use + self.n_slots(job.layout, size) <= 2 * size
            else:
                has_room = bool(rack.free)
            if has_room:
                return self._waiting.pop(i)
        return None

    def first_layout(self) -> CanonicalLayout:
        """The layout of the job that begins first; one must be waiting."""
        return self._waiting[0][0].layout
