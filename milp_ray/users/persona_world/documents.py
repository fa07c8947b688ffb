"""Pretraining documents: what the embedded base reads so that it knows the language and the world's rules.

A document is a list of spans, each with the information whether it is a response (weighted fully in the
loss) or something else. Personas, histories and wordings come from the pretraining population alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from milp_ray.users.persona_world.attributes import BY_NAME
from milp_ray.users.persona_world.persona import (
    Asked,
    Fact,
    Order,
    Persona,
    ask_direct,
    ask_generic,
    ask_implicit,
    draw_history,
    draw_persona,
    draw_profile,
    fact_sentence,
)


@dataclass(frozen=True, slots=True)
class Document:
    """A context (profile sentences or history turns, perhaps none) and questions about it."""

    profile: str | None
    turns: tuple[str, ...]
    asked: tuple[Asked, ...]


def _ask(fact: Fact, rng: Random) -> Asked:
    if rng.random() < 0.35:
        return ask_direct(fact, rng, "pretraining", "pretraining")
    order: Order = "choice_first" if rng.random() < 0.25 else "fact_first"
    rule = rng.choice(BY_NAME[fact.attribute].rules)
    return ask_implicit(fact, rule, order, rng, "pretraining", "pretraining")


def _questions(persona: Persona, n: int, rng: Random) -> tuple[Asked, ...]:
    """Questions about different facts, so that no answer can be copied from an earlier one; some generic."""
    facts = rng.sample(persona.facts, min(n, len(persona.facts)))
    # A fact that changed is asked for more often: that the latest value counts is the hardest to learn.
    changed = [fact for fact in persona.facts if fact.earlier is not None and fact not in facts]
    if changed and rng.random() < 0.5:
        facts[-1] = changed[0]
    asked = [_ask(fact, rng) for fact in facts]
    if rng.random() < 0.3:
        asked.insert(rng.randint(0, len(asked)), ask_generic(rng, "pretraining", "pretraining"))
    return tuple(asked)


def draw_document(rng: Random, progress: float) -> Document:
    """One document; ``progress`` in [0, 1] moves the mixture from single facts to whole histories."""
    persona = draw_persona(rng)
    kind = rng.random()
    history_share = 0.15 + 0.35 * progress
    few_share = 0.30 - 0.20 * progress
    if kind < history_share:
        n_facts = rng.randint(2, len(persona.facts)) if rng.random() < 0.7 - 0.4 * progress else len(persona.facts)
        part = Persona(persona.facts[:n_facts])
        turns = draw_history(part, rng.randint(n_facts, 5 * n_facts), rng, "pretraining")
        return Document(None, tuple(turns), _questions(part, rng.randint(4, 6), rng))
    if kind < history_share + few_share:
        part = Persona(persona.facts[: rng.randint(1, 3)])
        if rng.random() < 0.5:
            turns = draw_history(part, 1, rng, "pretraining")
            return Document(None, tuple(turns), _questions(part, 3, rng))
        return Document(" ".join(fact_sentence(fact, rng) for fact in part.facts), (), _questions(part, 3, rng))
    if kind < 0.85:
        return Document(draw_profile(persona, rng), (), _questions(persona, 6, rng))
    if kind < 0.93:
        return Document(None, (), _questions(persona, 1, rng))
    return Document(None, tuple(draw_history(persona, rng.randint(10, 60), rng, "pretraining")), ())
