"""`milp-ray` and other scripts, run by an experiment as a person would run them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from milp_ray.config_loader import load_config
from milp_ray.errors import MilpError
from milp_ray.rundir import RunFolder, place_of

HERE = Path(__file__).resolve().parent
SCALES = {"demo": "demo.yaml", "paper": "paper_llama2_7b.yaml"}
SEEDS = {"demo": 3, "paper": 1}  # at the paper's scale each is a search of 200 trials
SOME_FAILED = 3  # the exit code of commands that have done their work, but not for all users


def milp_ray(*arguments: str) -> str:
    """What the command prints.

    Raises:
        SystemExit: it fails, with the end of what it said; or it is interrupted.
    """
    return output_of([sys.executable, "-m", "milp_ray", *arguments])


def output_of(command: Sequence[str]) -> str:
    """What a command prints; see :func:`milp_ray`."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, said = process.communicate()
    except KeyboardInterrupt:
        process.communicate()  # it was interrupted as well, and ends in good order
        raise SystemExit("interrupted; the same command goes on") from None
    if process.returncode == SOME_FAILED:
        print(f"{' '.join(command)}: some users failed\n{said[-2000:]}", file=sys.stderr)
    elif process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{out[-2000:]}{said[-2000:]}")
    return out


def run(config: str, name: str, overrides: Sequence[str]) -> RunFolder:
    """`milp-ray run` of a file beside this one, finished now or before.

    Raises:
        SystemExit: as :func:`milp_ray`, and where the overrides are no settings.
    """
    settings = [*overrides, f"name={name}"]
    try:
        place = place_of(load_config(HERE / config, settings))
    except MilpError as error:
        raise SystemExit(str(error)) from None
    milp_ray("run", str(HERE / config), *settings)
    return RunFolder.open(place)


def run_of_seed(scale: str, seed: int, overrides: Sequence[str]) -> RunFolder:
    """The main job of a scale with a seed, which several experiments look at."""
    config = SCALES[scale]
    return run(config, f"{Path(config).stem}_seed{seed}", [f"seed={seed}", *overrides])
