"""Noisy expected hypervolume improvement, log-smoothed, for one candidate at a time and pending points.

Daulton et al. 2021 (NEHVI: the improvement over the front of every joint posterior draw, averaged) and
Ament et al. 2023 (the smoothing, which ranks candidates where no draw improves anything). The same quantity
as BoTorch's ``qLogNoisyExpectedHypervolumeImprovement`` with q = 1 and pending points counted as part of
the front, without gradients, which a discrete search has no use for.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from milp_ray.search.boxes import nondominated_cells
from milp_ray.search.posterior import JointDraws, Posterior

# Joint posterior draws over all samples of the hyperparameters together: quasi-random ones, which
# takes fewer of them. The time is proportional to their number.
N_DRAWS = 64
# Draws by which observed points are left out of the baseline: those on the front of none of them.
N_PRUNING_DRAWS = 256
# Width of the smoothing of max(x, 0), in standard deviations of an objective (BoTorch's tau_relu).
_TAU = 1e-6
# Candidates at once: more no longer fit the processor's cache.
_BATCH = 128


class NoisyHypervolumeImprovement:
    """log NEHVI of candidates, given what is observed and what is pending.

    Args:
        posterior: of m objectives, all maximised.
        baseline: p x d, the points that may be on the front.
        pending: r x d, points that are being measured.
        reference: m, in the model's units.
        n_more: how many points will be added to the pending ones.
        seed: of the draws.
    """

    def __init__(
        self,
        posterior: Posterior,
        baseline: Tensor,
        pending: Tensor,
        reference: Tensor,
        *,
        n_more: int,
        seed: int,
        n_draws: int = N_DRAWS,
    ) -> None:
        self._reference = reference
        points = torch.cat([baseline, pending])
        base = normal_draws(posterior, n_draws, len(points) + n_more, seed)
        self._draws = JointDraws(posterior, points, base)
        self._update_cells()

    def add_pending(self, point: Tensor) -> None:
        """Count one more point, d, as being measured."""
        self._draws.add(point[None])
        self._update_cells()

    def __call__(self, points: Tensor) -> Tensor:
        """Log NEHVI, q; ``points`` q x d."""
        return torch.cat([self._batch(part) for part in points.split(_BATCH)])

    def _update_cells(self) -> None:
        fronts = self._draws.values.flatten(0, 1).mT  # all draws x p x m
        self._lower, self._length = nondominated_cells(fronts, self._reference)

    def _batch(self, points: Tensor) -> Tensor:
        values = self._draws.candidates(points).flatten(0, 1)  # all draws x m x q
        volume: Tensor | None = None
        for objective in range(values.shape[1]):
            above = values[:, objective, None, :] - self._lower[:, :, objective, None]
            side = torch.minimum(_smooth_positive(above), self._length[:, :, objective, None])
            volume = side if volume is None else volume.mul_(side)
        assert volume is not None
        return volume.sum(dim=1).mean(dim=0).log()


def normal_draws(posterior: Posterior, n_draws: int, n_points: int, seed: int) -> Tensor:
    """Quasi-random standard normal numbers, s x k x m x n_points, with s·k ≥ ``n_draws`` in all."""
    s, m = posterior.n_samples, posterior.n_objectives
    k = max(8, math.ceil(n_draws / s))
    sequence = torch.quasirandom.SobolEngine(m * n_points, scramble=True, seed=seed)
    uniform = sequence.draw(s * k, dtype=torch.float64)
    # A scrambled sequence of few bits may hold 0 itself.
    normal = torch.special.ndtri(uniform.clamp(1e-9, 1.0 - 1e-9)).to(posterior.features)
    # Draws of one sample are spread over the sequence, not a run of it.
    return normal.reshape(k, s, m, n_points).transpose(0, 1)


def chances_on_front(posterior: Posterior, reference: Tensor, eligible: Tensor, *, seed: int) -> Tensor:
    """How often each observed point is on the front and above ``reference`` in joint draws, n.

    Points that are not ``eligible``, n, are on no front.
    """
    base = normal_draws(posterior, N_PRUNING_DRAWS, len(posterior.features), seed)
    draws = posterior.draws_at_observed(base).flatten(0, 1)  # draws x m x n
    on_front = _on_front(draws[:, :, eligible].mT, reference)
    chances = torch.zeros(len(posterior.features)).to(draws)
    chances[eligible] = on_front.to(draws).mean(dim=0)
    return chances


def _on_front(values: Tensor, reference: Tensor) -> Tensor:
    """Which of n points are above ``reference`` and not dominated: k x n x m, all maximised; k x n."""
    left = (values > reference).all(dim=2)
    found = torch.zeros_like(left)
    total = values.sum(dim=2)
    while bool(left.any()):
        # The point with the largest sum is dominated by none; what it dominates can go.
        best = total.masked_fill(~left, -torch.inf).argmax(dim=1, keepdim=True)
        found.scatter_(1, best, found.gather(1, best) | left.gather(1, best))
        corner = values.gather(1, best[:, :, None].expand(-1, -1, values.shape[2]))
        left &= (values > corner).any(dim=2)
    return found


def _smooth_positive(x: Tensor) -> Tensor:
    """max(x, 0) with the tail of a Cauchy density below zero (Ament et al. 2023, section 4); in place."""
    tail = (x / _TAU).square_().add_(1.0).reciprocal_().mul_(0.1 * _TAU)
    return tail.add_(x.clamp_min_(0.0))
