"""A trial that several processes train: Ray Train's workers, told what to do from inside the trial.

The trial's own process holds no resources and computes nothing. It starts a ``TorchTrainer``, whose workers
(one a GPU) load the base once and then take orders, layout after layout, for as long as Tune keeps the
trial's process. Orders and results are plain data and pass through a mailbox, an actor; weights stay with the
workers. Ray Train gives every group a rendezvous address and port of its own.

Ray Train reserves its workers' resources in a placement group that it makes itself, all of them or none; it
cannot be given the trial's (Train V2: ``WorkerGroup._create_placement_group``). So the trial asks Tune for
next to nothing, no resource is counted twice, and how many trials run at once is the conductor's business: a
group too many would wait for its workers, and hold nothing meanwhile.

A worker that is lost ends its group. Should the trial's own process be killed, Ray gives the workers'
resources back where its dashboard runs, and otherwise when the search ends (ray#54305).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from milp_ray.errors import MilpError
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.personalize.worker import safe_reason
from milp_ray.search.measure import Measurement, TrialTask
from milp_ray.search.trainers import SCRATCH_PREFIX
from milp_ray.telemetry import log_event, prepare_worker

if TYPE_CHECKING:
    from ray.tune import PlacementGroupFactory

    from milp_ray.config.search import SearchSection
    from milp_ray.training.base import Base

_RUNG, _FINISH, _CLOSE, _END = "rung", "finish", "close", "end"
_VALUES, _FAILED, _BROKEN = "values", "failed", "broken"  # what an answer holds
_SECONDS_BETWEEN_LOOKS = 1.0
_SECONDS_TO_END = 60.0


class GroupFailed(Exception):
    """The processes of a trial cannot go on; the message holds no text of a user."""


@dataclass(frozen=True)
class GroupSpec:
    """How many processes train one trial, and the CPUs and GPUs of each."""

    n_processes: int
    cpus: float
    gpus: float

    @classmethod
    def of(cls, section: SearchSection) -> GroupSpec | None:
        """What a search asks for; ``None`` where a trial is one process."""
        n = section.n_processes
        if n == 1:
            return None
        return cls(n, section.cpus_per_trial / n, section.gpus_per_trial / n)


def no_resources() -> PlacementGroupFactory:
    """What Tune reserves for the process of a trial that others compute: the least that it can."""
    from ray.tune import PlacementGroupFactory

    return PlacementGroupFactory([{"memory": 1.0}])  # a byte


class TrialGroup:
    """The processes of the trials that follow each other in one of Tune's actors."""

    def __init__(self, task: TrialTask, spec: GroupSpec) -> None:
        self._task = task
        self._spec = spec
        self._mailbox: Any = None
        self._thread: threading.Thread | None = None
        self._folder: TemporaryDirectory[str] | None = None
        self._n_orders = 0

    def measurement(self, layout: CanonicalLayout) -> GroupMeasurement:
        """The measurement of a layout; it has what :class:`milp_ray.search.measure.Measurement` has."""
        return GroupMeasurement(self, layout, len(self._task.rungs))

    def order(self, what: str, layout: CanonicalLayout | None = None) -> int:
        """Tell every process what to do next; the number of the order."""
        import ray

        self._start()
        described = {"what": what, "layout": None if layout is None else layout.to_dict()}
        ray.get(self._mailbox.order.remote(described))
        self._n_orders += 1
        return self._n_orders - 1

    def answer(self, number: int) -> dict[str, Any]:
        """What came of an order.

        Raises:
            MilpError: training failed in a way that it would fail again; the processes are at hand.
            GroupFailed: they are not.
        """
        import ray

        reply = self._mailbox.wait_for_answer.remote(number)
        while not ray.wait([reply], timeout=_SECONDS_BETWEEN_LOOKS)[0]:
            if self._thread is None or not self._thread.is_alive():
                raise GroupFailed("a training process of the trial was lost")
        answer: dict[str, Any] = ray.get(reply)
        if _FAILED in answer:
            raise MilpError(answer[_FAILED])
        if _BROKEN in answer:
            raise GroupFailed(answer[_BROKEN])
        values: dict[str, Any] = answer[_VALUES]
        return values

    def end(self) -> None:
        """End the processes and give their resources back; the next order starts new ones."""
        import ray

        from milp_ray.search.lost import LOST

        if self._thread is None:
            return
        if self._thread.is_alive():
            # Where the mailbox itself was lost, the processes fail at it and end as well.
            with contextlib.suppress(*LOST):
                ray.get(self._mailbox.order.remote({"what": _END, "layout": None}))
            self._thread.join(_SECONDS_TO_END)
        ray.kill(self._mailbox)
        self._mailbox = self._thread = None
        self._n_orders = 0
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _start(self) -> None:
        import ray

        if self._thread is not None:
            return
        self._mailbox = ray.remote(num_cpus=0)(Mailbox).remote()
        self._folder = TemporaryDirectory(prefix=f"{SCRATCH_PREFIX}{os.getpid()}-")
        # The task holds users' texts: a reference to it is all that Ray Train's records can show.
        config = {"mailbox": self._mailbox, "task": ray.put(self._task)}
        self._thread = threading.Thread(
            target=_fit, args=(self._spec, config, self._folder.name), name="trial-group", daemon=True
        )
        self._thread.start()
        log_event("trial_group_started", processes=self._spec.n_processes)


