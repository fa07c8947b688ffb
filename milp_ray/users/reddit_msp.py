"""The lines of MSP (Zhong et al. 2022, "Less is More"): posts with what a user said elsewhere.

A line of a file, plain or gzipped, has three fields with ``###`` between them, or five::

    post###response###reference<tab>reference…
    post###response###the user's references###similar users' references###references by topic

References are earlier utterances of users, chosen for the post. No line says whose it is: lines with the
very same references are one user's, ``msp-<file's stem>-<line of the first>``, and where they were chosen
anew for every post each line is a user with one example. To be tested on that, and to learn from the
references alone, set ``users.split: {train: 0, validation: 0}``; the layout then has to come from a search
over other users.

- **History**: the references, each once, in the order of the line. Of five fields those of the user alone:
  what similar users said and what fits the topic is another's memory, and is dropped.
- **Examples**: post → response, in the order of lines; there are no times.

Dropped are references that say the same as the user's own responses, and lines without references.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from milp_ray.errors import MilpError
from milp_ray.users.problems import Problem
from milp_ray.users.published import Found, clean_text, read_lines, without_responses
from milp_ray.users.records import Example, Turn, User

KIND = "post"

_SEPARATOR = "###"
_N_FIELDS = (3, 5)


def read_reddit_msp(paths: Sequence[Path]) -> Iterator[Found]:
    """Users of all files, in the order of their first lines; a place is that line.

    Raises:
        MilpError: no line of a file has the fields.
    """
    for path in paths:
        # references → line of the first, examples
        people: dict[tuple[str, ...], tuple[int, list[Example]]] = {}
        for number, line in read_lines(path):
            read = line if isinstance(line, Problem) else _line(path, number, line)
            if isinstance(read, Problem):
                yield path, number, read
                continue
            references, example = read
            people.setdefault(references, (number, []))[1].append(example)
        if not people:
            raise MilpError(
                f"users.paths: no line of {path} is post{_SEPARATOR}response{_SEPARATOR}references; "
                "users.format reddit_msp reads those"
            )
        for references, (number, examples) in people.items():
            history = without_responses([Turn(text) for text in references], examples)
            yield path, number, User(f"msp-{path.stem}-{number}", history, tuple(examples))


def _line(path: Path, number: int, line: str) -> tuple[tuple[str, ...], Example] | Problem:
    """The references, each once, and the example of a line."""
    fields = line.split(_SEPARATOR)
    if len(fields) not in _N_FIELDS:
        return Problem(path, number, f"the line has {len(fields)} fields between {_SEPARATOR}, not 3 or 5")
    post, response = clean_text(fields[0]), clean_text(fields[1])
    if post is None or response is None:
        return Problem(path, number, f"the {'post' if post is None else 'response'} is empty")
    texts = (clean_text(reference) for reference in fields[2].split("\t"))
    references = tuple(dict.fromkeys(text for text in texts if text is not None))
    if not references:
        return Problem(path, number, "the line has no reference of the user")
    return references, Example(post, response, kind=KIND)
