"""What is measured on a run's users beside its stages: methods side by side, what a judge prefers, general
ability, and leakage between users.
"""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any

from rich.console import Console

from milp_ray.pipeline.work import working

if TYPE_CHECKING:
    from milp_ray.config import Config
    from milp_ray.evaluation.ability import AbilityOptions
    from milp_ray.evaluation.judging import WinRateOptions
    from milp_ray.personalize.governance.leakage import LeakageOptions
    from milp_ray.rundir import RunFolder


def compare(run: RunFolder, config: Config, *, as_json: bool = False) -> None:
    """Compare every method on the users of ``config``; print the tables, and write them into the run.

    ``as_json``: standard output is the comparison as JSON, and nothing else.

    Raises:
        MilpError: no layout is given or chosen, nobody has a test example, or a method fails.
    """
    from milp_ray.compare_view import print_comparison, write_comparison
    from milp_ray.evaluation.side_by_side import STAGE, Settings, side_by_side

    with working(run, config, "compare") as work:
        if as_json:
            work.console = Console(stderr=True)
        recipe = work.recipe_of(config.compare.layout)
        started = time.perf_counter()
        settings = Settings(recipe, config.evaluation, config.methods)
        found = side_by_side(
            run,
            work.splits,
            settings,
            config.compare,
            pool=work.pool,
            progress_file=sys.stderr if as_json else None,
        )
        run.record_seconds(STAGE, time.perf_counter() - started)
        written = write_comparison(run.compare, found)
        if as_json:
            print(json.dumps(found, allow_nan=False))
            return
        print_comparison(work.console, found)
        work.say(f"{found['n_seeds']} seeds; written: {', '.join(map(str, written))}")


def win_rate(
    run: RunFolder, config: Config, options: WinRateOptions, *, quiet: bool = False
) -> dict[str, Any]:
    """Let a judge compare two methods' answers; the win rate, and the agreement with people if asked for.

    ``quiet``: progress and remarks go to standard error.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    from milp_ray.evaluation.human import read_choices, write_sheet
    from milp_ray.evaluation.judgements import read_judgements
    from milp_ray.evaluation.judging import judge_users, some_users
    from milp_ray.evaluation.win_rate import agreement, win_rates
    from milp_ray.personalize.store import run_store

    # Before anything is loaded or generated: what can be wrong with the call itself.
    choices = read_choices(options.human) if options.human else []
    options.check_sheet(run.path)
    with working(run, config, "winrate") as work:
        if quiet:
            work.console = Console(stderr=True)
        recipe = work.recipe
        judge = options.judge()
        judged = judge_users(
            run.judgements_file,
            some_users(work.splits, options.n_users, options.seed),
            recipe,
            config.evaluation,
            judge,
            methods=options.methods,
            settings=config.methods,
            pool=work.pool,
            store=run_store(run.store, config.personalize),
            is_everybody=options.n_users is None,
            with_sheet=options.sheet is not None,
            progress_file=sys.stderr if quiet else None,
        )
        work.failures["winrate"] = judged.failed_reasons
        if options.sheet is not None:
            write_sheet(options.sheet, judged.sheet, options.seed)
    section = config.evaluation
    draws = {"n_bootstrap": section.n_bootstrap, "confidence": section.confidence, "seed": config.seed}
    table = read_judgements(run.judgements_file)
    judged_now = pa.array(sorted(judged.user_ids), pa.string())
    table = table.filter(pc.is_in(table["user_id"], value_set=judged_now))
    call = (*options.methods, judge.name)

    def of_this_call(found: list[dict[str, Any]]) -> dict[str, Any]:
        return next(one for one in found if (one["method"], one["against"], one["judge"]) == call)

    return {
        **of_this_call(win_rates(table, draws)),
        "confidence": section.confidence,
        "agreement": of_this_call(agreement(table, choices, draws)) if options.human else None,
        "n_unclear": getattr(judge, "n_unclear", 0),
        "n_failed": judged.n_failed,
        "failed_reasons": judged.failed_reasons,
        "n_inapplicable": judged.n_inapplicable,
    }


def ability(
    run: RunFolder, config: Config, options: AbilityOptions, *, quiet: bool = False
) -> dict[str, Any]:
    """Measure what users' adapters cost on texts about nobody, and write ``ability.parquet``.

    ``quiet``: progress and remarks go to standard error.
    """
    from milp_ray.evaluation.ability import ability_of, measure_ability, population_texts
    from milp_ray.evaluation.judging import sample_of
    from milp_ray.personalize.store import run_store

    population = population_texts(config, options)
    with working(run, config, "ability") as work:
        if quiet:
            work.console = Console(stderr=True)
        found = measure_ability(
            run.ability_file,
            [split.user_id for split in sample_of(work.splits, options.n_users, options.seed)],
            population,
            config,
            pool=work.pool,
            store=run_store(run.store, config.personalize),
            progress_file=sys.stderr if quiet else None,
        )
        work.failures["ability"] = found
    measured = ability_of(run.ability_file, config)
    assert measured is not None  # a call that measured nobody has ended with its reason
    return {**measured, "n_failed": found.total(), "failed_reasons": dict(found)}


def leakage(
    run: RunFolder, config: Config, options: LeakageOptions, *, quiet: bool = False
) -> dict[str, Any]:
    """Audit whether users' adapters give other users' secrets away, and write ``leakage.json``.

    ``quiet``: progress and remarks go to standard error.
    """
    from milp_ray.atomic_files import write_json
    from milp_ray.personalize.governance.leakage import audit_leakage

    with working(run, config, "leakage") as work:
        if quiet:
            work.console = Console(stderr=True)
        recipe = work.recipe  # before Ray is started, so that a run without a layout is told at once
        found = audit_leakage(
            work.splits,
            recipe,
            options,
            config.evaluation,
            pool=work.pool,
            file=sys.stderr if quiet else None,
        )
        write_json(run.leakage_file, found)
        if not found["isolated"]:
            work.status.found = "users' adapters give other users' secrets away"
    return found
