"""How ``milp-ray watch`` looks in a terminal, and in a log."""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from milp_ray.report.style import duration, number
from milp_ray.watch import Snapshot

_LOG_WIDTH = 120
_BAR_WIDTH = 30
_LEVELS = "▁▂▃▄▅▆▇█"
_N_LEVELS_SHOWN = 40
_COLOURS = {"running": "cyan", "succeeded": "green", "stopped": "yellow", "failed": "red", "died": "red"}


class Screen:
    """Shows snapshots as they come: in place on a terminal, one after the other elsewhere.

    Use it as a context manager.

    Args:
        as_json: print each as one line of JSON instead.
    """

    def __init__(self, *, as_json: bool = False) -> None:
        self.last: Snapshot | None = None
        self._as_json = as_json
        self._hypervolumes: deque[float] = deque(maxlen=_N_LEVELS_SHOWN)
        self._console = Console(
            highlight=False, emoji=False, width=None if sys.stdout.isatty() else _LOG_WIDTH
        )
        self._live = Live(console=self._console, auto_refresh=False)

    def __enter__(self) -> Screen:
        if self._is_live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_live:
            self._live.stop()

    def show(self, now: Snapshot) -> None:
        """Show one more; one that tells nothing new is not printed again."""
        before, self.last = self.last, now
        if "hypervolume" in now.gauges:
            self._hypervolumes.append(now.gauges["hypervolume"])
        if self._as_json:
            print(json.dumps(now.to_dict()), flush=True)
        elif self._is_live:
            self._live.update(view(now, self._hypervolumes), refresh=True)
        elif before is None or (before.gauges, before.status) != (now.gauges, now.status):
            self._console.print(view(now, self._hypervolumes))

    @property
    def _is_live(self) -> bool:
        return self._console.is_terminal and not self._as_json


def view(now: Snapshot, hypervolumes: Iterable[float] = (), clock: datetime | None = None) -> RenderableType:
    """One snapshot: a headline, and a block for the search and for the batch, where there are any."""
    gauges = now.gauges
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for what, planned, done in (
        ("trials", "trials_planned", "trials_finished"),
        ("users", "users_expected", "users_finished"),
    ):
        if done in gauges:
            total = max(gauges.get(planned, 0.0), gauges[done], 1.0)
            counted = f"{gauges[done]:,.0f}/{total:,.0f}" if planned in gauges else f"{gauges[done]:,.0f}"
            bar = ProgressBar(total=total, completed=gauges[done], width=_BAR_WIDTH)
            table.add_row(what, bar, counted, _TEXTS[what](gauges))
        if what == "trials" and "hypervolume" in gauges:
            line = Text(f"hypervolume {gauges['hypervolume']:.4g} ")
            line.append(trend(list(hypervolumes)), style="cyan")
            table.add_row("", line, "", _bests(gauges))
    return Group(_headline(now, clock or datetime.now(UTC)), table)


def trend(values: list[float]) -> str:
    """One block a value, from the lowest value to the highest; nothing for fewer than two."""
    if len(values) < 2:
        return ""
    low, high = min(values), max(values)
    if high == low:
        return _LEVELS[0] * len(values)
    return "".join(_LEVELS[round((len(_LEVELS) - 1) * (value - low) / (high - low))] for value in values)


def _headline(now: Snapshot, clock: datetime) -> Text:
    status = now.status
    line = Text(now.run, style="bold")
    line.append(f"  {status.state}", style=_COLOURS[status.state])
    line.append(f" in {status.stage}" if status.stage else "")
    end = clock if status.state == "running" else datetime.fromisoformat(status.updated)
    seconds = max(0.0, (end - datetime.fromisoformat(status.started)).total_seconds())
    line.append(f", {duration(seconds)}, {status.command} on {status.host}", style="default")
    if status.reason:
        line.append(f"\n{status.reason}", style=_COLOURS[status.state])
    return line


def _trials(gauges: Mapping[str, float]) -> str:
    parts = [
        f"{gauges[name]:,.0f} {label}"
        for name, label in (
            ("trials_running", "running"),
            ("trials_stopped_early", "stopped early"),
            ("trials_failed", "failed"),
            ("idle_slots", "slots idle"),
        )
        if gauges.get(name)
    ]
    if "suggestion_seconds" in gauges:
        parts.append(f"layouts proposed in {duration(gauges['suggestion_seconds'])}")
    return ", ".join(parts)


def _bests(gauges: Mapping[str, float]) -> str:
    found = [("best_validation_loss", "best validation loss"), ("best_rouge_l", "best ROUGE-L")]
    return ", ".join(f"{label} {number(gauges[name])}" for name, label in found if name in gauges)


def _users(gauges: Mapping[str, float]) -> str:
    parts = [f"{gauges['users_failed']:,.0f} failed"] if gauges.get("users_failed") else []
    if gauges.get("users_per_minute"):
        parts.append(f"{gauges['users_per_minute']:,.1f} a minute")
    if gauges.get("tokens_per_second"):
        parts.append(f"{gauges['tokens_per_second']:,.0f} tokens/s")
    for name, label in (("worker_memory_mib", "a worker"), ("gpu_memory_mib", "a GPU")):
        if name in gauges:
            parts.append(f"{gauges[name]:,.0f} MiB {label}")
    return ", ".join(parts)


_TEXTS = {"trials": _trials, "users": _users}
