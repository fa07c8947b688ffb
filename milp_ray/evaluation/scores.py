"""The scores of single answers: one flat row a (user, method, example), without any text.

Rows are plain dicts with the columns of :data:`COLUMNS`, in the order the examples came in; the same
``example`` index means the same held-out query under every method of a user.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milp_ray.atomic_files import replacing
from milp_ray.errors import MilpError
from milp_ray.evaluation.metrics import content_words, fact_accuracy, rouge_1, rouge_l, set_f1
from milp_ray.evaluation.ngrams import BLEU_COUNTS, bleu_counts, new_n_grams
from milp_ray.evaluation.tasks import parse_label, parse_rating, yes_no_accuracy

if TYPE_CHECKING:
    import pyarrow as pa

    from milp_ray.config.evaluation import EvaluationSection
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
    "match_1": "int32",  # n-grams of the answer that the wanted response has, too: see ngrams.BLEU_COUNTS
    "match_2": "int32",
    "match_3": "int32",
    "match_4": "int32",
    "n_words": "int32",  # of the answer
    "n_reference_words": "int32",  # of the wanted response
    "new_1": "int32",  # different words that none of the user's earlier answers under the method has
    "new_2": "int32",  # … and pairs of words
    "yes_no": "float64",  # 0 or 1; null where the wanted response does not begin with yes or no
    "wanted": "float64",  # index of the wanted label, or the wanted rating; null for free answers
    "given": "float64",  # the same of the answer; null where it names none
}
# Columns that files of earlier versions lack: read as null.
LATER_COLUMNS = tuple(COLUMNS)[tuple(COLUMNS).index("match_1") :]
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
    section: EvaluationSection | None = None,
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
        section: what the queries ask for; ``None``: free answers.
    """
    rows: list[Row] = []
    new = [new_n_grams(responses, n) for n in (1, 2)]
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
                **dict(zip(BLEU_COUNTS, bleu_counts(response, example.response), strict=True)),
                "new_1": new[0][index],
                "new_2": new[1][index],
                "yes_no": yes_no_accuracy(response, example.response),
                "wanted": _closed_answer(example.answer or example.response, section),
                "given": _closed_answer(response, section),
            }
        )
    return rows


def _closed_answer(text: str, section: EvaluationSection | None) -> float | None:
    """The label's index or the rating that a text names."""
    if section is None or section.task == "answers":
        return None
    if section.task == "rating":
        return parse_rating(text, *section.scale)
    label = parse_label(text, section.labels)
    return None if label is None else float(label)


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

    with replacing(path) as temporary, pq.ParquetWriter(temporary, schema(), compression="zstd") as writer:
        pending: list[Row] = []
        for item in rows:
            if isinstance(item, pa.Table):
                writer.write_table(item)
            else:
                pending.append(item)
        if pending:
            writer.write_table(as_table(pending))
        writer.add_key_value_metadata({_USERS_KEY: json.dumps(dict(users or {}))})


def read_scores(path: Path) -> pa.Table:
    """Read a scores file.

    Raises:
        MilpError: there is no such file, or it holds other columns. :data:`LATER_COLUMNS` may be missing.
    """
    import pyarrow as pa

    file = _open(path)
    missing = [name for name in COLUMNS if name not in file.schema_arrow.names]
    required = [name for name in missing if name not in LATER_COLUMNS]
    if required:
        raise MilpError(f"{path} lacks the columns {required} of a scores file; run the evaluate stage again")
    table = file.read(columns=[name for name in COLUMNS if name not in missing])
    for name in missing:
        table = table.append_column(name, pa.nulls(len(table), schema().field(name).type))
    return table.select(list(COLUMNS)).cast(schema())


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
