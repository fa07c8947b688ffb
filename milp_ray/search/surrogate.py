"""The surrogate of a study and the batch of layouts that it proposes.

A SAAS Gaussian process an objective over the canonical layout's features (:mod:`milp_ray.search.saas`), and
a batch chosen greedily under noisy expected hypervolume improvement (:mod:`milp_ray.search.nehvi`). Nothing
is kept from batch to batch: the same observations, pending layouts and seed give the same proposals, in a
resumed study too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from milp_ray.objectives import KNOWN_OBJECTIVES
from milp_ray.search.acquisition import NewLayouts
from milp_ray.search.earlier import EarlierStudies, choose_trend, fit_earlier
from milp_ray.search.features import CanonicalRows, Rows, row_keys
from milp_ray.search.front import nadir
from milp_ray.search.nehvi import NoisyHypervolumeImprovement, chances_on_front
from milp_ray.search.observations import Observation, standard_errors
from milp_ray.search.outputs import Outputs
from milp_ray.search.partial import FinalValues, final_values
from milp_ray.search.posterior import Posterior
from milp_ray.search.saas import EXACT_NOISE, Hyperparameters, LinAlgError, fit_map
from milp_ray.search.subset import representative

if TYPE_CHECKING:
    from milp_ray.config.search import SurrogateSection
    from milp_ray.memory.layout import CanonicalLayout
    from milp_ray.memory.space import SearchSpace

# Variance, in those of an objective's values, of a value that is not known: all objectives share one batch of
# observations, and one with this much noise says nothing.
_MISSING = 1e4


@dataclass(frozen=True)
class Surrogate:
    """The fitted model of a study's objectives, in their order."""

    rows: CanonicalRows
    outputs: Outputs
    hyperparameters: Hyperparameters
    posterior: Posterior
    # What it was fitted to, in the order of the posterior's observations: at most section.max_observations.
    final: FinalValues

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
    """Fit every objective to the observations that say anything of it, in their order.

    Trials that were stopped early count with what their rungs say (:mod:`milp_ray.search.partial`); of more
    than ``section.max_observations`` a subset stands for all (:mod:`milp_ray.search.subset`).

    Args:
        seed: of NUTS; MAP fits draw nothing.
        earlier: studies that the objectives may take a trend from.

    Raises:
        torch.linalg.LinAlgError: no covariance could be factored.
    """
    torch.set_num_threads(1)  # the same sums in the same order on every machine, and no oversubscription
    rows = CanonicalRows(space)
    known = final_values(observations, objectives)
    data = _Data.of(rows, objectives, section, known)
    outputs, features, values, extra = data.outputs, data.features, data.values, data.extra
    errors = standard_errors(known.measured, objectives)
    variances = outputs.noise(None if errors is None else [errors[name] for name in objectives])
    noise = None if variances is None else torch.from_numpy(variances).clamp_min(EXACT_NOISE)
    trend = (
        None if earlier is None else choose_trend(earlier, features, values, noise, section.n_ensemble, extra)
    )
    deviations = values if trend is None else values - trend(features)
    if section.inference == "map":
        found = fit_map(features, deviations, noise, section.n_ensemble, extra)
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
            extra=extra,
        )
    return Surrogate(rows, outputs, found, Posterior(features, values, found, trend, extra), data.final)


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
    found = [final_values(study, objectives) for study in studies]
    data = [_Data.of(CanonicalRows(space), objectives, section, f) for f in found if len(f.measured) > 1]
    return fit_earlier([(d.features, d.values, d.extra) for d in data], section.n_ensemble) if data else None


def propose(
    space: SearchSpace,
    objectives: Sequence[str],
    section: SurrogateSection,
    observations: Sequence[Observation],
    pending: Sequence[CanonicalLayout],
    *,
    n_proposals: int,
    seed: int,
    earlier: EarlierStudies | None = None,
) -> list[CanonicalLayout]:
    """Layouts to measure next, in the order in which they were chosen: neither observed nor pending, all
    different; fewer than asked for where no more were found.

    Args:
        observations: ended trials in the order of their index; failed and stopped ones have no values.
        pending: layouts that are being measured, in the order of their trials.
        seed: of this batch.
        earlier: studies that the objectives may take a trend from.

    Raises:
        torch.linalg.LinAlgError: no model could be fitted or evaluated.
    """
    surrogate = fit(space, objectives, section, observations, seed, earlier)
    rows, posterior = surrogate.rows, surrogate.posterior
    corner = _corner(surrogate)
    fitted = rows.encode([o.layout for o in surrogate.final.observations])
    likely = _likely_front(surrogate, corner, seed)
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
            raise LinAlgError("acquisition values are not finite")
        return values.numpy()

    unavailable = [*row_keys(rows.encode([o.layout for o in observations])), *row_keys(waiting)]
    new = NewLayouts(rows, unavailable, fitted[likely], np.random.default_rng(seed))
    chosen: list[CanonicalLayout] = []
    while len(chosen) < n_proposals and (best := new.take_best(score)) is not None:
        chosen.append(rows.decode(best))
        if len(chosen) < n_proposals:
            acquisition.add_pending(surrogate.features(best[None])[0])
    return chosen


def _corner(surrogate: Surrogate) -> Tensor:
    """Where the hypervolume that is to be improved begins, m, in the model's units."""
    values = surrogate.outputs.observed(surrogate.final.values[surrogate.final.is_measured])
    return torch.from_numpy(nadir(values.T, np.full(len(values), -1.0)))


def warm_up(section: SurrogateSection) -> None:
    """Import what a proposal needs, so that the first one does not wait for it."""
    import_module("milp_ray.search.ax_study")
    if section.inference == "nuts":
        import_module("milp_ray.search.nuts")


def _likely_front(surrogate: Surrogate, corner: Tensor, seed: int) -> NDArray[np.int64]:
    """Positions of the observed points that may be on the front, the likeliest first; at least one.

    Only trials that have run to their end have an adapter to be on the front with.
    """
    is_measured = torch.from_numpy(surrogate.final.is_measured)
    chances = chances_on_front(surrogate.posterior, corner, is_measured, seed=seed).numpy()
    order = np.argsort(-chances, kind="stable")
    return order[: max(1, int((chances > 0).sum()))]


@dataclass(frozen=True)
class _Data:
    """What a model is fitted to: of the trials in ``final``, which are ``max_observations`` at the most,
    ``features`` n x d, ``values`` m x n in the model's units, and ``extra`` m x n, what the values' variances
    are above the noise; ``None`` where all of them have run to their end.
    """

    outputs: Outputs
    features: Tensor
    values: Tensor
    extra: Tensor | None
    final: FinalValues

    @classmethod
    def of(
        cls, rows: CanonicalRows, objectives: Sequence[str], section: SurrogateSection, final: FinalValues
    ) -> _Data:
        signs = _signs(objectives)
        points = rows.features(rows.encode([o.layout for o in final.observations]))
        kept = representative(points, final.values, final.is_measured, signs, section.max_observations)
        final, features = final.take(kept), torch.from_numpy(points[kept])
        outputs = Outputs.of(final.values, signs, section.outputs)
        values = outputs.observed(final.values)
        if final.is_measured.all():
            return cls(outputs, features, torch.from_numpy(values), None, final)
        extra = outputs.variances(final.values, final.variances)
        is_missing = np.isnan(values)
        extra[is_missing], values[is_missing] = _MISSING, 0.0
        return cls(outputs, features, torch.from_numpy(values), torch.from_numpy(extra), final)


def _signs(objectives: Sequence[str]) -> list[float]:
    return [KNOWN_OBJECTIVES[name].sign for name in objectives]
