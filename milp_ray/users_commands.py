"""``milp-ray users``: the options of each command; what they do is in :mod:`milp_ray.users_view`.

Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

from typing import Annotated

import typer

from milp_ray.arguments import AsJson, ConfigFile, Overrides

users_app = typer.Typer(help="Look at users.", no_args_is_help=True, rich_markup_mode=None)


@users_app.command("sample")
def users_sample(
    n: Annotated[int, typer.Option("-n", "--n", min=1, help="How many users.")] = 1,
    long: Annotated[bool, typer.Option("--long", help="Users with long histories.")] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the world.")] = 0,
) -> None:
    """Print embedded users.

    Their profile, their history, and queries with the wanted responses.
    """
    from milp_ray import users_view

    users_view.print_sample(n, long=long, seed=seed)


@users_app.command("check")
def users_check(file: ConfigFile, overrides: Overrides = None) -> None:
    """Read users and tell what was found."""
    from milp_ray import users_view
    from milp_ray.config_loader import load_config

    users_view.print_check(load_config(file, overrides or []))


@users_app.command("stats")
def users_stats(
    file: ConfigFile,
    overrides: Overrides = None,
    in_tokens: Annotated[
        bool, typer.Option("--tokens", help="Count lengths in the base's tokens, too.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print what a paper's first table tells of a dataset.

    Users, examples of each part, and how long histories, queries and responses are.
    """
    from milp_ray import users_view
    from milp_ray.config_loader import load_config

    users_view.print_statistics(load_config(file, overrides or []), in_tokens=in_tokens, as_json=as_json)
