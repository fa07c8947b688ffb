"""What a rule-based teacher knows of the world: statements that it recognises, and what is related to them.

PersonaWorld's vocabulary stands for the general knowledge that a language model brings along as a teacher.
It holds nothing about any user. Other sentences are taken as they stand, and what is related to one is the
same sentence with another word of the same kind in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from random import Random

from milp_ray.users.persona_world.attributes import ATTRIBUTES, BY_NAME
from milp_ray.users.persona_world.persona import choose_wordings
from milp_ray.users.persona_world.phrases import FRAMES, N_HELD_OUT_FRAMES, OPENINGS, OTHER_PEOPLE, SMALL_TALK

_OWN = "user"  # whose fact it is, where it is the user's own

# Words of a kind, for sentences that the vocabulary does not cover.
_KINDS: tuple[tuple[str, ...], ...] = (
    ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"),
    ("january", "february", "march", "april", "may", "june", "july", "august", "september", "october"),
    ("red", "green", "blue", "yellow", "black", "white", "brown", "grey"),
    ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    ("mother", "father", "sister", "brother", "aunt", "uncle", "cousin", "daughter", "son"),
    ("football", "tennis", "chess", "swimming", "running", "cycling", "climbing", "sailing"),
    ("coffee", "tea", "juice", "beer", "wine", "water"),
    ("london", "paris", "berlin", "madrid", "rome", "tokyo", "boston", "chicago"),
    ("doctor", "teacher", "lawyer", "nurse", "pilot", "baker", "plumber", "waiter"),
    ("car", "train", "bus", "bicycle", "plane", "boat"),
    ("guitar", "piano", "violin", "flute", "drums", "trumpet"),
    *(attribute.values for attribute in ATTRIBUTES),
)
_KIND_OF = {word: kind for kind in _KINDS for word in kind}


@dataclass(frozen=True, slots=True)
class Thing:
    """What a statement is about: a topic, whose it is, and the value. The same thing has many wordings."""

    topic: str
    owner: str
    value: str


@dataclass(frozen=True, slots=True)
class _Form:
    """A sentence with a value in it, by which a thing is recognised."""

    pattern: re.Pattern[str]
    topic: str
    template: str


def without_opening(sentence: str) -> str:
    """The sentence without what people begin with before they say it, its first letter small."""
    for opening in OPENINGS:
        if sentence.startswith(opening + " "):
            sentence = sentence[len(opening) + 1 :]
            break
    first, _, _ = sentence.partition(" ")
    keeps = first == "I" or first.startswith("I'") or (len(first) > 1 and first.isupper())
    return sentence if keeps else sentence[:1].lower() + sentence[1:]


def things_of(clause: str) -> list[Thing]:
    """What a sentence without its opening says; one of a change says two things, the present one first."""
    for form in _forms():
        found = form.pattern.fullmatch(clause)
        if found is None:
            continue
        groups = found.groupdict()
        things = [Thing(form.topic, groups.get("who") or _owner(form.topic), groups["v"])]
        if "o" in groups:
            things.append(Thing(form.topic, things[0].owner, groups["o"]))
        return things
    return [Thing("", "", clause.rstrip(".!?"))] if clause else []


def related(thing: Thing, rng: Random) -> list[Thing]:
    """Things of the same kind that differ in one respect, in random order."""
    if not thing.topic:
        others = [Thing("", "", clause) for clause in _with_other_words(thing.value)]
    else:
        others = [Thing(thing.topic, thing.owner, value) for value in _values(thing.topic)]
        if thing.owner not in {_OWN, ""}:
            others += [Thing(thing.topic, who, thing.value) for who in OTHER_PEOPLE]
    others = [other for other in dict.fromkeys(others) if other != thing]
    rng.shuffle(others)
    return others


def wordings(thing: Thing) -> list[str]:
    """Clauses that state a thing, as they stand after "that"; those of own facts leave held-out ones out."""
    if not thing.topic:
        return [thing.value]
    attribute = BY_NAME.get(thing.topic)
    if attribute is None:
        return [_clause(SMALL_TALK[int(thing.topic)][0].format(w=thing.value))]
    templates = attribute.others
    if thing.owner == _OWN:
        templates = tuple(choose_wordings(attribute.statements, "pretraining"))
    article = attribute.with_article(thing.value)
    return [_clause(t.format(v=thing.value, a=article, who=thing.owner)) for t in templates]


def open_questions(thing: Thing) -> list[str]:
    """Questions for the value of a user's own fact, in wordings of pretraining; none for other things."""
    attribute = BY_NAME.get(thing.topic)
    if attribute is None or thing.owner != _OWN:
        return []
    cores = choose_wordings(attribute.cores, "pretraining")
    frames = choose_wordings(FRAMES, "pretraining", N_HELD_OUT_FRAMES)
    return [frame.format(core=core) for core in cores for frame in frames]


