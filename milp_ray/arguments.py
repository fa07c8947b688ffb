"""The arguments that many commands take, and the run that they mean.

Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from milp_ray.config import Config
    from milp_ray.rundir import RunFolder

ConfigFile = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="A YAML file; experiments/ holds examples.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Settings that replace the file's, e.g. search.n_trials=24."
    ),
]
Target = Annotated[
    str,
    typer.Argument(
        metavar="RUN", help="A run folder, by path or URI, or the configuration file whose run is meant."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def run_of(target: str, overrides: list[str] | None) -> tuple[RunFolder, Config]:
    """The run that a path or URI means, and its configuration with the overrides applied and recorded."""
    from milp_ray.config_loader import load_config
    from milp_ray.rundir import RunFolder

    if Path(target).is_file():
        config = load_config(Path(target), overrides or [])
        return RunFolder.create(config), config
    # A run folder may have been moved since it was made: where it is counts, not where it was.
    config = load_config(RunFolder.open(target).config_file, overrides or [])
    return RunFolder.create(config, at=target), config


def existing_run(target: str) -> RunFolder:
    """The run that a path or URI means, which is only looked at."""
    from milp_ray.config_loader import load_config
    from milp_ray.rundir import RunFolder, place_of

    if Path(target).is_file():
        return RunFolder.open(place_of(load_config(Path(target), [])))
    return RunFolder.open(target)
