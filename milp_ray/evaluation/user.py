"""Some users, every method: the pure function that a worker of the pool runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from milp_ray.config.methods import MethodsSection
from milp_ray.errors import MilpError
from milp_ray.evaluation.scores import Row, persona_words, score_rows
from milp_ray.methods import fit_users, is_shared
from milp_ray.methods.protocol import FitRequest, training_side
from milp_ray.methods.text_prompt import history_fits

if TYPE_CHECKING:
    from milp_ray.config.evaluation import EvaluationSection
    from milp_ray.config.prompt import PromptSection
    from milp_ray.config.training import TrainingSection
    from milp_ray.memory.layout import CanonicalLayout
    from milp_ray.methods import Costs
    from milp_ray.methods.shared import Shared
    from milp_ray.training.adapters import Adapter
    from milp_ray.training.base import Base
    from milp_ray.users.records import UserSplit


@dataclass(frozen=True, slots=True)
class Subject:
    """A user to be scored: the whole split, the stored adapter (``None``: the full method trains one), and
    the seed of the adapters that are trained for the purpose.
    """

    split: UserSplit
    adapter: Adapter | None
    seed: int


def requests_of(
    base: Base,
    subjects: Sequence[Subject],
    layout: CanonicalLayout,
    training: TrainingSection,
    prompt: PromptSection,
    evaluation: EvaluationSection,
    settings: MethodsSection,
) -> list[FitRequest]:
    """What the methods are told of the users: the training side of their splits."""
    return [
        FitRequest(
            base=base,
            split=training_side(subject.split),
            layout=layout,
            training=training,
            prompt=prompt,
            max_new_tokens=evaluation.max_new_tokens,
            batch_size=evaluation.batch_size,
            seed=subject.seed,
            adapter=subject.adapter,
            methods=settings,
        )
        for subject in subjects
    ]


def evaluate_users(
    base: Base,
    subjects: Sequence[Subject],
    methods: Sequence[str],
    layout: CanonicalLayout,
    training: TrainingSection,
    prompt: PromptSection,
    evaluation: EvaluationSection,
    *,
    settings: MethodsSection | None = None,
    shared: Mapping[str, Shared] | None = None,
    costs: dict[str, Costs] | None = None,
) -> list[list[Row]]:
    """Score every method on each user's test examples; a row a (method, example), none without examples.

    Users are trained and answered for together; their rows do not depend on who else is there (beyond
    rounding). The methods get the training side of a split: the test examples are read here, to ask their
    queries and to score the answers.

    Args:
        base: the frozen base; left as it was.
        subjects: the users.
        methods: names, see :mod:`milp_ray.methods`; one that does not apply to a user gives no rows.
        layout: of the adapters that are trained here.
        training: recipe of the adapters that are trained here.
        prompt: the fixed phrases.
        evaluation: lengths and batch sizes of generation.
        settings: what the methods have to set; ``None``: their defaults.
        shared: what methods have trained on all users together.
        costs: is given what each method took, where it is wanted.

    Raises:
        MilpError: a method needs a part in ``shared`` that is not there.
    """
    missing = [name for name in methods if is_shared(name) and name not in (shared or {})]
    if missing:
        raise MilpError(
            f"{', '.join(missing)}: a part of it is trained on all users together, and these are only some; "
            "use `milp-ray compare`"
        )
    asked = [subject for subject in subjects if subject.split.test]
    requests = requests_of(base, asked, layout, training, prompt, evaluation, settings or MethodsSection())
    rows: dict[str, list[Row]] = {subject.split.user_id: [] for subject in subjects}
    queries = [[example.query for example in subject.split.test] for subject in asked]
    persona = [persona_words(subject.split) for subject in asked]
    whole = [
        history_fits(subject.split, own, base, prompt, reserve=evaluation.max_new_tokens)
        for subject, own in zip(asked, queries, strict=True)
    ]
    for name in methods:
        fitted = fit_users(name, requests, (shared or {}).get(name))
        ready = [(i, s.split) for i, s in enumerate(asked) if s.split.user_id in fitted.personalizers]
        answers = iter(fitted.respond([(split.user_id, q) for i, split in ready for q in queries[i]]))
        losses = fitted.losses({split.user_id: split.test for _, split in ready})
        for i, split in ready:
            rows[split.user_id] += score_rows(
                split.user_id,
                name,
                split.test,
                [next(answers) for _ in split.test],
                losses[split.user_id],
                persona=persona[i],
                history_fits=whole[i],
                section=evaluation,
            )
        if costs is not None:
            costs[name] = fitted.costs
    return [rows[subject.split.user_id] for subject in subjects]
