"""Which answers are averaged together: all, by kind and exposure, by length of history, by tag.

A slice has a short key that ``summary.json`` uses:

``all``, ``unseen``, ``direct``, ``direct/unseen``
    all users; a query kind, an exposure, or both.
``fits:…``, ``long:…``
    the same for users whose whole history fits the base's context beside the query, and for the others.
``order:choice_first``, ``mentions:1``, ``attribute:diet``
    all users; one value of a tag.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pyarrow as pa

ALL = "all"
FITS = "fits"
LONG = "long"
HISTORY_LABELS = {"": "All users", FITS: "History fits the context", LONG: "History longer than the context"}
TAG_LABELS = {"order": "Order of the answer", "mentions": "Mentions in the history", "attribute": "Attribute"}
NONE = "none"

_KIND_ORDER = ("direct", "implicit", "changed", "generic")
_EXPOSURE_ORDER = ("seen", "unseen")
_MOST_KINDS = 12  # of kinds that a user's file names itself; the rest still counts in "all"


@dataclass(frozen=True, slots=True)
class Slice:
    """A subset of the answers: those that match every field that is not empty."""

    key: str
    history: str = ""  # "", FITS or LONG
    kind: str = ""
    exposure: str = ""
    tag: str = ""  # name of another tag
    value: str = ""  # its value

    @property
    def label(self) -> str:
        """What a table's row says."""
        if self.tag:
            return self.value.replace("_", " ")
        parts = [self.kind or ("" if self.exposure else "all queries")]
        if self.exposure:
            parts.append(f"{self.exposure} facts" if not self.kind else self.exposure)
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True)
class Groups:
    """The grouping columns of a scores table as codes, so that a slice is a cheap mask."""

    columns: dict[str, tuple[list[str], NDArray[np.int64]]]  # name → (values, code of each row)
    fits: NDArray[np.bool_]

    @classmethod
    def of(cls, table: pa.Table) -> Groups:
        """Read the grouping columns of a scores table."""
        names = ("kind", "exposure", *TAG_LABELS)
        return cls(
            columns={name: encoded(table, name) for name in names},
            fits=table["history_fits"].to_numpy().astype(bool),
        )

    def mask(self, piece: Slice) -> NDArray[np.bool_]:
        """Which rows belong to a slice, shape ``(n_rows,)``."""
        keep = np.ones(len(self.fits), dtype=bool)
        if piece.history:
            keep &= self.fits if piece.history == FITS else ~self.fits
        for name, value in (("kind", piece.kind), ("exposure", piece.exposure), (piece.tag, piece.value)):
            if value:
                values, codes = self.columns[name]
                keep &= codes == values.index(value)
        return keep

    def present(self, name: str) -> list[str]:
        """The values of a column that occur, without "none"."""
        return [value for value in self.columns[name][0] if value not in (NONE, "")]


def encoded(table: pa.Table, name: str) -> tuple[list[str], NDArray[np.int64]]:
    """A text column as its sorted values and, a row, the position among them."""
    column = table[name].combine_chunks().dictionary_encode()
    values = column.dictionary.to_pylist()
    order = sorted(range(len(values)), key=lambda i: values[i])
    rank = np.empty(len(values), dtype=np.int64)
    rank[order] = np.arange(len(values))
    return [values[i] for i in order], rank[column.indices.to_numpy(zero_copy_only=False).astype(np.int64)]


def make_slices(groups: Groups) -> list[Slice]:
    """The slices that the data has, in the order in which tables show them.

    Kinds are told apart only where there are two or more, exposures inside a kind only where the kind has
    some, and lengths of history always: data without kinds or tags has "all" and its history part alone.
    """
    histories = [""]
    histories += [FITS] if groups.fits.any() else []
    histories += [LONG] if not groups.fits.all() else []
    exposures = _in_order(groups.present("exposure"), _EXPOSURE_ORDER)
    found: list[Slice] = []
    for history in histories:
        prefix = f"{history}:" if history else ""
        found.append(Slice(f"{prefix}{ALL}", history))
        found += [Slice(f"{prefix}{exposure}", history, exposure=exposure) for exposure in exposures]
        for kind in _kinds(groups):
            found.append(Slice(f"{prefix}{kind}", history, kind=kind))
            found += [Slice(f"{prefix}{kind}/{e}", history, kind=kind, exposure=e) for e in exposures]
    for tag in TAG_LABELS:
        found += [Slice(f"{tag}:{value}", tag=tag, value=value) for value in groups.present(tag)]
    return [piece for piece in found if groups.mask(piece).any()]


def _kinds(groups: Groups) -> list[str]:
    values, codes = groups.columns["kind"]
    if len(values) < 2:
        return []
    counts = np.bincount(codes, minlength=len(values))
    most = sorted(range(len(values)), key=lambda i: -counts[i])[:_MOST_KINDS]
    reserved = {ALL, *_EXPOSURE_ORDER}
    return [
        kind for kind in _in_order([values[i] for i in most], _KIND_ORDER) if kind and kind not in reserved
    ]


def _in_order(values: list[str], first: tuple[str, ...]) -> list[str]:
    known = [value for value in first if value in values]
    return known + sorted(value for value in values if value not in first)
