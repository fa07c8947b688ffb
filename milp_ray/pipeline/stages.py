"""The stages of a run, one function each, and all of them in order.

Every stage reads what earlier ones left in the run folder and writes its own files there, so that each can be
run, rerun or resumed alone.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rich.markup import escape

from milp_ray.outcome import base_facts, failures_table, front_table
from milp_ray.pipeline.probes import probes_of
from milp_ray.pipeline.work import Work, working

if TYPE_CHECKING:
    from milp_ray.config import Config
    from milp_ray.personalize.batch import BatchSummary, StreamedSplits
    from milp_ray.rundir import RunFolder
    from milp_ray.search.conductor import StudyProgress

STAGES = ("search", "choose", "personalize", "evaluate", "report")


def run_all(run: RunFolder, config: Config, *, preflight: bool = False) -> dict[str, int]:
    """Every stage in order; what an earlier command finished is not done again.

    Args:
        run: where everything goes.
        config: of the run.
        preflight: look at all nodes of the cluster before any work begins
            (:func:`milp_ray.launch.preflight.preflight`).

    Returns:
        How many users failed, by the stage in which they did; empty where none has. The others went on.
    """
    from milp_ray.personalize.store import run_store

    with working(run, config, "run") as work:
        # A store that cannot be written is told before the search, not after it.
        run_store(run.store, config.personalize).check()
        if preflight:
            _preflight(work)
        for stage in STAGES:
            _do(work, stage)
        _close(work)
        return {stage: sum(reasons.values()) for stage, reasons in work.failures.items()}


def search(run: RunFolder, config: Config) -> None:
    """Run the study, or what is left of it."""
    _alone(run, config, "search")


def choose(run: RunFolder, config: Config) -> None:
    """Choose a layout of the front and write ``chosen.yaml``."""
    _alone(run, config, "choose")


def personalize(run: RunFolder, config: Config, users: Sequence[str] = ()) -> BatchSummary:
    """Make the adapters that are not there yet under the chosen layout; how many, and who failed.

    Users of files are streamed, so that there may be any number of them.

    Args:
        run: where adapters and the summary go.
        config: its own users are taken where ``users`` names none.
        users: files, folders or URIs with users, in place of the configuration's.
    """
    with working(run, config, "personalize") as work:
        work.sources = tuple(users)
        _do(work, "personalize")
        assert work.batch is not None
        return work.batch


def evaluate(run: RunFolder, config: Config) -> int:
    """Score every method on the held-out queries and write ``scores.parquet``; how many users failed."""
    with working(run, config, "evaluate") as work:
        _do(work, "evaluate")
        return sum(work.failures.get("evaluate", {}).values())


def report(run: RunFolder, config: Config) -> None:
    """Write ``summary.json``, the figures and the page."""
    _alone(run, config, "report")


# ------------------------------------------------------------------------------------- one after the other


def _alone(run: RunFolder, config: Config, stage: str) -> None:
    with working(run, config, stage) as work:
        _do(work, stage)


def _do(work: Work, stage: str) -> None:
    started = time.perf_counter()
    work.status.stage(stage)
    try:
        _FUNCTIONS[stage](work)
    finally:
        work.run.record_seconds(stage, time.perf_counter() - started)


def _preflight(work: Work) -> None:
    from milp_ray.launch.preflight import preflight

    work.open_ray()
    nodes = preflight(work.config)
    n_gpus = sum(node.n_gpus for node in nodes)
    work.say(f"preflight: {len(nodes)} nodes, {n_gpus:g} GPUs, versions and storage are the same on all")


def _close(work: Work) -> None:
    """The last lines of a run: who failed, where the time went, and what to do next."""
    for stage, reasons in work.failures.items():
        work.console.print(failures_table(reasons, sum(reasons.values()), stage))
    seconds = work.run.seconds()
    by_stage = ", ".join(f"{stage} {seconds[stage]:.0f}" for stage in STAGES if stage in seconds)
    work.say(
        f"{sum(seconds.values()):.0f} s in all ({by_stage}); peak memory {work.run.peak_memory():,.0f} MiB"
    )
    work.say(f"results for programs: {work.run.summary_file}")
    user = shlex.quote(work.splits[0].user_id)
    work.say(f'ask as a user: milp-ray generate {work.run.place} --user {user} "…"')


# ---------------------------------------------------------------------------------------------- stages


def _search(work: Work) -> None:
    from milp_ray.progress import progress
    from milp_ray.search.study import StudySettings, run_study
    from milp_ray.training.shapes import base_shapes

    config = work.config
    probes = probes_of(work)
    if probes is None:
        return
    work.run.record_facts(probe_users=[split.user_id for split in probes])
    shapes = base_shapes(config.base)
    settings = StudySettings.of(config)
    work.open_ray()
    gauges = work.gauges
    with progress("search", config.search.n_trials, unit="trials") as bar:
        shown = 0

        def tell(now: StudyProgress) -> None:
            nonlocal shown
            notes = [f"hypervolume {now.hypervolume:.4g}"] if now.hypervolume is not None else []
            notes += [f"{now.n_stopped} stopped early"] if now.n_stopped else []
            notes += [f"{now.n_failed} failed"] if now.n_failed else []
            notes += ["proposing layouts"] if now.is_suggesting else []
            bar.advance(now.n_ended - shown, note=", ".join(notes))
            shown = now.n_ended
            gauges.set(
                now.n_ended,
                trials_planned=now.n_trials,
                trials_running=now.n_running,
                trials_finished=now.n_ended,
                trials_failed=now.n_failed,
                trials_stopped_early=now.n_stopped,
                best_validation_loss=now.best.get("validation_loss"),
                best_rouge_l=now.best.get("rouge_l"),
                hypervolume=now.hypervolume,
                suggestion_seconds=now.suggestion_seconds,
                startup_seconds=now.startup_seconds,
                idle_slots=now.n_idle,
                gpu_memory_mib=now.gpu_memory_mib,
            )
            if now.ended is not None:
                gauges.log_trial(now.ended)

        result = run_study(work.run.study, settings, probes, shapes, tell)
        bar.advance(len(result.trials) - shown)  # a search that an earlier command finished
    work.run.record_facts(base=base_facts(config.base))
    if result.exhausted:
        work.say(f"the search measured all {len(result.trials)} layouts of the space")


def _choose(work: Work) -> None:
    from milp_ray.atomic_files import write_yaml
    from milp_ray.search import choice
    from milp_ray.search.results import load_result

    result = load_result(work.run.journal)
    chosen = choice.choose(result.front, result.objectives, work.config.choice)
    write_yaml(work.run.chosen_file, chosen.to_dict())
    work.console.print(front_table(result, chosen))
    work.say(f"chosen by {chosen.rule}: [bold]{chosen.layout.key}[/]. {chosen.reason}")


def _personalize(work: Work) -> None:
    from milp_ray.personalize.batch import BatchInterrupted, StreamedSplits
    from milp_ray.personalize.batch import personalize as make_adapters
    from milp_ray.personalize.governance.given import note_given
    from milp_ray.personalize.store import run_store

    config, users = work.config, work.batch_users
    if work.sources:
        note_given(work.run, work.sources)
    try:
        # A stream says how long it is only at its end: workers are opened when the first user is there.
        pool = None if isinstance(users, StreamedSplits) else work.pool
        summary = make_adapters(
            work.run,
            users,
            work.recipe,
            section=config.personalize,
            ray=config.ray,
            pool=pool,
            gauges=work.gauges,
        )
    except BatchInterrupted as interrupted:
        _record_batch(work, interrupted.summary)
        raise
    _record_batch(work, summary)
    if isinstance(users, StreamedSplits):
        _record_stream(work, users)
        work.say_refused()
        n_unserved = users.n_unserved
    else:
        store = run_store(work.run.store, config.personalize)
        n_unserved = work.gate.note_file(work.loaded.users, work.loaded.problems, store)
    if n_unserved:
        work.say(
            f"[yellow]{n_unserved} users without consent have an adapter from before:[/] it is not served; "
            "`milp-ray forget` removes it"
        )
    _say_layouts(work, summary)
    if summary.failed:
        work.failures["personalize"] = summary.reasons
        work.console.print(failures_table(summary.reasons, summary.failed))
    line = f"{summary.done} adapters made, {summary.skipped} were finished before"
    if summary.withdrawn:
        line += f", {summary.withdrawn} users without consent left out"
    if summary.failed:
        line += f", [red]{summary.failed} users failed[/] (each with its reason in {work.run.failed_file})"
    work.say(line)


def _say_layouts(work: Work, summary: BatchSummary) -> None:
    """Which layouts users got and what that cost, where they need not have the same one."""
    from milp_ray.report.layouts_text import layout_sentences, layout_title, terminal_table

    found = summary.layouts.to_dict()
    if found is None:
        return
    work.say(f"[bold]{layout_title(found)}[/]")
    work.console.print(terminal_table(found))
    for sentence in layout_sentences(found):
        work.say(sentence)


def _record_batch(work: Work, summary: BatchSummary) -> None:
    work.batch = summary
    work.run.record_facts(personalize=summary.to_dict())
    work.run.update_summary(personalize=summary.to_dict())


def _record_stream(work: Work, users: StreamedSplits) -> None:
    facts = {"dataset_hash": users.digest.hexdigest(), "n_users": users.digest.n_users}
    if work.sources:
        before = work.run.facts().get("batch_users") or {}
        work.run.record_facts(batch_users={**before, **facts, "n_files": len(users.stream.files)})
    else:
        work.run.record_facts(**facts)
    unknown_fields = sorted(users.stream.unknown_fields)
    if unknown_fields:
        work.say(f"[yellow]fields that are not read:[/] {escape(', '.join(unknown_fields))}")


def _evaluate(work: Work) -> None:
    from milp_ray.evaluation.stage import FAILED_FILE
    from milp_ray.evaluation.stage import evaluate as score
    from milp_ray.evaluation.tables import terminal_tables
    from milp_ray.personalize.store import run_store

    found = score(
        work.run,
        work.splits,
        work.recipe,
        work.config.evaluation,
        pool=work.pool,
        store=run_store(work.run.store, work.config.personalize),
        settings=work.config.methods,
    )
    counts = {name: found[name] for name in ("n_failed", "n_without_test", "n_kept_versions")}
    work.run.record_facts(evaluate=counts)
    for table in terminal_tables(found):
        work.console.print(table)
    if found["n_kept_versions"]:
        work.say(
            f"[yellow]{found['n_kept_versions']} users were scored with an adapter older than their data:[/] "
            f"the guard refused its update (reasons in {work.run.updates_file})"
        )
    if found["n_without_test"]:
        work.say(f"{found['n_without_test']} users have no test example and are not in the tables")
    if found["n_failed"]:
        work.failures["evaluate"] = found["failed_reasons"]
        reasons = work.run.path / FAILED_FILE
        work.say(f"[red]{found['n_failed']} users could not be scored[/] (reasons in {reasons})")


def _report(work: Work) -> None:
    from milp_ray.report.stage import write_report

    work.record_peak_memory()
    started = time.perf_counter()
    page = write_report(work.run)
    # The page cannot tell how long it took to write it; the summary can.
    summary = json.loads(work.run.summary_file.read_text(encoding="utf-8"))
    spent = round(time.perf_counter() - started, 3)
    work.run.write_summary({**summary, "seconds": {**work.run.seconds(), "report": spent}})
    work.say(f"report: {page}")


_FUNCTIONS: dict[str, Callable[[Work], None]] = {
    "search": _search,
    "choose": _choose,
    "personalize": _personalize,
    "evaluate": _evaluate,
    "report": _report,
}
