"""Users of PersonaWorld: a history, then examples in time order whose parts test different things."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from random import Random

from milp_ray.config.users import SplitSection
from milp_ray.users.persona_world.attributes import BY_NAME
from milp_ray.users.persona_world.persona import (
    Asked,
    Fact,
    Order,
    Persona,
    Wordings,
    ask_direct,
    ask_generic,
    ask_implicit,
    draw_history,
    draw_persona,
    draw_profile,
)
from milp_ray.users.records import Example, Turn, User
from milp_ray.users.splits import part_sizes

SHORT_TURNS = (20, 60)
LONG_TURNS = (180, 240)
# A user's own random stream is PersonaWorld's seed × this + its index; pretraining starts far above.
MAX_USERS = 1_000_000
MAX_SEED = 1_000_000
PRETRAINING_FIRST = 1 << 48
POPULATION_FIRST = 1 << 56  # far above everything that pretraining can have read
# A user wants all responses in one of so many forms (a phrasing a kind of question).
N_FORMS = 6
START = datetime(2024, 1, 1, 8, 0, tzinfo=UTC)


def evaluation_rng(seed: int, index: int) -> Random:
    """The random stream of one user that is personalised and evaluated."""
    if not (0 <= seed < MAX_SEED and 0 <= index < MAX_USERS):
        raise ValueError(f"seed {seed} and index {index} must be below {MAX_SEED} and {MAX_USERS}")
    return Random(seed * MAX_USERS + index)


def pretraining_rng(index: int) -> Random:
    """The random stream of one pretraining document; never that of a user that occurs later."""
    return Random(PRETRAINING_FIRST + index)


def population_rng(index: int) -> Random:
    """The random stream of one document about nobody: drawn as pretraining's are, and never one of those."""
    return Random(POPULATION_FIRST + index)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """One example to make: of which kind, about which fact, and in which wordings."""

    kind: str
    fact: Fact | None = None
    exposure: str = "none"
    order: Order | None = None  # None: a direct question
    rule: int = 0
    wordings: Wordings = "pretraining"
    for_training: bool = False


def generate_users(
    n_short: int, n_long: int, n_examples: int, seed: int, *, long_turns: tuple[int, int] = LONG_TURNS
) -> list[User]:
    """``n_short`` users whose history fits the embedded base's context, then ``n_long`` whose does not.

    Args:
        n_short: users with 20 to 60 turns.
        n_long: users with ``long_turns``, the same number of statements about their facts among them.
        n_examples: query → response pairs of each user, all splits together.
        seed: the same seed gives the same users; user ``i`` does not depend on how many there are.
        long_turns: fewest and most turns of a long history.
    """
    short = [_generate_user(seed, index, SHORT_TURNS, n_examples, "s") for index in range(n_short)]
    half = MAX_USERS // 2
    return short + [
        _generate_user(seed, half + index, long_turns, n_examples, "l") for index in range(n_long)
    ]


def _generate_user(seed: int, index: int, turns: tuple[int, int], n_examples: int, prefix: str) -> User:
    rng = evaluation_rng(seed, index)
    persona = draw_persona(rng)
    texts = draw_history(persona, rng.randint(*turns), rng, "all")
    history = tuple(Turn(text, time=START + timedelta(hours=i)) for i, text in enumerate(texts))
    first_example = START + timedelta(hours=len(texts) + 1)
    form = rng.randrange(N_FORMS)
    examples = _examples(_plan(persona, n_examples, rng), first_example, form, rng)
    return User(
        user_id=f"pw-{seed}-{prefix}{index % (MAX_USERS // 2):05d}",
        history=history,
        examples=examples,
        profile=draw_profile(persona, rng),
        consent=True,
    )


def _plan(persona: Persona, n_examples: int, rng: Random) -> list[_Wanted]:
    """Which examples to make, in time order: train, validation, test in the shares of the default split."""
    n_train, n_validation = part_sizes(n_examples, SplitSection())
    seen, unseen = _expose(persona, rng)
    train = [_train_wanted(seen, i, rng) for i in range(n_train)]
    validation = [_cycle(_HELD_OUT_CYCLE, i, seen, unseen, rng, "pretraining") for i in range(n_validation)]
    n_test = n_examples - n_train - n_validation
    test = [_cycle(_HELD_OUT_CYCLE, i, seen, unseen, rng, "held_out") for i in range(n_test)]
    rng.shuffle(train)
    return train + validation + test


