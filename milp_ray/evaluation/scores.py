"""The scores of single answers: one flat row a (user, method, example), without any text.

Rows are plain dicts with the columns of :data:`COLUMNS`, in the order the examples came in; the same
``example`` index means the same held-out query under every method of a user.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milp_ray.errors import MilpError
from milp_ray.evaluation.metrics import content_words, fact_accuracy, rouge_1, rouge_l, set_f1

if TYPE_CHECKING:
    import pyarrow as pa

    from milp_ray.users.records import Example, UserSplit

Row = dict[str, Any]

# Column → Arrow type. Tags that an example does not carry are "none".
COLUMNS: Mapping[str, str] = {
    "user_id": "string",
    "method": "string",
    "example": "int32",  # position among the user's test examples
    "kind": "string",
    "exposure": "string",
    "order": "string",
    "mentions": "string",
    "attribute": "string",
    "history_fits": "bool",  # the whole history fits the context beside every query
    "loss": "float64",  # mean cross-entropy a token of the wanted response, nats; null where it has no token
    "n_tokens": "int32",  # tokens that the loss is the mean of
    "rouge_1": "float64",
    "rouge_l": "float64",
    "persona_f1": "float64",
    "fact_accuracy": "float64",  # 0 or 1; null where the example has no known answer
}
_USERS_KEY = "milp_ray.users"
TAGS = ("exposure", "order", "mentions", "attribute")


def persona_words(split: UserSplit) -> frozenset[str]:
    """The word set that Persona-F1 compares with: the user's training-side history, and the profile."""
    texts = [turn.text for turn in split.history]
    return content_words([*texts, split.profile] if split.profile else texts)


def score_rows(
    user_id: str,
    method: str,
    examples: Sequence[Example],
    responses: Sequence[str],
    losses: Sequence[tuple[float, int]],
    *,
    persona: frozenset[str],
    history_fits: bool,
) -> list[Row]:
    """Score one method's answers to one user's examples.

    Args:
        user_id: opaque id.
        method: name of the method.
        examples: held-out examples; their texts are read and not kept.
        responses: one a example, as generated.
        losses: one (summed negative log-likelihood in nats, tokens) a example, of the wanted response.
        persona: :func:`persona_words` of the user.
        history_fits: whether the user's whole history fits the base's context.
    """
    rows: list[Row] = []
    for index, (example, response, (nll, n_tokens)) in enumerate(
        zip(examples, responses, losses, strict=True)
    ):
        rows.append(
            {
                "user_id": user_id,
                "method": method,
                "example": index,
                "kind": example.kind,
                **{tag: example.tags.get(tag, "none") for tag in TAGS},
                "history_fits": history_fits,
                "loss": nll / n_tokens if n_tokens else None,
                "n_tokens": n_tokens,
                "rouge_1": rouge_1(response, example.response),
                "rouge_l": rouge_l(response, example.response),
                "persona_f1": set_f1(content_words(response), persona),
                "fact_accuracy": fact_accuracy(response, example.answer),
            }
        )
    return rows


def schema() -> pa.Schema:
    """The Arrow schema of a scores file."""
    import pyarrow as pa

    types = {"string": pa.string(), "int32": pa.int32(), "bool": pa.bool_(), "float64": pa.float64()}
    return pa.schema([(name, types[kind]) for name, kind in COLUMNS.items()])


def as_table(rows: Iterable[Row]) -> pa.Table:
    """Rows as an Arrow table with the schema of a scores file."""
    import pyarrow as pa

    return pa.Table.from_pylist(list(rows), schema=schema())


def write_scores(
    path: Path, rows: Iterable[Row] | Iterable[pa.Table], users: Mapping[str, str] | None = None
) -> None:
    """Write a scores file (Parquet), whole or not at all: a reader never sees half of one.

    Args:
        path: the file.
        rows: rows, or tables of rows that are written one after the other, so that not all are in memory.
        users: user id → fingerprint of what was scored, kept in the file for :func:`read_users_scored`; users
            without any row can be among them.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with pq.ParquetWriter(temporary, schema(), compression="zstd") as writer:
            pending: list[Row] = []
            for item in rows:
                if isinstance(item, pa.Table):
                    writer.write_table(item)
                else:
                    pending.append(item)
            if pending:
                writer.write_table(as_table(pending))
            writer.add_key_value_metadata({_USERS_KEY: json.dumps(dict(users or {}))})
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_scores(path: Path) -> pa.Table:
    """Read a scores file.

    Raises:
        MilpError: there is no such file, or it holds other columns.
    """
    file = _open(path)
    missing = [name for name in COLUMNS if name not in file.schema_arrow.names]
    if missing:
        raise MilpError(f"{path} lacks the columns {missing} of a scores file; run the evaluate stage again")
    return file.read(columns=list(COLUMNS)).cast(schema())


def read_users_scored(path: Path) -> dict[str, str]:
    """User id → fingerprint of the users that a scores file tells about.

    Raises:
        MilpError: there is no such file.
    """
    metadata = _open(path).metadata.metadata or {}
    users: dict[str, str] = json.loads(metadata.get(_USERS_KEY.encode(), b"{}"))
    return users


def _open(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise MilpError(f"no scores at {path}: run the evaluate stage first")
    try:
        # One file, not a data set: a folder name like "a=b" above it must not become a column.
        return pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise MilpError(f"{path} is damaged; remove it and run the evaluate stage again") from error