def open_answer(thing: Thing) -> str:
    """The answer to a question for the value."""
    attribute = BY_NAME[thing.topic]
    return attribute.answers[0].format(v=thing.value, a=attribute.with_article(thing.value))


@cache
def everything() -> tuple[Thing, ...]:
    """All things that the vocabulary can tell apart: own facts, other people's, and small talk."""
    facts = [(attribute.name, value) for attribute in ATTRIBUTES for value in attribute.values]
    talk = [(str(number), word) for number, (_, words) in enumerate(SMALL_TALK) for word in words]
    return (
        *(own(topic, value) for topic, value in facts),
        *(Thing(topic, who, value) for topic, value in facts for who in OTHER_PEOPLE),
        *(Thing(topic, "", word) for topic, word in talk),
    )


def own_topics() -> list[str]:
    """Topics that a user can have a fact of their own about."""
    return list(BY_NAME)


def own(topic: str, value: str) -> Thing:
    """A user's own fact."""
    return Thing(topic, _OWN, value)


def _owner(topic: str) -> str:
    return _OWN if topic in BY_NAME else ""


def _values(topic: str) -> tuple[str, ...]:
    return BY_NAME[topic].values if topic in BY_NAME else SMALL_TALK[int(topic)][1]


def _clause(sentence: str) -> str:
    return without_opening(sentence).rstrip(".!")


@cache
def _forms() -> tuple[_Form, ...]:
    """All statements of the vocabulary; the first that matches counts."""
    found: list[_Form] = []
    for attribute in ATTRIBUTES:
        for template in (*attribute.updates, *attribute.statements, *attribute.others):
            found.append(_Form(_pattern(template, attribute.values), attribute.name, template))
    for number, (template, words) in enumerate(SMALL_TALK):
        found.append(_Form(_pattern(template.replace("{w}", "{v}"), words), str(number), template))
    return tuple(found)


def _pattern(template: str, values: tuple[str, ...]) -> re.Pattern[str]:
    """A template as a pattern whose groups are the value, an earlier value and the person."""
    value = "|".join(map(re.escape, values))
    seen: set[str] = set()

    def group(match: re.Match[str]) -> str:
        name = {"a": "v"}.get(match[1], match[1])
        if name in seen:
            return f"(?:an? )?(?P={name})"
        seen.add(name)
        if name == "who":
            return f"(?P<who>{'|'.join(map(re.escape, OTHER_PEOPLE))})"
        return f"(?:an? )?(?P<{name}>{value})"

    text = template.rstrip(".")
    text = text if text.startswith(("I ", "{")) else text[:1].lower() + text[1:]
    parts = re.split(r"(\{\w+\})", text)
    made = [re.sub(r"\{(\w+)\}", group, part) if part.startswith("{") else re.escape(part) for part in parts]
    return re.compile("".join(made))


def _with_other_words(clause: str) -> Iterator[str]:
    """The clause with one word replaced by others of its kind; nothing where no word's kind is known."""
    for match in re.finditer(r"[A-Za-z]+", clause):
        for other in _KIND_OF.get(match[0].lower(), ()):
            if other != match[0].lower():
                word = other.capitalize() if match[0][0].isupper() else other
                yield clause[: match.start()] + word + clause[match.end() :]
