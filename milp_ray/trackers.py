"""Experiment trackers that a run's numbers go to beside the Ray dashboard: TensorBoard and MLflow.

They get what the gauges get (:mod:`milp_ray.gauges`), and the values of each trial. One that cannot be opened
is an error before any work is done; one that is lost later costs a warning and its numbers, never the run.
Nobody waits for them: they write in threads of their own.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from milp_ray.atomic_files import write_json
from milp_ray.errors import MilpError
from milp_ray.telemetry import logger

if TYPE_CHECKING:
    from milp_ray.config.tracking import TrackingSection
    from milp_ray.rundir import RunFolder


class Tracker(Protocol):
    """Takes numbers by name at a step."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record values; of one name, the step counts up."""

    def close(self) -> None:
        """Write what is left."""


@contextmanager
def opened_trackers(section: TrackingSection, run: RunFolder) -> Iterator[list[Tracker]]:
    """The trackers that a configuration asks for, open until the block is left.

    Raises:
        MilpError: MLflow is asked for and is not installed or does not answer.
    """
    with ExitStack() as stack:
        found: list[Tracker] = []
        if section.tensorboard:
            found.append(TensorBoard(run))
            stack.callback(found[-1].close)
        if section.mlflow is not None:
            found.append(MLflow(run, section.mlflow, section.mlflow_experiment))
            stack.callback(found[-1].close)
        yield found


class _InBackground:
    """What a tracker writes, written by one thread in order; after a failure no more.

    Args:
        name: of the tracker.
        broken: what its calls raise when it is lost.
    """

    def __init__(self, name: str, broken: tuple[type[Exception], ...]) -> None:
        self._name = name
        self._broken = broken
        self._is_lost = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)

    def submit(self, call: Callable[[], Any]) -> None:
        """Have something written."""
        self._thread.submit(self._try, call)

    def finish(self, last: Callable[[], Any]) -> None:
        """Write the last, and wait for it."""
        self.submit(last)
        self._thread.shutdown()

    def _try(self, call: Callable[[], Any]) -> None:
        if self._is_lost:
            return
        try:
            call()
        except self._broken as error:
            self._is_lost = True
            logger.warning("%s is lost (%s): the run goes on without it", self._name, type(error).__name__)


class TensorBoard:
    """Event files in the run folder; every command on the run adds one, from its first number on.

    (tensorboardX's own ``SummaryWriter`` waits for ever for its thread when that has met a full disk.)
    """

    def __init__(self, run: RunFolder) -> None:
        # Imported here: the first number comes in Tune's control loop, which an import would hold up.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        self._folder = run.tensorboard
        self._open, self._event, self._scalar = EventsWriter, Event, scalar
        self._events: EventsWriter | None = None
        self._background = _InBackground("TensorBoard", (OSError,))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record scalars, in the background."""
        self._background.submit(partial(self._write, dict(values), step, time.time()))

    def close(self) -> None:
        """Write what is left."""
        self._background.finish(self._end)

    def _write(self, values: Mapping[str, float], step: int, now: float) -> None:
        if self._events is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._events = self._open(str(self._folder / "events"))
        for name, value in values.items():
            summary = self._scalar(name, value)
            self._events.write_event(self._event(wall_time=now, step=step, summary=summary))
        self._events.flush()

    def _end(self) -> None:
        if self._events is not None:
            self._events.close()


class MLflow:
    """One MLflow run, which later commands on the same run folder go on with.

    Args:
        run: its name is the MLflow run's, whose id is kept in the folder.
        uri: of the tracking server, or a ``file:`` URI.
        experiment: made where it is missing.

    Raises:
        MilpError: the package is missing, or the server does not answer.
    """

    def __init__(self, run: RunFolder, uri: str, experiment: str) -> None:
        try:
            from mlflow import MlflowClient
            from mlflow.entities import Metric
            from mlflow.exceptions import MlflowException
        except ImportError:
            raise MilpError(
                'tracking.mlflow is set, but MLflow is not installed: pip install "milp-ray[mlflow]", or '
                "leave tracking.mlflow out"
            ) from None
        self._metric = Metric
        # The client's own patience with a server that is away is several minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        broken = (MlflowException, OSError)
        self._background = _InBackground("MLflow", broken)
        try:
            self._client = MlflowClient(tracking_uri=uri)
            self._run_id = self._opened(run, experiment)
        except broken as error:
            # (Its message may quote the request, and what authorised it.)
            raise MilpError(
                f"MLflow at tracking.mlflow={uri} cannot be used ({type(error).__name__}); check the "
                "address, set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD where it asks who you "
                "are, or leave tracking.mlflow out"
            ) from None

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record metrics in one request, which is sent in the background."""
        now = int(1000 * time.time())
        metrics = [self._metric(name, float(value), now, step) for name, value in values.items()]
        self._background.submit(partial(self._client.log_batch, self._run_id, metrics=metrics))

    def close(self) -> None:
        """End the MLflow run; a later command opens it again."""
        self._background.finish(partial(self._client.set_terminated, self._run_id))

    def _opened(self, run: RunFolder, experiment: str) -> str:
        known = run.mlflow_file
        if known.is_file():
            run_id = str(json.loads(known.read_text(encoding="utf-8"))["run_id"])
            self._client.update_run(run_id, status="RUNNING")
            return run_id
        found = self._client.get_experiment_by_name(experiment)
        experiment_id = self._client.create_experiment(experiment) if found is None else found.experiment_id
        run_id = str(self._client.create_run(experiment_id, run_name=run.path.name).info.run_id)
        write_json(known, {"run_id": run_id})
        return run_id
