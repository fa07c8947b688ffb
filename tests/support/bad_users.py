"""Records that a users file may hold and should not, or that look as if they should not."""

from __future__ import annotations

import json
from typing import Any

SECRET = "my pin is 4711"
MEGABYTE = 1 << 20


def record(user_id: Any = "odd", **fields: Any) -> bytes:
    return json.dumps({"user_id": user_id, "history": [SECRET, "I like tea."], **fields}).encode()


def text(history: str, user_id: str = "odd") -> bytes:
    return json.dumps({"user_id": user_id, "history": [history]}, ensure_ascii=False).encode()


PAIRS = [{"query": f"What is {i}?", "response": f"It is {i}."} for i in range(3)]
DEEP = b"[" * 100_000 + b"]" * 100_000

# What is refused: name → (line, what the reason says).
REFUSED: dict[str, tuple[bytes, str]] = {
    "broken UTF-8": (b'{"user_id": "odd", "history": ["my pin is \xff\xfe"]}', "no valid UTF-8"),
    "UTF-16": ('{"user_id": "odd"}'.encode("utf-16"), "no valid UTF-8"),
    "a raw NUL byte": (b'{"user_id": "odd", "history": ["my\x00pin"]}', "no JSON"),
    "half a line": (b'{"user_id": "odd", "history": ["my pin is', "no JSON"),
    "no JSON": (b"my pin is 4711", "no JSON"),
    "two objects": (record() + record(), "no JSON"),
    "a list": (b'["my pin is 4711"]', "not an object"),
    "a number": (b"4711", "not an object"),
    "null": (b"null", "not an object"),
    "a huge number": (b'{"user_id": "odd", "history": [' + b"9" * 5000 + b"]}", "too large"),
    "deep nesting": (b'{"user_id": "odd", "history": ' + DEEP + b"}", "too large"),
    "no user_id": (b'{"history": ["my pin is 4711"]}', "user_id is missing"),
    "an empty user_id": (record(""), "user_id is empty"),
    "a user_id of spaces": (record("  \t"), "user_id is empty"),
    "a number for a user_id": (record(17), "user_id is a number"),
    "a list for a user_id": (record(["a"]), "user_id is a list"),
    "half a surrogate in a user_id": (b'{"user_id": "\\ud83d", "history": ["tea"]}', "surrogate"),
    "half a surrogate in a turn": (b'{"user_id": "odd", "history": ["tea \\ud83d"]}', "surrogate"),
    "half a surrogate in a tag's name": (
        record(examples=[{"query": "q", "response": "r", "tags": {"\ud83d": "x"}}]),
        "surrogate",
    ),
    "no history and no examples": (b'{"user_id": "odd"}', "neither history nor examples"),
    "empty history": (record(history=[]), "neither history nor examples"),
    "null history": (record(history=None, examples=None), "neither history nor examples"),
    "a string for a history": (record(history=SECRET), "history is a string"),
    "an object for a history": (record(history={"0": SECRET}), "history is an object"),
    "a number for a turn": (record(history=[4711]), "history[0] is a number"),
    "a list for a turn": (record(history=[[SECRET]]), "history[0] is a list"),
    "an empty turn": (record(history=[SECRET, " "]), "history[1] is empty"),
    "a turn without a text": (record(history=[{"role": "user"}]), "history[0].text is missing"),
    "a number for a role": (record(history=[{"text": SECRET, "role": 1}]), "role is a number"),
    "no time": (record(history=[{"text": SECRET, "time": "yesterday"}]), "no ISO 8601 time"),
    "a time that is none": (record(history=[{"text": SECRET, "time": "2024-13-45"}]), "no ISO 8601 time"),
    "a time before all": (
        record(history=[{"text": SECRET, "time": "0001-01-01T00:00:00+14:00"}]),
        "outside the years",
    ),
    "a number for a time": (record(history=[{"text": SECRET, "time": 1714557600}]), "time is a number"),
    "an example without a response": (record(examples=[{"query": SECRET}]), "response is missing"),
    "a string for an example": (record(examples=[SECRET]), "examples[0] is a string"),
    "a list for tags": (record(examples=[{"query": "q", "response": "r", "tags": []}]), "tags is a list"),
    "text for a consent": (record(consent="yes"), "consent is neither"),
    "a list for a profile": (record(profile=[SECRET]), "profile is a list"),
    "a 10 MB turn": (text("my pin is 4711 " * (10 * MEGABYTE // 15), "huge"), "personalize.max_characters"),
}

# What looks odd and is a user like any other: name → (user id, line).
HANDLED: dict[str, tuple[str, bytes]] = {
    "slashes": ("a/b\\c", record("a/b\\c")),
    "dots": ("../../../etc/passwd", record("../../../etc/passwd")),
    "one dot": (".", record(".")),
    "two dots": ("..", record("..")),
    "an absolute path": ("/etc/passwd", record("/etc/passwd")),
    "a NUL in the id": ("a\0b", record("a\0b")),
    "a line break in the id": ("a\nb", record("a\nb")),
    "an id of 5,000 characters": ("x" * 5000, record("x" * 5000)),
    "markup in the id": ("[red]${HOME}`id`; rm -rf *", record("[red]${HOME}`id`; rm -rf *")),
    "an id like a version": ("v1", record("v1")),
    "an emoji": ("emoji", text("I like 👩‍👩‍👧‍👦 and 🏳️‍🌈 very much.", "emoji")),
    "an emoji as id": ("🦊", text("I like tea.", "🦊")),
    "right-to-left text": ("rtl", text("אני אוהב תה, وأنا أحب الشاي.", "rtl")),
    "direction overrides": ("bidi", text("tea \u202e gnp.exe \u2066 more \u2069", "bidi")),
    "combining marks": ("zalgo", text("t̸̢̛e̶͓͝a̷̡͠" * 20, "zalgo")),
    "an escaped NUL in a turn": ("nul", record("nul", history=["my\0pin is\0 4711"])),
    "control characters": ("control", record("control", history=["\x01\x02\x1b[31m tea \x7f"])),
    "special tokens": ("special", text("</s><s>[INST] <|endoftext|> <pad> tea", "special")),
    "a turn of one sign": ("sign", text("?", "sign")),
    "one word without end": ("word", text("a" * 20_000, "word")),
    "only white space beside signs": ("space", text("\u00a0\u2003.\u3000", "space")),
    "unknown fields": ("extra", record("extra", mood="good", nested={"a": [{"b": SECRET}]})),
    "keys that come twice": (
        "twice",
        b'{"user_id": "first", "user_id": "twice", "history": ["I like tea."]}',
    ),
    "a carriage return": ("crlf", record("crlf") + b"\r"),
    "examples alone": ("pairs", record("pairs", history=[], examples=PAIRS)),
    "another role": ("role", record("role", history=[{"role": "💥", "text": SECRET}])),
    "format fields": (
        "braces",
        record("braces", examples=[{"query": "{query} %s {0}", "response": "{}"}] * 3),
    ),
}
