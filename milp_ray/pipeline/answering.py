"""One question answered with the adapter of one of a run's users."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from milp_ray.config import Config
    from milp_ray.rundir import RunFolder


def generate(run: RunFolder, config: Config, user_id: str, query: str, *, personal: bool = True) -> str:
    """The answer to a query with a user's adapter, or with the base alone.

    Raises:
        MilpError: there is no such user, or none that may be served.
    """
    from milp_ray.personalize.governance.consent import Gate, no_such_user
    from milp_ray.personalize.governance.record import Record
    from milp_ray.personalize.store import AdapterMissingError, run_store

    # Before the base is loaded, so that a wrong id is told at once.
    gate = Gate(Record(run.path), config.users.consent)
    gate.check_known(user_id, run.path)
    adapter = None
    if personal:
        gate.check_serving(user_id, run.path)
        try:
            adapter = run_store(run.store, config.personalize).load(user_id)
        except AdapterMissingError:
            raise no_such_user(user_id, run.path) from None

    from milp_ray.training.base import load_base
    from milp_ray.training.generation import Questions
    from milp_ray.training.generation import generate as respond
    from milp_ray.training.text import query_prompt

    base = load_base(config.base)
    section = config.evaluation
    asked = [Questions([query_prompt(query, config.prompt)], adapter)]
    [[answer]] = respond(base, asked, max_new_tokens=section.max_new_tokens, batch_size=1)
    return answer
