"""One pack for several callers: each asks from a thread of its own, and one thread has the base and the pack.

What is asked for while the pack runs joins it between two steps: jobs take free slots, and prompts of all
callers that wait are answered in one batch. So a caller gets what it would have computed by itself, up to
rounding.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milp_ray.errors import MilpError
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.memory.lora import target_modules
from milp_ray.training.checkpoint import CheckpointFile
from milp_ray.training.generation import Questions, generate
from milp_ray.training.hooks import Ended, Hooks
from milp_ray.training.job import Job, JobResult, PausedJob
from milp_ray.training.pack import Pack, can_pack
from milp_ray.training.pack_size import Room, pack_size, room_beside
from milp_ray.training.train import paused_of, result_of, train_alone

if TYPE_CHECKING:
    from milp_ray.config.prompt import PromptSection
    from milp_ray.config.training import TrainingSection
    from milp_ray.training.base import Base


class TakenOut(Exception):
    """What was asked for is not worked on any more: its caller, or the whole pack, was closed."""


@dataclass(eq=False)
class _Jobs:
    """Jobs of one caller; ``future`` gets what came of them, in their order, or the first failure."""

    caller: PackCaller
    jobs: list[Job]
    until_epoch: int | None
    handed_out: Callable[[Ended], Any]
    future: Future[list[Any]] = field(default_factory=Future)
    found: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class _Prompts:
    """Prompts of one caller; ``future`` gets the answers."""

    caller: PackCaller
    asked: Sequence[Questions]
    settings: tuple[int, int]  # most new tokens, and rows at once
    future: Future[list[list[str]]] = field(default_factory=Future)


class PackCaller:
    """One of those who share a pack; ``seconds`` are its part of the time that the pack has worked.

    A step's time is shared out by tokens, that of an answered batch by prompts. Every method waits for its
    result and raises :class:`TakenOut` once this caller or the pack is closed; only answers that are being
    worked out at that moment still come.
    """

    def __init__(self, pack: SharedPack, name: str) -> None:
        self._pack, self._name = pack, name
        self.seconds = 0.0
        self.is_closed = False  # the pack's to set, and to look at
        self.job_ids: set[str] = set()  # in the pack's own naming, of all that was asked for

    def train(self, jobs: Sequence[Job]) -> list[JobResult]:
        """As :func:`milp_ray.training.train.train`; jobs go on from where :meth:`train_until` left them."""
        return self._trained(jobs, None, self._pack.result_of)

    def train_until(self, jobs: Sequence[Job], epoch: int) -> list[PausedJob]:
        """As :func:`milp_ray.training.train.train_until`."""
        return self._trained(jobs, epoch, paused_of)

    def answers(self, asked: Sequence[Questions], *, max_new_tokens: int, batch_size: int) -> list[list[str]]:
        """As :func:`milp_ray.training.generation.generate`."""
        prompts = _Prompts(self, asked, (max_new_tokens, batch_size))
        self._pack.submit(prompts)
        return prompts.future.result()

    def close(self) -> None:
        """Take this caller's jobs out of the pack, and remove what it keeps of them."""
        self._pack.take_out(self)

    def _trained(self, jobs: Sequence[Job], epoch: int | None, handed_out: Callable[[Ended], Any]) -> Any:
        own = [replace(job, job_id=f"{self._name}/{job.job_id}") for job in jobs]
        self.job_ids.update(job.job_id for job in own)
        asked_for = _Jobs(self, own, epoch, handed_out)
        self._pack.submit(asked_for)
        results = asked_for.future.result()
        return [replace(result, job_id=job.job_id) for result, job in zip(results, jobs, strict=True)]


