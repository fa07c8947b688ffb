"""General ability before and after: perplexity on texts about nobody, under the base and under each adapter.

A personal model that forgets the world is worse, and nothing that is asked about a user shows it. The texts
are disjoint from all users' data: for the embedded base, documents of PersonaWorld about further personas,
drawn as those of its pretraining and none of them; for any other base a file that the caller gives.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from milp_ray.errors import MilpError
from milp_ray.evaluation.bootstrap import interval
from milp_ray.evaluation.metrics import perplexity
from milp_ray.evaluation.table_file import read_table, write_table
from milp_ray.personalize.batch import users_at_once
from milp_ray.personalize.tally import count_reason
from milp_ray.progress import progress

if TYPE_CHECKING:
    from milp_ray.config import Config
    from milp_ray.config.prompt import PromptSection
    from milp_ray.personalize.pool import WorkerPool
    from milp_ray.personalize.store import AdapterStore
    from milp_ray.training.base import Base
    from milp_ray.training.data import Sequence as TokenSequence

STAGE = "ability"
COLUMNS = {
    "user_id": "string",
    "texts": "string",  # where they came from
    "n_texts": "int32",
    "n_tokens": "int64",  # predicted tokens of all texts
    "nll": "double",  # their summed negative log-likelihood under the user's adapter, nats
    "base_nll": "double",  # and under the base alone
}
_EMBEDDED_WORLD = "PersonaWorld"
_DECIMALS = 6

# Pieces of a text, each with whether an end token follows it.
Text = tuple[tuple[str, bool], ...]


@dataclass(frozen=True, slots=True)
class AbilityOptions:
    """What a call measures."""

    texts: Path | None = None  # None: documents of PersonaWorld
    n_texts: int = 32  # at most
    n_users: int | None = None  # at most; None: all
    seed: int = 0  # of the sample of users


@dataclass(frozen=True, slots=True)
class Population:
    """Texts about nobody, and what they are called."""

    name: str
    texts: tuple[Text, ...]


def population_texts(config: Config, options: AbilityOptions) -> Population:
    """The texts that a call measures on.

    Raises:
        MilpError: the file cannot be read or is empty, or none is given and the base is not the embedded one.
    """
    if options.texts is not None:
        lines = _lines(options.texts, options.n_texts)
        return Population(options.texts.name, tuple(((line, False),) for line in lines))
    if config.base.model != "embedded":
        raise MilpError(
            f"there are no texts for base.model {config.base.model!r}: name a file of texts about nobody, in "
            'the language that the base knows, with --texts (a text a line, or .jsonl with a field "text")'
        )
    return Population(_EMBEDDED_WORLD, embedded_texts(options.n_texts, config.prompt))


def embedded_texts(n_texts: int, prompt: PromptSection) -> tuple[Text, ...]:
    """Documents of PersonaWorld about nobody, as pretraining would have read them."""
    from milp_ray.users.persona_world.documents import draw_document
    from milp_ray.users.persona_world.generator import population_rng

    drawn = (draw_document(population_rng(index), 2) for index in range(n_texts))
    return tuple(_document_text(one, prompt) for one in drawn)


def measure_ability(
    file: Path,
    user_ids: Sequence[str],
    population: Population,
    config: Config,
    *,
    pool: WorkerPool,
    store: AdapterStore,
    progress_file: TextIO | None = None,
) -> Counter[str]:
    """Measure the users' current adapters, and write one row a user in place of what ``file`` held.

    Args:
        file: gets the rows (:data:`COLUMNS`).
        user_ids: whose adapters.
        population: on what.
        config: the run's.
        pool: open workers that hold the base.
        store: the adapters.
        progress_file: where progress goes; ``None``: standard output.

    Returns:
        How many users failed, by reason without its particulars; without an adapter, for example.

    Raises:
        MilpError: nobody's adapter could be measured.
    """
    reasons: Counter[str] = Counter()
    found: dict[str | None, tuple[float, int]] = {}
    work = partial(_measure, store, population, config.evaluation.batch_size)
    items = [_Item(None), *(_Item(user_id) for user_id in user_ids)]
    with progress(STAGE, len(user_ids), unit="users", file=progress_file) as bar:
        for outcome in pool.map(
            work,
            items,
            key=lambda item: item.key,
            size=lambda item: 1.0,
            at_once=users_at_once(config.training),
        ):
            if outcome.failed:
                count_reason(reasons, str(outcome.reason))
            else:
                user_id, nll, n_tokens = outcome.value
                found[user_id] = (nll, n_tokens)
            bar.advance(outcome.key != _Item(None).key)
    base = found.pop(None, None)
    if base is None or not found:
        reason = reasons.most_common(1)[0][0] if reasons else "there are no users"
        raise MilpError(f"no adapter could be measured: {reason}")
    same = {"texts": population.name, "n_texts": len(population.texts), "base_nll": base[0]}
    order = {user_id: place for place, user_id in enumerate(user_ids)}
    rows = [
        {"user_id": user_id, "nll": nll, "n_tokens": n_tokens, **same}
        for user_id, (nll, n_tokens) in sorted(found.items(), key=lambda item: order[str(item[0])])
    ]
    write_table(file, rows, COLUMNS)
    return reasons


def ability_of(file: Path, config: Config) -> dict[str, Any] | None:
    """What a file of :func:`measure_ability` says, in plain types; ``None`` where no user is left in it.

    Returns:
        ``base_perplexity``; ``perplexity`` under the users' adapters and ``change``, the relative one, each
        ``{mean, low, high, n_users}`` over users; ``worst_change``, the largest of a user; ``n_users``,
        ``texts``, ``n_texts``, ``n_tokens`` (of one measurement) and ``confidence``.

    Raises:
        MilpError: the file is damaged.
    """
    rows = read_table(file, COLUMNS).to_pylist()
    if not rows:
        return None
    section = config.evaluation
    draws: dict[str, Any] = {
        "n_bootstrap": section.n_bootstrap,
        "confidence": section.confidence,
        "seed": config.seed,
    }
    with_adapter, changes = [], []
    for row in rows:
        with_adapter.append(_finite(perplexity(row["nll"], row["n_tokens"])))
        changes.append(_finite(perplexity(row["nll"] - row["base_nll"], row["n_tokens"])) - 1.0)
    first = rows[0]
    return {
        "base_perplexity": round(_finite(perplexity(first["base_nll"], first["n_tokens"])), _DECIMALS),
        "perplexity": _cell(with_adapter, draws),
        "change": _cell(changes, draws),
        "worst_change": round(max(changes), _DECIMALS),
        "n_users": len(rows),
        **{name: first[name] for name in ("texts", "n_texts", "n_tokens")},
        "confidence": section.confidence,
    }


@dataclass(frozen=True, slots=True)
class _Item:
    """One adapter to be measured; ``None``: the base alone."""

    user_id: str | None

    @property
    def key(self) -> str:
        """A name that no user id is."""
        return "base" if self.user_id is None else f"user {self.user_id}"


def _measure(
    store: AdapterStore,
    population: Population,
    batch_size: int,
    base: Base,
    items: Sequence[_Item],
    report: Callable[[int, Any], None],
) -> None:
    """Measure some adapters in shared passes; runs in a worker. Reports (user id, nats, tokens)."""
    from milp_ray.evaluation.answers import current_adapter
    from milp_ray.training.response_loss import losses_under

    adapters = {}
    for place, item in enumerate(items):
        try:
            adapters[place] = None if item.user_id is None else current_adapter(store, item.user_id)
        except MilpError as error:
            report(place, error)
    sequences = token_sequences(population.texts, base)
    losses = losses_under(base, list(adapters.values()), [sequences] * len(adapters), batch_size=batch_size)
    for place, own in zip(adapters, losses, strict=True):
        nll, n_tokens = sum(nll for nll, _ in own), sum(n for _, n in own)
        report(place, (items[place].user_id, nll, n_tokens))


def token_sequences(texts: Sequence[Text], base: Base) -> list[TokenSequence]:
    """The texts' tokens behind the start tokens, in pieces of the base's context.

    Every token is predicted, but the first of a piece where the base has no start tokens.
    """
    from milp_ray.training.data import Sequence as TokenSequence

    start = base.start_ids
    found = []
    for text in texts:
        tokens: list[int] = []
        for (_, ends), piece in zip(text, base.tokenize([part for part, _ in text]), strict=True):
            tokens += [*piece, base.eos_id] if ends else piece
        room = base.context_length - len(start)
        for first in range(0, len(tokens), room):
            ids = (*start, *tokens[first : first + room])
            if len(ids) > max(1, len(start)):
                found.append(TokenSequence(ids, max(1, len(start)), "memory"))
    return found


def _document_text(document: Any, prompt: PromptSection) -> Text:
    """A document of PersonaWorld as its base has read such ones: context, questions, answers with an end."""
    from milp_ray.training.text import history_context, profile_context, query_prompt, response_text
    from milp_ray.users.records import Turn

    context = profile_context(document.profile, prompt)
    context += history_context([Turn(text) for text in document.turns], prompt)
    pieces = [(context, False)] if context else []
    for asked in document.asked:
        pieces += [(query_prompt(asked.query, prompt), False), (response_text(asked.response), True)]
    return tuple(pieces)


def _lines(path: Path, most: int) -> list[str]:
    if not path.is_file():
        raise MilpError(f"--texts {path}: there is no such file")
    found: list[str] = []
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if len(found) == most:
                    break
                text = _text_field(path, number, line) if path.suffix == ".jsonl" else line.strip()
                found += [text] if text else []
    except UnicodeDecodeError:
        # Not its own words, which quote the file.
        raise MilpError(f"--texts {path} is not UTF-8; convert it") from None
    if not found:
        raise MilpError(f"--texts {path} holds no text")
    return found


def _text_field(path: Path, number: int, line: str) -> str:
    try:
        record = json.loads(line) if line.strip() else {"text": ""}
    except ValueError:
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise MilpError(f'{path}, line {number}: not a JSON object with a string in "text"')
    return str(record["text"]).strip()


def _cell(values: list[float], draws: dict[str, Any]) -> dict[str, Any]:
    found = interval(np.array(values), **draws)
    assert found is not None
    return {
        name: round(value, _DECIMALS) if isinstance(value, float) else value
        for name, value in found.to_dict().items()
    }


def _finite(value: float | None) -> float:
    """A perplexity that JSON and a mean can hold, also of an adapter that has lost everything."""
    return min(value or 0.0, 1e300)
