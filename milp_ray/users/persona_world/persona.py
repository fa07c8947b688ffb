"""One persona: its facts, what it says in a history, and what is asked about it.

Everything is drawn from a :class:`random.Random` that the caller seeds: a persona is a function of its seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, TypeVar

from milp_ray.users.persona_world.attributes import ATTRIBUTES, BY_NAME, Attribute, Rule
from milp_ray.users.persona_world.phrases import (
    CHOICE_FIRST_FRAMES,
    FRAMES,
    GENERIC,
    N_HELD_OUT_CHOICE_FIRST_FRAMES,
    N_HELD_OUT_FRAMES,
    OPENINGS,
    OTHER_PEOPLE,
    SMALL_TALK,
)

Wordings = Literal["pretraining", "held_out", "all"]
Order = Literal["fact_first", "choice_first"]
T = TypeVar("T")

MIN_FACTS, MAX_FACTS, MAX_MENTIONS = 8, 12, 4


@dataclass(frozen=True, slots=True)
class Fact:
    """The value of one attribute; ``earlier`` is what it was before it changed, if it did."""

    attribute: str
    value: str
    earlier: str | None
    mentions: int  # statements of the present value in the history, an update included


@dataclass(frozen=True, slots=True)
class Persona:
    """The facts of one user, by attribute, in the order in which they were drawn."""

    facts: tuple[Fact, ...]

    def fact(self, attribute: str) -> Fact:
        """The fact about one attribute; ``KeyError`` where the persona has none."""
        for fact in self.facts:
            if fact.attribute == attribute:
                return fact
        raise KeyError(attribute)


@dataclass(frozen=True, slots=True)
class Asked:
    """One question with its answer. ``answer`` is the word or phrase that a right response holds."""

    query: str
    response: str
    answer: str


def choose_wordings(options: Sequence[T], wordings: Wordings, n_held_out: int = 1) -> Sequence[T]:
    """The part of ``options`` that may be used; the last ``n_held_out`` never occur in pretraining."""
    if wordings == "pretraining":
        return options[:-n_held_out]
    return options[-n_held_out:] if wordings == "held_out" else options


def draw_persona(rng: Random) -> Persona:
    """A persona with 8 to 12 facts, one or two of which have changed over time."""
    attributes = rng.sample(ATTRIBUTES, rng.randint(MIN_FACTS, MAX_FACTS))
    n_changed = rng.randint(1, 2)
    facts = []
    for position, attribute in enumerate(attributes):
        value, earlier = rng.sample(attribute.values, 2)
        facts.append(
            Fact(
                attribute=attribute.name,
                value=value,
                earlier=earlier if position < n_changed else None,
                mentions=rng.randint(1, MAX_MENTIONS),
            )
        )
    rng.shuffle(facts)
    return Persona(tuple(facts))


def _fill(template: str, attribute: Attribute, value: str, **more: str) -> str:
    return template.format(v=value, a=attribute.with_article(value), **more)


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _opened(text: str, rng: Random) -> str:
    """Now and then an opening before the sentence, as people talk."""
    if rng.random() >= 0.3:
        return text
    head = text if text.startswith("I ") else text[0].lower() + text[1:]
    return f"{rng.choice(OPENINGS)} {head}"


def fact_turns(fact: Fact, rng: Random, wordings: Wordings) -> list[str]:
    """All statements of one fact in time order: earlier value, update, present value."""
    attribute = BY_NAME[fact.attribute]
    statements = choose_wordings(attribute.statements, wordings)
    if fact.earlier is None:
        templates = rng.sample(statements, fact.mentions)
        return [_fill(template, attribute, fact.value) for template in templates]
    earlier = rng.sample(statements, rng.randint(1, 2))
    return [
        *(_fill(template, attribute, fact.earlier) for template in earlier),
        *change_turns(fact, rng, wordings),
    ]


def change_turns(fact: Fact, rng: Random, wordings: Wordings) -> list[str]:
    """That a fact has changed, and the later statements of its present value."""
    attribute = BY_NAME[fact.attribute]
    present = rng.sample(choose_wordings(attribute.statements, wordings), fact.mentions - 1)
    update = rng.choice(attribute.updates)
    before = "" if fact.earlier is None else attribute.with_article(fact.earlier)
    return [
        _fill(update, attribute, fact.value, o=before),
        *(_fill(template, attribute, fact.value) for template in present),
    ]


def _distractor(rng: Random) -> str:
    """Somebody else's fact, or small talk."""
    if rng.random() < 0.35:
        attribute = rng.choice(ATTRIBUTES)
        who = rng.choice(OTHER_PEOPLE)
        return _sentence(
            _fill(rng.choice(attribute.others), attribute, rng.choice(attribute.values), who=who)
        )
    template, words = rng.choice(SMALL_TALK)
    return template.format(w=rng.choice(words))


