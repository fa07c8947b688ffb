"""Who proposes the next batch of layouts: the surrogate, or chance where it cannot; in an actor of its own.

A batch takes seconds (with NUTS a minute), which would freeze Tune's controller, so the suggester is a Ray
actor that is asked and polled. It is started with the study, so that its imports pass while the initial
trials run.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from milp_ray.errors import MilpError
from milp_ray.search.candidates import random_new_point
from milp_ray.search.observations import Observation
from milp_ray.search.placement import node_without_gpu
from milp_ray.telemetry import log_event, logger

if TYPE_CHECKING:
    from milp_ray.config.search import SearchSection
    from milp_ray.memory.layout import CanonicalLayout
    from milp_ray.memory.space import SearchSpace
    from milp_ray.search.ax_study import AxStudy
    from milp_ray.search.earlier import EarlierStudies

SAAS_NEHVI = "saas_nehvi"
RANDOM = "random"
_MOST_LOSSES = 3  # of the actor's process, in a row and beyond Ray's own restarts
# Observations with values below which there is nothing to fit.
_MIN_OBSERVATIONS = 2


@dataclass(frozen=True)
class Proposal:
    """A raw point to measure, and what proposed it."""

    raw: dict[str, Any]
    generator: str


@dataclass(frozen=True)
class Question:
    """What proposals are made from: everything that ended before ``batch``, in the order of the trials.

    ``n`` is how many are asked for; ``pending`` are the layouts that run or wait to, in the order of their
    trials: they are not proposed again, and what they will probably show is taken for shown.
    """

    observations: tuple[Observation, ...]
    batch: int
    n: int
    pending: tuple[CanonicalLayout, ...] = ()


class Proposer(Protocol):
    """What the conductor asks for batches; one batch is asked for at a time."""

    def submit(self, question: Question) -> None:
        """Ask for proposals."""

    def poll(self) -> list[Proposal] | None:
        """The proposals asked for, or ``None`` while they are being made."""

    def close(self) -> None:
        """Free what the proposer holds."""


class Suggester:
    """Proposals of a study; the same observations, batch and seed give the same ones.

    Args:
        earlier: observations of finished studies of the same space and objectives, which inform the
            surrogate where they predict this study's own (:mod:`milp_ray.search.earlier`).
    """

    def __init__(
        self,
        space: SearchSpace,
        section: SearchSection,
        seed: int,
        earlier: tuple[tuple[Observation, ...], ...] = (),
    ) -> None:
        self._space = space
        self._section = section
        self._seed = seed
        self._earlier = earlier
        self._earlier_models: EarlierStudies | None = None
        self._ax: AxStudy | None = None

    def warm_up(self) -> None:
        """Import what proposals need; for a process that does nothing else."""
        if self._section.surrogate.inference != "nuts":
            # Only NUTS samples with JAX, yet BoTorch imports it, memory and all, wherever it is installed. It
            # does without where the import fails.
            modules: dict[str, Any] = sys.modules
            modules.setdefault("jax", None)  # what Python takes for "is not there"
        from milp_ray.search import surrogate

        surrogate.warm_up(self._section.surrogate)

    def propose(self, question: Question) -> list[Proposal]:
        """As many new layouts as asked for, fewer where the space has no more; no layout comes twice.

        The surrogate proposes; where it cannot be fitted (too few trials with values, or numerical trouble,
        which is logged) random new layouts take its place, so that a search never ends for it.
        """
        seen = {observation.key for observation in question.observations}
        seen |= {layout.key for layout in question.pending}
        n = min(question.n, self._space.n_canonical - len(seen))
        seed = np.random.SeedSequence([self._seed, question.batch])
        found: list[Proposal] = []
        for raw in self._from_surrogate(question, n, int(seed.generate_state(1)[0])):
            seen.add(self._space.layout(raw).canonical().key)
            found.append(Proposal(raw, SAAS_NEHVI))
        rng = np.random.default_rng(seed)
        while len(found) < n:
            point = random_new_point(self._space, seen, rng)
            if point is None:
                break
            seen.add(self._space.layout(point).canonical().key)
            found.append(Proposal(point, RANDOM))
        return found

    def _from_surrogate(self, question: Question, n: int, seed: int) -> list[dict[str, Any]]:
        n_measured = sum(o.values is not None for o in question.observations)
        if n < 1 or n_measured < _MIN_OBSERVATIONS:
            return []
        from ax.exceptions.core import AxError

        from milp_ray.search import surrogate
        from milp_ray.search.saas import LinAlgError

        def choose() -> list[CanonicalLayout]:
            if self._earlier and self._earlier_models is None:
                self._earlier_models = surrogate.earlier_studies(
                    self._space, self._section.objectives, self._section.surrogate, self._earlier
                )
            return surrogate.propose(
                self._space,
                self._section.objectives,
                self._section.surrogate,
                question.observations,
                question.pending,
                n_proposals=n,
                seed=seed,
                earlier=self._earlier_models,
            )

        try:
            if self._ax is None:
                from milp_ray.search.ax_study import AxStudy

                self._ax = AxStudy(self._space, self._section.objectives)
            return self._ax.propose(question.observations, question.pending, n, choose)
        except (AxError, LinAlgError) as error:
            self._ax = None  # whatever state it was left in, the next one is built afresh
            logger.warning(
                "the surrogate gave no proposals (%s); random layouts instead", type(error).__name__
            )
            log_event("surrogate_failed", error=type(error).__name__, n_observations=n_measured)
            return []


class InlineProposer:
    """Proposes in this process, when polled."""

    def __init__(self, propose: Callable[[Question], list[Proposal]]) -> None:
        self._propose = propose
        self._asked: Question | None = None

    def submit(self, question: Question) -> None:
        """Remember what is asked."""
        self._asked = question

    def poll(self) -> list[Proposal] | None:
        """Make the proposals now."""
        if self._asked is None:
            return None
        asked, self._asked = self._asked, None
        return self._propose(asked)

    def close(self) -> None:
        """Nothing is held."""


class SuggesterActor:
    """A suggester in a Ray actor's process, with its imports done."""

    def __init__(self, suggester: Suggester) -> None:
        from milp_ray.telemetry import prepare_worker

        prepare_worker(threads=1)
        suggester.warm_up()
        self._suggester = suggester

    def __repr__(self) -> str:
        return "layout-suggester"

    def propose(self, question: Question, observations: Sequence[bytes]) -> list[Proposal]:
        """See :meth:`Suggester.propose`; the question's observations come packed."""
        unpacked = tuple(pickle.loads(observation) for observation in observations)
        return self._suggester.propose(replace(question, observations=unpacked))


