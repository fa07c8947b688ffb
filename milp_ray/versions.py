"""What a run was made with: packages, interpreter, platform, git commit. Nothing heavy is imported."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import milp_ray

PACKAGES = (
    "ray",
    "torch",
    "transformers",
    "peft",
    "deepspeed",
    "ax-platform",
    "botorch",
    "gpytorch",
    "jax",
    "numpyro",
    "rouge-score",
    "safetensors",
    "tokenizers",
    "numpy",
    "pyarrow",
    "pydantic",
)


def package_version(name: str) -> str | None:
    """The installed version of a distribution, or ``None``."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, Any]:
    """Versions of this package, of what it computes with, of the interpreter and the platform."""
    return {
        "milp_ray": milp_ray.__version__,
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "packages": {name: package_version(name) for name in PACKAGES},
    }


def git_commit() -> str | None:
    """The commit of the checkout that this package runs from, with ``-dirty`` where it was changed.

    ``None`` outside a checkout of this project (an installed wheel), without git, or before a first commit.
    """
    root = Path(milp_ray.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None