def draw_history(persona: Persona, n_turns: int, rng: Random, wordings: Wordings) -> list[str]:
    """``n_turns`` utterances in time order, or more where the facts alone need more.

    The statements of a fact keep their order; those of different facts and the distractors are interleaved.
    """
    return interleave([fact_turns(fact, rng, wordings) for fact in persona.facts], n_turns, rng)


def interleave(threads: Sequence[Sequence[str]], n_turns: int, rng: Random) -> list[str]:
    """``n_turns`` utterances, or more, of threads that keep their order, and of distractors."""
    n_distractors = max(n_turns - sum(map(len, threads)), len(threads) // 2)
    placed = [(position, text) for thread in threads for position, text in _spread(thread, rng)]
    placed += [(rng.random(), _distractor(rng)) for _ in range(n_distractors)]
    placed.sort(key=lambda entry: entry[0])
    return [_opened(text, rng) for _, text in placed]


def _spread(thread: Sequence[str], rng: Random) -> list[tuple[float, str]]:
    return list(zip(sorted(rng.random() for _ in thread), thread, strict=True))


def draw_profile(persona: Persona, rng: Random) -> str:
    """All present facts in sentences: what an oracle would put into the prompt."""
    sentences = []
    for fact in persona.facts:
        attribute = BY_NAME[fact.attribute]
        sentences.append(_fill(rng.choice(attribute.profile), attribute, fact.value))
    rng.shuffle(sentences)
    return " ".join(sentences)


def fact_sentence(fact: Fact, rng: Random) -> str:
    """One present fact in one sentence."""
    attribute = BY_NAME[fact.attribute]
    return _fill(rng.choice(attribute.profile), attribute, fact.value)


def _frame(core: str, rng: Random, wordings: Wordings) -> str:
    return rng.choice(choose_wordings(FRAMES, wordings, N_HELD_OUT_FRAMES)).format(core=core)


def _template(options: Sequence[str], form: int | None, rng: Random) -> str:
    return rng.choice(options) if form is None else options[form % len(options)]


def ask_direct(
    fact: Fact, rng: Random, core_wordings: Wordings, frame_wordings: Wordings, form: int | None = None
) -> Asked:
    """A question for the value itself; ``form`` picks the phrasing of the response, ``None`` by chance."""
    attribute = BY_NAME[fact.attribute]
    core = rng.choice(choose_wordings(attribute.cores, core_wordings))
    return Asked(
        query=_frame(core, rng, frame_wordings),
        response=_fill(_template(attribute.answers, form, rng), attribute, fact.value),
        answer=fact.value,
    )


def ask_implicit(
    fact: Fact,
    rule: Rule,
    order: Order,
    rng: Random,
    core_wordings: Wordings,
    frame_wordings: Wordings,
    form: int | None = None,
) -> Asked:
    """A question whose answer follows from the value by a rule of the world; ``form`` as in direct ones."""
    attribute = BY_NAME[fact.attribute]
    choice = rule.choices[attribute.values.index(fact.value)]
    core = rng.choice(choose_wordings(rule.cores, core_wordings))
    if order == "fact_first":
        query, template = _frame(core, rng, frame_wordings), _template(rule.fact_first, form, rng)
    else:
        frames = choose_wordings(CHOICE_FIRST_FRAMES, frame_wordings, N_HELD_OUT_CHOICE_FIRST_FRAMES)
        query, template = rng.choice(frames).format(core=core), _template(rule.choice_first, form, rng)
    return Asked(
        query=query, response=_sentence(_fill(template, attribute, fact.value, c=choice)), answer=choice
    )


def ask_generic(rng: Random, core_wordings: Wordings, frame_wordings: Wordings) -> Asked:
    """A question that needs no fact about anybody."""
    cores, response, answer = rng.choice(GENERIC)
    core = rng.choice(choose_wordings(cores, core_wordings))
    return Asked(query=_frame(core, rng, frame_wordings), response=response, answer=answer)
