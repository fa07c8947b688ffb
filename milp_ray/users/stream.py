"""Users of any number, read one after the other from files that may be far away and larger than memory.

At no time is more than one record in memory here (of Parquet: one small batch of rows), whatever the number
of users, and a record of more than :data:`MOST_RECORD_BYTES` is not even read whole. Ids are not remembered
either: who takes the users has to know which came before (:class:`~milp_ray.users.seen.SeenIds`).
"""

from __future__ import annotations

import gzip
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import IO, cast

from milp_ray.errors import MilpError
from milp_ray.users.jsonl import parse_line, parse_row
from milp_ray.users.problems import Problem
from milp_ray.users.records import User
from milp_ray.users.sources import UsersFile, first_line, pieces_of

MOST_RECORD_BYTES = 64 << 20
_ROWS_AT_ONCE = 64
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class UserStream:
    """Users and problems of some files, once, in the order of the files.

    A file that is damaged is read up to there, and the rest of it is one problem.

    Args:
        files: from :func:`~milp_ray.users.sources.find_users_files`.
        limit: end after so many users; ``None``: all.
        unknown_fields: counts, by path ("history[].mood"), the fields that the format does not have.
    """

    def __init__(
        self,
        files: Sequence[UsersFile],
        limit: int | None = None,
        unknown_fields: Counter[str] | None = None,
    ) -> None:
        self.files = tuple(files)
        self.unknown_fields: Counter[str] = Counter() if unknown_fields is None else unknown_fields
        self.n_records = 0
        self.n_users = 0
        self.has_ended = False
        self._limit = limit
        self._n_bytes = sum(file.n_bytes for file in self.files)
        self._bytes_before = 0  # of the files that are read
        self._n_read = 0  # files that are read
        self._share = 0.0  # of the file that is being read

    def expected_records(self) -> int | None:
        """How many records there will have been, by the share of bytes that is read; ``None`` before any."""
        if self.has_ended:
            return self.n_records
        current = next((file.n_bytes for file in self.files[self._n_read :]), 0)
        read = self._bytes_before + self._share * current
        return round(self.n_records * self._n_bytes / read) if read > 0 and self.n_records else None

    def __iter__(self) -> Iterator[User | Problem]:
        """Read the files.

        Raises:
            MilpError: a file cannot be opened or read any more (the network, permissions), or no file holds
                a record.
        """
        for _, _, item in self.records():
            self.n_users += isinstance(item, User)
            yield item
            if self._limit is not None and self.n_users == self._limit:
                self.has_ended = True
                return
        self.has_ended = True
        if not self.n_records:
            names = ", ".join(file.name for file in self.files[:5])
            raise MilpError(f"no record is in {names}: there are no users")

    def records(self) -> Iterator[tuple[UsersFile, int, User | Problem]]:
        """Every record with its file and its line or row, whatever the limit. Raises as iterating does."""
        for index, file in enumerate(self.files):
            self._n_read, self._share = index, 0.0
            for number, item in self._read(file):
                self.n_records += 1
                yield file, number, item
            self._bytes_before += file.n_bytes
        self._n_read, self._share = len(self.files), 0.0

    def _read(self, file: UsersFile) -> Iterator[tuple[int, User | Problem]]:
        records = self._read_parquet(file) if file.format == "parquet" else self._read_jsonl(file)
        last = 0
        try:
            for number, item in records:
                last = number
                yield number, item
        except (gzip.BadGzipFile, EOFError, zlib.error):
            yield last + 1, Problem(file.name, last + 1, "the file is no sound gzip file from here on")
        except OSError as error:
            # Parquet's own errors have no number; those of a disk have one, and those of a network say so.
            if file.format == "parquet" and file.filesystem is None and error.errno is None:
                reason = "the file is no sound Parquet file from here on"
                yield last + 1, Problem(file.name, last + 1, reason)
                return
            raise MilpError(
                f"{file.name} cannot be read: {error.strerror or first_line(error)}. What was done is kept; "
                "the same command goes on from there"
            ) from None

    def _read_jsonl(self, file: UsersFile) -> Iterator[tuple[int, User | Problem]]:
        with file.open() as raw:
            stream = cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if file.is_compressed else raw
            for number, line in enumerate(pieces_of(stream, MOST_RECORD_BYTES), start=1):
                self._share = raw.tell() / max(1, file.n_bytes)
                if number == 1 and line is not None:
                    line = line.removeprefix(_BYTE_ORDER_MARK)
                if line is None:
                    reason = f"the line has more than {MOST_RECORD_BYTES >> 20} MiB"
                    yield number, Problem(file.name, number, reason)
                elif line.strip():
                    yield number, parse_line(file.name, number, line, self.unknown_fields)

    def _read_parquet(self, file: UsersFile) -> Iterator[tuple[int, User | Problem]]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        number = 0
        with file.open() as raw:
            try:
                table = pq.ParquetFile(raw)
                n_rows = table.metadata.num_rows
                for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE):
                    for row in range(batch.num_rows):
                        number += 1
                        self._share = number / n_rows
                        yield number, parse_row(file.name, number, batch, row, self.unknown_fields)
            except pa.ArrowException:
                reason = "the file is no sound Parquet file from here on"
                yield number + 1, Problem(file.name, number + 1, reason)
