"""Runs as jobs of a Ray cluster (its Jobs API): submitted under the run's name, followed, stopped."""

from __future__ import annotations

import asyncio
import secrets
import shlex
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milp_ray import exit_codes
from milp_ray.errors import MilpError
from milp_ray.rundir import place_of

if TYPE_CHECKING:
    from milp_ray.config import Config

CONFIG_FILE = "config.yaml"
# How `stop` ends a run: as Ctrl-C does, with time for what is in hand to be saved.
STOP = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "60"}
_RETRY_SECONDS = 2.0
_START_SECONDS = 120.0  # that a head node may take to start all of its processes
_STOP_SECONDS = 10.0  # that a job is given to end before it is left on the list
_LONGEST_SILENCE_SECONDS = 600.0  # that a lost connection is waited for
_LONGEST_WAIT_SECONDS = 300.0  # for a job to print something, before its state is asked for


@dataclass(frozen=True, slots=True)
class JobState:
    """What the cluster says of a job: Ray's word for its state, its remark, and the command's exit code."""

    state: str
    message: str
    exit_code: int | None

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will come."""
        return self.state in {"SUCCEEDED", "FAILED", "STOPPED"}

    @property
    def code(self) -> int:
        """The exit code that stands for the job's end."""
        if self.exit_code is not None:
            return self.exit_code
        return {"SUCCEEDED": 0, "STOPPED": exit_codes.INTERRUPTED}.get(self.state, exit_codes.BUG)


def _to_stdout(text: str) -> None:
    print(text, end="", flush=True)  # who reads it from a pipe sees it as it comes, too


class Jobs:
    """The jobs of one cluster.

    Args:
        address: the dashboard's, such as http://127.0.0.1:8265.
        shown: what the cluster is called in messages; the address unless given.
        option: how a command names it; ``--address`` unless given.

    Raises:
        MilpError: nobody answers there, or a token is missing.
    """

    def __init__(self, address: str, shown: str | None = None, option: str | None = None) -> None:
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient

        self.shown = shown or address
        self.option = option or f"--address {address}"
        try:
            self._client = JobSubmissionClient(address)
            self._client.list_jobs()  # the first question that a cluster does not answer to strangers
        except (ConnectionError, RuntimeError, ValueError, AuthenticationError) as error:
            raise MilpError(
                f"no Ray dashboard answers at {self.shown} ({_first_line(error)}); reach it with "
                "`ray dashboard CLUSTER` and give its address, such as http://127.0.0.1:8265; one with token "
                "authentication wants RAY_AUTH_MODE=token and ~/.ray/auth_token here, too"
            ) from None

    def submit(self, config: Config, *, fresh: bool = False) -> str:
        """Submit a run under its name, which is the job's id; an earlier job of the name that ended goes.

        Args:
            config: of the run.
            fresh: have an earlier run of the name deleted first.

        Raises:
            MilpError: it is running already, or its files would be lost with the job.
        """
        from milp_ray.config_loader import dump_config

        check_paths(config)
        before = self.find(config.name)
        if before is not None and not before.has_ended:
            raise MilpError(
                f"{config.name} is {before.state} on {self.shown} already; watch it with `milp-ray logs "
                f"{config.name} {self.option}`, or choose another name=…"
            )
        if before is not None:
            self._client.delete_job(config.name)
        with tempfile.TemporaryDirectory(prefix="milp_ray-") as folder:
            (Path(folder) / CONFIG_FILE).write_text(dump_config(config), encoding="utf-8")
            return self._submit(config, folder, ["--fresh"] if fresh else [])

    def _submit(self, config: Config, folder: str, options: Sequence[str]) -> str:
        """Submit the configuration in a folder, once the head node can take it; the job's id."""
        command = [
            "python",
            "-m",
            "milp_ray",
            "run",
            CONFIG_FILE,
            "ray.address=auto",
            "--preflight",
            *options,
        ]
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                return str(
                    self._client.submit_job(
                        entrypoint=shlex.join(command),
                        submission_id=config.name,
                        runtime_env={"working_dir": folder, "env_vars": STOP},
                        metadata={"run": config.name, "place": str(place_of(config))},
                    )
                )
            except RuntimeError as error:
                # Ray has no class for it: its nodes' agents start after the dashboard.
                if "No available agent" in str(error) and time.monotonic() < deadline:
                    time.sleep(_RETRY_SECONDS)
                    continue
                raise MilpError(
                    f"{self.shown} did not take the job ({_last_line(error)}); look at the cluster with "
                    "`ray status`, and submit again"
                ) from None

    def find(self, name: str) -> JobState | None:
        """A job by its run's name; ``None``: there is none."""
        try:
            return self._look(name)
        except RuntimeError as error:
            raise MilpError(f"{self.shown} does not tell about {name} ({_first_line(error)})") from None

    def _look(self, name: str) -> JobState | None:
        """As :meth:`find`. Raises ``RuntimeError`` where the dashboard does not say."""
        try:
            info = self._client.get_job_info(name)
        except RuntimeError as error:
            # Ray has no classes for its errors: of a name that it does not know it says one of these.
            if "does not exist" in str(error) or "status code 404" in str(error):
                return None
            raise
        return JobState(info.status.value, info.message or "", info.driver_exit_code)

    def get(self, name: str) -> JobState:
        """A job by its run's name.

        Raises:
            MilpError: there is none.
        """
        return self._known(name, self.find(name))

    def _known(self, name: str, found: JobState | None) -> JobState:
        if found is None:
            raise MilpError(f"there is no job {name!r} on {self.shown}; a job goes by its run's name")
        return found

    def logs(self, name: str) -> str:
        """All that a job has printed."""
        self.get(name)
        return str(self._client.get_job_logs(name))

    def stop(self, name: str) -> bool:
        """Ask a job to end as by Ctrl-C; whether it was running."""
        self.get(name)
        return bool(self._client.stop_job(name))

    def follow(self, name: str, write: Callable[[str], Any] = _to_stdout) -> JobState:
        """Print what a job prints until it ends, across lost connections; nothing is printed twice.

        Args:
            name: of the run.
            write: gets what is new, in pieces.

        Raises:
            MilpError: there is no such job, or the cluster was silent for ten minutes.
            OSError: ``write`` raised it.
        """
        from aiohttp import ClientError

        output = _Output(write)
        while True:
            lost: Exception | None = None
            for ask in (self._listen, self._end_of):
                try:
                    ended = ask(name, output)
                except (OSError, RuntimeError, ClientError) as error:
                    if error is output.failure:
                        raise
                    lost = error
                    continue
                if ended is not None:
                    return ended
            if lost is not None and time.monotonic() - output.heard > _LONGEST_SILENCE_SECONDS:
                raise MilpError(
                    f"{self.shown} has been silent for ten minutes ({type(lost).__name__}); the job "
                    f"may go on: `milp-ray logs {name} {self.option}` looks again"
                )
            time.sleep(_RETRY_SECONDS)

    def _listen(self, name: str, output: _Output) -> None:
        """Print what is new until the stream ends, or has been silent for some minutes."""
        asyncio.run(self._tail(name, output))

    def _end_of(self, name: str, output: _Output) -> JobState | None:
        """How the job has ended, with the rest of its output printed; ``None``: it goes on."""
        state = self._known(name, self._look(name))
        output.heard = time.monotonic()
        if not state.has_ended:
            return None
        output.show(str(self._client.get_job_logs(name)), 0)
        return state

    def observe(self, name: str, every: float, write: Callable[[str], Any]) -> JobState:
        """Have a job beside a run's print what its folder tells, line by line as JSON, until the run ends.

        Args:
            name: of the run, whose job has to have begun.
            every: seconds between two looks.
            write: gets what the job prints, in pieces.

        Returns:
            How that job ended.
        """
        self.get(name)
        folder = (self._client.get_job_info(name).metadata or {}).get("place", name)
        observer = self._client.submit_job(
            entrypoint=f"python -m milp_ray watch {shlex.quote(folder)} --json --every {every:g}",
            submission_id=f"watch-{name}-{secrets.token_hex(3)}",
            metadata={"run": name},
        )
        try:
            return self.follow(observer, write)
        finally:
            self._remove(observer)

    def _remove(self, name: str) -> None:
        """End a job that is of no use any more, and take it off the list."""
        if self._client.stop_job(name):
            deadline = time.monotonic() + _STOP_SECONDS
            while not self.get(name).has_ended and time.monotonic() < deadline:
                time.sleep(0.2)
        if self.get(name).has_ended:
            self._client.delete_job(name)

    async def _tail(self, name: str, output: _Output) -> None:
        """Print what is new until the stream ends; it begins anew with every connection."""
        position = 0
        stream: Any = self._client.tail_job_logs(name)  # a generator, though Ray's annotation says less
        async with aclosing(stream) as pieces:
            while True:
                try:
                    # The other end may be gone without a word, or the job have nothing to say: which of the
                    # two it is, asking for its state tells.
                    async with asyncio.timeout(_LONGEST_WAIT_SECONDS):
                        text = await anext(pieces)
                except (StopAsyncIteration, TimeoutError):
                    return
                output.show(text, position)
                position += len(text)


