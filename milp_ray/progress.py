"""One progress display for every stage: a bar on a terminal, a few plain lines anywhere else."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

PLAIN_INTERVAL_SECONDS = 15.0  # between two lines of a log; the last one comes in any case
_PACE_SECONDS = 120.0  # over which a pace is measured


class Progress(Protocol):
    """Where a stage says how far it is."""

    def advance(self, n: int = 1, note: str | None = None, *, worked: bool = True) -> None:
        """Count ``n`` more; ``note`` is a short remark shown from now on, such as "2 failed".

        ``worked`` is false where there was nothing to do for them, so that they say nothing about the pace.
        """

    def set_total(self, total: int) -> None:
        """Say how many there are in all, where that was not known at the start."""


@contextmanager
def progress(
    label: str,
    total: int | None = None,
    *,
    unit: str = "",
    file: TextIO | None = None,
    interval: float = PLAIN_INTERVAL_SECONDS,
    pace: bool = False,
) -> Iterator[Progress]:
    """Show the progress of one stage.

    Args:
        label: the stage, such as "personalize".
        total: how many there are to do; ``None`` while it is not known.
        unit: what is counted, such as "users".
        file: standard output unless another stream is given; a bar is drawn only where it is a terminal.
        interval: seconds between plain lines.
        pace: show how many a minute it were of late, and how long the others will take at that rate.
    """
    stream = file or sys.stdout
    rate = _Pace(unit) if pace else None
    if not stream.isatty():
        plain = _PlainProgress(label, total, unit, stream, interval, rate)
        try:
            yield plain
        finally:
            plain.close()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as RichBar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        *((TextColumn("left"), TimeRemainingColumn()) if rate is None else ()),
        TextColumn("{task.fields[note]}"),
    )
    with RichBar(*columns, console=Console(file=stream)) as bar:
        yield _BarProgress(bar, bar.add_task(label, total=total, note=""), rate)


class _Pace:
    """How many a minute were worked on of late, so that workers that come or go show soon."""

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._worked = 0
        self._samples = deque([(time.monotonic(), 0)])  # (second, worked on until then), a second apart

    def advance(self, n: int) -> None:
        self._worked += n
        now = time.monotonic()
        if now - self._samples[-1][0] >= 1.0:
            self._samples.append((now, self._worked))
        while len(self._samples) > 2 and now - self._samples[1][0] > _PACE_SECONDS:
            self._samples.popleft()

    def text(self, left: int | None) -> str:
        """Such as ``77 users a minute, 3 min left``; nothing before there is a second to go by."""
        since, before = self._samples[0]
        seconds = time.monotonic() - since
        if seconds < 1.0 or self._worked == before:
            return ""
        a_minute = 60.0 * (self._worked - before) / seconds
        rate = f"{a_minute:,.0f}" if a_minute >= 10 else f"{a_minute:.1f}"
        text = f"{rate} {self._unit} a minute".replace("  ", " ")
        return f"{text}, {_duration(60.0 * left / a_minute)} left" if left else text


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h" if seconds >= 36000 else f"{seconds / 3600:.1f} h"


class _BarProgress:
    def __init__(self, bar: RichProgress, task: TaskID, pace: _Pace | None) -> None:
        self._bar = bar
        self._task = task
        self._pace = pace
        self._note = ""

    def advance(self, n: int = 1, note: str | None = None, *, worked: bool = True) -> None:
        self._bar.advance(self._task, n)
        self._note = self._note if note is None else note
        if self._pace is None:
            self._bar.update(self._task, note=self._note)
            return
        self._pace.advance(n if worked else 0)
        task = self._bar.tasks[self._task]
        left = None if task.total is None else int(task.total - task.completed)
        shown = ", ".join(part for part in (self._pace.text(left), self._note) if part)
        self._bar.update(self._task, note=shown)

    def set_total(self, total: int) -> None:
        self._bar.update(self._task, total=total)


class _PlainProgress:
    """Lines such as ``personalize: 40/120 users, 2 failed, 31 s``, one an interval and one at the end."""

    def __init__(
        self,
        label: str,
        total: int | None,
        unit: str,
        stream: TextIO,
        interval: float,
        pace: _Pace | None = None,
    ) -> None:
        self._label = label
        self._total = total
        self._unit = unit
        self._stream = stream
        self._interval = interval
        self._pace = pace
        self._done = 0
        self._note = ""
        self._written: str | None = None
        self._started = self._last = time.monotonic()

    def advance(self, n: int = 1, note: str | None = None, *, worked: bool = True) -> None:
        self._done += n
        if self._pace is not None:
            self._pace.advance(n if worked else 0)
        self._note = self._note if note is None else note
        if time.monotonic() - self._last >= self._interval:
            self._write()

    def set_total(self, total: int) -> None:
        self._total = total

    def close(self) -> None:
        if self._state() != self._written:
            self._write()

    def _state(self) -> str:
        count = f"{self._done}" if self._total is None else f"{self._done}/{self._total}"
        return ", ".join(part for part in (f"{count} {self._unit}".strip(), self._note) if part)

    def _write(self) -> None:
        self._last = time.monotonic()
        self._written = self._state()
        parts = [self._written, f"{self._last - self._started:.0f} s"]
        if self._pace is not None:
            parts.append(self._pace.text(None if self._total is None else self._total - self._done))
        print(f"{self._label}: {', '.join(part for part in parts if part)}", file=self._stream, flush=True)
