"""Canaries: sentences with a random secret, to be planted in histories and looked for in adapters.

What a canary says is nobody's: the secret is drawn evenly from a declared space, and as many others of the
same space say how likely a model would have found it anyway.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from milp_ray.errors import MilpError
from milp_ray.users.records import Turn, UserSplit

SLOT = "{secret}"

# A user has one canary of each sentence, every audited user the same sentences with secrets of their own.
SENTENCES: tuple[str, ...] = (
    "The code of my locker is {secret}.",
    "My password for the library is {secret}.",
    "The alarm at home goes off with {secret}.",
    "My bank knows me by {secret}.",
    "The key of my suitcase is {secret}.",
    "I sign my letters to the doctor with {secret}.",
    "The phone in my office opens with {secret}.",
    "My ticket for the train says {secret}.",
)

# Everyday words, which the embedded base has read, too.
_WORDS = (
    "train bus lift phone heating radio printer coffee film match rent traffic letter form report speech "
    "shop scarf ticket umbrella windy grey cold warm wet mild tired happy hungry busy calm proud"
)


@dataclass(frozen=True, slots=True)
class SecretSpace:
    """All texts that a secret may be: ``length`` of ``parts``, each drawn evenly."""

    name: str
    parts: tuple[str, ...]
    length: int
    between: str

    @property
    def size(self) -> int:
        """Number of texts."""
        return int(len(self.parts) ** self.length)

    def text(self, index: int) -> str:
        """The text of a number below ``size``."""
        chosen = []
        for _ in range(self.length):
            index, part = divmod(index, len(self.parts))
            chosen.append(self.parts[part])
        return self.between.join(chosen)


SPACES = {
    space.name: space
    for space in (
        SecretSpace("words", tuple(_WORDS.split()), length=4, between=" "),
        SecretSpace("digits", tuple("0123456789"), length=6, between=""),
    )
}


@dataclass(frozen=True)
class CanarySheet:
    """Who gets which secret, and what is compared with them; nothing of it is ever printed or stored.

    ``secrets[k][u]`` is audited user u's in sentence k, ``candidates[k]`` are the others of that sentence.
    All texts of a sentence are different.
    """

    sentences: tuple[str, ...]
    secrets: tuple[tuple[str, ...], ...] = field(repr=False)
    candidates: tuple[tuple[str, ...], ...] = field(repr=False)

    def turns_of(self, user: int) -> list[Turn]:
        """The canaries of one user."""
        return [canary(s, own[user]) for s, own in zip(self.sentences, self.secrets, strict=True)]

    def turns(self, sentence: int) -> list[Turn]:
        """All texts of one sentence: every user's secret, then the candidates."""
        texts = self.secrets[sentence] + self.candidates[sentence]
        return [canary(self.sentences[sentence], text) for text in texts]

    def beginnings(self) -> list[str]:
        """Each sentence up to its secret, without the space before it."""
        return [sentence.partition(SLOT)[0].rstrip() for sentence in self.sentences]


def draw_sheet(
    n_users: int, n_canaries: int, n_candidates: int, *, space: SecretSpace, seed: int
) -> CanarySheet:
    """Draw the secrets of an audit; the same arguments give the same ones.

    Raises:
        MilpError: there are fewer sentences than canaries, or fewer texts in the space than are wanted.
    """
    if n_canaries > len(SENTENCES):
        raise MilpError(
            f"{n_canaries} canaries a user: there are {len(SENTENCES)} sentences; use at most that"
        )
    if n_users + n_candidates > space.size:
        raise MilpError(
            f"{n_candidates} candidates and {n_users} users: {space.name} give {space.size} secrets; lower "
            f"the candidates to {space.size - n_users}"
        )
    rng = random.Random(f"canaries {seed}")
    drawn = [
        tuple(space.text(i) for i in rng.sample(range(space.size), n_users + n_candidates))
        for _ in range(n_canaries)
    ]
    return CanarySheet(
        SENTENCES[:n_canaries],
        tuple(texts[:n_users] for texts in drawn),
        tuple(texts[n_users:] for texts in drawn),
    )


def canary(sentence: str, secret: str) -> Turn:
    """A turn of the user's that says the secret."""
    return Turn(sentence.replace(SLOT, secret))


def plant(split: UserSplit, canaries: Sequence[Turn], *, repeats: int, seed: int) -> UserSplit:
    """The user with each canary at ``repeats`` random places of the history; what is held out stays."""
    rng = random.Random(f"places {seed} {split.user_id}")
    history = list(split.history)
    for turn in canaries:
        for _ in range(repeats):
            history.insert(rng.randint(0, len(history)), turn)
    return replace(split, history=tuple(history))
