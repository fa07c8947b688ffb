"""What the users of PLUM's experiment are asked: who they are, yes/no questions and open ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

from milp_ray.config.methods import ConversationSection
from milp_ray.config.prompt import PromptSection
from milp_ray.config.users import SplitSection
from milp_ray.methods.plum import world
from milp_ray.methods.plum.conversations import Conversation, conversations
from milp_ray.methods.plum.rule import Said, clauses_of
from milp_ray.methods.plum.world import Thing
from milp_ray.users.persona_world import generate_users
from milp_ray.users.persona_world.attributes import BY_NAME
from milp_ray.users.records import Example, UserSplit
from milp_ray.users.splits import split_user

PROMPT = PromptSection()
# The tokenizer of the embedded base has no tokens for "Yes" and "No", and its pretraining had no use of them.
YES, NO = "You said so.", "You did not say so."
Row = dict[str, float]  # measure → a user's value, NaN where nothing of that kind was asked

CONVERSATION = ConversationSection(turns=2)
AGES = ((1, 10), (11, 25), (26, 50), (51, 100))  # conversations ago
HELD_OUT_FRAMES = (
    "Can you say whether I said that {clause}?",
    "I wonder whether I said that {clause}.",
    "Please remind me whether I said that {clause}.",
)


@dataclass(frozen=True)
class Probe:
    """A yes/no question; ``age``: how many conversations ago the thing, or the one beside it, was said."""

    question: str
    is_said: bool
    age: int


def users(seed: int, n: int, n_turns: int) -> list[UserSplit]:
    """``n`` users with a history of ``n_turns`` turns."""
    found = [user for user in generate_users(0, 3 * n + 5, 50, seed) if len(user.history) >= n_turns]
    assert len(found) >= n, "too few of PersonaWorld's long users have a history so long"
    cut = [replace(user, history=user.history[:n_turns]) for user in found[:n]]
    return [split_user(user, SplitSection()) for user in cut]


def cut(split: UserSplit) -> list[Conversation]:
    """A user's conversations, oldest first."""
    return conversations(split.history, CONVERSATION)


def probes(split: UserSplit, seed: int) -> list[Probe]:
    """A question about everything that was said, and one about something related that never was."""
    rng = Random(f"{seed}/{split.user_id}")
    own = cut(split)
    said, last = Said(), dict[Thing, int]()
    for conversation in own:
        for clause in clauses_of(conversation):
            said.add(clause)
            last.update(dict.fromkeys(world.things_of(clause), conversation.number))
    found: list[Probe] = []
    used: set[Thing] = set()
    for thing, number in last.items():
        untold = [other for other in said.untold_beside(thing, rng) if other not in used]
        if untold:
            used.add(untold[0])
            age = len(own) - number
            found += [_probe(thing, True, age, rng), _probe(untold[0], False, age, rng)]
    return found


def _probe(thing: Thing, is_said: bool, age: int, rng: Random) -> Probe:
    attribute = BY_NAME.get(thing.topic)
    clause = rng.choice(world.wordings(thing))
    if attribute is not None and thing == world.own(thing.topic, thing.value):
        # The last statement of an attribute is held out, and the rule-based teacher never uses it by itself.
        held_out = attribute.statements[-1].format(v=thing.value, a=attribute.with_article(thing.value))
        clause = world.without_opening(held_out).rstrip(".")
    return Probe(rng.choice(HELD_OUT_FRAMES).format(clause=clause), is_said, age)


def open_examples(split: UserSplit) -> list[Example]:
    """Held-out direct questions whose answer the (cut) history tells."""
    value: dict[str, str] = {}
    for conversation in cut(split):
        for clause in clauses_of(conversation):
            for thing in reversed(world.things_of(clause)):  # of a change the present value is the first
                if thing == world.own(thing.topic, thing.value):
                    value[thing.topic] = thing.value
    return [
        example
        for example in split.test
        if example.tags["order"] == "none" and value.get(example.tags["attribute"]) == example.answer
    ]


def age_name(low: int, high: int) -> str:
    """The measure of what was said so many conversations ago."""
    return f"age {low}-{high}"
