"""`milp-ray` and other scripts, run by an experiment as a person would run them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from milp_ray.config_loader import load_config

HERE = Path(__file__).resolve().parent
SCALES = {"demo": "demo.yaml", "paper": "paper_llama2_7b.yaml"}


def milp_ray(*arguments: str) -> str:
    """What the command prints.

    Raises:
        SystemExit: it fails; with the end of what it said.
    """
    return output_of([sys.executable, "-m", "milp_ray", *arguments])


def output_of(command: Sequence[str]) -> str:
    """What a command prints; see :func:`milp_ray`."""
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode:
        said = answer.stdout[-2000:] + answer.stderr[-2000:]
        raise SystemExit(f"{' '.join(command)} ended with {answer.returncode}:\n{said}")
    return answer.stdout


def run(config: str, name: str, overrides: Sequence[str]) -> Path:
    """`milp-ray run` of a file beside this one, finished now or before; the run's folder."""
    settings = [*overrides, f"name={name}"]
    milp_ray("run", str(HERE / config), *settings)
    return load_config(HERE / config, settings).output_dir / name


def run_of_seed(scale: str, seed: int, overrides: Sequence[str]) -> Path:
    """The main job of a scale with a seed, which several experiments look at."""
    config = SCALES[scale]
    return run(config, f"{Path(config).stem}_seed{seed}", [f"seed={seed}", *overrides])
