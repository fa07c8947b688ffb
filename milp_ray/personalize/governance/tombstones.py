"""Finding people who were forgotten, of whom only keyed hashes are known: every word is hashed."""

from __future__ import annotations

import copy
import html
import json
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Self

from milp_ray.personalize.governance.needles import is_plain, text_bytes
from milp_ray.personalize.store.names import hash_id

if TYPE_CHECKING:
    from milp_ray.personalize.governance.needles import Buffer
    from milp_ray.personalize.governance.record import Record

_LONGEST_ID = 1024
_QUOTED = re.compile(r'"((?:[^"\\\n]|\\.){1,1024})"')
_WORDS = re.compile(r"[^\s\"'<>,;()\[\]{}=&\\\x00-\x1f]+")
_PLACE = re.compile(r"[0-9a-f]{64}")
_PNG = b"\x89PNG"


class TombstoneFinder:
    """Finds the ids of everybody whom a record calls forgotten: quoted values, words, and store places.

    An id with blanks, or one that is a number or a short word, is found where it is quoted (JSON, Parquet
    cells). Weights and pixels hold no words and are passed over.
    """

    longest = 4 * _LONGEST_ID

    def __init__(self, record: Record) -> None:
        self._record = record
        self._forgotten = {*record.state.forgotten, *record.state.forgetting}
        self._known: dict[str, bool] = {}
        self._seeks_plain = True

    def look(self, content: Buffer) -> set[str]:
        """See :class:`~milp_ray.personalize.governance.needles.Finder`."""
        n_bytes = self.reach(bytes(content[:10]), len(content))
        text = bytes(content[:n_bytes]).decode("utf-8", "replace")
        return self._in_words(_candidates(text))

    def reach(self, beginning: bytes, n_bytes: int) -> int:
        """See :class:`~milp_ray.personalize.governance.needles.Finder`."""
        if beginning.startswith(_PNG):
            return 0
        return text_bytes(beginning, n_bytes)

    def among_words(self) -> Self:
        """See :class:`~milp_ray.personalize.governance.needles.Finder`."""
        finder = copy.copy(self)
        finder._seeks_plain = False
        return finder

    def look_at_name(self, name: str) -> set[str]:
        """See :class:`~milp_ray.personalize.governance.needles.Finder`."""
        words = [name, *re.split(r"[/\\]", name), name.rpartition(".")[0]]
        return self._in_words([*_candidates(name), *((word, False) for word in words)])

    def _in_words(self, words: Iterable[tuple[str, bool]]) -> set[str]:
        for word, is_quoted in words:
            is_forgotten = self._known.get(word)
            if is_forgotten is None:
                places = [hash_id(word), *_PLACE.findall(word)]
                is_forgotten = any(self._record.place_key(place) in self._forgotten for place in places)
                if len(self._known) > 1_000_000:
                    self._known.clear()
                self._known[word] = is_forgotten
            if is_forgotten and ((is_quoted and self._seeks_plain) or not is_plain(word)):
                return {"a forgotten user's id, or its hash"}
        return set()


def _candidates(text: str) -> Iterator[tuple[str, bool]]:
    """What in a text could be an id, and whether it is quoted."""
    for match in _QUOTED.finditer(text):
        quoted = match[1]
        if "\\" in quoted:
            try:
                quoted = str(json.loads(f'"{quoted}"'))
            except ValueError:
                quoted = match[1]
        yield quoted, True
        yield html.unescape(quoted) if "&" in quoted else quoted, True
    for match in _WORDS.finditer(text):
        word = match[0][:_LONGEST_ID]
        yield word, False
        yield word.strip(".:,;!?/"), False
    if "&" in text:
        yield from ((match[0], False) for match in _WORDS.finditer(html.unescape(text)))
