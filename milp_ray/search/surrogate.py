"""The surrogate of a study and the batch of layouts that it proposes.

A SAAS Gaussian process an objective over the canonical layout's features (:mod:`milp_ray.search.saas`), and
a batch chosen greedily under noisy expected hypervolume improvement (:mod:`milp_ray.search.nehvi`). Nothing
is kept from batch to batch: the same observations, pending layouts and seed give the same proposals, in a
resumed study too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from milp_ray.objectives import KNOWN_OBJECTIVES
from milp_ray.search.acquisition import NewLayouts
from milp_ray.search.earlier import EarlierStudies, choose_trend, fit_earlier
from milp_ray.search.features import CanonicalRows, Rows, row_keys
from milp_ray.search.nehvi import NoisyHypervolumeImprovement, chances_on_front
from milp_ray.search.observations import Observation, standard_errors
from milp_ray.search.outputs import Outputs
from milp_ray.search.posterior import Posterior
from milp_ray.search.saas import EXACT_NOISE, Hyperparameters, fit_map

if TYPE_CHECKING:
    from milp_ray.config import SurrogateSection
    from milp_ray.memory.layout import CanonicalLayout
    from milp_ray.memory.space import SearchSpace


@dataclass(frozen=True)
class Surrogate:
    """The fitted model of a study's objectives, in their order."""

    rows: CanonicalRows
    outputs: Outputs
    hyperparameters: Hyperparameters
    posterior: Posterior

    def features(self, rows: Rows) -> Tensor:
        """What the posterior is asked with, q x d."""
        return torch.from_numpy(self.rows.features(rows))


def fit(
    space: SearchSpace,
    objectives: Sequence[str],
    section: SurrogateSection,
    observations: Sequence[Observation],
    seed: int,
    earlier: EarlierStudies | None = None,
) -> Surrogate:
    """Fit every objective to the observations that have values, in their order.

    Args:
        seed: of NUTS; MAP fits draw nothing.
        earlier: studies that the objectives may take a trend from.

    Raises:
        torch.linalg.LinAlgError: no covariance could be factored.
    """
    torch.set_num_threads(1)  # the same sums in the same order on every machine, and no oversubscription
    measured = [o for o in observations if o.values is not None]
    rows = CanonicalRows(space)
    outputs, features, values = _data(rows, objectives, section, measured)
    errors = standard_errors(measured, objectives)
    variances = outputs.noise(None if errors is None else [errors[name] for name in objectives])
    noise = None if variances is None else torch.from_numpy(variances).clamp_min(EXACT_NOISE)
    trend = None if earlier is None else choose_trend(earlier, features, values, noise, section.n_ensemble)
    deviations = values if trend is None else values - trend(features)
    if section.inference == "map":
        found = fit_map(features, deviations, noise, section.n_ensemble)
    else:
        from milp_ray.search.nuts import fit_nuts

        found = fit_nuts(
            features,
            deviations,
            noise,
            warmup_steps=section.warmup_steps,
            n_steps=section.num_samples,
            thinning=section.thinning,
            seed=seed,
        )
    return Surrogate(rows, outputs, found, Posterior(features, values, found, trend))


def earlier_studies(
    space: SearchSpace,
    objectives: Sequence[str],
    section: SurrogateSection,
    studies: Sequence[Sequence[Observation]],
) -> EarlierStudies | None:
    """Models of earlier studies of the same space and objectives; ``None`` where none has two values.

    Raises:
        torch.linalg.LinAlgError: no covariance could be factored.
    """
    torch.set_num_threads(1)
    measured = [[o for o in study if o.values is not None] for study in studies]
    data = [_data(CanonicalRows(space), objectives, section, study) for study in measured if len(study) > 1]
    return fit_earlier([parts[1:] for parts in data], section.n_ensemble) if data else None


def propose(
    space: SearchSpace,
    objectives: Sequence[str],
    section: SurrogateSection,
    observations: Sequence[Observation],
    pending: Sequence[CanonicalLayout],
    reference: Sequence[float],
    *,
    n_proposals: int,
    seed: int,
    earlier: EarlierStudies | None = None,
) -> list[CanonicalLayout]:
    """Layouts to measure next, in the order in which they were chosen: neither observed nor pending, all
    different; fewer than asked for where no more were found.

    Args:
        observations: ended trials in the order of their index; failed ones have no values.
        pending: layouts that are being measured, in the order of their trials.
        reference: the corner of the hypervolume, in the units of the objectives.
        seed: of this batch.
        earlier: studies that the objectives may take a trend from.

    Raises:
        torch.linalg.LinAlgError: no model could be fitted or evaluated.
    """
    surrogate = fit(space, objectives, section, observations, seed, earlier)
    rows, posterior = surrogate.rows, surrogate.posterior
    corner = torch.from_numpy(surrogate.outputs.forward([reference])[:, 0].copy())
    measured = rows.encode([o.layout for o in observations if o.values is not None])
    likely = _likely_front(posterior, corner, seed)
    waiting = rows.encode(pending)
    acquisition = NoisyHypervolumeImprovement(
        posterior,
        posterior.features[torch.from_numpy(np.sort(likely))],
        surrogate.features(waiting),
        corner,
        n_more=n_proposals,
        seed=seed,
    )

    def score(candidates: Rows) -> NDArray[np.float64]:
        values = acquisition(surrogate.features(candidates))
        if not bool(torch.isfinite(values).all()):
            raise torch.linalg.LinAlgError("acquisition values are not finite")  # type: ignore[attr-defined]
        return values.numpy()

    unavailable = [*row_keys(rows.encode([o.layout for o in observations])), *row_keys(waiting)]
    new = NewLayouts(rows, unavailable, measured[likely], np.random.default_rng(seed))
    chosen: list[CanonicalLayout] = []
    while len(chosen) < n_proposals and (best := new.take_best(score)) is not None:
        chosen.append(rows.decode(best))
        if len(chosen) < n_proposals:
            acquisition.add_pending(surrogate.features(best[None])[0])
    return chosen


def warm_up(section: SurrogateSection) -> None:
    """Import what a proposal needs, so that the first one does not wait for it."""
    import milp_ray.search.ax_study

    if section.inference == "nuts":
        import milp_ray.search.nuts  # noqa: F401


def _likely_front(posterior: Posterior, corner: Tensor, seed: int) -> NDArray[np.int64]:
    """Positions of the observed points that may be on the front, the likeliest first; at least one."""
    chances = chances_on_front(posterior, corner, seed=seed).numpy()
    order = np.argsort(-chances, kind="stable")
    return order[: max(1, int((chances > 0).sum()))]


def _data(
    rows: CanonicalRows,
    objectives: Sequence[str],
    section: SurrogateSection,
    measured: Sequence[Observation],
) -> tuple[Outputs, Tensor, Tensor]:
    """The outputs' transform, features n x d and values m x n in the model's units."""
    table = _table(measured, objectives)
    outputs = Outputs.of(table, _signs(objectives), section.outputs)
    features = torch.from_numpy(rows.features(rows.encode([o.layout for o in measured])))
    return outputs, features, torch.from_numpy(outputs.observed(table))


def _table(measured: Sequence[Observation], objectives: Sequence[str]) -> list[list[float]]:
    return [[(o.values or {})[name] for name in objectives] for o in measured]


def _signs(objectives: Sequence[str]) -> list[float]:
    return [KNOWN_OBJECTIVES[name].sign for name in objectives]
