"""Taking one user out of JSON, of a line, and of a Parquet file; others' values stay as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from milp_ray.atomic_files import replacing
from milp_ray.errors import MilpError
from milp_ray.personalize.governance.needles import IdFinder


class Renamed:
    """Decoded JSON with one user's id taken out: a value becomes the pseudonym, a key and its value go."""

    def __init__(self, finder: IdFinder, pseudonym: str) -> None:
        self._finder = finder
        self._pseudonym = pseudonym
        self.count = 0

    def apply(self, data: Any) -> Any:
        """The data without the id; :attr:`count` says how often it was there."""
        if isinstance(data, str) and self._finder.in_text(data):
            self.count += 1
            return self._pseudonym
        if isinstance(data, list):
            return [self.apply(value) for value in data]
        if isinstance(data, dict):
            kept = {name: value for name, value in data.items() if not self._finder.in_text(name)}
            self.count += len(data) - len(kept)
            return {name: self.apply(value) for name, value in kept.items()}
        return data


def names(line: bytes, finder: IdFinder) -> bool:
    """Whether a line of a JSONL file names the user; also one that is no JSON."""
    try:
        renamed = Renamed(finder, "")
        renamed.apply(json.loads(line))
    except (ValueError, RecursionError):
        return bool(finder.look(line))
    return renamed.count > 0


def rewrite_table(path: Path, finder: IdFinder, dry_run: bool) -> int:
    """Take the user's rows out of a Parquet file; how many there were, mentions in the metadata included."""
    import pyarrow as pa
    import pyarrow.compute as pc
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
            others = pa.array([True] * len(table), pa.bool_())
            for name in table.schema.names:
                if pa.types.is_string(table.schema.field(name).type):
                    mentioned = [v for v in pc.unique(table[name]).to_pylist() if v and finder.in_text(v)]
                    found = pc.is_in(table[name], value_set=pa.array(mentioned, pa.string()))
                    others = pc.and_(others, pc.invert(found.combine_chunks()))
            kept = table.filter(others)
            count += len(table) - len(kept)
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


def _metadata_without(said: dict[bytes, bytes], finder: IdFinder) -> tuple[dict[str, str], int]:
    """A file's own metadata without the user, and how often the user was in it."""
    metadata: dict[str, str] = {}
    count = 0
    for key, value in said.items():
        text = value.decode("utf-8", "replace")
        renamed = Renamed(finder, "")
        try:
            changed = renamed.apply(json.loads(text))
        except ValueError:
            changed = None
        if renamed.count:
            text, count = json.dumps(changed), count + renamed.count
        metadata[key.decode("utf-8", "replace")] = text
    return metadata, count
