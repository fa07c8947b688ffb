"""What a batch has taken and paid: counts and sums over users, small whatever their number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from milp_ray.personalize.layouts.race import CHOICE
from milp_ray.personalize.layouts.rule import Decision

if TYPE_CHECKING:
    from milp_ray.personalize.store import Manifest


def layout_counts(decision: Decision, manifest: Manifest) -> dict[str, Any] | None:
    """What one user adds to the counts; ``None`` where one layout is for all.

    An adapter that was made before this mode was set, of the very layout, says nothing of a decision: what
    is decided now stands for it.
    """
    if decision.mode == "chosen":
        return None
    meta = manifest.meta
    said: Mapping[str, Any] = meta.get(CHOICE) or {}
    if said.get("mode") != decision.mode:
        said = {**decision.facts, "reason": decision.reason, "parameters": decision.candidates[0].parameters}
    beside = said.get("beside_chosen") or {}
    return {
        "mode": decision.mode,
        "layout": manifest.layout.key,
        "chosen": decision.chosen.layout.key,
        "reason": said["reason"],
        "parameters": said["parameters"],
        "chosen_parameters": decision.chosen.parameters,
        "steps": said.get("steps", meta.get("steps", 0)),
        "own_steps": said.get("own_steps", meta.get("steps", 0)),
        "seconds": said.get("seconds", meta.get("seconds", 0.0)),
        "own_seconds": said.get("own_seconds", meta.get("seconds", 0.0)),
        "taken_loss": beside.get("taken"),
        "chosen_loss": beside.get("chosen"),
        "predicted_gain": said.get("predicted_gain"),
    }


@dataclass(slots=True)
class LayoutTally:
    """Sums over the users of a batch, those that were finished before included."""

    mode: str = ""
    chosen: str = ""
    n_users: int = 0
    taken: Counter[str] = field(default_factory=Counter)  # layout → users
    reasons: Counter[str] = field(default_factory=Counter)
    _sums: Counter[str] = field(default_factory=Counter)
    _n_compared: int = 0
    _n_predicted: int = 0

    def add(self, counts: Mapping[str, Any] | None) -> None:
        """Count one user; ``None``: one layout is for all."""
        if counts is None:
            return
        self.mode, self.chosen = counts["mode"], counts["chosen"]
        self.n_users += 1
        self.taken[counts["layout"]] += 1
        self.reasons[counts["reason"]] += 1
        for name in ("parameters", "chosen_parameters", "steps", "own_steps", "seconds", "own_seconds"):
            self._sums[name] += counts[name]
        if counts["taken_loss"] is not None and counts["chosen_loss"] is not None:
            self._n_compared += 1
            self._sums["taken_loss"] += counts["taken_loss"]
            self._sums["chosen_loss"] += counts["chosen_loss"]
        if counts["predicted_gain"] is not None and counts["layout"] != counts["chosen"]:
            self._n_predicted += 1
            self._sums["predicted_gain"] += counts["predicted_gain"]

    def to_dict(self) -> dict[str, Any] | None:
        """For ``summary.json`` and the report; ``None`` where one layout was for all.

        ``…_ratio`` are sums over all users against those of one layout for all: of adapter parameters (what
        the store holds), optimizer steps and seconds of training. ``taken_loss`` and ``chosen_loss`` are
        means over the ``n_compared`` users for whom both were trained, nats a token, at the epoch where the
        chosen layout was measured last. ``predicted_gain`` is a mean over users who took another layout by a
        prediction.
        """
        if not self.n_users:
            return None
        sums = self._sums
        return {
            "mode": self.mode,
            "chosen": self.chosen,
            "n_users": self.n_users,
            "n_other": self.n_users - self.taken[self.chosen],
            "taken": dict(self.taken.most_common()),
            "reasons": dict(self.reasons.most_common()),
            "parameters_ratio": _ratio(sums["parameters"], sums["chosen_parameters"]),
            "steps_ratio": _ratio(sums["steps"], sums["own_steps"]),
            "seconds_ratio": _ratio(sums["seconds"], sums["own_seconds"]),
            "n_compared": self._n_compared,
            "taken_loss": _ratio(sums["taken_loss"], self._n_compared),
            "chosen_loss": _ratio(sums["chosen_loss"], self._n_compared),
            "predicted_gain": _ratio(sums["predicted_gain"], self._n_predicted),
        }


def _ratio(value: float, beside: float) -> float | None:
    return value / beside if beside else None
