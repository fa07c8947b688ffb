"""What a rerun on the same run folder may give differently, and what it may not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from milp_ray.config.search import OPERATIONAL

if TYPE_CHECKING:
    from milp_ray.config import Config

# What may differ, because no result that is already there depends on it:
# where and how wide the work runs, and what later stages make anew from what earlier ones left.
RESUMABLE = (
    "output_dir",
    "tracking",
    "ray",
    "users.consent",
    *(f"search.{name}" for name in sorted(OPERATIONAL)),
    "personalize",
    "update",
    "choice",
    "compare",  # what is kept there has a digest by part, and tables are made from the parts asked for
    "evaluation.methods",
    "evaluation.n_bootstrap",
    "evaluation.confidence",
    "evaluation.task",
    "evaluation.labels",
    "evaluation.scale",
)
GROWING = ("search.n_trials",)  # may become larger: a search goes on where it stood


def differences(before: Config, now: Config) -> list[str]:
    """The settings by which results of the one cannot be mixed with those of the other, a line each."""
    was, is_now = _flat(before.model_dump(mode="json")), _flat(now.model_dump(mode="json"))
    return [
        f"{key}: was {was.get(key)!r}, now {value!r}"
        for key, value in is_now.items()
        if was.get(key) != value and not _may_differ(key, was, is_now)
    ]


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``."""
    result: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            result.update(_flat(value, f"{prefix}{key}."))
        else:
            result[prefix + key] = value
    return result


def _may_differ(key: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    if any(key == free or key.startswith(free + ".") for free in RESUMABLE):
        return True
    return key in GROWING and now[key] >= before.get(key, now[key])
