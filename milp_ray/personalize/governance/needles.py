"""Whether bytes hold a user's id or a user's content, in the forms in which files hold strings.

An id is found where it stands by itself: "u-1" is not in "u-17". Where it stands inside something longer
("u-1-b", "file_u-1.json") that is found too, unless the longer word is another user's id. An id that is too
plain to be sought like that (a number, or a short word such as "ann") is found as a quoted or a
length-prefixed value, and so is any short one in what is no text.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import html
import json
import mmap
import re
from collections.abc import Callable, Iterable
from typing import Protocol, Self
from urllib.parse import quote

from markupsafe import escape

from milp_ray.personalize.governance.items import Item
from milp_ray.personalize.store.names import hash_id
from milp_ray.users.splits import normalised

SHORTEST_BARE_ID = 3  # bytes; a shorter one is sought as a value only
SHORTEST_IN_BINARY = 6  # the same, among bytes that are no text: weights hold any three bytes by chance
SHORTEST_WORD = 8  # the same, of ids that are letters alone: shorter ones are words of a configuration
SHORTEST_ANYWHERE = 8  # bytes of a quoted or length-prefixed form that is sought also where no strings are
SHORTEST_TEXT = 12  # bytes of a text that is sought itself; shorter ones by their hashes
_SHORTEST_ENCODED = 8  # characters of a base64 or hexadecimal form that say enough to look closer
_WORD = re.compile(rb"[0-9A-Za-z\x80-\xff]")
_LONGER = re.compile(r"[\w.@:/+-]+")
_BASE64 = re.compile(rb"[A-Za-z0-9+/_-]+")
_HEX = re.compile(rb"[0-9A-Fa-f]+")
_DIGEST = re.compile(rb"(?<![0-9A-Fa-f])(?:[0-9A-Fa-f]{64}|[0-9A-Fa-f]{40}|[0-9A-Fa-f]{32})(?![0-9A-Fa-f])")
_MOST_CONTEXT = 4096
_HEAD = 8192  # bytes by which text is told from what is none
_PICKLE = re.compile(rb"\x80[\x02-\x05]")
_SAFETENSORS = re.compile(rb'.{6}\x00\x00\{"', re.DOTALL)


Buffer = bytes | mmap.mmap  # in memory, or a file mapped into it


class Finder(Protocol):
    """Says what of someone is in some bytes, or in a file's name: kinds of things, never the things."""

    longest: int  # bytes by which pieces of one content must overlap

    def look(self, content: Buffer) -> set[str]:
        """What is in the content."""

    def look_at_name(self, name: str) -> set[str]:
        """What is in a name or path."""

    def reach(self, beginning: bytes, n_bytes: int) -> int:
        """How many of a content's bytes, from its beginning on, can hold what is sought."""

    def among_words(self) -> Self:
        """The same for a content whose words are the program's own: no plain id is sought in it."""


