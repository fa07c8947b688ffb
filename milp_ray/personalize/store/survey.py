"""Going through a whole store: what it holds, what is wrong with it, what can be removed.

Everything here works without the key of an encrypted store: users are then named by the hash of their id.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from milp_ray.personalize.store.backend import ABANDONED_AFTER_SECONDS
from milp_ray.personalize.store.faults import AdapterDamagedError
from milp_ray.personalize.store.names import hash_id, shown, shown_place

if TYPE_CHECKING:
    from milp_ray.personalize.store.adapter_store import AdapterStore
    from milp_ray.personalize.store.faults import OnDamaged
    from milp_ray.personalize.store.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Entry:
    """One user: the hash of the id, the versions, and the current one's manifest (or why it is not read)."""

    place: str
    versions: tuple[int, ...]
    manifest: Manifest | None
    problem: str | None = None

    @property
    def name(self) -> str:
        """The user's id as it may be shown; the beginning of its hash where the id is not known."""
        if self.manifest is None or self.manifest.is_sealed:
            return shown_place(self.place)
        return shown(self.manifest.user_id)


@dataclass(slots=True)
class Findings:
    """What :func:`verify_store` counted."""

    users: int = 0
    versions: int = 0
    n_bytes: int = 0
    in_the_clear: int = 0  # versions that are not encrypted, where a key is given
    damaged: int = 0
    unfinished: int = 0


@dataclass(slots=True)
class Removed:
    """What :func:`collect` removed, or would."""

    unfinished: int = 0
    versions: int = 0
    n_bytes: int = 0
    too_young: int = 0  # unfinished, but a writer could still be at work on it
    needed: int = 0  # users whose current version is damaged, so that their older ones stay


def entries(store: AdapterStore, *, user_ids: Collection[str] | None = None) -> Iterator[Entry]:
    """The users that have an adapter, one after the other; ``None``: all of them, by hash."""
    for place in _places(store, user_ids):
        spots = store.backend.find(place)
        if not spots:
            continue
        number = max(spots)
        try:
            manifest = store.manifest_at(place, number, spots[number])
        except AdapterDamagedError as error:
            yield Entry(place, tuple(spots), None, str(error))
        else:
            yield Entry(place, tuple(spots), manifest)


def verify_store(
    store: AdapterStore, found: Findings, *, user_ids: Collection[str] | None = None
) -> Iterator[tuple[str, str]]:
    """Check every file of every version; the problems as (who, what), while ``found`` counts.

    An upload without a manifest is a problem too: its writer was killed, or the manifest was lost.
    """
    for place in _places(store, user_ids):
        spots = store.backend.find(place)
        found.users += bool(spots)
        name = shown_place(place)
        for number, spot in spots.items():
            found.versions += 1
            try:
                manifest = store.verify_at(place, number, spot)
            except AdapterDamagedError as error:
                found.damaged += 1
                yield name, str(error)
                continue
            name = name if manifest.is_sealed else shown(manifest.user_id)
            found.n_bytes += manifest.n_bytes
            found.in_the_clear += store.key is not None and manifest.key_id is None
        for leftover in store.backend.leftovers(place):
            if leftover.seconds_old > ABANDONED_AFTER_SECONDS:
                found.unfinished += 1
                yield (
                    name,
                    f"{leftover.n_bytes:,} bytes without a manifest: its writer was killed, or the manifest "
                    "was lost; `milp-ray store gc` removes them",
                )


def collect(
    store: AdapterStore,
    *,
    keep: int | None = None,
    older_than_seconds: float = ABANDONED_AFTER_SECONDS,
    dry_run: bool = False,
) -> Removed:
    """Remove what is unfinished and old, and all but the newest ``keep`` versions of each user.

    Args:
        store: the store.
        keep: at least 1; ``None``: versions stay.
        older_than_seconds: what is younger may belong to a writer that is at work, and stays.
        dry_run: count only.
    """
    removed = Removed()
    for place in store.backend.places():
        for leftover in store.backend.leftovers(place):
            if leftover.seconds_old <= older_than_seconds:
                removed.too_young += 1
                continue
            removed.unfinished += 1
            removed.n_bytes += leftover.n_bytes
            if not dry_run:
                store.backend.remove(leftover)
        spots = store.backend.find(place)
        old = sorted(spots)[:-keep] if keep else []
        if old and not _is_sound(store, place, max(spots), spots[max(spots)]):
            removed.needed += 1
            continue
        for number in old:
            with suppress(AdapterDamagedError):  # then of unknown size
                removed.n_bytes += store.manifest_at(place, number, spots[number]).n_bytes
            removed.versions += 1
            if not dry_run:
                store.backend.delete_version(place, number, spots[number])
    return removed


def _is_sound(store: AdapterStore, place: str, number: int, spot: str) -> bool:
    try:
        store.verify_at(place, number, spot)
    except AdapterDamagedError:
        return False
    return True


def _places(store: AdapterStore, user_ids: Collection[str] | None) -> Iterator[str]:
    if user_ids is None:
        return store.backend.places()
    return iter([hash_id(user_id) for user_id in user_ids])


def rewrite(store: AdapterStore, *, on_damaged: OnDamaged | None = None) -> Iterator[tuple[str, int]]:
    """Store current adapters again that are not in the store's precision and under its key.

    Each becomes a new version with the same facts, fingerprint, date of making and date of expiry, and the
    version that it replaces goes; what has expired stays as it is. Rounding is not undone: what was stored in
    8 bits stays as exact as that. Yields user ids and the new version's numbers.

    Nothing else may write to the store meanwhile: what is published or forgotten while an adapter is on its
    way would be covered by the old weights again.

    Args:
        store: the store.
        on_damaged: is told of an adapter that is damaged and stays as it is; ``None``: that raises.

    Raises:
        AdapterDamagedError: as above.
    """
    for user_id in store.users(on_damaged=on_damaged):
        manifest = store.manifest(user_id)
        is_encrypted = manifest.key_id is not None
        is_as_wanted = manifest.precision["name"] == store.precision
        is_as_wanted = is_as_wanted and is_encrypted == (store.key is not None)
        if is_as_wanted or store.is_expired(manifest):
            continue
        try:
            adapter = store.load(user_id, version=manifest.version)
        except AdapterDamagedError as error:
            if on_damaged is None:
                raise
            on_damaged(error)
            continue
        number = store.publish(
            user_id, adapter, manifest.meta, fingerprint=manifest.fingerprint, replaces=manifest
        )
        store.verify(user_id, version=number)
        store.delete_version(user_id, manifest.version)
        yield user_id, number
