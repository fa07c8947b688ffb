"""``milp-ray submit``, ``status``, ``watch``, ``logs``, ``stop``: runs on a cluster, and what any run does.

Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from milp_ray import exit_codes
from milp_ray.arguments import AsJson, ConfigFile, Overrides, existing_run
from milp_ray.errors import MilpError

if TYPE_CHECKING:
    from milp_ray.launch.jobs import Jobs

Address = Annotated[
    str | None,
    typer.Option("--address", metavar="URL", help="The cluster's dashboard, e.g. http://127.0.0.1:8265."),
]
Cluster = Annotated[
    Path | None, typer.Option("--cluster", metavar="FILE", help="The cluster's file of Ray's launcher.")
]
Run = Annotated[
    str, typer.Argument(metavar="RUN", help="A run folder; with --address or --cluster a run's name.")
]


def register(app: typer.Typer) -> None:
    """Add the commands to ``milp-ray``."""
    for command in (submit, status, watch, logs, stop):
        app.command()(command)


def submit(
    config: ConfigFile,
    overrides: Overrides = None,
    address: Address = None,
    cluster: Cluster = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete an earlier run of this name first.")] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Print its output until it ends.")] = True,
) -> None:
    """Run a configuration on a cluster.

    As a job whose id is the run's name, of the cluster whose dashboard is at --address, or that Ray's
    launcher brought up by the file --cluster. Versions, storage and GPUs are looked at first. An interruption
    here leaves the job alone; the exit code is the run's. The same command continues a run that stopped.
    """
    from milp_ray.config_loader import load_config
    from milp_ray.rundir import place_of

    resolved = load_config(config, overrides or [])
    with _jobs(address, cluster) as jobs:
        name = jobs.submit(resolved, fresh=fresh)
        typer.echo(f"submitted {name} to {jobs.shown}; files: {place_of(resolved)}")
        if wait:
            raise typer.Exit(_followed(jobs, name))


def status(run: Run, address: Address = None, cluster: Cluster = None, as_json: AsJson = False) -> None:
    """Say what a run is doing, or how it ended.

    Exit code 0: it runs or has succeeded; 1: it failed, died or was stopped.
    """
    if address is not None or cluster is not None:
        with _jobs(address, cluster) as jobs:
            job = jobs.get(run)
        facts = {"run": run, "state": job.state.lower(), "exit_code": job.exit_code, "message": job.message}
        typer.echo(json.dumps(facts) if as_json else f"{run}: {job.state.lower()}. {job.message}")
        raise typer.Exit(0 if job.state in {"PENDING", "RUNNING", "SUCCEEDED"} else 1)
    from milp_ray.run_status import read_status

    folder = existing_run(run)
    found = read_status(folder)
    if found is None:
        raise MilpError(f"{folder.place}: no command was recorded on this run yet; `milp-ray run` is")
    if as_json:
        typer.echo(json.dumps({"run": folder.path.name, **found.to_dict()}))
    else:
        where = f" in {found.stage}" if found.stage else ""
        why = f": {found.reason}" if found.reason else ""
        typer.echo(f"{folder.place}: {found.state}{where}{why}")
        typer.echo(f"  {found.command} since {found.started}, last heard of {found.updated}, on {found.host}")
    raise typer.Exit(0 if found.state in {"running", "succeeded"} else 1)


def watch(
    run: Run,
    address: Address = None,
    cluster: Cluster = None,
    every: Annotated[
        float, typer.Option("--every", metavar="SECONDS", min=0.1, help="Between two looks.")
    ] = 2.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print each look as one line of JSON.")] = False,
) -> None:
    """Watch a run until it ends: its stage, trials, front and users.

    Ctrl-C ends the watching and leaves the run alone. Exit code 0: it has succeeded; 1: it has not.
    """
    from milp_ray.watch import Lines, snapshots
    from milp_ray.watch_view import Screen

    with Screen(as_json=as_json) as screen:
        try:
            if address is None and cluster is None:
                for now in snapshots(existing_run(run), every):
                    screen.show(now)
            else:
                lines = Lines(screen.show)
                with _jobs(address, cluster) as jobs:
                    jobs.observe(run, every, lines.write)
                if screen.last is None:
                    raise MilpError(f"{run} could not be watched: {lines.last_remark or 'nothing was told'}")
        except KeyboardInterrupt:
            raise typer.Exit(exit_codes.INTERRUPTED) from None
    assert screen.last is not None
    raise typer.Exit(0 if screen.last.status.state == "succeeded" else 1)


def logs(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run's name.")],
    address: Address = None,
    cluster: Cluster = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends.")] = False,
) -> None:
    """Print what a run on a cluster has printed."""
    with _jobs(address, cluster) as jobs:
        if follow:
            raise typer.Exit(_followed(jobs, run))
        typer.echo(jobs.logs(run), nl=False)


def stop(run: Run, address: Address = None, cluster: Cluster = None) -> None:
    """Stop a run as Ctrl-C does.

    What is finished is kept, and the same command continues.
    """
    if address is None and cluster is None:
        from milp_ray.run_status import interrupt

        interrupt(existing_run(run))
        typer.echo(f"{run}: asked to stop; `milp-ray status {run}` tells when it has")
        return
    with _jobs(address, cluster) as jobs:
        if not jobs.stop(run):
            raise MilpError(f"{run} is not running on {jobs.shown}")
        typer.echo(f"{run}: asked to stop; `milp-ray status {run} {jobs.option}` tells when it has")


@contextmanager
def _jobs(address: str | None, cluster: Path | None) -> Iterator[Jobs]:
    if (address is None) == (cluster is None):
        raise MilpError(
            "say which cluster: --address URL of its dashboard, such as http://127.0.0.1:8265, or --cluster "
            "FILE of Ray's launcher"
        )
    if cluster is not None:
        from milp_ray.launch.tunnel import dashboard_of

        # (Before Ray is imported: it reads how to authenticate then.)
        with dashboard_of(cluster) as local:
            from milp_ray.launch.jobs import Jobs

            yield Jobs(local, shown=str(cluster), option=f"--cluster {cluster}")
    elif address is not None:
        from milp_ray.launch.jobs import Jobs

        yield Jobs(address)


def _followed(jobs: Jobs, name: str) -> int:
    try:
        state = jobs.follow(name)
    except KeyboardInterrupt:
        typer.echo(
            f"\nno longer watching; {name} goes on: `milp-ray logs {name} --follow {jobs.option}` "
            f"watches it again, `milp-ray stop {name} {jobs.option}` ends it"
        )
        return exit_codes.INTERRUPTED
    if state.state != "SUCCEEDED":
        typer.secho(f"{name}: {state.state.lower()}. {state.message}", fg=typer.colors.RED, err=True)
    return state.code
