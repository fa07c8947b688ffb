"""Some users, every method: the pure function that a worker of the pool runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from milp_ray.evaluation.scores import Row, persona_words, score_rows
from milp_ray.methods import fit
from milp_ray.methods.protocol import FitRequest, losses_all, respond_all, training_side
from milp_ray.methods.text_prompt import history_fits

if TYPE_CHECKING:
    from milp_ray.config import EvaluationSection, PromptSection, TrainingSection
    from milp_ray.memory.layout import CanonicalLayout
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


def evaluate_users(
    base: Base,
    subjects: Sequence[Subject],
    methods: Sequence[str],
    layout: CanonicalLayout,
    training: TrainingSection,
    prompt: PromptSection,
    evaluation: EvaluationSection,
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
    """
    asked = [subject for subject in subjects if subject.split.test]
    requests = [
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
        )
        for subject in asked
    ]
    rows: dict[str, list[Row]] = {subject.split.user_id: [] for subject in subjects}
    queries = [[example.query for example in subject.split.test] for subject in asked]
    persona = [persona_words(subject.split) for subject in asked]
    whole = [
        history_fits(subject.split, own, base, prompt, reserve=evaluation.max_new_tokens)
        for subject, own in zip(asked, queries, strict=True)
    ]
    for name in methods:
        ready = [(i, one) for i, one in enumerate(fit(name, requests)) if one is not None]
        personalizers = [one for _, one in ready]
        responses = respond_all(personalizers, [queries[i] for i, _ in ready])
        losses = losses_all(personalizers, [asked[i].split.test for i, _ in ready])
        for (i, _), response, loss in zip(ready, responses, losses, strict=True):
            split = asked[i].split
            rows[split.user_id] += score_rows(
                split.user_id,
                name,
                split.test,
                response,
                loss,
                persona=persona[i],
                history_fits=whole[i],
                section=evaluation,
            )
    return [rows[subject.split.user_id] for subject in subjects]
