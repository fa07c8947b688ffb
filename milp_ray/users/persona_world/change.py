"""Users of PersonaWorld at two times: between them facts change, new ones are told, others are not mentioned.

A user has twelve facts, one an attribute: four *practice* facts, which training examples ask about and tests
do not; three *old* ones, told before and not mentioned again; three *changed* ones, told before and replaced
later; two *new* ones, told later. Examples and wordings are those of
:mod:`milp_ray.users.persona_world.generator`, with the tag ``state`` beside the others.

Later, what was held out for validation before is training data, as time goes on for any user: validation
examples about changed facts then state a value that no longer holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from random import Random

from milp_ray.users.persona_world.attributes import ATTRIBUTES, BY_NAME
from milp_ray.users.persona_world.generator import N_FORMS, START, evaluation_rng
from milp_ray.users.persona_world.persona import (
    MAX_MENTIONS,
    Fact,
    Order,
    Wordings,
    ask_direct,
    ask_generic,
    ask_implicit,
    change_turns,
    fact_turns,
    interleave,
)
from milp_ray.users.records import Example, Turn, UserSplit
from milp_ray.users.splits import normalised

PRACTICE, OLD, CHANGED, NEW = "practice", "old", "changed", "new"
N_FACTS = {PRACTICE: 4, OLD: 3, CHANGED: 3, NEW: 2}
TURNS_BEFORE, TURNS_AFTER = (30, 40), (15, 20)
TRAIN_BEFORE, TRAIN_AFTER = 28, 7
_FIRST_INDEX = 750_000  # of random streams: far from those of the users that generate_users makes

Facts = Mapping[str, Sequence[Fact]]  # by state


@dataclass(frozen=True, slots=True)
class ChangingUser:
    """One user at two times; the later history and training examples begin with the earlier ones.

    ``after.test`` asks three questions about every old, changed and new fact (tag ``state``); where a fact
    has changed, the tag ``earlier`` is what was right before. ``before.test`` is empty.
    """

    before: UserSplit
    after: UserSplit


def changing_users(n: int, seed: int) -> list[ChangingUser]:
    """``n`` users; user ``i`` does not depend on how many there are."""
    return [_changing_user(f"pw-{seed}-c{i:05d}", evaluation_rng(seed, _FIRST_INDEX + i)) for i in range(n)]


def _changing_user(user_id: str, rng: Random) -> ChangingUser:
    now = _draw_facts(rng)
    then: Facts = {
        PRACTICE: now[PRACTICE],
        OLD: now[OLD],
        CHANGED: [replace(fact, value=str(fact.earlier), earlier=None) for fact in now[CHANGED]],
    }
    told = [fact_turns(fact, rng, "all") for facts in then.values() for fact in facts]
    later = [change_turns(fact, rng, "all") for fact in now[CHANGED]]
    later += [fact_turns(fact, rng, "all") for fact in now[NEW]]
    first = interleave(told, rng.randint(*TURNS_BEFORE), rng)
    second = interleave(later, rng.randint(*TURNS_AFTER), rng)

    asker = _Asker(rng)
    test, held_out_now = asker.test(now), asker.validation(now)
    held_out_then = asker.validation(then)
    train, more = asker.train(now[PRACTICE], TRAIN_BEFORE), asker.train(now[PRACTICE], TRAIN_AFTER)

    at_first: list[Turn | Example] = [*(Turn(text) for text in first), *train, *held_out_then]
    timed = _an_hour_apart([*at_first, *(Turn(text) for text in second), *more, *held_out_now, *test])
    before, after = timed[: len(at_first)], timed
    n_validation = len(held_out_then)
    return ChangingUser(
        UserSplit(user_id, None, *_turns_and_examples(before, n_validation, 0)),
        UserSplit(user_id, None, *_turns_and_examples(after, len(held_out_now), len(test))),
    )


def _draw_facts(rng: Random) -> Facts:
    attributes = iter(rng.sample(ATTRIBUTES, sum(N_FACTS.values())))
    facts: dict[str, list[Fact]] = {state: [] for state in N_FACTS}
    for state, n in N_FACTS.items():
        for _ in range(n):
            attribute = next(attributes)
            value, earlier = rng.sample(attribute.values, 2)
            mentions = rng.randint(1, MAX_MENTIONS)
            facts[state].append(Fact(attribute.name, value, earlier if state == CHANGED else None, mentions))
    return facts


class _Asker:
    """Makes a user's examples, all in that user's form; no question is asked in two parts.

    So what is held out is asked for first: test, then validation, then training.
    """

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._form = rng.randrange(N_FORMS)
        self._taken: set[str] = set()

    def validation(self, facts: Facts) -> list[Example]:
        """Two questions about facts of each state, direct and implicit."""
        orders: tuple[Order | None, ...] = (None, "fact_first")
        return self._held_out(
            (state, self._rng.choice(some), order, 1, "pretraining")
            for state, some in facts.items()
            for order in orders
        )

    def test(self, facts: Facts) -> list[Example]:
        """Three questions about every fact that is not for practice, in wordings met nowhere else."""
        kinds: tuple[tuple[Order | None, int], ...] = ((None, 0), ("fact_first", 0), ("choice_first", 1))
        return self._held_out(
            (state, fact, order, rule, "held_out")
            for state in (OLD, CHANGED, NEW)
            for fact in facts[state]
            for order, rule in kinds
        )

    def _held_out(self, wanted: Iterable[tuple[str, Fact, Order | None, int, Wordings]]) -> list[Example]:
        found = [self._example(*one) for one in wanted]
        self._taken |= {normalised(example.query) for example in found}
        return found

    def train(self, facts: Sequence[Fact], n: int) -> list[Example]:
        """One in seven generic, else the facts in turn."""
        found: list[Example] = []
        while len(found) < n:
            i = len(found)
            order: Order | None = None if self._rng.random() < 0.5 else "fact_first"
            fact = None if i % 7 == 6 else facts[i % len(facts)]
            found.append(self._example(PRACTICE, fact, order, 0, "pretraining"))
        return found

    def _example(
        self, state: str, fact: Fact | None, order: Order | None, rule: int, wordings: Wordings
    ) -> Example:
        example = self._drawn(state, fact, order, rule, wordings)
        while normalised(example.query) in self._taken:
            example = self._drawn(state, fact, order, rule, wordings)
        return example

    def _drawn(
        self, state: str, fact: Fact | None, order: Order | None, rule: int, wordings: Wordings
    ) -> Example:
        if fact is None:
            kind, asked = "generic", ask_generic(self._rng, wordings, wordings)
        elif order is None:
            kind, asked = "direct", ask_direct(fact, self._rng, wordings, wordings, self._form)
        else:
            rules = BY_NAME[fact.attribute].rules
            kind = "implicit"
            asked = ask_implicit(fact, rules[rule], order, self._rng, wordings, wordings, self._form)
        tags = {"state": state}
        if fact is not None and fact.earlier is not None:
            attribute = BY_NAME[fact.attribute]
            choices = attribute.values if order is None else attribute.rules[rule].choices
            tags["earlier"] = choices[attribute.values.index(fact.earlier)]
        return Example(asked.query, asked.response, kind=kind, answer=asked.answer, tags=tags)


def _an_hour_apart(records: Sequence[Turn | Example]) -> list[Turn | Example]:
    return [replace(record, time=START + timedelta(hours=i)) for i, record in enumerate(records)]


def _turns_and_examples(
    records: Sequence[Turn | Example], n_validation: int, n_test: int
) -> tuple[tuple[Turn, ...], tuple[Example, ...], tuple[Example, ...], tuple[Example, ...]]:
    """The history, and the examples cut into train, validation and test."""
    turns = tuple(record for record in records if isinstance(record, Turn))
    examples = tuple(record for record in records if isinstance(record, Example))
    n_train = len(examples) - n_validation - n_test
    validation = examples[n_train : n_train + n_validation]
    return turns, examples[:n_train], validation, examples[n_train + n_validation :]
