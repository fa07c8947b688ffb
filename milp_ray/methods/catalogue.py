"""Which methods there are: their names, their modules, and what tables call them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from milp_ray.config.methods import ALL_METHODS


@dataclass(frozen=True, slots=True)
class MethodInfo:
    """How a method is called in tables, what it is in a line, and where it is.

    ``module`` is that in :mod:`milp_ray.methods` (``None``: of the method's own name), whose ``fit`` is given
    ``options``. ``is_trained``: seeds make a difference to it.
    """

    name: str
    label: str
    short: str  # for narrow columns
    description: str
    module: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    is_trained: bool = True


INFO: dict[str, MethodInfo] = {
    info.name: info
    for info in (
        MethodInfo("base", "Base alone", "Base", "the frozen model, given the query only", is_trained=False),
        MethodInfo(
            "text_prompt",
            "Text prompt",
            "Text prompt",
            "as much recent history as fits the context, before the query",
            is_trained=False,
        ),
        MethodInfo(
            "retrieval_recency",
            "Retrieval, recency",
            "Recency",
            "the most recent few turns, before the query",
            module="retrieval",
            options={"ranking": "recency"},
            is_trained=False,
        ),
        MethodInfo(
            "retrieval_bm25",
            "Retrieval, BM25",
            "BM25",
            "the few turns that share rare words with the query, before it",
            module="retrieval",
            options={"ranking": "bm25"},
            is_trained=False,
        ),
        MethodInfo(
            "retrieval_dense",
            "Retrieval, dense",
            "Dense",
            "the few turns whose hidden states are nearest to the query's, before it",
            module="retrieval",
            options={"ranking": "dense"},
            is_trained=False,
        ),
        MethodInfo(
            "retrieval_fusion",
            "Retrieval, fused",
            "Fused",
            "the few turns that are ranked high by recency, BM25 and hidden states together",
            module="retrieval",
            options={"ranking": "fusion"},
            is_trained=False,
        ),
        MethodInfo(
            "oracle_profile",
            "Oracle profile",
            "Oracle",
            "the user's true facts before the query: a ceiling",
            is_trained=False,
        ),
        MethodInfo(
            "malp",
            "MaLP",
            "MaLP",
            "short- and long-term memory before the query, and one adapter for all that was trained so",
        ),
        MethodInfo(
            "shared_adapter",
            "One adapter for all",
            "Shared",
            "one adapter, trained on everybody's history and past examples",
        ),
        MethodInfo(
            "oppu",
            "OPPU",
            "OPPU",
            "an adapter for the task, trained on everybody's examples, and a user's own beside it",
        ),
        MethodInfo(
            "uelp",
            "UeLP",
            "UeLP",
            "a soft prompt, or vectors for cross-attention, that an encoder, trained on everybody's data, "
            "makes of the user's history",
        ),
        MethodInfo(
            "soft_fused",
            "Soft-fused prompting",
            "Soft-fused",
            "soft prompts of history, recent and retrieved turns and examples, weighted for each query",
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
        MethodInfo(
            "plum", "PLUM", "PLUM", "an adapter trained on questions and answers about each conversation"
        ),
        MethodInfo("milp", "MiLP", "MiLP", "an adapter trained on the history and on past examples"),
        MethodInfo(
            "dpo",
            "MiLP with DPO",
            "DPO",
            "MiLP's adapter, then trained to prefer the user's own past answers to other users'",
        ),
        MethodInfo(
            "hybrid", "MiLP with retrieval", "Hybrid", "MiLP's adapter, with retrieved turns before the query"
        ),
    )
}
if tuple(INFO) != ALL_METHODS:
    raise RuntimeError(f"methods {tuple(INFO)} differ from those of the configuration, {ALL_METHODS}")


def label(name: str) -> str:
    """What tables and figures call a method; a module of one's own goes by the last part of its name."""
    return INFO[name].label if name in INFO else name.rpartition(".")[2]


def short_label(name: str) -> str:
    """A method's name for a narrow column."""
    return INFO[name].short if name in INFO else name.rpartition(".")[2]


def in_order(names: Iterable[str]) -> list[str]:
    """Method names in the order of the tables: from nothing known about the user to the full method."""
    order = {name: position for position, name in enumerate(INFO)}
    return sorted(set(names), key=lambda name: (order.get(name, len(order)), name))
