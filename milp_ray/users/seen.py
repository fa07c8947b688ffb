"""A set of user ids that costs a few bytes an id, whatever their length."""

from __future__ import annotations

import hashlib
from array import array

_FIRST_SLOTS = 1 << 10  # a power of two
_FULLEST = 0.6  # share of the slots in use, above which a search for a free one becomes long


class SeenIds:
    """Which user ids were there before, by a 64-bit hash of each.

    An open-addressed table of 8-byte slots: 16 MiB for a million ids, 24 while it grows to that; a set of
    the ids themselves takes some 120 MiB. That two of a million ids share a hash has a chance of 3e-8.
    """

    def __init__(self) -> None:
        self._slots = array("Q", bytes(8 * _FIRST_SLOTS))  # 0: free
        self._n = 0

    def __len__(self) -> int:
        return self._n

    @property
    def n_bytes(self) -> int:
        """Bytes of the table."""
        return len(self._slots) * self._slots.itemsize

    def __contains__(self, user_id: str) -> bool:
        key = _key(user_id)
        return self._slots[_place(self._slots, key)] == key

    def add(self, user_id: str) -> bool:
        """Remember an id; whether it is new."""
        key = _key(user_id)
        place = _place(self._slots, key)
        if self._slots[place] == key:
            return False
        self._slots[place] = key
        self._n += 1
        if self._n > _FULLEST * len(self._slots):
            self._grow()
        return True

    def _grow(self) -> None:
        larger = array("Q", bytes(2 * self.n_bytes))
        for key in self._slots:
            if key:
                larger[_place(larger, key)] = key
        self._slots = larger


def _key(user_id: str) -> int:
    digest = hashlib.blake2b(user_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1


def _place(slots: array[int], key: int) -> int:
    """Where a key stands, or the free slot that it would take."""
    last = len(slots) - 1
    place = key & last
    while slots[place] not in (0, key):
        place = (place + 1) & last
    return place
