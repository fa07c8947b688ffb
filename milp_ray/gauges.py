"""What the Ray dashboard, Prometheus and Grafana are told of a run while it works.

Gauges are set in the driver, since those of processes that live for one trial are lost with them, and have
one tag, the run's name: never anything of a user. Ray exports each as ``ray_<name>``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# In ASCII: Ray takes nothing else.
DESCRIPTIONS: Mapping[str, str] = {
    "milp_trials_running": "Trials that run now.",
    "milp_trials_finished": "Trials that have ended, with values or without.",
    "milp_trials_failed": "Trials that failed for good.",
    "milp_trials_stopped_early": "Trials that were stopped at a rung.",
    "milp_best_validation_loss": "Lowest validation loss of a trial, nats a token.",
    "milp_best_rouge_l": "Highest ROUGE-L of a trial, F-measure times 100.",
    "milp_hypervolume": "Hypervolume of the front.",
    "milp_suggestion_seconds": "Seconds that the latest batch of layouts took to propose.",
    "milp_idle_slots": "Trial slots that wait for a layout.",
    "milp_users_finished": "Users that have their adapter, those from before included.",
    "milp_users_failed": "Users that get none.",
    "milp_users_per_minute": "Adapters made a minute since the batch began.",
    "milp_tokens_per_second": "Tokens trained on a second since the batch began, all workers together.",
    "milp_worker_memory_mib": "Resident memory of the largest worker, MiB.",
}
_PREFIX = "milp_"
_TAG = "run"


class Gauges:
    """The gauges of one run; without an open Ray session nothing happens.

    Args:
        run: its name, the value of the one tag.
    """

    def __init__(self, run: str) -> None:
        self._tags = {_TAG: run}
        self._made: dict[str, Any] = {}

    def set(self, **values: float | None) -> None:
        """Set gauges by their names without the prefix, such as ``trials_running``; ``None`` sets none."""
        import ray

        known = {_PREFIX + name: value for name, value in values.items() if value is not None}
        unknown = sorted(known.keys() - DESCRIPTIONS.keys())
        if unknown:
            raise ValueError(f"there is no gauge {', '.join(unknown)}; DESCRIPTIONS names them all")
        if not ray.is_initialized():
            return
        for name, value in known.items():
            self._gauge(name).set(float(value), tags=self._tags)

    def _gauge(self, name: str) -> Any:
        from ray.util.metrics import Gauge

        if name not in self._made:
            self._made[name] = Gauge(name, description=DESCRIPTIONS[name], tag_keys=(_TAG,))
        return self._made[name]