class ActorProposer:
    """Proposes in an actor; should its process be lost, another one is asked the same.

    Ray restarts it a few times in all, and a long search may lose more nodes than that.

    Args:
        suggester: a fresh one, of which the actor gets a copy.
    """

    def __init__(self, suggester: Suggester) -> None:
        self._suggester = suggester
        self._actor: Any = None
        self._reply: Any = None
        self._question: Question | None = None
        self._n_lost = 0  # since the last answer
        # By the trial's index: what is sent with every question is packed once, as Tune's controller waits.
        self._packed: dict[int, bytes] = {}

    def start(self) -> None:
        """Start the actor, if it is not; otherwise the first question does."""
        import ray

        if self._actor is None:
            from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

            node = node_without_gpu(ray.nodes(), own=ray.get_runtime_context().get_node_id())
            there: Any = NodeAffinitySchedulingStrategy(node, soft=True)
            # No CPU is reserved: it works while no trial runs, and would otherwise take one trial's place.
            actor: Any = ray.remote(
                num_cpus=0,
                max_restarts=2,
                max_task_retries=2,
                scheduling_strategy=there,
            )(SuggesterActor)
            self._actor = actor.remote(self._suggester)

    def submit(self, question: Question) -> None:
        """Send the question."""
        self.start()
        self._question = question
        for observation in question.observations:
            if observation.index not in self._packed:
                self._packed[observation.index] = pickle.dumps(observation)
        packed = [self._packed[observation.index] for observation in question.observations]
        self._reply = self._actor.propose.remote(replace(question, observations=()), packed)

    def poll(self) -> list[Proposal] | None:
        """The answer, if it has come; never waits.

        Raises:
            MilpError: the actor was lost again and again.
        """
        import ray

        from milp_ray.search.lost import LOST

        if self._reply is None or not ray.wait([self._reply], timeout=0)[0]:
            return None
        reply, self._reply = self._reply, None
        try:
            proposals: list[Proposal] = ray.get(reply)
        except LOST as error:
            self._ask_another(error)
            return None
        self._n_lost = 0
        return proposals

    def _ask_another(self, error: Exception) -> None:
        self._n_lost += 1
        log_event("suggester_lost", losses=self._n_lost)
        if self._n_lost > _MOST_LOSSES or self._question is None:
            raise MilpError(
                "the process that proposes layouts is lost again and again "
                f"({type(error).__name__}), most likely out of memory: give its node more, or take "
                "search.surrogate.inference=map. What was measured is kept; the same command goes on"
            ) from error
        self._actor = None
        self.submit(self._question)

    def close(self) -> None:
        """End the actor."""
        import ray

        if self._actor is not None:
            ray.kill(self._actor)
