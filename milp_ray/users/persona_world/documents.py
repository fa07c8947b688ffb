"""Pretraining documents: what the embedded base reads so that it knows the language and the world's rules.

A document is a context (one fact, a profile, a history, or none) followed by questions about it. Personas,
histories and wordings come from the pretraining population alone.
"""

from __future__ import annotations

import itertools
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
    if rng.random() < 0.4:
        asked.insert(rng.randint(0, len(asked)), ask_generic(rng, "pretraining", "pretraining"))
    return tuple(asked)


# Shares of the mixture by level: (few facts, profile, history, history without questions); the rest are
# questions without any context.
MIXTURES = ((0.95, 0.0, 0.0, 0.0), (0.35, 0.50, 0.10, 0.0), (0.10, 0.35, 0.42, 0.08))


def draw_document(rng: Random, level: int) -> Document:
    """One document of the mixture at ``level``: 0 single facts, 1 profiles as well, 2 histories as well.

    Single facts come first because reading an answer out of a context is learnt soonest where the context
    holds little else.
    """
    persona = draw_persona(rng)
    few, profile, history, history_alone = itertools.accumulate(MIXTURES[level])
    kind = rng.random()
    if kind < few:
        return _few_facts(Persona(persona.facts[: rng.randint(1, 2)]), rng)
    if kind < profile:
        return Document(draw_profile(persona, rng), (), _questions(persona, 6, rng))
    if kind < history:
        whole = level == 2 and rng.random() < 0.6
        n_facts = len(persona.facts) if whole else rng.randint(2, len(persona.facts) if level == 2 else 4)
        part = Persona(persona.facts[:n_facts])
        turns = draw_history(part, rng.randint(n_facts, 5 * n_facts), rng, "pretraining")
        return Document(None, tuple(turns), _questions(part, rng.randint(4, 6), rng))
    if kind < history_alone:
        return Document(None, tuple(draw_history(persona, rng.randint(10, 60), rng, "pretraining")), ())
    return Document(None, (), _questions(persona, 1, rng))


def _few_facts(part: Persona, rng: Random) -> Document:
    asked = _questions(part, len(part.facts), rng)
    if rng.random() < 0.5:
        return Document(None, tuple(draw_history(part, 1, rng, "pretraining")), asked)
    return Document(" ".join(fact_sentence(fact, rng) for fact in part.facts), (), asked)
