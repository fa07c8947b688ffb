"""Many users' adapters through stages of their own, in one go."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from milp_ray.training.job import INSTRUCTION, Job
from milp_ray.training.train import train

if TYPE_CHECKING:
    from collections.abc import Sequence

    from milp_ray.methods.protocol import FitRequest
    from milp_ray.training.adapters import Adapter
    from milp_ray.training.job import Stage


@dataclass(frozen=True)
class Course:
    """What a user's adapter goes through; ``start``: what it is before, ``None`` for a fresh one."""

    request: FitRequest
    stages: tuple[Stage, ...]
    start: Adapter | None = None


def train_courses(courses: Sequence[Course], *, in_order: bool = False) -> list[Adapter]:
    """Each user's adapter after their stages, each of which has an optimizer and a schedule of its own.

    Args:
        courses: what each goes through.
        in_order: batches are filled with the sequences as they stand, in every epoch alike, whatever the
            recipe says.

    Raises:
        MilpError: training diverges.
    """
    if not courses:
        return []
    one = courses[0].request
    order = "chronological" if in_order else one.training.order
    recipe = one.training.model_copy(update={"early_stopping_patience": None, "order": order})
    results = train(one.base, [_job(i, course) for i, course in enumerate(courses)], recipe, one.prompt)
    adapters = []
    for result in results:
        assert result.adapter is not None, "nobody is taught under an empty layout"
        adapters.append(result.adapter)
    return adapters


def without_validation(request: FitRequest) -> FitRequest:
    """The request as it is trained on: validation examples are about the end of the history, and no stage
    may choose by them.
    """
    if not request.split.validation:
        return request
    return replace(request, split=replace(request.split, validation=()))


def _job(number: int, course: Course) -> Job:
    request = without_validation(course.request)
    return Job(
        job_id=str(number),
        split=request.split,
        layout=request.layout,
        parts=frozenset({INSTRUCTION}),
        seed=request.seed,
        learning_rate=request.methods.plum.learning_rate,
        start=course.start,
        stages=course.stages,
    )
