"""One user, every method: the pure function that a worker of the pool runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from milp_ray.evaluation.scores import Row, persona_words, score_rows
from milp_ray.methods import fit
from milp_ray.methods.protocol import FitRequest, training_side
from milp_ray.methods.text_prompt import history_fits

if TYPE_CHECKING:
    from milp_ray.config import EvaluationSection, PromptSection, TrainingSection
    from milp_ray.memory.layout import CanonicalLayout
    from milp_ray.training.adapters import Adapter
    from milp_ray.training.base import Base
    from milp_ray.users.records import UserSplit


def evaluate_user(
    base: Base,
    split: UserSplit,
    methods: Sequence[str],
    milp_adapter: Adapter | None,
    layout: CanonicalLayout,
    training: TrainingSection,
    prompt: PromptSection,
    evaluation: EvaluationSection,
    seed: int,
) -> list[Row]:
    """Score every method on the user's test examples; a row a (method, example), no row without examples.

    Depends on its arguments alone. The methods get the training side of the split: the test examples are
    read here, to ask their queries and to score the answers.

    Args:
        base: the frozen base; left as it was.
        split: the user.
        methods: names, see :mod:`milp_ray.methods`; one that does not apply to the user gives no rows.
        milp_adapter: the user's adapter; ``None``: the full method trains one.
        layout: of the adapters that are trained here.
        training: recipe of the adapters that are trained here.
        prompt: the fixed phrases.
        evaluation: lengths and batch sizes of generation.
        seed: of the adapters that are trained here.
    """
    examples = split.test
    if not examples:
        return []
    request = FitRequest(
        base=base,
        split=training_side(split),
        layout=layout,
        training=training,
        prompt=prompt,
        max_new_tokens=evaluation.max_new_tokens,
        batch_size=evaluation.batch_size,
        seed=seed,
        adapter=milp_adapter,
    )
    queries = [example.query for example in examples]
    persona = persona_words(split)
    whole = history_fits(split, queries, base, prompt, reserve=evaluation.max_new_tokens)
    rows: list[Row] = []
    for name in methods:
        personalizer = fit(name, request)
        if personalizer is None:
            continue
        rows += score_rows(
            split.user_id,
            name,
            examples,
            personalizer.respond(queries),
            personalizer.losses(examples),
            persona=persona,
            history_fits=whole,
        )
    return rows
