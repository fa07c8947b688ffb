"""One command at work on a run: its users, recipe, Ray session and workers, each made when first asked for.

Ray and the workers that hold a base are opened once and serve all stages of a command.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

from milp_ray.errors import MilpError
from milp_ray.resident_memory import PeakMemory, peak_memory
from milp_ray.run_status import recorded
from milp_ray.table_console import table_console

if TYPE_CHECKING:
    from milp_ray.config import Config
    from milp_ray.config.evaluation import LayoutSection
    from milp_ray.gauges import Gauges
    from milp_ray.personalize.batch import BatchSummary, StreamedSplits
    from milp_ray.personalize.governance.consent import Gate
    from milp_ray.personalize.pool import WorkerPool
    from milp_ray.personalize.recipe import Recipe
    from milp_ray.run_status import Recorder
    from milp_ray.rundir import RunFolder
    from milp_ray.users.readers import LoadedUsers
    from milp_ray.users.records import UserSplit


class Work:
    """One command at work on a run: what its stages share."""

    def __init__(
        self, run: RunFolder, config: Config, stack: ExitStack, peak: PeakMemory, status: Recorder
    ) -> None:
        self.run = run
        self.config = config
        self.status = status
        self.console = table_console()
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
        store = run_store(self.run.store, self.config.personalize)
        return StreamedSplits(stream, section.split, self.gate, store)

    def open_ray(self) -> None:
        """Open a Ray session for the rest of the command, or go on with the one that is open."""
        from milp_ray.telemetry import ray_session

        self._stack.enter_context(ray_session(self.config.ray))

    @cached_property
    def gauges(self) -> Gauges:
        """Where the run's numbers go: the Ray dashboard, the run folder, and experiment trackers."""
        from milp_ray.gauges import Gauges
        from milp_ray.trackers import opened_trackers

        trackers = self._stack.enter_context(opened_trackers(self.config.tracking, self.run))
        return self._stack.enter_context(Gauges(self.run, trackers))

    @cached_property
    def pool(self) -> WorkerPool:
        """Workers that hold the base."""
        from milp_ray.personalize.batch import worker_pool

        self.open_ray()
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
                f"{self.run.place} has no chosen.yaml: run `milp-ray search` and `milp-ray choose` first"
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
def working(run: RunFolder, config: Config, command: str) -> Iterator[Work]:
    """Hold the run, tell in its status what ``command`` does, watch memory, and close what was opened."""
    from milp_ray.telemetry import configure_logging

    configure_logging()
    with (
        run.lock(),
        recorded(run, command) as status,
        peak_memory() as peak,
        ExitStack() as stack,
    ):
        work = Work(run, config, stack, peak, status)
        try:
            yield work
            status.failed = {stage: sum(reasons.values()) for stage, reasons in work.failures.items()}
        finally:
            work.record_peak_memory()
