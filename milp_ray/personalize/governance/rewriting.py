"""Taking one user out of JSON, of a line, and of a Parquet file; others' values stay as they are.

Whose a row or a line is says its ``user_id`` alone. Elsewhere an id is taken for one only where ids stand, or
where it is no plain word: other rows and keys may hold the same word for another reason.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from milp_ray.atomic_files import replacing
from milp_ray.errors import MilpError
from milp_ray.personalize.governance.id_places import USER_ID, USERS_KEYS, ids_in, is_about_users
from milp_ray.personalize.governance.needles import IdFinder

_NOT_OF_USERS = frozenset({"method", "against", "judge"})  # columns that hold names of ours


class Renamed:
    """Decoded JSON with one user's id taken out: a value becomes the pseudonym, a key of a map by users and
    its value go.

    In JSON that ``is_own``, written by the program, a whole value is an id only where ids stand: elsewhere it
    is a word of ours, such as the name of the base.
    """

    def __init__(self, finder: IdFinder, pseudonym: str, *, is_own: bool = False) -> None:
        self._finder = finder
        self._pseudonym = pseudonym
        self._is_own = is_own
        self.count = 0

    def apply(self, data: Any, *, by_user: bool = False) -> Any:
        """The data without the id; :attr:`count` says how often it was there.

        ``by_user``: the data is an id, a list of ids, or a map with ids for keys.
        """
        finder = self._finder
        if isinstance(data, str) and self._is_named_by(data, by_user):
            self.count += 1
            return self._pseudonym
        if isinstance(data, list):
            return [self.apply(value, by_user=by_user and isinstance(value, str)) for value in data]
        if isinstance(data, dict):
            kept = {name: value for name, value in data.items() if not (by_user and name == finder.user_id)}
            self.count += len(data) - len(kept)
            return {
                name: self.apply(value, by_user=is_about_users(name, value)) for name, value in kept.items()
            }
        return data

    def _is_named_by(self, text: str, by_user: bool) -> bool:
        if by_user:
            return text == self._finder.user_id
        is_word = self._is_own and text == self._finder.user_id
        return not is_word and self._finder.in_text(text)


def line_without(line: bytes, finder: IdFinder, pseudonym: str | None) -> bytes | None:
    """A line of a JSONL file without the user; ``None`` where nothing of it may stay.

    Another user's line stays; in its texts the pseudonym takes the id's place, if there is one. A line that
    says of no user whose it is, or is no JSON, goes where it names the user.
    """
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        return None if finder.look(line) else line
    owner = data.get(USER_ID) if isinstance(data, dict) else None
    if owner == finder.user_id:
        return None
    renamed = Renamed(finder, pseudonym or "", is_own=isinstance(owner, str))
    changed = renamed.apply(data)
    if not renamed.count:
        return line
    if not isinstance(owner, str):
        return None
    return line if pseudonym is None else json.dumps(changed).encode("ascii") + b"\n"


def is_among(content: bytes, finder: IdFinder) -> bool:
    """Whether the user is one of those that a JSON file tells about; also in one that is broken."""
    try:
        return finder.user_id in ids_in(json.loads(content))
    except (ValueError, RecursionError):
        return bool(finder.look(content))


def rewrite_table(path: Path, finder: IdFinder, pseudonym: str | None, dry_run: bool) -> int:
    """Take the user's rows out of a Parquet file; how many there were, mentions in the metadata included.

    Where no column says whose a row is, it goes if it names the user. In other users' rows the pseudonym, if
    there is one, takes the place of cells that name the user.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowException:
        raise MilpError(
            f"{path} is damaged, so that nothing can be taken out of it; remove it and run the command again"
        ) from None
    with file:
        said = {k: v for k, v in (file.metadata.metadata or {}).items() if k != b"ARROW:schema"}
        metadata, count = _metadata_without(said, finder)
        groups = []
        for index in range(file.num_row_groups):
            table = file.read_row_group(index)
            kept = _rows_of_others(table, finder)
            count += len(table) - len(kept)
            if _has_owners(table) and pseudonym is not None:
                kept, n_mentions = _without_mentions(kept, finder, pseudonym)
                count += n_mentions
            if len(kept):
                groups.append(kept)
        if not count or dry_run:
            return count
        schema = file.schema_arrow.remove_metadata()
    with replacing(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for table in groups:
            writer.write_table(table.replace_schema_metadata(None))
        writer.add_key_value_metadata(metadata)
    return count


def _rows_of_others(table: Any, finder: IdFinder) -> Any:
    import pyarrow as pa
    import pyarrow.compute as pc

    if _has_owners(table):
        own = pc.is_in(table[USER_ID], value_set=pa.array([finder.user_id], pa.string()))
        return table.filter(pc.invert(own))
    others = pa.array([True] * len(table), pa.bool_())
    for name in _names_of_strings(table):
        others = pc.and_(others, pc.invert(_mentions(table[name], finder).combine_chunks()))
    return table.filter(others)


def _without_mentions(table: Any, finder: IdFinder, pseudonym: str) -> tuple[Any, int]:
    import pyarrow as pa
    import pyarrow.compute as pc

    count = 0
    for index, name in enumerate(table.schema.names):
        if name not in _names_of_strings(table) or name == USER_ID or name in _NOT_OF_USERS:
            continue
        mentions = _mentions(table[name], finder)
        n_mentions = pc.sum(mentions).as_py() or 0
        if n_mentions:
            count += n_mentions
            changed = pc.if_else(mentions, pa.scalar(pseudonym, table[name].type), table[name])
            table = table.set_column(index, table.schema.field(name), changed)
    return table, count


def _has_owners(table: Any) -> bool:
    """Whether a column says whose each row is."""
    return USER_ID in _names_of_strings(table)


def _names_of_strings(table: Any) -> list[str]:
    import pyarrow as pa

    return [field.name for field in table.schema if pa.types.is_string(field.type)]


def _mentions(column: Any, finder: IdFinder) -> Any:
    """For each cell whether the id is in it."""
    import pyarrow as pa
    import pyarrow.compute as pc

    mentioned = [value for value in pc.unique(column).to_pylist() if value and finder.in_text(value)]
    return pc.is_in(column, value_set=pa.array(mentioned, pa.string()))


def _metadata_without(said: dict[bytes, bytes], finder: IdFinder) -> tuple[dict[str, str], int]:
    """A file's own metadata without the user, and how often the user was in it."""
    metadata: dict[str, str] = {}
    count = 0
    for key, value in said.items():
        name, text = key.decode("utf-8", "replace"), value.decode("utf-8", "replace")
        renamed = Renamed(finder, "")
        try:
            changed = renamed.apply(json.loads(text), by_user=name in USERS_KEYS)
        except ValueError:
            changed = None
        if renamed.count:
            text, count = json.dumps(changed), count + renamed.count
        metadata[name] = text
    return metadata, count