class _Output:
    """A job's output, of which every character is written once, however often it comes."""

    def __init__(self, write: Callable[[str], Any]) -> None:
        self.heard = time.monotonic()  # when the cluster last said something
        self.failure: OSError | None = None  # of writing, which is no lost connection
        self._write = write
        self._n_written = 0

    def show(self, text: str, position: int) -> None:
        """Write what is new in a piece of the output that begins at ``position``."""
        self.heard = time.monotonic()
        new = text[max(0, self._n_written - position) :]
        if not new:
            return
        try:
            self._write(new)
        except OSError as error:
            self.failure = error
            raise
        self._n_written += len(new)


def check_paths(config: Config) -> None:
    """Refuse what would lie in the job's own folder, which goes with the job.

    Raises:
        MilpError: the run folder, users' files, a base, the store, its key or an earlier search are relative
            to a working directory.
    """
    store = config.personalize.store
    places: list[tuple[str, Path | str | None]] = [
        ("output_dir", config.output_dir),
        *(("users.paths", path) for path in config.users.paths),
        ("personalize.store", None if store is None or "://" in store else Path(store)),
        ("personalize.encryption.key_file", config.personalize.encryption.key_file),
        *(("search.warm_start", folder) for folder in config.search.warm_start),
    ]
    relative = {
        key: str(place) for key, place in places if isinstance(place, Path) and not place.is_absolute()
    }
    if config.base.model.startswith((".", "~")):
        relative["base.model"] = config.base.model
    if relative:
        named = ", ".join(f"{key}={value}" for key, value in relative.items())
        raise MilpError(
            f"{named}: on a cluster these are looked for in the job's own folder, which goes with it; give "
            "absolute paths on storage that all nodes share, or URIs"
        )


def _last_line(error: BaseException) -> str:
    """The last line of what the cluster says, which is usually a traceback of its own."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1][:300]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
