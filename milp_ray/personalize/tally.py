"""What became of a batch's users: the counts, the failures' file, and the progress that is shown."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from milp_ray.gauges import Gauges
from milp_ray.personalize.hands import Outcome
from milp_ray.personalize.layouts.tally import LayoutTally
from milp_ray.personalize.store import hash_id
from milp_ray.progress import Progress
from milp_ray.telemetry import log_event

# Reasons that are counted by themselves; further ones, which only a broken file brings about, are one.
MOST_REASONS = 50
OTHER_REASONS = "other reasons"
# What differs between two users of the same reason: numbers, names in quotation marks.
_PARTICULARS = re.compile(r'"(?:[^"\\]|\\.)*"|\d[\d.,]*')


@dataclass(slots=True)
class BatchSummary:
    """Counts of one call: users made anew, users that were finished before, and users that failed."""

    done: int = 0
    skipped: int = 0
    failed: int = 0  # records that are no user included
    withdrawn: int = 0  # without consent: not trained, and no failure
    retried: int = 0  # users whose worker was lost or slow, and that were tried again
    steps: int = 0
    tokens: int = 0
    bytes: int = 0  # of the adapters made
    training_seconds: float = 0.0  # of all workers together
    seconds: float = 0.0  # on the clock
    peak_rss_mib: float = 0.0  # of the largest worker
    peak_gpu_mib: float | None = None  # of the GPU that held most; none on CPUs
    interrupted: bool = False
    reasons: Counter[str] = field(default_factory=Counter)  # of failures, without their particulars
    layouts: LayoutTally = field(default_factory=LayoutTally)  # of users whose layout was decided on

    @property
    def n_users(self) -> int:
        """Users that were looked at."""
        return self.done + self.skipped + self.failed + self.withdrawn

    def to_dict(self) -> dict[str, Any]:
        """The counts in plain types, the reasons with the most frequent first."""
        counts = asdict(replace(self, reasons=Counter(), layouts=LayoutTally()))
        reasons = dict(self.reasons.most_common())
        return {"n_users": self.n_users, **counts, "reasons": reasons, "layouts": self.layouts.to_dict()}


def without_particulars(reason: str) -> str:
    """A reason as it is the same for all users that fail for it: no numbers, and no ids in it."""
    return _PARTICULARS.sub("…", reason)


def count_reason(known: Counter[str], reason: str) -> None:
    """Count a user that failed: without particulars, and beyond :data:`MOST_REASONS` with all others."""
    general = without_particulars(reason)
    known[general if general in known or len(known) < MOST_REASONS else OTHER_REASONS] += 1


class Tally:
    """Counts users as they end, writes down those that fail, and shows how far the batch is.

    Use it as a context manager: ``failed_file`` then holds the failed users of this call, a line each as soon
    as it is known.
    """

    def __init__(self, failed_file: Path, bar: Progress, gauges: Gauges | None = None) -> None:
        self.summary = BatchSummary()
        self._gauges = gauges
        self._expected: int | None = None
        self._started = time.perf_counter()
        self._path = failed_file
        self._bar = bar

    def __enter__(self) -> Tally:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("w", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def skipped(self, layout: Mapping[str, Any] | None = None) -> None:
        """A user whose adapter is there already; ``layout`` is what was decided on it, if anything was."""
        self.summary.skipped += 1
        self.summary.layouts.add(layout)
        self._show(worked=False)

    def withdrawn(self) -> None:
        """A user without consent."""
        self.summary.withdrawn += 1
        self._show(worked=False)

    def failed(
        self, user_id: str | None, error: str, reason: str, *, attempts: int = 0, place: str | None = None
    ) -> None:
        """A user that gets no adapter, and why; ``place`` is the file and line of a record that is no user.

        Args:
            user_id: ``None`` where it could not be read.
            error: the class of what went wrong.
            reason: a sentence without anything of the user's text.
            attempts: how often it was tried.
            place: as above.
        """
        self.summary.failed += 1
        count_reason(self.summary.reasons, reason)
        line: dict[str, Any] = {"user_id": user_id, "error": error, "reason": reason, "attempts": attempts}
        if place is not None:
            line["place"] = place
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self._show(worked=attempts > 0)
        user = None if user_id is None else hash_id(user_id)
        log_event("user_failed", user=user, error=error, attempts=attempts, place=place)

    def ended(self, outcome: Outcome) -> None:
        """A user that a worker was given."""
        summary = self.summary
        summary.retried += outcome.attempts > 1
        if outcome.failed:
            self.failed(outcome.key, str(outcome.error), str(outcome.reason), attempts=outcome.attempts)
            return
        made: Mapping[str, Any] = outcome.value
        summary.done += 1
        summary.steps += made["steps"]
        summary.tokens += made["tokens"]
        summary.bytes += made["bytes"]
        summary.training_seconds += made["seconds"]
        summary.layouts.add(made.get("layout"))
        summary.peak_rss_mib = max(summary.peak_rss_mib, made["peak_rss_mib"])
        if (on_gpu := made["peak_gpu_mib"]) is not None:
            summary.peak_gpu_mib = max(summary.peak_gpu_mib or 0.0, on_gpu)
        self._show(worked=True)
        user, seconds = hash_id(outcome.key), round(outcome.seconds, 3)
        log_event(
            "adapter_made", user=user, worker=outcome.worker, seconds=seconds, attempts=outcome.attempts
        )

    def expect(self, total: int | None) -> None:
        """Say how many users there will probably be."""
        if total is not None:
            self._expected = max(total, self.summary.n_users)
            self._bar.set_total(self._expected)

    def _tell_gauges(self) -> None:
        if self._gauges is None:
            return
        summary, seconds = self.summary, max(1e-3, time.perf_counter() - self._started)
        self._gauges.set(
            summary.n_users,
            users_expected=self._expected,
            users_finished=summary.done + summary.skipped,
            users_failed=summary.failed,
            users_per_minute=60.0 * summary.done / seconds,
            tokens_per_second=summary.tokens / seconds,
            worker_memory_mib=summary.peak_rss_mib or None,
            gpu_memory_mib=summary.peak_gpu_mib,
        )

    def _show(self, *, worked: bool) -> None:
        counts = {
            "finished before": self.summary.skipped,
            "without consent": self.summary.withdrawn,
            "failed": self.summary.failed,
        }
        note = ", ".join(f"{n} {what}" for what, n in counts.items() if n)
        self._bar.advance(note=note, worked=worked)
        self._tell_gauges()
