"""The stages of a run, one function each, and all of them in order.

Every stage reads what earlier ones left in the run folder and writes its own files there, so that each can be
run, rerun or resumed alone. Ray and the workers that hold a base are opened once and serve all stages of a
command.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

from rich.console import Console

from milp_ray.errors import MilpError
from milp_ray.resident_memory import peak_memory

if TYPE_CHECKING:
    from milp_ray.config import Config
    from milp_ray.memory.layout import CanonicalLayout
    from milp_ray.personalize.pool import WorkerPool
    from milp_ray.rundir import RunFolder
    from milp_ray.users.records import UserSplit

STAGES = ("search", "choose", "personalize", "evaluate", "report")


class _Work:
    """One command at work on a run: what its stages share."""

    def __init__(self, run: RunFolder, config: Config, stack: ExitStack) -> None:
        self.run = run
        self.config = config
        self.console = Console(highlight=False, emoji=False)
        self._stack = stack

    @cached_property
    def splits(self) -> list[UserSplit]:
        """Every user, split in time order, and shown to hold nothing of what is held out."""
        from milp_ray.users.readers import read_users
        from milp_ray.users.splits import check_no_leak, split_user

        loaded = read_users(self.config.users, self.config.seed)
        self.run.record_facts(dataset_hash=loaded.dataset_hash, n_users=len(loaded.users))
        if loaded.problems:
            self.console.print(
                f"[yellow]{len(loaded.problems)} records are kept out[/], the first: {loaded.problems[0]}; "
                "`milp-ray users check` lists them"
            )
        if loaded.unknown_fields:
            self.console.print(f"[yellow]fields that are not read:[/] {', '.join(loaded.unknown_fields)}")
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

    @cached_property
    def layout(self) -> CanonicalLayout:
        """The chosen layout.

        Raises:
            MilpError: nothing was chosen yet.
        """
        import yaml

        from milp_ray.search.choice import chosen_layout

        try:
            text = self.run.chosen_file.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise MilpError(
                f"{self.run.path} has no chosen.yaml: run `milp-ray search` and `milp-ray choose` on it first"
            ) from None
        return chosen_layout(yaml.safe_load(text))


@contextmanager
def _working(run: RunFolder, config: Config) -> Iterator[_Work]:
    """Hold the run, watch memory, and close at the end whatever the stages opened."""
    from milp_ray.telemetry import configure_logging

    configure_logging()
    with run.lock(), peak_memory() as peak, ExitStack() as stack:
        try:
            yield _Work(run, config, stack)
        finally:
            peak.sample()
            run.record_peak_memory(peak.mib)


@contextmanager
def _timed(run: RunFolder, stage: str) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        run.record_seconds(stage, time.perf_counter() - started)
