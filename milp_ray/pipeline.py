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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from functools import cached_property
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from milp_ray.errors import MilpError
from milp_ray.outcome import base_facts, failures_table, front_table
from milp_ray.resident_memory import PeakMemory, peak_memory

if TYPE_CHECKING:
    from milp_ray.config import Config
    from milp_ray.config.evaluation import LayoutSection
    from milp_ray.evaluation.ability import AbilityOptions
    from milp_ray.evaluation.judging import WinRateOptions
    from milp_ray.personalize.batch import BatchSummary, StreamedSplits
    from milp_ray.personalize.governance.consent import Gate
    from milp_ray.personalize.governance.leakage import LeakageOptions
    from milp_ray.personalize.pool import WorkerPool
    from milp_ray.personalize.recipe import Recipe
    from milp_ray.rundir import RunFolder
    from milp_ray.search.conductor import StudyProgress
    from milp_ray.users.readers import LoadedUsers
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
        self.sources: tuple[str, ...] = ()  # of users, in place of the configuration's, for the batch
        self.batch: BatchSummary | None = None  # what the batch made
        self.failures: dict[str, Mapping[str, int]] = {}  # stage → reason → users, where some failed
        self._stack = stack
        self._peak = peak

    def say(self, line: str) -> None:
        """Print one line, never broken: paths and commands in it can be copied."""
        self.console.print(line, soft_wrap=True)

    @cached_property
    def gate(self) -> Gate:
        """Who may be trained and served."""
        from milp_ray.personalize.governance.consent import Gate
        from milp_ray.personalize.governance.record import Record

        return Gate(Record(self.run.path), self.config.users.consent)

    @cached_property
    def loaded(self) -> LoadedUsers:
        """The users of the configuration, whoever may be trained."""
        from milp_ray.users.readers import read_users

        return read_users(self.config.users, self.config.seed)

    @cached_property
    def splits(self) -> list[UserSplit]:
        """Every user that may be trained, split in time order, nothing held out in what is trained on."""
        from milp_ray.users.readers import dataset_hash
        from milp_ray.users.splits import check_no_leak, split_user

        loaded = self.loaded
        users = list(self.gate.admit(loaded.users))
        digest = dataset_hash(self.gate.remaining(user) for user in users)
        self.run.record_facts(dataset_hash=digest, n_users=len(users))
        reasons = self.say_refused()
        if not users:
            raise MilpError(
                f"none of {len(loaded.users)} users may be trained ({reasons}); give users who consent "
                '("consent": true), or set users.consent to assumed where the law lets you'
            )
        if loaded.problems:
            self.say(
                f"[yellow]{len(loaded.problems)} records are kept out[/], the first: {loaded.problems[0]}; "
                "`milp-ray users check` lists them"
            )
        if loaded.unknown_fields:
            self.say(f"[yellow]fields that are not read:[/] {', '.join(loaded.unknown_fields)}")
        splits = [self.gate.trimmed(split_user(user, self.config.users.split)) for user in users]
        for split in splits:
            check_no_leak(split)
        return splits

    def say_refused(self) -> str:
        """Tell how many users are left out; for which reasons."""
        reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(self.gate.refused.items()))
        if reasons:
            self.say(f"[yellow]{self.gate.refused.total()} users are left out:[/] {reasons}")
        return reasons

    @property
    def batch_users(self) -> list[UserSplit] | StreamedSplits:
        """Users of the batch: those that other stages have read already, or a stream of the files."""
        section = self.config.users
        if not self.sources and ("splits" in vars(self) or section.format not in ("jsonl", "parquet")):
            return self.splits
        from milp_ray.personalize.batch import StreamedSplits
        from milp_ray.personalize.store import run_store
        from milp_ray.users.sources import find_users_files, named_files
        from milp_ray.users.stream import UserStream

        if self.sources:
            stream = UserStream(find_users_files(self.sources))
        else:
            stream = UserStream(named_files(section), section.limit)
        store = run_store(self.run.adapters, self.config.personalize)
        return StreamedSplits(stream, section.split, self.gate, store)

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
        """What the adapters are made from: the chosen layout, and how users come by another one.

        Raises:
            MilpError: nothing was chosen yet, or ``personalize.layout`` needs a study that is not there.
        """
        import yaml

        from milp_ray.memory.architecture import adapter_parameters
        from milp_ray.personalize.layouts.evidence import layout_rule
        from milp_ray.personalize.layouts.rule import Candidate
        from milp_ray.personalize.recipe import Recipe
        from milp_ray.search.choice import chosen_layout
        from milp_ray.training.shapes import base_shapes

        try:
            chosen = yaml.safe_load(self.run.chosen_file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise MilpError(
                f"{self.run.path} has no chosen.yaml: run `milp-ray search` and `milp-ray choose` on it first"
            ) from None
        config, layout = self.config, chosen_layout(chosen)
        rule = None
        if config.personalize.layout != "chosen":
            size = adapter_parameters(layout, base_shapes(config.base))
            rule = layout_rule(self.run.journal, Candidate(layout, size), config.personalize)
        return Recipe(layout, config.base, config.training, config.prompt, config.seed, rule)

    def recipe_of(self, given: LayoutSection | None) -> Recipe:
        """The recipe with a layout that is given by hand, or with the chosen one.

        Raises:
            MilpError: none is given and nothing was chosen yet, or it is for a base of other depth.
        """
        if given is None:
            return self.recipe
        from milp_ray.memory.layout import CanonicalLayout
        from milp_ray.personalize.recipe import Recipe
        from milp_ray.training.base import model_config

        config = self.config
        n_layers = model_config(config.base).num_hidden_layers
        values = {"n_layers": n_layers, "layers": list(given.layers), "rank": given.rank}
        layout = CanonicalLayout.from_dict(values)
        return Recipe(layout, config.base, config.training, config.prompt, config.seed)

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


def run_all(run: RunFolder, config: Config) -> dict[str, int]:
    """Every stage in order; what an earlier command finished is not done again.

    Returns:
        How many users failed, by the stage in which they did; empty where none has. The others went on.
    """
    from milp_ray.personalize.store import run_store

    with _working(run, config) as work:
        # A store that cannot be written is told before the search, not after it.
        run_store(run.adapters, config.personalize).check()
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
    with _working(run, config) as work:
        work.sources = tuple(users)
        _do(work, "personalize")
        assert work.batch is not None
        return work.batch


def update(
    run: RunFolder, config: Config, user_ids: Sequence[str] | None = None, *, as_json: bool = False
) -> int:
    """Continue adapters with what is new since they were made, for all users or for some; print the outcomes.

    Returns:
        How many users failed.

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
            return summary.users["failed"]
        work.console.print(update_table(summary))
        if summary.users["kept"] or summary.users["failed"]:
            work.say(f"users whose adapter was not replaced, one a line: {run.updates_file}")
        return summary.users["failed"]


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


def evaluate(run: RunFolder, config: Config) -> int:
    """Score every method on the held-out queries and write ``scores.parquet``; how many users failed."""
    with _working(run, config) as work:
        _do(work, "evaluate")
        return sum(work.failures.get("evaluate", {}).values())


def report(run: RunFolder, config: Config) -> None:
    """Write ``summary.json``, the figures and the page."""
    _alone(run, config, "report")


def generate(run: RunFolder, config: Config, user_id: str, query: str, *, personal: bool = True) -> str:
    """The answer to a query with a user's adapter, or with the base alone.

    Raises:
        MilpError: there is no such user, or none that may be served.
    """
    from milp_ray.personalize.governance.consent import Gate, no_such_user
    from milp_ray.personalize.governance.record import Record
    from milp_ray.personalize.store import AdapterMissingError, run_store

    # Before the base is loaded, so that a wrong id is told at once.
    gate = Gate(Record(run.path), config.users.consent)
    gate.check_known(user_id, run.path)
    adapter = None
    if personal:
        gate.check_serving(user_id, run.path)
        try:
            adapter = run_store(run.adapters, config.personalize).load(user_id)
        except AdapterMissingError:
            raise no_such_user(user_id, run.path) from None

    from milp_ray.training.base import load_base
    from milp_ray.training.generation import Questions
    from milp_ray.training.generation import generate as respond
    from milp_ray.training.text import query_prompt

    base = load_base(config.base)
    section = config.evaluation
    asked = [Questions([query_prompt(query, config.prompt)], adapter)]
    [[answer]] = respond(base, asked, max_new_tokens=section.max_new_tokens, batch_size=1)
    return answer


def compare(run: RunFolder, config: Config, *, as_json: bool = False) -> None:
    """Compare every method on the users of ``config``; print the tables, and write them into the run.

    ``as_json``: standard output is the comparison as JSON, and nothing else.

    Raises:
        MilpError: no layout is given or chosen, nobody has a test example, or a method fails.
    """
    from milp_ray.compare_view import print_comparison, write_comparison
    from milp_ray.evaluation.side_by_side import STAGE, Settings, side_by_side

    with _working(run, config) as work:
        if as_json:
            work.console = Console(stderr=True)
        recipe = work.recipe_of(config.compare.layout)
        started = time.perf_counter()
        settings = Settings(recipe, config.evaluation, config.methods)
        found = side_by_side(run, work.splits, settings, config.compare, pool=work.pool)
        run.record_seconds(STAGE, time.perf_counter() - started)
        written = write_comparison(run.compare, found)
        if as_json:
            print(json.dumps(found, allow_nan=False))
            return
        print_comparison(work.console, found)
        work.say(f"{found['n_seeds']} seeds; written: {', '.join(map(str, written))}")


def leakage(
    run: RunFolder, config: Config, options: LeakageOptions, *, quiet: bool = False
) -> dict[str, Any]:
    """Audit whether users' adapters give other users' secrets away, and write ``leakage.json``.

    ``quiet``: progress and remarks go to standard error.
    """
    from milp_ray.personalize.governance.leakage import audit_leakage
    from milp_ray.rundir import write_json

    with _working(run, config) as work:
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
    return found


def win_rate(
    run: RunFolder, config: Config, options: WinRateOptions, *, quiet: bool = False
) -> dict[str, Any]:
    """Let a judge compare two methods' answers; the win rate, and the agreement with people if asked for.

    ``quiet``: progress and remarks go to standard error.
    """
    from milp_ray.evaluation.human import read_choices, write_sheet
    from milp_ray.evaluation.judgements import read_judgements
    from milp_ray.evaluation.judging import judge_users, some_users
    from milp_ray.evaluation.win_rate import agreement, win_rates
    from milp_ray.personalize.store import run_store

    # Before anything is loaded or generated: what can be wrong with the call itself.
    choices = read_choices(options.human) if options.human else []
    options.check_sheet(run.path)
    with _working(run, config) as work:
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
            pool=work.pool,
            store=run_store(run.adapters, config.personalize),
            with_sheet=options.sheet is not None,
            progress_file=sys.stderr if quiet else None,
        )
        if options.sheet is not None:
            write_sheet(options.sheet, judged.sheet, options.seed)
    section = config.evaluation
    draws = {"n_bootstrap": section.n_bootstrap, "confidence": section.confidence, "seed": config.seed}
    table = read_judgements(run.judgements_file)
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
    with _working(run, config) as work:
        if quiet:
            work.console = Console(stderr=True)
        found = measure_ability(
            run.ability_file,
            [split.user_id for split in sample_of(work.splits, options.n_users, options.seed)],
            population,
            config,
            pool=work.pool,
            store=run_store(run.adapters, config.personalize),
            progress_file=sys.stderr if quiet else None,
        )
    measured = ability_of(run.ability_file, config)
    assert measured is not None  # a call that measured nobody has ended with its reason
    return {**measured, "n_failed": found.total(), "failed_reasons": dict(found)}


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
    work.say(f'ask as a user: milp-ray generate {work.run.path} --user {user} "…"')


def _search(work: _Work) -> None:
    from milp_ray.progress import progress
    from milp_ray.search.study import StudySettings, run_study
    from milp_ray.training.shapes import base_shapes

    config = work.config
    probes = _probes(work)
    if probes is None:
        return
    work.run.record_facts(probe_users=[split.user_id for split in probes])
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
    work.run.record_facts(base=base_facts(config.base))
    if result.exhausted:
        work.say(f"the search measured all {len(result.trials)} layouts of the space")


def _probes(work: _Work) -> list[UserSplit] | None:
    """The probe users; those that the search began with, whoever else came or went since.

    ``None``: the search is finished, and one of them was forgotten or has gone, wholly or in part. What it
    found stays; nothing more can be measured on the same users.

    Raises:
        MilpError: so it is, and the search is not finished.
    """
    from milp_ray.search.journal import read_study

    search, by_id = work.config.search, {split.user_id: split for split in work.splits}
    state = read_study(work.run.journal)
    names = work.run.facts().get("probe_users")
    if state.header is None or not names:
        return probe_users(work.splits, search.n_probe_users, work.config.seed)
    n_gone = sum(name not in by_id or work.gate.is_trimmed(name) for name in names)
    if not n_gone:
        return [by_id[name] for name in names]
    n_ended = sum(trial.has_ended for trial in state.trials)
    what = f"{n_gone} of the {len(names)} users that the search measured on were forgotten or have gone"
    if state.finished is None:
        raise MilpError(
            f"{what}, so that its {n_ended} trials cannot be followed by comparable ones; go on from them "
            "with `milp-ray choose`, or search again with --fresh (who was forgotten stays so)"
        )
    work.say(f"the search stays as it is, with {n_ended} trials: {what}")
    return None


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
    from milp_ray.personalize.batch import BatchInterrupted, StreamedSplits
    from milp_ray.personalize.batch import personalize as make_adapters
    from milp_ray.personalize.store import run_store

    config, users = work.config, work.batch_users
    try:
        # A stream says how long it is only at its end: workers are opened when the first user is there.
        pool = None if isinstance(users, StreamedSplits) else work.pool
        summary = make_adapters(
            work.run, users, work.recipe, section=config.personalize, ray=config.ray, pool=pool
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
        store = run_store(work.run.adapters, config.personalize)
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


def _say_layouts(work: _Work, summary: BatchSummary) -> None:
    """Which layouts users got and what that cost, where they need not have the same one."""
    from milp_ray.report.layouts_text import layout_sentences, layout_title, terminal_table

    found = summary.layouts.to_dict()
    if found is None:
        return
    work.say(f"[bold]{layout_title(found)}[/]")
    work.console.print(terminal_table(found))
    for sentence in layout_sentences(found):
        work.say(sentence)


def _record_batch(work: _Work, summary: BatchSummary) -> None:
    work.batch = summary
    work.run.record_facts(personalize=summary.to_dict())
    work.run.update_summary(personalize=summary.to_dict())


def _record_stream(work: _Work, users: StreamedSplits) -> None:
    facts = {"dataset_hash": users.digest.hexdigest(), "n_users": users.digest.n_users}
    if work.sources:
        work.run.record_facts(batch_users={**facts, "n_files": len(users.stream.files)})
    else:
        work.run.record_facts(**facts)
    unknown_fields = sorted(users.stream.unknown_fields)
    if unknown_fields:
        work.say(f"[yellow]fields that are not read:[/] {escape(', '.join(unknown_fields))}")


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
