"""The ``milp-ray`` command: its subcommands put together, and what a failure of any of them becomes.

Nothing heavy is imported before a command needs it, so that ``milp-ray --help`` answers at once.
"""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from milp_ray import exit_codes, governance_commands, job_commands, run_commands
from milp_ray.arguments import ConfigFile, Overrides
from milp_ray.estimate_command import estimate
from milp_ray.leakage_command import leakage
from milp_ray.quality_commands import ability, winrate
from milp_ray.store_commands import store_app
from milp_ray.study_commands import study_app
from milp_ray.users_commands import users_app

SHOW_MESSAGES = "MILP_TRACEBACK"  # the variable that lets messages through which may quote users' texts
# A mistake in the command line, which typer tells itself; the class has no public name there.
_UsageMistake: type[Exception] = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
)


class _Commands(TyperGroup):
    """The one place where a failure becomes a message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        from milp_ray.errors import MilpError, safe_traceback

        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, _UsageMistake, BrokenPipeError):
            raise
        except MilpError as error:
            typer.secho(str(error), fg=typer.colors.RED, err=True)
            raise typer.Exit(exit_codes.MISTAKE) from None
        except KeyboardInterrupt as interrupted:
            typer.secho(
                f"\n{str(interrupted) or 'interrupted; the same command continues'}",
                fg=typer.colors.YELLOW,
                err=True,
            )
            raise typer.Exit(exit_codes.INTERRUPTED) from None
        except Exception as error:
            of_the_disk = _of_the_disk(error)
            if of_the_disk is not None:
                typer.secho(of_the_disk, fg=typer.colors.RED, err=True)
                raise typer.Exit(exit_codes.MISTAKE) from None
            if os.environ.get(SHOW_MESSAGES):
                raise
            typer.secho(
                f"{safe_traceback(error)}\nThis was not foreseen; {SHOW_MESSAGES}=1 shows the whole message",
                fg=typer.colors.RED,
                err=True,
            )
            raise typer.Exit(exit_codes.BUG) from None


def _of_the_disk(error: Exception) -> str | None:
    """What to say where a disk is full, read-only or not ours; ``None`` of any other error."""
    from milp_ray.errors import MilpError, is_of_the_disk

    if not isinstance(error, OSError) or not is_of_the_disk(error):
        return None
    # A stage that fails for this reason says more, though its last notes could not be written either.
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MilpError):
            return str(cause)
        cause = cause.__context__
    return (
        f"{error.filename or 'a file'}: {error.strerror}. Make room or mend the permissions; what was done "
        "is kept, and the same command goes on from there"
    )


app = typer.Typer(
    name="milp-ray",
    help="Personal adapters for many users of one frozen language model.",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    # Rich help pages cost a third of a second of imports at every call.
    rich_markup_mode=None,
    # A traceback with local variables would print users' texts.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
config_app = typer.Typer(help="Look at a configuration.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(config_app, name="config")
app.add_typer(users_app, name="users")
app.add_typer(study_app, name="study")
app.add_typer(store_app, name="store")


def _version(asked: bool) -> None:
    if asked:
        from milp_ray import __version__

        typer.echo(f"milp-ray {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


run_commands.register(app)
job_commands.register(app)
governance_commands.register(app)
app.command()(leakage)
app.command()(winrate)
app.command()(ability)
app.command()(estimate)


@app.command()
def doctor() -> None:
    """Say what is installed and what would fail."""
    from rich.console import Console

    from milp_ray.doctor import doctor as examine

    raise typer.Exit(examine(Console(emoji=False)))


@config_app.command("show")
def config_show(file: ConfigFile, overrides: Overrides = None) -> None:
    """Print the resolved configuration.

    The file, the overrides, and every default.
    """
    from milp_ray.config_loader import dump_config, load_config

    typer.echo(dump_config(load_config(file, overrides or [])), nl=False)


def main() -> None:
    """Entry point of the ``milp-ray`` command."""
    app()


if __name__ == "__main__":
    main()
