"""The study as an Ax experiment: Ax holds the trials and asks our generation node for the next ones.

The client is kept from batch to batch and told only what is new; after a resume it is built once from the
journal's observations. What is proposed does not depend on which of the two happened: the node fits to the
study's observations, in the order of their index, not to what Ax has stored. (The standard errors are pooled
over all trials and so change with each new one; Ax would need all data again at every batch.)
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ax.api.client import Client
from ax.api.configs import RangeParameterConfig
from ax.core.data import Data, DataRow
from ax.core.trial_status import TrialStatus
from ax.exceptions.core import SearchSpaceExhausted
from ax.generation_strategy.external_generation_node import ExternalGenerationNode
from ax.generation_strategy.generation_strategy import GenerationStrategy
from ax.utils.common.logger import set_ax_logger_levels

from milp_ray.objectives import KNOWN_OBJECTIVES

if TYPE_CHECKING:
    from ax.core.experiment import Experiment
    from ax.core.types import TParameterization

    from milp_ray.memory.layout import CanonicalLayout
    from milp_ray.memory.space import SearchSpace
    from milp_ray.search.observations import Observation

NODE_NAME = "saas_nehvi"
# Makes a batch: canonical layouts in the order in which they were chosen.
Choose = Callable[[], Sequence["CanonicalLayout"]]


class AxStudy:
    """One study's Ax client, which is told of observations and pending layouts and asked for proposals."""

    def __init__(self, space: SearchSpace, objectives: Sequence[str]) -> None:
        self._space = space
        self._node = LayoutNode(lambda layout: self._encode(space.raw(layout)))
        self._trials: dict[str, int] = {}  # Ax's index by canonical key
        self._objectives = tuple(objectives)
        with _quiet():
            self._client = Client()
            self._client.configure_experiment(parameters=self._parameters())
            signs = [KNOWN_OBJECTIVES[name].sign for name in objectives]
            self._client.configure_optimization(
                objective=", ".join(
                    ("-" if s > 0 else "") + n for n, s in zip(objectives, signs, strict=True)
                )
            )
            self._client.set_generation_strategy(GenerationStrategy(name=NODE_NAME, nodes=[self._node]))

    @property
    def experiment(self) -> Experiment:
        """Ax's experiment, with all that was told and proposed."""
        return self._client._experiment

    def propose(
        self,
        observations: Sequence[Observation],
        pending: Sequence[CanonicalLayout],
        n_proposals: int,
        choose: Choose,
    ) -> list[dict[str, Any]]:
        """Raw points of a batch, which ``choose`` makes; Ax records them as running trials.

        Fewer than ``n_proposals`` come back where ``choose`` gives fewer.

        Raises:
            Exception: what ``choose`` raises.
        """
        with _quiet():
            self._tell(observations, pending)
            self._node.choose = choose
            try:
                proposed = self._client.get_next_trials(max_trials=1)
            except SearchSpaceExhausted:
                return []
            n_more = min(n_proposals - 1, self._node.n_left)
            if n_more:
                proposed |= self._client.get_next_trials(max_trials=n_more)
        points = [self._decode(parameters) for _, parameters in sorted(proposed.items())]
        self._trials |= {self._key(p): index for index, p in zip(sorted(proposed), points, strict=True)}
        return points

    def _tell(self, observations: Sequence[Observation], pending: Sequence[CanonicalLayout]) -> None:
        """Bring Ax's trials up to what is known; a trial that nobody runs any more is abandoned."""
        known = {layout.key for layout in pending} | {observation.key for observation in observations}
        for key, index in list(self._trials.items()):
            if key not in known and self._is_running(index):
                self._client.mark_trial_abandoned(index)
                del self._trials[key]
        rows: list[DataRow] = []
        completed: list[int] = []
        for observation in observations:
            index = self._trial(observation.key, observation.raw)
            if not self._is_running(index):
                continue
            if observation.values is None:
                self._client.mark_trial_failed(index)
            else:
                completed.append(index)
                rows += self._data(index, observation.values)
        if rows:
            # All at once: the client's own way looks all data through for every trial.
            self.experiment.attach_data(Data(data_rows=rows))
            for index in completed:
                self.experiment.trials[index].mark_completed()
        for layout in pending:
            self._trial(layout.key, self._space.raw(layout))

    def _data(self, index: int, values: Mapping[str, float]) -> list[DataRow]:
        arm = self.experiment.trials[index].arms[0].name
        return [
            DataRow(
                trial_index=index,
                arm_name=arm,
                metric_name=name,
                metric_signature=self.experiment.metrics[name].signature,
                mean=values[name],
                se=float("nan"),
            )
            for name in self._objectives
        ]

    def _trial(self, key: str, raw: Mapping[str, Any]) -> int:
        """Ax's index of a layout's trial, which is attached where Ax has none."""
        if key not in self._trials:
            self._trials[key] = self._client.attach_trial(self._encode(raw))
        return self._trials[key]

    def _is_running(self, index: int) -> bool:
        return self.experiment.trials[index].status == TrialStatus.RUNNING

    def _key(self, raw: Mapping[str, Any]) -> str:
        return self._space.layout(raw).canonical().key

    def _parameters(self) -> list[RangeParameterConfig]:
        """The searched parameters that have a choice, as integer ranges: positions among their values."""
        return [
            RangeParameterConfig(name=p.name, parameter_type="int", bounds=(0, len(p.values) - 1))
            for p in self._space.parameters()
            if len(p.values) > 1
        ]

    def _encode(self, raw: Mapping[str, Any]) -> dict[str, int]:
        parameters = [p for p in self._space.parameters() if len(p.values) > 1]
        return {p.name: p.values.index(raw[p.name]) for p in parameters}

    def _decode(self, encoded: Mapping[str, Any]) -> dict[str, Any]:
        return {p.name: p.values[int(encoded.get(p.name, 0))] for p in self._space.parameters()}


class LayoutNode(ExternalGenerationNode):
    """Hands out the layouts of one batch after another, which it has made when Ax first asks.

    The batch is made while Ax brings the node up to date: what is raised there reaches the caller, where Ax
    would answer an error of the generation itself with random points of its own.
    """

    def __init__(self, encode: Callable[[CanonicalLayout], dict[str, int]]) -> None:
        super().__init__(name=NODE_NAME, should_deduplicate=False)
        self.choose: Choose | None = None
        self._encode = encode
        self._left: deque[CanonicalLayout] = deque()

    @property
    def n_left(self) -> int:
        """Layouts of the batch that Ax has not been given."""
        return len(self._left)

    def update_generator_state(self, experiment: Experiment, data: Data) -> None:
        """Make the batch, if it is not made.

        Raises:
            SearchSpaceExhausted: there is no layout to hand out.
            Exception: what ``choose`` raises.
        """
        if self.choose is not None:
            choose, self.choose = self.choose, None
            self._left = deque(choose())
        if not self._left:
            raise SearchSpaceExhausted("no layout is left to propose")

    def get_next_candidate(self, pending_parameters: list[TParameterization]) -> TParameterization:
        """The next layout of the batch, in Ax's encoding."""
        return dict(self._encode(self._left.popleft()))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Ax's log lines, one a trial, and its warnings about scaling off the terminal."""
    set_ax_logger_levels(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
