"""Turns of people of the pretraining population, and questions whether one of them said this or that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from milp_ray.methods.plum import world
from milp_ray.methods.plum.rule import YES_NO_FRAMES, Said, clauses_of_text
from milp_ray.users.persona_world.persona import draw_history, draw_persona

HISTORY_TURNS = 60  # of which a few are read, as retrieval would choose them


@dataclass(frozen=True)
class Level:
    """What is asked: about how many turns, and which share of the questions is hard.

    ``beside``: of the negative ones are about something related to what was said, the others about a topic
    that does not occur. ``reworded``: of the positive ones are in other words. ``nothing``: of the contexts
    are empty, so that all answers are no.
    """

    n_turns: tuple[int, ...]
    beside: float = 0.0
    reworded: float = 0.0
    nothing: float = 0.0


LEVELS = (
    Level((1,)),
    Level((1,), beside=0.75),
    Level((1,), beside=0.75, reworded=0.5, nothing=0.05),
    Level((1, 1, 2, 2, 4, 4, 4, 8, 16, 32), beside=0.75, reworded=0.5, nothing=0.05),
)


@dataclass(frozen=True)
class Asked:
    """Turns and questions about them, each with whether it is answered with yes."""

    turns: tuple[str, ...]
    questions: tuple[tuple[str, bool], ...]


def draw_asked(level: Level, rng: Random, n_questions: int = 8) -> Asked:
    """Some turns of a person of the pretraining population, and questions whether this or that was said."""
    history = draw_history(draw_persona(rng), HISTORY_TURNS, rng, "pretraining")
    n_turns = 0 if rng.random() < level.nothing else rng.choice(level.n_turns)
    turns = tuple(history[i] for i in sorted(rng.sample(range(len(history)), n_turns)))
    said, clauses = Said(), [clause for text in turns for clause in clauses_of_text(text)]
    for clause in clauses:
        said.add(clause)
    questions = []
    for _ in range(n_questions):
        is_said = rng.random() < 0.5 and bool(clauses)
        clause = _said(clauses, level, rng) if is_said else _not_said(clauses, said, level, rng)
        if clause is not None:
            questions.append((rng.choice(YES_NO_FRAMES).format(clause=clause), is_said))
    return Asked(turns, tuple(questions))


def _said(clauses: Sequence[str], level: Level, rng: Random) -> str:
    clause = rng.choice(clauses)
    if rng.random() < level.reworded:
        return rng.choice(world.wordings(rng.choice(world.things_of(clause))))
    return clause


def _not_said(clauses: Sequence[str], said: Said, level: Level, rng: Random) -> str | None:
    """What was not said; ``None`` where nothing suitable is found."""
    if clauses and rng.random() < level.beside:
        thing = rng.choice(world.things_of(rng.choice(clauses)))
        others = said.untold_beside(thing, rng)
        return rng.choice(world.wordings(others[0])) if others else None
    [text, *_] = draw_history(draw_persona(rng), 1, rng, "pretraining")
    topics = {thing.topic for clause in clauses for thing in world.things_of(clause)}
    for clause in clauses_of_text(text):
        thing, *more = world.things_of(clause)
        if topics.isdisjoint(one.topic for one in (thing, *more)):
            if not level.reworded:
                return clause
            # What nobody said may be anything: the thing itself, or something related.
            return rng.choice(world.wordings(rng.choice([thing, *world.related(thing, rng)])))
    return None
