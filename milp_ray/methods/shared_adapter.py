"""One adapter for all users: trained on everybody's history and past examples, and nobody's in particular.

The non-personal counterpart of one adapter each, as in the comparisons of OPPU (Tan et al. 2024, arXiv
2402.04401): what of MiLP's gain is knowing the task and the form of the answers, and what is knowing the
user. Layout and recipe are MiLP's, epochs too, so that each user's data is seen as often as there. The
adapter holds all users' data together: whom it is asked for makes no difference, and what one user said may
come out in the answer to another.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from milp_ray.methods.milp import BOTH
from milp_ray.methods.protocol import Answerer
from milp_ray.methods.shared import Shared

if TYPE_CHECKING:
    from collections.abc import Sequence

    from milp_ray.methods.protocol import FitRequest, Personalizer
    from milp_ray.training.adapters import Adapter
    from milp_ray.training.job import Stage


def share(requests: Sequence[FitRequest]) -> Shared:
    """Train the adapter."""
    return Shared(pooled_adapter(requests, BOTH))


def fit(requests: Sequence[FitRequest]) -> list[Personalizer | None]:
    """Everybody is answered by the same adapter."""
    return [Answerer(request, adapter=request.shared_adapter) for request in requests]


def pooled_adapter(requests: Sequence[FitRequest], parts: frozenset[str]) -> Adapter | None:
    """One adapter trained on these parts of all users' data; ``None`` where there are none."""
    from milp_ray.training.job import pooled_stages

    if not requests:
        return None
    one = requests[0]
    splits = [request.split for request in requests]
    return trained_on(one, pooled_stages(splits, parts, one.base, one.training, one.prompt))


def trained_on(request: FitRequest, stages: tuple[Stage, ...]) -> Adapter | None:
    """One adapter trained on sequences of many users, by a user's recipe and with its seed."""
    from milp_ray.training.job import Job
    from milp_ray.training.train import train
    from milp_ray.users.records import UserSplit

    if request.layout.is_empty or not stages:
        return None
    nobody = UserSplit("everybody", None, (), (), (), ())
    job = Job("everybody", nobody, request.layout, BOTH, request.seed, stages=stages)
    [result] = train(request.base, [job], request.training, request.prompt)
    return result.adapter
