"""Reading a configuration: YAML, ``key=value`` overrides, and errors that say what to write instead.

Every problem is one line: where it stands (file or command line), the dotted key, what was given, what is
allowed. All problems are reported at once.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from milp_ray.config import Config
from milp_ray.errors import MilpError

_TEXT, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """Safe YAML whose keys are text, each given once, and that reads ``5e-4`` as the number of YAML 1.2."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Before any merge key (<<) is resolved: a key that is given here may stand in what is merged, too.
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key_node, _ in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise MilpError(
                    f"line {line}: a list or mapping stands for a key; put text like {{{{ x }}}} in quotes"
                )
            if key_node.tag not in (_TEXT, _MERGE):
                raise MilpError(f'line {line}: a key is text, and {key} is none in YAML; quote it: "{key}"')
            if key in seen:
                raise MilpError(f"line {line}: the key {key!r} is given twice; keep one of them")
            seen.add(key)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError, LookupError, AttributeError):
            # It looks like a date, or is tagged as a number, and is none.
            problem = f"{_shown(node.value)} is no {node.tag.rpartition(':')[2]}; quote it where it is text"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d[\d_]*(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration file and apply ``key.sub=value`` overrides in their order.

    Args:
        path: a YAML file whose keys mirror :class:`milp_ray.config.Config`.
        overrides: each ``dotted.key=value``, the value in YAML (``3``, ``null``, ``[8, 16]``, ``text``).

    Raises:
        MilpError: the file cannot be read, a key is unknown or a value impossible; it names every problem.
    """
    path = Path(path)
    return _validated(_with_overrides(_read(path), overrides), str(path), overrides)


def override_config(config: Config, overrides: Sequence[str], source: str = "configuration") -> Config:
    """A copy of ``config`` with ``key.sub=value`` overrides applied; errors as in :func:`load_config`."""
    return _validated(_with_overrides(config.model_dump(mode="json"), overrides), source, overrides)


def dump_config(config: Config) -> str:
    """The whole resolved configuration as YAML that :func:`load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise MilpError(f"{path}: there is no such configuration file; experiments/ holds examples") from None
    except IsADirectoryError:
        raise MilpError(f"{path} is a folder; give a configuration file (YAML)") from None
    except (OSError, UnicodeDecodeError) as error:
        raise MilpError(f"{path} cannot be read as text: {error}") from None
    data = _parse(text, str(path))
    if data is None:
        raise MilpError(f"{path} is empty; give at least `name: …`")
    if not isinstance(data, dict):
        raise MilpError(f"{path} holds a {type(data).__name__}; a configuration is keys with values")
    return data


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except MilpError as error:
        raise MilpError(f"{source}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "cannot be parsed"
        raise MilpError(f"{source}:{where} is not valid YAML: {problem}") from None
    except RecursionError:
        raise MilpError(f"{source}: the nesting is too deep to read") from None


def _with_overrides(data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of ``data`` in which each override is set; intermediate sections are made where absent."""
    result: dict[str, Any] = {**data}
    for text in overrides:
        key, equals, value = text.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            raise MilpError(
                f"command line: {text!r} is not an override; write key=value, for example search.n_trials=24"
            )
        section = result
        for part in parts[:-1]:
            below = section.get(part)
            # A section that is not one (a number, say) is left to validation, which names it.
            section[part] = dict(below) if isinstance(below, Mapping) else {}
            section = section[part]
        section[parts[-1]] = _parse(value, f"command line, {key.strip()}")
    return result


def _validated(data: dict[str, Any], source: str, overrides: Sequence[str]) -> Config:
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        overridden = [text.partition("=")[0].strip() for text in overrides]
        lines = [_line(problem, source, overridden) for problem in error.errors(include_url=False)]
        raise MilpError("\n".join(lines)) from None


# ------------------------------------------------------------------------------------ wording of a problem


def _line(problem: Any, source: str, overridden: Sequence[str]) -> str:
    """One pydantic problem as ``where: dotted.key …``."""
    location: tuple[str | int, ...] = problem["loc"]
    key = _dotted(location)
    names = [part for part in location if isinstance(part, str)]
    plain = ".".join(names)
    where = source
    if any(f"{plain}.".startswith(f"{name}.") or f"{name}.".startswith(f"{plain}.") for name in overridden):
        where = "command line"
    kind = problem["type"]
    if kind == "extra_forbidden":
        return f"{where}: unknown key {key}; {_nearest(names)}"
    if kind == "missing":
        return f"{where}: {key} is missing; give {_allowed(_schema_at(names))}"
    if kind == "value_error":
        return f"{where}: {key + ': ' if key else ''}{problem['ctx']['error']}"
    return f"{where}: {key}: {_shown(problem['input'])} given; allowed: {_allowed(_schema_at(location))}"


def _dotted(location: Sequence[str | int]) -> str:
    """``("space", "ranks", 1)`` as ``space.ranks[1]``."""
    key = ""
    for part in location:
        key += f"[{part}]" if isinstance(part, int) else f".{part}" if key else part
    return key


def _shown(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


def _nearest(names: Sequence[str]) -> str:
    """Advice for an unknown key: the nearest sibling, else the same name elsewhere, else all siblings."""
    *parents, name = names
    siblings = sorted(_properties(_schema_at(parents)))
    prefix = "".join(part + "." for part in parents)
    near = difflib.get_close_matches(name, siblings, n=1, cutoff=0.6)
    if near:
        return f"did you mean {prefix}{near[0]}?"
    by_name: dict[str, list[str]] = {}
    for key in known_keys():
        by_name.setdefault(key.rpartition(".")[2], []).append(key)
    elsewhere = difflib.get_close_matches(name, by_name, n=1, cutoff=0.8)
    if elsewhere:
        return f"did you mean {' or '.join(by_name[elsewhere[0]])}?"
    return f"known {'in ' + prefix[:-1] if parents else 'at the top'}: {', '.join(siblings)}"


def known_keys() -> Iterator[str]:
    """Every dotted key of a configuration, sections before what they hold."""

    def below(prefix: str, node: Mapping[str, Any]) -> Iterator[str]:
        for name, child in _properties(node).items():
            yield prefix + name
            yield from below(f"{prefix}{name}.", child)

    yield from below("", _schema())


@cache
def _schema() -> dict[str, Any]:
    return Config.model_json_schema()


def _resolved(node: Mapping[str, Any]) -> Mapping[str, Any]:
    reference = node.get("$ref")
    return _schema()["$defs"][reference.rpartition("/")[2]] if reference else node


def _properties(node: Mapping[str, Any]) -> Mapping[str, Any]:
    return _resolved(node).get("properties", {})


def _schema_at(location: Sequence[str | int]) -> Mapping[str, Any]:
    """The JSON schema of what stands at a location."""
    node: Mapping[str, Any] = _schema()
    for part in location:
        node = _resolved(node)
        options = [node, *(_resolved(option) for option in node.get("anyOf", ()))]
        if isinstance(part, int):
            node = next((option["items"] for option in options if "items" in option), {})
        else:
            node = next((option["properties"][part] for option in options if part in _properties(option)), {})
    return _resolved(node)


def _allowed(node: Mapping[str, Any]) -> str:
    """What a schema allows, in words: ``a whole number of at least 1, or null``."""
    node = _resolved(node)
    if "anyOf" in node:
        return ", or ".join(_allowed(option) for option in node["anyOf"])
    if "enum" in node or "const" in node:
        return "one of " + ", ".join(map(str, node.get("enum", [node.get("const")])))
    kind = node.get("type")
    if kind in ("integer", "number"):
        return ("a whole number" if kind == "integer" else "a number") + _range(node)
    if kind == "array":
        return f"a list such as [a, b], each {_allowed(node['items'])}"
    if kind == "string":
        return f"text like {node['pattern']}" if "pattern" in node else "text"
    if kind == "object":
        return "keys " + ", ".join(_properties(node))
    return {"boolean": "true or false", "null": "null"}.get(str(kind), "another value")


def _range(node: Mapping[str, Any]) -> str:
    bounds = [
        f"{words} {node[key]:g}"
        for key, words in (
            ("minimum", "at least"),
            ("exclusiveMinimum", "above"),
            ("maximum", "at most"),
            ("exclusiveMaximum", "below"),
        )
        if key in node
    ]
    return f" ({' and '.join(bounds)})" if bounds else ""
