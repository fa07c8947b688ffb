"""``milp-ray winrate`` and ``ability``: which answers a judge prefers, and what adapters cost elsewhere.

Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from milp_ray import exit_codes
from milp_ray.arguments import AsJson
from milp_ray.table_console import table_console

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from milp_ray.evaluation.judges.protocol import Judge


Target = Annotated[str, typer.Argument(metavar="RUN", help="A run folder whose users have adapters.")]


class JudgeName(StrEnum):
    """Who judges."""

    embedded = "embedded"
    embedded_free = "embedded_free"
    reward_model = "reward_model"
    openai = "openai"


def winrate(
    target: Target,
    method: Annotated[str, typer.Option("--method", help="Whose wins are counted.")] = "milp",
    against: Annotated[
        str, typer.Option("--against", help="The method it is compared with.")
    ] = "text_prompt",
    judge: Annotated[
        JudgeName,
        typer.Option(
            "--judge",
            help="embedded: overlap with the wanted response. embedded_free: Persona-F1, without one. "
            "reward_model: a local reward model (--model FOLDER). openai: an OpenAI-compatible endpoint "
            "(--base-url, --model), which is sent queries, wanted responses and answers.",
        ),
    ] = JudgeName.embedded,
    model: Annotated[
        str, typer.Option("--model", help="Folder of a reward model, or an endpoint's model.")
    ] = "",
    base_url: Annotated[
        str, typer.Option("--base-url", help="Of an endpoint, such as http://localhost:8000/v1.")
    ] = "",
    key_env: Annotated[
        str, typer.Option("--key-env", help="Environment variable with an endpoint's key.")
    ] = "",
    timeout: Annotated[
        float, typer.Option("--timeout", min=0.1, help="Seconds a request to an endpoint.")
    ] = 60.0,
    margin: Annotated[
        float | None,
        typer.Option("--margin", min=0.0, help="Differences up to this are ties, in the judge's units."),
    ] = None,
    users: Annotated[int | None, typer.Option("--users", min=1, help="Users to judge, at most.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the sample of users.")] = 0,
    human: Annotated[
        Path | None,
        typer.Option("--human", help="CSV of people's choices, to compare the judge with: a filled sheet."),
    ] = None,
    sheet: Annotated[
        Path | None,
        typer.Option(
            "--sheet", help="Write the judged pairs, with their texts, as a CSV for people to fill in."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Judge one method's answers against another's.

    Answers the users' held-out queries with both methods, lets a judge compare them, and keeps who won in the
    run folder (judgements.parquet, no texts), where the report finds it. Exit code 3 where some users failed.
    """
    from milp_ray.evaluation.judging import WinRateOptions
    from milp_ray.pipeline import quality
    from milp_ray.rundir import RunFolder

    _check_methods(method, against)
    make = _judge_maker(judge, model, base_url, key_env, timeout, margin)
    run = RunFolder.open(target)
    options = WinRateOptions(make, (method, against), users, seed, human, sheet)
    found = quality.win_rate(run, run.config(), options, quiet=as_json)
    if as_json:
        typer.echo(json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False))
    else:
        _print_win_rate(found, sheet)
    if found["n_failed"]:
        raise typer.Exit(exit_codes.SOME_FAILED)