def _expose(persona: Persona, rng: Random) -> tuple[list[Fact], list[Fact]]:
    """Facts that also stand in the training examples, and facts that stand in the history only.

    One changed fact is always among the latter.
    """
    facts = list(persona.facts)
    rng.shuffle(facts)
    facts.sort(key=lambda fact: fact.earlier is None)  # changed facts first
    unseen, rest = facts[:1], facts[1:]
    rng.shuffle(rest)
    half = len(facts) // 2
    return rest[half - 1 :], unseen + rest[: half - 1]


# What validation and test hold, over and over: (kind, exposure, order). Six of ten need a fact that stands in
# the history only. Rule 0 of a seen fact is trained on, rule 1 never is.
_HELD_OUT_CYCLE: tuple[tuple[str, str, Order | None], ...] = (
    ("direct", "unseen", None),
    ("implicit", "unseen", "fact_first"),
    ("changed", "unseen", None),
    ("direct", "seen", None),
    ("generic", "none", None),
    ("implicit", "unseen", "fact_first"),
    ("direct", "unseen", None),
    ("implicit", "unseen", "choice_first"),
    ("implicit", "seen", "fact_first"),
    ("changed", "unseen", "fact_first"),
)


def _train_wanted(seen: list[Fact], i: int, rng: Random) -> _Wanted:
    """One in seven generic; else the seen facts in turn, directly or through their first rule."""
    if i % 7 == 6:
        return _Wanted("generic", for_training=True)
    fact = seen[i % len(seen)]
    direct = rng.random() < 0.5
    kind = "changed" if fact.earlier is not None else "direct" if direct else "implicit"
    order: Order | None = None if direct else ("choice_first" if rng.random() < 0.25 else "fact_first")
    return _Wanted(kind, fact, "seen", order, for_training=True)


def _cycle(
    cycle: tuple[tuple[str, str, Order | None], ...],
    i: int,
    seen: list[Fact],
    unseen: list[Fact],
    rng: Random,
    wordings: Wordings,
) -> _Wanted:
    kind, exposure, order = cycle[i % len(cycle)]
    if kind == "generic":
        return _Wanted(kind, wordings=wordings)
    facts = seen if exposure == "seen" else unseen
    changed = [fact for fact in facts if (fact.earlier is not None) == (kind == "changed")]
    fact = rng.choice(changed or facts)
    rule = 1 if exposure == "seen" else rng.randint(0, 1)
    if not changed:
        kind = "changed" if fact.earlier is not None else "direct" if order is None else "implicit"
    return _Wanted(kind, fact, exposure, order, rule, wordings)


def _examples(plan: list[_Wanted], start: datetime, form: int, rng: Random) -> tuple[Example, ...]:
    """The examples of a plan, an hour apart; no held-out question is repeated in training."""
    examples: list[Example] = []
    held_out: set[str] = set()
    for i in reversed(range(len(plan))):
        wanted, time = plan[i], start + timedelta(hours=i)
        example = _example(wanted, form, rng, time)
        while wanted.for_training and example.query in held_out:
            example = _example(wanted, form, rng, time)
        if not wanted.for_training:
            held_out.add(example.query)
        examples.append(example)
    return tuple(reversed(examples))


def _example(wanted: _Wanted, form: int, rng: Random, time: datetime) -> Example:
    asked = _ask(wanted, form, rng)
    fact = wanted.fact
    return Example(
        query=asked.query,
        response=asked.response,
        time=time,
        kind=wanted.kind,
        answer=asked.answer,
        tags={
            "exposure": wanted.exposure,
            "order": wanted.order or "none",
            "mentions": str(fact.mentions) if fact else "0",
            "attribute": fact.attribute if fact else "none",
        },
    )


def _ask(wanted: _Wanted, form: int, rng: Random) -> Asked:
    # A held-out core may come in any frame: half of them in one that pretraining has not seen either.
    frames: Wordings = wanted.wordings
    if frames == "held_out" and rng.random() < 0.5:
        frames = "all"
    if wanted.fact is None:
        return ask_generic(rng, wanted.wordings, frames)
    if wanted.order is None:
        return ask_direct(wanted.fact, rng, wanted.wordings, frames, form)
    rule = BY_NAME[wanted.fact.attribute].rules[wanted.rule]
    return ask_implicit(wanted.fact, rule, wanted.order, rng, wanted.wordings, frames, form)
