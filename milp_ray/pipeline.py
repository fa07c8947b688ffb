"""The stages of a run, one function each, and all of them in order.

Every stage reads what earlier ones left in the run folder and writes its own files there, so that each can be
run, rerun or resumed alone. Ray and the workers that hold a base are opened once and serve all stages of a
command.
"""

from __future__ import annotations

import json
import random
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from functools import cached_property
from typing import TYPE_CHECKING, Any

from rich.console import Console

from milp_ray.errors import MilpError
from milp_ray.outcome import base_facts, front_table
from milp_ray.resident_memory import PeakMemory, peak_memory

if TYPE_CHECKING:
    from milp_ray.config import Config
    from milp_ray.personalize.pool import WorkerPool
    from milp_ray.personalize.recipe import Recipe
    from milp_ray.rundir import RunFolder
    from milp_ray.search.conductor import StudyProgress
    from milp_ray.users.records import UserSplit

_LOG_WIDTH = 120
STAGES = ("search", "choose", "personalize", "evaluate", "report")


class _Work:
    """One command at work on a run: what its stages share."""

    def __init__(self, run: RunFolder, config: Config, stack: ExitStack, peak: PeakMemory) -> None:
        self.run = run
        self.config = config
        # A log is not a terminal of 80 columns: tables keep the width they need.
        self.console = Console(
            highlight=False, emoji=False, width=None if sys.stdout.isatty() else _LOG_WIDTH
        )
        self._stack = stack
        self._peak = peak

    def say(self, line: str) -> None:
        """Print one line, never broken: paths and commands in it can be copied."""
        self.console.print(line, soft_wrap=True)

    @cached_property
    def splits(self) -> list[UserSplit]:
        """Every user, split in time order, and shown to hold nothing of what is held out."""
        from milp_ray.users.readers import read_users
        from milp_ray.users.splits import check_no_leak, split_user

        loaded = read_users(self.config.users, self.config.seed)
        self.run.record_facts(dataset_hash=loaded.dataset_hash, n_users=len(loaded.users))
        if loaded.problems:
            self.say(
                f"[yellow]{len(loaded.problems)} records are kept out[/], the first: {loaded.problems[0]}; "
                "`milp-ray users check` lists them"
            )
        if loaded.unknown_fields:
            self.say(f"[yellow]fields that are not read:[/] {', '.join(loaded.unknown_fields)}")
        splits = [split_user(user, self.config.users.split) for user in loaded.users]
        for split in splits:
            check_no_leak(split)
        return splits

    @cached_property
    def ray(self) -> Any:
        """The Ray session, opened when the first stage asks for it."""
        from milp_ray.telemetry import ray_session

        return self._stack.enter_context(ray_session(self.config.ray))

    @cached_property
    def pool(self) -> WorkerPool:
        """Workers that hold the base."""
        from milp_ray.personalize.batch import worker_pool

        self.ray  # noqa: B018 -- workers live in the session
        return self._stack.enter_context(
            worker_pool(self.config.base, self.config.personalize, self.config.ray)
        )

    @property
    def recipe(self) -> Recipe:
        """What the adapters are made from, the chosen layout included.

        Raises:
            MilpError: nothing was chosen yet.
        """
        import yaml

        from milp_ray.personalize.recipe import Recipe
        from milp_ray.search.choice import chosen_layout

        try:
            chosen = yaml.safe_load(self.run.chosen_file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise MilpError(
                f"{self.run.path} has no chosen.yaml: run `milp-ray search` and `milp-ray choose` on it first"
            ) from None
        config = self.config
        return Recipe(chosen_layout(chosen), config.base, config.training, config.prompt, config.seed)

    def record_peak_memory(self) -> None:
        """Measure now, and keep the largest in the run folder."""
        self._peak.sample()
        self.run.record_peak_memory(self._peak.mib)


@contextmanager
def _working(run: RunFolder, config: Config) -> Iterator[_Work]:
    """Hold the run, watch memory, and close at the end whatever the stages opened."""
    from milp_ray.telemetry import configure_logging

    configure_logging()
    with run.lock(), peak_memory() as peak, ExitStack() as stack:
        work = _Work(run, config, stack, peak)
        try:
            yield work
        finally:
            work.record_peak_memory()


# ---------------------------------------------------------------------------------------------- public


def run_all(run: RunFolder, config: Config) -> None:
    """Every stage in order; what an earlier command finished is not done again."""
    from milp_ray.personalize.store import run_store

    with _working(run, config) as work:
        # A store that cannot be written is told before the search, not after it.
        run_store(run.adapters, config.personalize).check()
        for stage in STAGES:
            _do(work, stage)
        _close(work)


def search(run: RunFolder, config: Config) -> None:
    """Run the study, or what is left of it."""
    _alone(run, config, "search")


def choose(run: RunFolder, config: Config) -> None:
    """Choose a layout of the front and write ``chosen.yaml``."""
    _alone(run, config, "choose")


def personalize(run: RunFolder, config: Config) -> None:
    """Make the adapters that are not there yet under the chosen layout."""
    _alone(run, config, "personalize")


def update(
    run: RunFolder, config: Config, user_ids: Sequence[str] | None = None, *, as_json: bool = False
) -> None:
    """Continue adapters with what is new since they were made, for all users or for some; print the outcomes.

    Raises:
        MilpError: the run has no user of an id.
    """
    from milp_ray.personalize.update import update as update_adapters
    from milp_ray.personalize.update import update_table

    with _working(run, config) as work:
        started = time.perf_counter()
        # Standard output is for the JSON alone, where that is asked for.
        with redirect_stdout(sys.stderr if as_json else sys.stdout):
            try:
                # Ray and its workers are started only where there is something to do.
                summary = update_adapters(
                    run,
                    work.splits if user_ids is None else _some(work.splits, user_ids),
                    work.recipe,
                    section=config.update,
                    personalize=config.personalize,
                    ray=config.ray,
                )
            finally:
                run.record_seconds("update", time.perf_counter() - started)
        run.record_facts(update=summary.to_dict())
        if as_json:
            print(json.dumps(summary.to_dict(), indent=2, allow_nan=False))
            return
        work.console.print(update_table(summary))
        if summary.users["kept"] or summary.users["failed"]:
            work.say(f"users whose adapter was not replaced, one a line: {run.updates_file}")


def _some(splits: Sequence[UserSplit], user_ids: Sequence[str]) -> list[UserSplit]:
    """The users of these ids."""
    wanted = set(user_ids)
    found = [split for split in splits if split.user_id in wanted]
    missing = sorted(wanted - {split.user_id for split in found})
    if missing:
        raise MilpError(
            f"the run has no user {missing[0]!r}"
            + (f" and {len(missing) - 1} others" * (len(missing) > 1))
            + "; `milp-ray users check CONFIG` lists what was read"
        )
    return found


def evaluate(run: RunFolder, config: Config) -> None:
    """Score every method on the held-out queries and write ``scores.parquet``."""
    _alone(run, config, "evaluate")


def report(run: RunFolder, config: Config) -> None:
    """Write ``summary.json``, the figures and the page."""
    _alone(run, config, "report")


def generate(run: RunFolder, config: Config, user_id: str, query: str, *, personal: bool = True) -> str:
    """The answer to a query with a user's adapter, or with the base alone.

    Raises:
        MilpError: the store holds no adapter of the user.
    """
    from milp_ray.personalize.store import run_store

    # Before the base is loaded, so that a wrong id is told at once.
    adapter = run_store(run.adapters, config.personalize).load(user_id) if personal else None

    from milp_ray.training.base import load_base
    from milp_ray.training.generation import Questions
    from milp_ray.training.generation import generate as respond
    from milp_ray.training.text import query_prompt

    base = load_base(config.base)
    section = config.evaluation
    asked = [Questions([query_prompt(query, config.prompt)], adapter)]
    [[answer]] = respond(base, asked, max_new_tokens=section.max_new_tokens, batch_size=1)
    return answer


def probe_users(splits: Sequence[UserSplit], n: int, seed: int) -> list[UserSplit]:
    """The users that a search measures layouts on: a seeded sample of those with validation examples.

    Raises:
        MilpError: fewer than ``n`` users have any.
    """
    able = [split for split in splits if split.validation and (split.history or split.train)]
    if len(able) < n:
        raise MilpError(
            f"search.n_probe_users is {n}, but {len(able)} of {len(splits)} users have validation examples "
            "and something to train on; lower it, or raise users.split.validation"
        )
    chosen = set(random.Random(f"probe users {seed}").sample(range(len(able)), n))
    return [split for index, split in enumerate(able) if index in chosen]


# ---------------------------------------------------------------------------------------------- stages


def _alone(run: RunFolder, config: Config, stage: str) -> None:
    with _working(run, config) as work:
        _do(work, stage)


def _do(work: _Work, stage: str) -> None:
    started = time.perf_counter()
    try:
        _FUNCTIONS[stage](work)
    finally:
        work.run.record_seconds(stage, time.perf_counter() - started)


def _close(work: _Work) -> None:
    """The last lines of a run: where the time went, and what to do next."""
    seconds = work.run.seconds()
    by_stage = ", ".join(f"{stage} {seconds[stage]:.0f}" for stage in STAGES if stage in seconds)
    work.say(
        f"{sum(seconds.values()):.0f} s in all ({by_stage}); peak memory {work.run.peak_memory():,.0f} MiB"
    )
    work.say(f"results for programs: {work.run.summary_file}")
    user = shlex.quote(work.splits[0].user_id)
    work.say(f'ask as a user: milp-ray generate {work.run.path} --user {user} "…"')


def _search(work: _Work) -> None:
    from milp_ray.progress import progress
    from milp_ray.search.study import StudySettings, run_study
    from milp_ray.training.shapes import base_shapes

    config = work.config
    probes = probe_users(work.splits, config.search.n_probe_users, config.seed)
    shapes = base_shapes(config.base)
    settings = StudySettings.of(config)
    work.ray  # noqa: B018 -- a study needs Ray to be up
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

        result = run_study(work.run.study, settings, probes, shapes, tell)
        bar.advance(len(result.trials) - shown)  # a search that an earlier command finished
    work.run.record_facts(base=base_facts(config.base), probe_users=[split.user_id for split in probes])
    if result.exhausted:
        work.say(f"the search measured all {len(result.trials)} layouts of the space")


def _choose(work: _Work) -> None:
    from milp_ray.rundir import write_yaml
    from milp_ray.search import choice
    from milp_ray.search.results import load_result

    result = load_result(work.run.journal)
    chosen = choice.choose(result.front, result.objectives, work.config.choice)
    write_yaml(work.run.chosen_file, chosen.to_dict())
    work.console.print(front_table(result, chosen))
    work.say(f"chosen by {chosen.rule}: [bold]{chosen.layout.key}[/]. {chosen.reason}")


def _personalize(work: _Work) -> None:
    from milp_ray.personalize.batch import personalize as make_adapters

    config = work.config
    summary = make_adapters(
        work.run, work.splits, work.recipe, section=config.personalize, ray=config.ray, pool=work.pool
    )
    work.run.record_facts(personalize=summary.to_dict())
    line = f"{summary.done} adapters made, {summary.skipped} were finished before"
    if summary.failed:
        line += f", [red]{summary.failed} users failed[/] (reasons in {work.run.failed_file})"
    work.say(line)


def _evaluate(work: _Work) -> None:
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
        store=run_store(work.run.adapters, work.config.personalize),
    )
    for table in terminal_tables(found):
        work.console.print(table)
    if found["n_without_test"]:
        work.say(f"{found['n_without_test']} users have no test example and are not in the tables")
    if found["n_failed"]:
        reasons = work.run.path / FAILED_FILE
        work.say(f"[red]{found['n_failed']} users could not be scored[/] (reasons in {reasons})")


def _report(work: _Work) -> None:
    from milp_ray.report.stage import write_report

    work.record_peak_memory()
    started = time.perf_counter()
    page = write_report(work.run)
    # The page cannot tell how long it took to write it; the summary can.
    summary = json.loads(work.run.summary_file.read_text(encoding="utf-8"))
    spent = round(time.perf_counter() - started, 3)
    work.run.write_summary({**summary, "seconds": {**work.run.seconds(), "report": spent}})
    work.say(f"report: {page}")


_FUNCTIONS: dict[str, Callable[[_Work], None]] = {
    "search": _search,
    "choose": _choose,
    "personalize": _personalize,
    "evaluate": _evaluate,
    "report": _report,
}
