"""Runs in a bucket, on one machine and on others."""

from __future__ import annotations

from pathlib import Path

import pytest

from milp_ray.config import Config


def move_to(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine is, for a run in a bucket, another folder of copies."""
    monkeypatch.setenv("MILP_MIRRORS", str(machine))


def config_of(uri: str, **changes: object) -> Config:
    """A configuration whose run is at the URI, which ends in ``/r``."""
    place, _, options = uri.partition("?")
    return Config.model_validate(
        {"name": "r", "output_dir": f"{place.removesuffix('/r')}?{options}", **changes}
    )
