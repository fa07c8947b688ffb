"""What an update came to: counts by outcome, and the reasons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

OUTCOMES = {
    "updated": "updated",
    "unchanged": "unchanged",
    "kept": "old version kept",
    "anew": "made anew",
    "failed": "failed",
}


@dataclass(slots=True)
class UpdateSummary:
    """Counts of one call."""

    users: Counter[str] = field(default_factory=Counter)  # by outcome
    reasons: dict[str, Counter[str]] = field(default_factory=dict)  # outcome → reason → users
    retried: int = 0  # users whose worker was lost and that were tried again
    steps: int = 0
    tokens: int = 0
    training_seconds: float = 0.0  # of all workers together
    seconds: float = 0.0  # on the clock
    interrupted: bool = False

    @property
    def n_users(self) -> int:
        """Users that were looked at."""
        return self.users.total()

    def count(self, outcome: str, reason: str | None = None, made: Mapping[str, Any] | None = None) -> None:
        """One user more; ``made`` holds what it cost."""
        self.users[outcome] += 1
        if reason is not None:
            self.reasons.setdefault(outcome, Counter())[reason] += 1
        if made is not None:
            self.steps += made["steps"]
            self.tokens += made["tokens"]
            self.training_seconds += made["seconds"]

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return {
            "n_users": self.n_users,
            **{outcome: self.users[outcome] for outcome in OUTCOMES},
            "reasons": {outcome: dict(found.most_common()) for outcome, found in self.reasons.items()},
            "retried": self.retried,
            "steps": self.steps,
            "tokens": self.tokens,
            "training_seconds": round(self.training_seconds, 3),
            "seconds": round(self.seconds, 3),
            "interrupted": self.interrupted,
        }


def update_table(summary: UpdateSummary) -> Table:
    """One row an outcome and reason."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=f"Update: {summary.n_users:,} users in {summary.seconds:.0f} s",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
    )
    table.add_column("Outcome", no_wrap=True)
    table.add_column("Users", justify="right")
    table.add_column("Reason")
    for outcome, label in OUTCOMES.items():
        reasons = summary.reasons.get(outcome, Counter())
        without = summary.users[outcome] - reasons.total()
        rows = [(without, "")] if without else []
        for n, reason in [*rows, *((n, reason) for reason, n in reasons.most_common())]:
            table.add_row(label, f"{n:,}", escape(reason))
    return table
