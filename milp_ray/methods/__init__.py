"""Every way of personalising, behind one protocol, so that they can be compared.

A method is one module with a function ``fit(requests) -> list[Personalizer | None]``, one a user (``None``:
the method does not apply to that user), and a docstring that names its paper and where it departs from it.
The modules import torch, so they are loaded at first use.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from milp_ray.config import METHODS
from milp_ray.errors import MilpError

if TYPE_CHECKING:
    from milp_ray.methods.protocol import FitRequest, Personalizer


@dataclass(frozen=True, slots=True)
class MethodInfo:
    """How a method is called in tables, and what it is in a line."""

    name: str
    label: str
    short: str  # for narrow columns
    description: str


INFO: dict[str, MethodInfo] = {
    info.name: info
    for info in (
        MethodInfo("base", "Base alone", "Base", "the frozen model, given the query only"),
        MethodInfo(
            "text_prompt",
            "Text prompt",
            "Text prompt",
            "as much recent history as fits the context, before the query",
        ),
        MethodInfo(
            "oracle_profile", "Oracle profile", "Oracle", "the user's true facts before the query: a ceiling"
        ),
        MethodInfo(
            "memory_only", "Memory only", "Memory", "an adapter trained on the history alone (stage 1)"
        ),
        MethodInfo(
            "instruction_only",
            "Instruction only",
            "Instruction",
            "an adapter trained on past examples alone (stage 2)",
        ),
        MethodInfo("milp", "MiLP", "MiLP", "an adapter trained on the history and on past examples"),
    )
}
if tuple(INFO) != METHODS:
    raise RuntimeError(f"methods {tuple(INFO)} differ from those of the configuration, {METHODS}")


def fit(name: str, requests: Sequence[FitRequest]) -> list[Personalizer | None]:
    """Make one method ready to answer each user; ``None`` where it does not apply to that user.

    Raises:
        MilpError: there is no such method, or a user's training diverges.
    """
    if name not in INFO:
        raise MilpError(f"method {name!r}: use one of {', '.join(INFO)}")
    personalizers: list[Personalizer | None] = import_module(f"{__name__}.{name}").fit(requests)
    return personalizers


def label(name: str) -> str:
    """What tables and figures call a method."""
    return INFO[name].label if name in INFO else name


def short_label(name: str) -> str:
    """A method's name for a narrow column."""
    return INFO[name].short if name in INFO else name


def in_order(names: Iterable[str]) -> list[str]:
    """Method names in the order of the tables: from nothing known about the user to the full method."""
    order = {name: position for position, name in enumerate(INFO)}
    return sorted(set(names), key=lambda name: (order.get(name, len(order)), name))