def ability(
    target: Target,
    texts: Annotated[
        Path | None,
        typer.Option(
            "--texts",
            help='Texts about nobody: a text a line, or .jsonl with a field "text". Left out: documents of '
            "the embedded world, for the embedded base.",
        ),
    ] = None,
    documents: Annotated[int, typer.Option("--documents", min=1, help="Texts to measure on, at most.")] = 32,
    users: Annotated[int | None, typer.Option("--users", min=1, help="Users to measure, at most.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the sample of users.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Measure what adapters cost on texts about nobody.

    Perplexity on population texts under the base alone and under each user's adapter: a personal model that
    forgets the world is worse. Writes ability.parquet in the run folder, where the report finds it. Exit code
    3 where some users failed.
    """
    from milp_ray.evaluation.ability import AbilityOptions
    from milp_ray.pipeline import quality
    from milp_ray.rundir import RunFolder

    run = RunFolder.open(target)
    found = quality.ability(run, run.config(), AbilityOptions(texts, documents, users, seed), quiet=as_json)
    if as_json:
        typer.echo(json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False))
    else:
        from milp_ray.report.ability_text import COLUMNS, ability_rows, ability_title, ability_verdict

        rows = [
            [name, *(f"{value} [{bounds}]" if bounds else value for value, bounds in cells)]
            for name, cells in ability_rows(found)
        ]
        _print_table(ability_title(found), COLUMNS, rows)
        typer.echo(ability_verdict(found))
        for reason, count in found["failed_reasons"].items():
            typer.echo(f"{count} users failed: {reason}")
    if found["n_failed"]:
        raise typer.Exit(exit_codes.SOME_FAILED)


def _check_methods(method: str, against: str) -> None:
    from milp_ray.config.methods import METHODS
    from milp_ray.errors import MilpError

    for option, name in (("--method", method), ("--against", against)):
        if name not in METHODS:
            raise MilpError(f"{option} {name}: use one of {', '.join(METHODS)}")
    if method == against:
        raise MilpError(f"--method and --against are both {method}; give two different methods")


def _judge_maker(
    judge: JudgeName, model: str, base_url: str, key_env: str, timeout: float, margin: float | None
) -> Callable[[], Judge]:
    """A function that makes the judge; a mistake in the options is told at once.

    Raises:
        MilpError: an option is missing, or belongs to another judge.
    """
    from milp_ray.errors import MilpError

    is_endpoint, has_model = judge is JudgeName.openai, judge in (JudgeName.openai, JudgeName.reward_model)
    if has_model and not model:
        raise MilpError(f"--judge {judge} needs --model")
    if is_endpoint and not base_url:
        raise MilpError("--judge openai needs --base-url: texts of users go nowhere that was not named")
    if (model and not has_model) or ((base_url or key_env) and not is_endpoint):
        raise MilpError(f"--judge {judge} takes none of --model, --base-url and --key-env that was given")
    if is_endpoint and margin is not None:
        raise MilpError("--judge openai takes no --margin: an answer wins where both orders prefer it")
    if is_endpoint:
        from milp_ray.chat import Endpoint
        from milp_ray.evaluation.judges.openai import OpenAIJudge

        made = OpenAIJudge(Endpoint(base_url, model, key_env, timeout=timeout))
        return lambda: made

    def make() -> Judge:
        from milp_ray.evaluation.judges.embedded import PersonaJudge, ReferenceJudge
        from milp_ray.evaluation.judges.reward_model import RewardModelJudge

        if judge is JudgeName.reward_model:
            return RewardModelJudge(Path(model), margin=margin or 0.0)
        embedded = ReferenceJudge if judge is JudgeName.embedded else PersonaJudge
        return embedded() if margin is None else embedded(margin)

    return make


def _print_win_rate(found: Mapping[str, Any], sheet: Path | None) -> None:
    from milp_ray.report.win_rate_text import (
        COLUMNS,
        agreement_sentence,
        win_rate_cells,
        win_rate_title,
        win_rate_verdict,
    )

    shown = [(value, bounds.replace(" to ", ", ")) for value, bounds in win_rate_cells(found)]
    cells = [f"{value} [{bounds}]" if bounds else value for value, bounds in shown]
    confidence = f"{found['confidence']:.0%} intervals over users"
    _print_table(f"{win_rate_title(found)} ({confidence})", COLUMNS, [[found["judge"], *cells]])
    lines = [win_rate_verdict(found)]
    if found["agreement"]:
        lines.append(agreement_sentence(found["agreement"]))
    if found["n_unclear"]:
        lines.append(f"{found['n_unclear']} replies of the judge held no verdict and count as ties")
    if found["n_inapplicable"]:
        lines.append(f"one of the methods does not apply to {found['n_inapplicable']} users")
    lines += [f"{count} users failed: {reason}" for reason, count in found["failed_reasons"].items()]
    if sheet is not None:
        lines.append(f"for people to fill in: {sheet}; it holds users' texts, remove it afterwards")
    for line in lines:
        typer.echo(line)


def _print_table(title: str, columns: tuple[str, ...], rows: list[list[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    console = table_console()
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)