class SharedPack:
    """The base, the pack, and the thread that works with them.

    ``is_broken``: something failed that should not; nothing more is worked on in this process.

    Args:
        base: the frozen base; nobody else may use it until :meth:`close`.
        section: the recipe of all jobs.
        prompt: the fixed phrases.
        folder: where jobs that pause are kept; nobody else's.

    Raises:
        MilpError: jobs over this base, or of this recipe, cannot be packed.
    """

    def __init__(self, base: Base, section: TrainingSection, prompt: PromptSection, folder: Path) -> None:
        if not can_pack(base, section):
            raise MilpError(
                f"jobs over the base {base.model_id!r} cannot be packed, by its architecture or precision: "
                "its trials cannot share a process; leave search.trials_per_gpu and trials_per_process out"
            )
        self._base, self._section, self._prompt, self._folder = base, section, prompt, folder
        self.is_broken = False
        self._changed = threading.Condition()  # guards the next three: what callers leave for the thread
        self._new: list[_Jobs | _Prompts] = []
        self._leaving: list[PackCaller] = []
        self._is_closed = False
        self._under_way: list[_Jobs] = []
        self._asked: list[_Prompts] = []  # prompts in the thread's hands
        self._thread = threading.Thread(target=self._run, name="shared-pack", daemon=True)
        self._thread.start()

    def caller(self, name: str) -> PackCaller:
        """Somebody who asks; no two have the same name."""
        return PackCaller(self, name)

    def result_of(self, ended: Ended) -> JobResult:
        """What is handed out of a job that has come to its end."""
        result = result_of(self._base, ended, self._section)
        CheckpointFile(self._folder, ended.job.job_id).remove()
        return result

    def submit(self, request: _Jobs | _Prompts) -> None:
        """Leave something for the thread.

        Raises:
            TakenOut: the pack or the caller is closed.
        """
        with self._changed:
            if self._is_closed:
                raise TakenOut("the pack was closed")
            if request.caller.is_closed:
                raise TakenOut("taken out of the pack")
            self._new.append(request)
            self._changed.notify_all()

    def take_out(self, caller: PackCaller) -> None:
        """Let the thread forget a caller."""
        with self._changed:
            caller.is_closed = True
            self._leaving.append(caller)
            self._changed.notify_all()

    def close(self) -> None:
        """End the thread and give the base back."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()

    # -------------------------------------------------------------------------------- in the thread

    def _run(self) -> None:
        while not self._is_closed:
            try:
                self._work()
            except MilpError as error:
                self._break_off(error)
            except Exception as error:
                self.is_broken = self._is_closed = True
                self._break_off(error)
        self._break_off(TakenOut("the pack was closed"))

    def _break_off(self, error: Exception) -> None:
        """Whatever was asked for ends with ``error``."""
        with self._changed:
            requests = [*self._new, *self._under_way, *self._asked]
            self._new, self._under_way, self._asked = [], [], []
        for request in requests:
            _fail(request, error)

    def _work(self) -> None:
        """Wait for jobs and train until there are none; more may come all the while."""
        room = room_beside(self._base)
        pack = Pack(
            self._base,
            self._section,
            self._prompt,
            Hooks(self._folder, checkpoint_every_epoch=False),
            on_ended=self._ended,
            on_failure=self._failed,
            size=1,
        )
        with self._changed:
            self._changed.wait_for(lambda: self._new or self._leaving or self._is_closed)
        self._look_around(pack, room)
        if not pack.has_jobs:
            return
        all_layers = CanonicalLayout((True,) * self._base.n_layers, 1)  # who knows what comes
        with pack.on_base(target_modules(all_layers, self._base.spec)):
            while pack.has_jobs and not self._is_closed:
                pack.step()
                self._look_around(pack, room)

    def _look_around(self, pack: Pack, room: Room) -> None:
        """Between two steps: whoever leaves goes, prompts are answered, and new jobs take their places."""
        with self._changed:
            new, self._new = self._new, []
            leaving, self._leaving = self._leaving, []
        jobs = [request for request in new if isinstance(request, _Jobs)]
        self._under_way += jobs
        self._asked = [request for request in new if isinstance(request, _Prompts)]
        for caller in leaving:
            self._let_go(pack, caller)
        # Where one job has failed its caller's others are not wanted either.
        for request in [request for request in self._under_way if request.future.done()]:
            pack.take_out({job.job_id for job in request.jobs})
            self._under_way.remove(request)
        prompts = [request for request in self._asked if not request.future.done()]
        alone = [job for request in jobs for job in request.jobs if job.layout.is_empty]
        if prompts or alone:
            with pack.lent_base():
                self._answer(prompts)
                self._asked = []
                self._measure_base(alone)
        for request in jobs:
            if request in self._under_way:
                pack.add([job for job in request.jobs if not job.layout.is_empty], request.until_epoch)
        if jobs and pack.has_jobs:
            pack.size = pack_size(self._base, pack.jobs, self._section, self._prompt, room=room)

    def _let_go(self, pack: Pack, caller: PackCaller) -> None:
        requests: list[_Jobs | _Prompts] = [*self._under_way, *self._asked]
        for request in requests:
            if request.caller is caller:
                _fail(request, TakenOut("taken out of the pack"))
        pack.take_out(caller.job_ids)
        for job_id in caller.job_ids:
            CheckpointFile(self._folder, job_id).remove()

    def _answer(self, requests: Sequence[_Prompts]) -> None:
        """Answer all prompts that are asked for with the same settings together."""
        for settings in dict.fromkeys(request.settings for request in requests):
            some = [request for request in requests if request.settings == settings]
            asked = [questions for request in some for questions in request.asked]
            started = time.perf_counter()
            try:
                answers = iter(
                    generate(self._base, asked, max_new_tokens=settings[0], batch_size=settings[1])
                )
            except MilpError as error:
                for request in some:
                    _fail(request, error)
                continue
            except Exception as error:
                for request in some:
                    _fail(request, error)
                raise
            a_prompt = (time.perf_counter() - started) / max(1, sum(len(one.prompts) for one in asked))
            for request in some:
                request.caller.seconds += a_prompt * sum(len(one.prompts) for one in request.asked)
                request.future.set_result([next(answers) for _ in request.asked])

    def _measure_base(self, jobs: Sequence[Job]) -> None:
        """Jobs of the empty layout: what the base gives as it is."""
        for job in jobs:
            try:
                ended = train_alone(self._base, job, self._section, self._prompt, Hooks())
            except MilpError as error:
                self._failed(job, error)
            else:
                self._ended(ended)

    def _ended(self, ended: Ended) -> None:
        request = self._request_of(ended.job)
        if request is None:
            return
        request.caller.seconds += ended.seconds
        request.found[ended.job.job_id] = request.handed_out(ended)
        if len(request.found) == len(request.jobs):
            self._under_way.remove(request)
            request.future.set_result([request.found[job.job_id] for job in request.jobs])

    def _failed(self, job: Job, error: MilpError) -> None:
        request = self._request_of(job)
        if request is not None:
            _fail(request, error)

    def _request_of(self, job: Job) -> _Jobs | None:
        """Whose job it is; ``None`` where a failure of another one has ended the request."""
        for request in self._under_way:
            if not request.future.done() and any(own.job_id == job.job_id for own in request.jobs):
                return request
        return None


def _fail(request: _Jobs | _Prompts, error: Exception) -> None:
    if not request.future.done():
        request.future.set_exception(error)
