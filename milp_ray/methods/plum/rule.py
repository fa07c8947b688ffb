"""The embedded teacher: questions by rule, without any language model.

Every sentence of the user's becomes yes/no questions («Did I say that I keep a dog at home?») in several
frames and, where its thing is known to :mod:`milp_ray.methods.plum.world`, in several wordings; each has a
counterpart about something related that the user has not said (another animal, somebody else's dog). Own
facts that the vocabulary knows are asked for openly, too, beside facts that the user has not told; of any
other sentence the rest is asked for by its rarest word.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING

from milp_ray.methods.plum import world
from milp_ray.methods.plum.qa import QAPair, yes_no
from milp_ray.methods.plum.world import Thing

if TYPE_CHECKING:
    from milp_ray.methods.plum.conversations import Conversation

# The clause stands for a sentence of the user's: "I keep a dog at home".
YES_NO_FRAMES: tuple[str, ...] = (
    "Did I say that {clause}?",
    "Did I tell you that {clause}?",
    "Tell me whether I said that {clause}.",
    "Do you know whether I said that {clause}?",
    "I forgot whether I said that {clause}.",
    "Do you remember whether I said that {clause}?",
)
UNTOLD = "You have not told me."
_SENTENCE = re.compile(r"[^.!?\n]+[.!?]*")
_CONTENT_WORD = re.compile(r"[A-Za-zÀ-ÿ]{4,}")
_MOST_WORDS = 40  # of a sentence that becomes a question; longer ones are cut


class RuleTeacher:
    """Asks by rule.

    Args:
        per_statement: yes/no questions about each statement, and as many about what was not said.
        open_questions: open questions about each statement that allows any, and as many that have no answer.
    """

    def __init__(self, per_statement: int, open_questions: int = 1) -> None:
        self._per_statement = per_statement
        self._open_questions = open_questions

    def pairs(self, conversations: Sequence[Conversation], seed: int) -> list[list[QAPair]]:
        """See :class:`~milp_ray.methods.plum.teacher.Teacher`; the seed chooses frames and wordings."""
        said = Said()
        found = []
        for conversation in conversations:
            clauses = clauses_of(conversation)
            for clause in clauses:
                said.add(clause)
            rng = Random(f"{seed}/{conversation.number}")
            found.append([pair for clause in clauses for pair in self._about(clause, said, rng)])
        return found

    def _about(self, clause: str, said: Said, rng: Random) -> list[QAPair]:
        things = world.things_of(clause)
        pairs: list[QAPair] = []
        for thing in things:
            pairs += self._yes_no(clause, thing, said, rng)
        pairs += self._open(clause, things[0], said, rng)
        return pairs

    def _yes_no(self, clause: str, thing: Thing, said: Said, rng: Random) -> list[QAPair]:
        clauses = world.wordings(thing)
        rng.shuffle(clauses)
        positive = list(dict.fromkeys([clause, *clauses]))
        untold = said.untold_beside(thing, rng)
        pairs = []
        for i in range(self._per_statement):
            frames = rng.choices(YES_NO_FRAMES, k=2)
            pairs.append(yes_no(frames[0].format(clause=positive[i % len(positive)]), is_positive=True))
            if untold:
                other = rng.choice(world.wordings(untold[i % len(untold)]))
                pairs.append(yes_no(frames[1].format(clause=other), is_positive=False))
        return pairs

    def _open(self, clause: str, thing: Thing, said: Said, rng: Random) -> list[QAPair]:
        questions = world.open_questions(thing)
        pairs = []
        if questions:
            answer = world.open_answer(thing)
            untold = [world.own(topic, "") for topic in world.own_topics() if not said.has_topic(topic)]
            for asked in rng.sample(questions, min(self._open_questions, len(questions))):
                pairs.append(QAPair(asked, answer, "open", is_positive=True))
                if untold:
                    unanswered = rng.choice(world.open_questions(rng.choice(untold)))
                    pairs.append(QAPair(unanswered, UNTOLD, "open", is_positive=False))
        elif not thing.topic:
            word, other = said.rarest_word(clause), said.unsaid_word(clause, rng)
            if word and other:
                ask = "What did I say about {}?".format
                pairs.append(QAPair(ask(word), f"You said that {clause}.", "open", is_positive=True))
                pairs.append(QAPair(ask(other), UNTOLD, "open", is_positive=False))
        return pairs


class Said:
    """What a user has said so far."""

    def __init__(self) -> None:
        self._things: set[Thing] = set()
        self._words: Counter[str] = Counter()
        self._last_words: dict[str, None] = {}

    def add(self, clause: str) -> None:
        """The user says it."""
        self._things.update(world.things_of(clause))
        words = content_words(clause)
        self._words.update(words)
        self._last_words.update(dict.fromkeys(words[-1:]))

    def has_topic(self, topic: str) -> bool:
        """Whether the user has said anything of their own about it."""
        return any(world.own(topic, thing.value) == thing for thing in self._things if thing.topic == topic)

    def untold_beside(self, thing: Thing, rng: Random) -> list[Thing]:
        """Related things that the user has not said, in random order."""
        found = [other for other in world.related(thing, rng) if other not in self._things]
        if found or thing.topic:
            return found
        # A sentence of no known kind gets its last word from another sentence of the user's.
        words = list(_CONTENT_WORD.finditer(thing.value))
        if not words:
            return []
        last = words[-1]
        head, tail = thing.value[: last.start()], thing.value[last.end() :]
        made = [Thing("", "", head + word + tail) for word in self._last_words if word != last[0].lower()]
        rng.shuffle(made)
        return [other for other in made if other not in self._things]

    def rarest_word(self, clause: str) -> str | None:
        """The content word of a clause that the user has used least often; the longest among equals."""
        words = content_words(clause)
        return min(words, key=lambda word: (self._words[word], -len(word)), default=None)

    def unsaid_word(self, clause: str, rng: Random) -> str | None:
        """A word of the kind of one in the clause that the user has not used."""
        made = {
            word for other in world.related(Thing("", "", clause), rng) for word in content_words(other.value)
        }
        return min((word for word in made if not self._words[word]), default=None)


def things_asked(question: str) -> list[Thing]:
    """What a yes/no question of this teacher's is about; nothing of any other question."""
    for frame in YES_NO_FRAMES:
        head, _, tail = frame.partition("{clause}")
        if question.startswith(head) and question.endswith(tail):
            return world.things_of(question[len(head) : len(question) - len(tail)])
    return []


def clauses_of(conversation: Conversation) -> list[str]:
    """The sentences of the user's own turns, without openings and final stops; questions are left out."""
    return [
        clause for turn in conversation.turns if turn.role == "user" for clause in clauses_of_text(turn.text)
    ]


def clauses_of_text(text: str) -> list[str]:
    """The sentences of a turn, as :func:`clauses_of` has them."""
    found = []
    for sentence in map(str.strip, _SENTENCE.findall(text)):
        if sentence.endswith("?") or not content_words(sentence):
            continue
        clause = " ".join(world.without_opening(sentence).rstrip(".!").split()[:_MOST_WORDS])
        if clause:  # an opening may be all that there is: "Honestly, ..."
            found.append(clause)
    return found


def content_words(text: str) -> list[str]:
    """Words of four letters and more, small."""
    return [word.lower() for word in _CONTENT_WORD.findall(text)]
