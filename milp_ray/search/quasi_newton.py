"""Many small minimisations at once: BFGS with a dense inverse Hessian for every problem of a batch.

Hyperparameters of a few Gaussian processes are a handful of problems of a few dozen variables each. One
function call serves them all, so that what a call costs beyond arithmetic is paid once, and with so few
variables a dense inverse Hessian costs nothing and takes fewer steps than a limited-memory one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# f(points: k x p, problems: k) -> values k, gradients k x p; infinite values are allowed off the start.
Batched = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

_ARMIJO = 1e-4
_SHRINK = 0.3
_MAX_STEP = 3.0  # of any variable at once: they are logarithms, beyond it no model of second order holds
_SMALLEST_STEP = 1e-8


def minimise(
    function: Batched,
    start: Tensor,
    lower: Tensor,
    upper: Tensor,
    *,
    max_evaluations: int,
    tolerance: float,
    inverse: Tensor | None = None,
) -> Minima:
    """Minimise every problem of a batch within its box (Nocedal and Wright 2006, algorithm 6.1, projected).

    A problem leaves the batch once its projected gradient is below ``tolerance`` everywhere or its last two
    steps gained less than a tenth of it, so that slow problems do not hold the quick ones; a step that does
    not gain enough (Armijo) is shortened while the other problems go on.

    Args:
        function: values and gradients of some problems, which it is told by their positions in the batch.
        start: b x p, strictly inside the box or on it.
        lower, upper: p.
        max_evaluations: of one problem.
        inverse: b x p x p, inverse Hessians to begin with, where they are roughly known.
    """
    everyone = torch.arange(len(start), device=start.device)
    value, gradient = function(start, everyone)
    state = _State(everyone, start.clone(), value, gradient, inverse)
    found = Minima(start.clone(), value.clone(), state.inverse.clone())
    state.aim(lower, upper)
    for _ in range(max_evaluations - 1):
        keep = state.unfinished(tolerance, lower, upper)
        if not bool(keep.all()):
            state.store(found)
            state.keep(keep)
        if len(state.problems) == 0:
            break
        trial = (state.point + state.step[:, None] * state.direction).clamp(lower, upper)
        value, gradient = function(trial, state.problems)
        state.advance(trial, value, gradient, tolerance)
        state.aim(lower, upper)
    state.store(found)
    return found


@dataclass(frozen=True)
class Minima:
    """Of b problems: points b x p, values b, and estimates of the inverse Hessians there, b x p x p."""

    points: Tensor
    values: Tensor
    inverse: Tensor


class _State:
    """The problems still at work, k of them."""

    def __init__(
        self, problems: Tensor, point: Tensor, value: Tensor, gradient: Tensor, inverse: Tensor | None
    ) -> None:
        k, p = point.shape
        self.problems = problems
        self.point, self.value, self.gradient = point, value, gradient
        self.inverse = torch.eye(p).to(point).repeat(k, 1, 1) if inverse is None else inverse.clone()
        self.direction = torch.zeros_like(point)
        self.step = torch.ones_like(value)
        self.is_new = torch.ones_like(problems, dtype=torch.bool)  # whether the point moved: aim afresh
        self.is_first = torch.full_like(self.is_new, inverse is None)  # no curvature is known yet
        self.n_stalled = torch.zeros_like(problems)

    def store(self, found: Minima) -> None:
        """Write down where the problems are."""
        found.points[self.problems] = self.point
        found.values[self.problems] = self.value
        found.inverse[self.problems] = self.inverse

    def keep(self, which: Tensor) -> None:
        """Drop the other problems."""
        for name, values in vars(self).items():
            setattr(self, name, values[which])

    def unfinished(self, tolerance: float, lower: Tensor, upper: Tensor) -> Tensor:
        """Which problems go on, k."""
        free = self._free(self.gradient, lower, upper)
        flat = (self.gradient.abs() * free).amax(dim=1) < tolerance
        return ~(flat | (self.n_stalled >= 2) | (self.step < _SMALLEST_STEP))

    def aim(self, lower: Tensor, upper: Tensor) -> None:
        """A new direction for the problems whose point moved."""
        new = self.is_new
        if not bool(new.any()):
            return
        free = self._free(self.gradient, lower, upper)
        projected = self.gradient * free
        direction = -torch.bmm(self.inverse, projected[:, :, None])[:, :, 0] * free
        # Curvature that was met outside the box may point uphill here: begin again, downhill.
        uphill = new & ((direction * projected).sum(dim=1) >= 0)
        if bool(uphill.any()):
            self.inverse[uphill] = torch.eye(self.point.shape[1]).to(self.inverse)
            self.is_first |= uphill
            direction = torch.where(uphill[:, None], -projected, direction)
        longest = direction.abs().amax(dim=1).clamp_min(1e-300)
        limit = torch.where(self.is_first, torch.ones_like(longest), torch.full_like(longest, _MAX_STEP))
        direction = direction * (limit / longest).clamp_max(1.0)[:, None]
        self.direction = torch.where(new[:, None], direction, self.direction)
        self.step = torch.where(new, torch.ones_like(self.step), self.step)
        self.is_new = torch.zeros_like(new)

    def advance(self, trial: Tensor, value: Tensor, gradient: Tensor, tolerance: float) -> None:
        """Take the trial points that gain enough; shorten the step of the others."""
        moved = trial - self.point
        expected = (self.gradient * moved).sum(dim=1)
        good = torch.isfinite(value) & (value <= self.value + _ARMIJO * expected)
        gain = torch.where(good, self.value - value, torch.zeros_like(value))
        self._update_inverse(good, moved, gradient - self.gradient)
        self.n_stalled = torch.where(
            good & (gain < 0.1 * tolerance), self.n_stalled + 1, torch.where(good, 0, self.n_stalled)
        )
        self.step = torch.where(good, self.step, self.step * _SHRINK)
        self.point = torch.where(good[:, None], trial, self.point)
        self.value = torch.where(good, value, self.value)
        self.gradient = torch.where(good[:, None], gradient, self.gradient)
        self.is_new = good

    def _free(self, gradient: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
        """Variables that are not held at a bound by the gradient, k x p."""
        held = ((self.point <= lower) & (gradient > 0)) | ((self.point >= upper) & (gradient < 0))
        return ~held

    def _update_inverse(self, good: Tensor, moved: Tensor, change: Tensor) -> None:
        """The BFGS update, where the curvature along the step is positive."""
        curvature = (moved * change).sum(dim=1)
        curved = good & (curvature > 1e-10 * moved.norm(dim=1) * change.norm(dim=1))
        if not bool(curved.any()):
            return
        s, y, sy = moved[curved], change[curved], curvature[curved]
        inverse = self.inverse[curved]
        # The first curvature sets the scale (equation 6.20).
        scale = torch.where(self.is_first[curved], sy / (y * y).sum(dim=1), torch.ones_like(sy))
        inverse = inverse * scale[:, None, None]
        hy = torch.bmm(inverse, y[:, :, None])[:, :, 0]
        cross = s[:, :, None] * hy[:, None, :]
        weight = (1.0 + (y * hy).sum(dim=1) / sy) / sy
        inverse = inverse + weight[:, None, None] * (s[:, :, None] * s[:, None, :])
        self.inverse[curved] = inverse - (cross + cross.mT) / sy[:, None, None]
        self.is_first = self.is_first & ~curved