class IdFinder:
    """Finds one user's id; ``is_other`` says whether a word is the id of somebody else."""

    def __init__(self, user_id: str, is_other: Callable[[str], bool] = lambda _: False) -> None:
        self.user_id = user_id
        self._is_other = is_other
        self._bytes = raw = user_id.encode("utf-8", "surrogatepass")
        self._is_bare = not is_plain(user_id)
        self._is_bare_in_binary = self._is_bare and len(raw) >= SHORTEST_IN_BINARY
        self._spelled = _spellings(user_id)
        self._prefixed = _length_prefixed(raw)
        self._quoted: set[bytes] = set()
        if not self._is_bare_in_binary:
            self._quoted = {q + form + q for form in self._spelled for q in (b'"', b"'")}
        self._utf16 = user_id.encode("utf-16-le", "surrogatepass")
        self._base64 = _base64_needles(raw)
        self._hex = raw.hex().encode("ascii")
        place = hash_id(user_id)
        names = {place, hashlib.sha256(place.encode()).hexdigest()}
        self.hashes = names | {name[:32] for name in names}
        self._digests = {bytes.fromhex(name) for name in names}
        self.longest = 8 * len(raw) + 2 * _MOST_CONTEXT

    def in_text(self, text: str) -> bool:
        """Whether a string is the id or holds it; never of a plain id, which may be any word."""
        return self._stands_in(text.encode("utf-8", "surrogatepass"))

    def in_place(self, place: str) -> bool:
        """Whether a file or folder of this name is filed under the id's hash."""
        return any(digest in place for digest in self.hashes)

    def look(self, content: Buffer) -> set[str]:
        """See :class:`Finder`."""
        found = set()
        is_sought = self._is_bare_in_binary or b"\0" not in content[:_HEAD]
        is_there = is_sought and self._stands_in(content)
        if is_there or self._is_value_in(content):
            found.add("the id")
        if self._is_bare_in_binary and self._in_utf16(content):
            found.add("the id, in UTF-16")
        for name, needles, pattern, decode in (
            ("the id, in base64", self._base64, _BASE64, _from_base64),
            ("the id, in hexadecimal", {self._hex, self._hex.upper()}, _HEX, _from_hex),
        ):
            if any(self._is_encoded(content, needle, pattern, decode) for needle in needles):
                found.add(name)
        if any(content.find(digest) >= 0 for digest in self._digests) or self._hash_in(content):
            found.add("a hash of the id")
        return found

    def look_at_name(self, name: str) -> set[str]:
        """See :class:`Finder`."""
        parts = re.split(r"[/\\]", name)
        found = {"the id"} if any(self.in_text(part) for part in parts) else set()
        if self.in_place(name):
            found.add("a hash of the id")
        return found

    def reach(self, beginning: bytes, n_bytes: int) -> int:
        """See :class:`Finder`."""
        return n_bytes

    def among_words(self) -> Self:
        """See :class:`Finder`."""
        if self._is_bare:
            return self
        finder = copy.copy(self)
        finder._quoted = finder._prefixed = set()
        return finder

    def _is_value_in(self, content: Buffer) -> bool:
        """Whether the id is there quoted, or after its length."""
        forms = self._quoted | self._prefixed
        if any(content.find(form) >= 0 for form in forms if len(form) >= SHORTEST_ANYWHERE):
            return True
        strings, are_prefixed = _strings_in(content)
        forms = forms if are_prefixed else self._quoted
        return any(strings.find(form) >= 0 for form in forms if len(form) < SHORTEST_ANYWHERE)

    def _hash_in(self, content: Buffer) -> bool:
        return any(
            content.find(form) >= 0
            for name in self.hashes
            for form in (name.encode("ascii"), name.upper().encode("ascii"))
        )

    def _stands_in(self, content: Buffer) -> bool:
        return self._is_bare and any(self._stands(content, form) for form in self._spelled)

    def _stands(self, content: Buffer, form: bytes) -> bool:
        start = content.find(form)
        while start >= 0:
            end = start + len(form)
            is_inside = _WORD.match(form[:1]) and _WORD.match(content[max(0, start - 1) : start])
            is_inside = is_inside or (_WORD.match(form[-1:]) and _WORD.match(content[end : end + 1]))
            if not is_inside and not self._is_other(_word_around(content, start, end)):
                return True
            start = content.find(form, start + 1)
        return False

    def _in_utf16(self, content: Buffer) -> bool:
        start = content.find(self._utf16)
        while start >= 0:
            end = start + len(self._utf16)
            before, after = content[max(0, start - 2) : start], content[end : end + 2]
            if not any(_WORD.match(unit[:1]) and unit[1:] == b"\0" for unit in (before, after)):
                return True
            start = content.find(self._utf16, start + 1)
        return False

    def _is_encoded(
        self,
        content: Buffer,
        needle: bytes,
        pattern: re.Pattern[bytes],
        decode: Callable[[bytes], Iterable[bytes]],
    ) -> bool:
        start = content.find(needle) if len(needle) >= _SHORTEST_ENCODED else -1
        while start >= 0:
            low = max(0, start - _MOST_CONTEXT)
            around = content[low : start + len(needle) + _MOST_CONTEXT]
            for run in pattern.finditer(around):
                if run.start() <= start - low < run.end() and any(map(self._stands_in, decode(run[0]))):
                    return True
            start = content.find(needle, start + 1)
        return False


class ItemFinder:
    """Finds the texts of some items, and hashes of them."""

    def __init__(self, items: Iterable[Item], hashes: Iterable[str] = ()) -> None:
        self._texts: set[bytes] = set()
        self._hashes = {digest.lower() for digest in hashes}
        for item in items:
            self._hashes.add(item.sha256)
            for text in item.texts:
                raw = text.encode("utf-8", "surrogatepass")
                for form in {raw, normalised(text).encode("utf-8", "surrogatepass")}:
                    self._hashes |= {getattr(hashlib, name)(form).hexdigest() for name in _ALGORITHMS}
                if len(raw) >= SHORTEST_TEXT:
                    self._texts |= _spellings(text) | _base64_needles(raw)
                    self._texts.add(text.encode("utf-16-le", "surrogatepass"))
        self._digests = {bytes.fromhex(digest) for digest in self._hashes if len(digest) == 64}
        self.longest = max(map(len, self._texts), default=0) + 64

    def look(self, content: Buffer) -> set[str]:
        """See :class:`Finder`."""
        found = set()
        if any(content.find(text) >= 0 for text in self._texts):
            found.add("a text of the user")
        hexadecimal = (match[0].decode("ascii").lower() for match in _DIGEST.finditer(content))
        if any(digest in self._hashes for digest in hexadecimal) or any(
            content.find(digest) >= 0 for digest in self._digests
        ):
            found.add("a hash of a text of the user")
        return found

    def look_at_name(self, name: str) -> set[str]:
        """See :class:`Finder`."""
        return self.look(name.encode("utf-8", "surrogateescape"))

    def reach(self, beginning: bytes, n_bytes: int) -> int:
        """See :class:`Finder`."""
        return n_bytes

    def among_words(self) -> Self:
        """See :class:`Finder`."""
        return self


