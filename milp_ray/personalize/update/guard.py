"""Whether an update still knows what the adapter knew: its loss on what was held out then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from milp_ray.config.prompt import PromptSection
    from milp_ray.training.adapters import Adapter
    from milp_ray.training.base import Base
    from milp_ray.users.records import Example

_USERS_A_PASS = 16  # two adapters each: bounds what is on the device at once


@dataclass(frozen=True, slots=True)
class Verdict:
    """Losses (mean nats a response token) on ``n_examples``, with the weights before and after an update.

    Without examples there is nothing to hold against an update.
    """

    n_examples: int
    before: float | None
    after: float | None
    tolerance: float | None

    @property
    def holds(self) -> bool:
        """Whether the new weights may take the place of the old ones."""
        if self.tolerance is None or self.before is None or self.after is None:
            return True
        return self.after <= self.before * (1.0 + self.tolerance)  # never for NaN

    def to_dict(self) -> dict[str, Any]:
        """Plain types; what is no number becomes ``None``."""
        losses = {"before": self.before, "after": self.after}
        finite = {name: v if v is not None and v - v == 0.0 else None for name, v in losses.items()}
        return {"n_examples": self.n_examples, **finite, "tolerance": self.tolerance}


@dataclass(frozen=True, slots=True)
class Guarded:
    """One user's examples, and the adapters to compare on them."""

    examples: Sequence[Example]
    before: Adapter
    after: Adapter


def verdicts(
    base: Base, guarded: Sequence[Guarded], prompt: PromptSection, tolerance: float | None
) -> list[Verdict]:
    """Measure users' adapters before and after an update, many users and both weights in one pass.

    Raises:
        MilpError: an adapter does not fit the base.
    """
    from milp_ray.training.loss import mean_token_loss
    from milp_ray.training.response_loss import Wanted, response_losses

    found: list[Verdict] = []
    for start in range(0, len(guarded), _USERS_A_PASS):
        some = guarded[start : start + _USERS_A_PASS]
        wanted = [Wanted(one.examples, adapter=a) for one in some for a in (one.before, one.after)]
        losses = [mean_token_loss(own) for own in response_losses(base, wanted, prompt)]
        found += [
            Verdict(len(one.examples), losses[2 * i], losses[2 * i + 1], tolerance)
            for i, one in enumerate(some)
        ]
    return found