class GroupMeasurement:
    """The measurement of one layout by a :class:`TrialGroup`."""

    def __init__(self, group: TrialGroup, layout: CanonicalLayout, n_rungs: int) -> None:
        self._group = group
        self._layout = layout
        self._n_rungs_left = n_rungs
        self._is_begun = False

    @property
    def has_rungs_left(self) -> bool:
        """Whether :meth:`next_rung` comes next, and not yet :meth:`finish`."""
        return self._n_rungs_left > 0

    def next_rung(self) -> dict[str, Any]:
        """As :meth:`milp_ray.search.measure.Measurement.next_rung`."""
        values = self._ask(_RUNG)
        self._n_rungs_left -= 1
        return values

    def finish(self) -> dict[str, Any]:
        """As :meth:`milp_ray.search.measure.Measurement.finish`."""
        values = self._ask(_FINISH)
        self._is_begun = False  # nothing is kept any more
        return values

    def close(self) -> None:
        """Let the processes remove what they keep of a measurement that was begun."""
        if self._is_begun:
            self._is_begun = False
            self._group.order(_CLOSE)

    def _ask(self, what: str) -> dict[str, Any]:
        number = self._group.order(what, self._layout)
        self._is_begun = True
        try:
            return self._group.answer(number)
        except MilpError:
            self._is_begun = False
            raise
        except GroupFailed:
            self._is_begun = False
            self._group.end()
            raise


class Mailbox:
    """Orders from a trial to its processes, each of which takes all of them, and the answers. An actor."""

    def __init__(self) -> None:
        self._orders: list[dict[str, Any]] = []
        self._answers: dict[int, dict[str, Any]] = {}
        self._changed = asyncio.Condition()

    async def order(self, order: dict[str, Any]) -> None:
        """Append an order."""
        async with self._changed:
            self._orders.append(order)
            self._changed.notify_all()

    async def wait_for_order(self, number: int) -> dict[str, Any]:
        """Order ``number``, as soon as it is there."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._orders) > number)
            return self._orders[number]

    async def answer(self, number: int, answer: dict[str, Any]) -> None:
        """Answer an order; the first answer counts (an error of one process comes before the others')."""
        async with self._changed:
            self._answers.setdefault(number, answer)
            self._changed.notify_all()

    async def wait_for_answer(self, number: int) -> dict[str, Any]:
        """The answer to order ``number``, as soon as it is there."""
        async with self._changed:
            await self._changed.wait_for(lambda: number in self._answers)
            return self._answers.pop(number)


def _fit(spec: GroupSpec, config: dict[str, Any], folder: str) -> None:
    """Run the group until it is told to end, or one of its processes is lost; errors came by the mailbox."""
    # This process is one of Tune's workers and nothing else. Paths of a configuration are relative to the
    # working directory, which Ray Train would change in its workers.
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    os.environ["RAY_TRAIN_V2_ENABLED"] = "1"
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # a process more, for a warning nobody reads
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    resources = {"CPU": spec.cpus} | ({"GPU": spec.gpus} if spec.gpus else {})
    trainer = TorchTrainer(
        _serve,
        train_loop_config=config,
        scaling_config=ScalingConfig(
            num_workers=spec.n_processes, use_gpu=spec.gpus > 0, resources_per_worker=resources
        ),
        run_config=RunConfig(name="group", storage_path=folder, failure_config=FailureConfig(max_failures=0)),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        log_event("trial_group_failed", error=type(error).__name__)


# ------------------------------------------------------------------------------- in each of the processes


def _serve(config: dict[str, Any]) -> None:
    """Take orders until there are no more."""
    import ray

    task: TrialTask = ray.get(config["task"])
    prepare_worker(task.threads)
    server = _Server(task)
    for number in range(1 << 62):
        order = ray.get(config["mailbox"].wait_for_order.remote(number))
        if order["what"] == _END:
            server.close()
            return
        answer = server.obey(order)
        is_awaited = order["what"] != _CLOSE
        if (server.speaks and is_awaited) or _BROKEN in answer:
            ray.get(config["mailbox"].answer.remote(number, answer))
        if _BROKEN in answer:
            server.close()
            # The others may wait for this process in the middle of something: Ray Train ends them all.
            raise GroupFailed(answer[_BROKEN])


class _Server:
    """One process of the group: its base, and the measurement at hand."""

    def __init__(self, task: TrialTask) -> None:
        from milp_ray.training.distributed import Processes

        self.speaks = Processes.here().is_first
        self._task = task
        self._base: Base | None = None
        self._measurement: Measurement | None = None

    def obey(self, order: dict[str, Any]) -> dict[str, Any]:
        """Carry out an order and answer it; no exception leaves, whose message may quote a text."""
        try:
            return {_VALUES: self._carry_out(order)}
        except MilpError as error:
            if self._base is None:
                # Perhaps this process alone could not load it: the others would wait in vain.
                return {_BROKEN: str(error)}
            self.close()
            return {_FAILED: str(error)}
        except Exception as error:
            return {_BROKEN: safe_reason(error)}

    def close(self) -> None:
        """Remove what the measurement at hand kept."""
        if self._measurement is not None:
            self._measurement.close()
            self._measurement = None

    def _carry_out(self, order: dict[str, Any]) -> dict[str, Any]:
        if order["what"] == _CLOSE:
            self.close()
            return {}
        if self._base is None:
            self._base = _load_base(self._task)
        if self._measurement is None:
            layout = CanonicalLayout.from_dict(order["layout"])
            self._measurement = Measurement(self._base, layout, self._task, scores_texts=self.speaks)
        if order["what"] == _RUNG:
            return self._measurement.next_rung()
        values = self._measurement.finish()
        self.close()
        return values


def _load_base(task: TrialTask) -> Base:
    """The base on this process's own device: Ray shows every GPU of the group on a node to each process."""
    from ray.train.torch import get_device

    from milp_ray.training.base import load_base

    device = get_device()
    section = task.base
    if device.type == "cuda":
        section = section.model_copy(update={"device": str(device)})
    return load_base(section)