class Finders:
    """Several finders as one."""

    def __init__(self, *finders: Finder) -> None:
        self._finders = finders
        self.longest = max(finder.longest for finder in finders)

    def look(self, content: Buffer) -> set[str]:
        """See :class:`Finder`."""
        return set().union(*(finder.look(content) for finder in self._finders))

    def look_at_name(self, name: str) -> set[str]:
        """See :class:`Finder`."""
        return set().union(*(finder.look_at_name(name) for finder in self._finders))

    def reach(self, beginning: bytes, n_bytes: int) -> int:
        """See :class:`Finder`."""
        return max(finder.reach(beginning, n_bytes) for finder in self._finders)

    def among_words(self) -> Self:
        """See :class:`Finder`."""
        among = tuple(finder.among_words() for finder in self._finders)
        return self if among == self._finders else type(self)(*among)


def is_plain(user_id: str) -> bool:
    """Whether an id is a number or a short word, which by itself is not known for an id."""
    least = SHORTEST_WORD if user_id.isalpha() else SHORTEST_BARE_ID
    return user_id.isdecimal() or len(user_id.encode("utf-8", "surrogatepass")) < least


def text_bytes(beginning: bytes, n_bytes: int) -> int:
    """Of a content in safetensors the bytes of its header, of any other all; told by its first ten bytes."""
    if _SAFETENSORS.fullmatch(beginning[:10]):
        return min(n_bytes, 8 + int.from_bytes(beginning[:8], "little"))
    return n_bytes


_ALGORITHMS = ("sha256", "sha1", "md5")


def _spellings(text: str) -> set[bytes]:
    """A string as text formats spell it: JSON, also inside a string of JSON, HTML, addresses."""

    def in_json(string: str) -> set[str]:
        return {json.dumps(string, ensure_ascii=is_ascii)[1:-1] for is_ascii in (True, False)}

    once = in_json(text)
    twice = {outer for inner in once for outer in in_json(inner)}
    in_html = {
        spelled
        for string in (text, *once)
        # As Python has it, and as templates have it.
        for spelled in (html.escape(string, quote=False), html.escape(string), str(escape(string)))
    }
    addresses = {quote(text, safe=safe, errors="replace") for safe in ("", "/")}
    return {s.encode("utf-8", "surrogatepass") for s in {text, *once, *twice, *in_html, *addresses}}


def _strings_in(content: Buffer) -> tuple[Buffer, bool]:
    """The part of a content where strings are, and whether they may stand after their length."""
    if _PICKLE.match(content[:2]) or content[:4] == b"PAR1":
        return content, True
    if _SAFETENSORS.match(content[:10]):
        return content[: text_bytes(content[:10], len(content))], False
    return (b"" if b"\0" in content[:_HEAD] else content), False


def _length_prefixed(raw: bytes) -> set[bytes]:
    """A string as binary formats hold it: pickle, Parquet's plain pages, MessagePack."""
    forms = {len(raw).to_bytes(4, "little") + raw}
    if len(raw) < 256:
        forms.add(b"\x8c" + bytes([len(raw)]) + raw)
    if 2 <= len(raw) < 32:
        forms.add(bytes([0xA0 | len(raw)]) + raw)
    return forms


def _word_around(content: Buffer, start: int, end: int) -> str:
    """The longest word of id-like characters that holds ``content[start:end]``."""
    low = max(0, start - 256)
    text = bytes(content[low : end + 256]).decode("utf-8", "replace")
    inner = bytes(content[start:end]).decode("utf-8", "replace")
    before = len(bytes(content[low:start]).decode("utf-8", "replace"))
    for match in _LONGER.finditer(text):
        if match.start() <= before and match.end() >= before + len(inner):
            return match[0].strip(".:/")
    return inner


def _base64_needles(raw: bytes) -> set[bytes]:
    """What base64 of any content that holds ``raw`` must hold, for its three alignments."""
    needles = set()
    for offset in range(3):
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            encoded = encode(bytes(offset) + raw)
            part = encoded[-(-8 * offset // 6) : 8 * (offset + len(raw)) // 6]
            if len(part) >= _SHORTEST_ENCODED:
                needles.add(part)
    return needles


def _from_base64(run: bytes) -> Iterable[bytes]:
    text = run.translate(bytes.maketrans(b"-_", b"+/"))
    for offset in range(4):
        part = text[offset:]
        # A last character alone holds no whole byte.
        part = part[: len(part) - (len(part) % 4 == 1)]
        yield base64.b64decode(part + b"=" * (-len(part) % 4))


def _from_hex(run: bytes) -> Iterable[bytes]:
    for offset in range(2):
        part = run[offset:]
        yield bytes.fromhex(part[: len(part) - len(part) % 2].decode("ascii"))
