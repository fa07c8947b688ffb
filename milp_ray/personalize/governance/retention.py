"""For what an adapter is kept, and for how long: written into its manifest, asked at every read.

The period counts from when the adapter was made; a user who is personalised again before it ends gets a new
version with a new period. A configuration whose period has become shorter counts for earlier adapters too, a
longer one does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from milp_ray.config.personalize import PersonalizeSection
    from milp_ray.personalize.store.adapter_store import AdapterStore
    from milp_ray.personalize.store.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Retention:
    """What a configuration says: the purpose in words, and the days that an adapter may be kept."""

    purpose: str | None = None
    days: int | None = None

    @classmethod
    def of(cls, section: PersonalizeSection) -> Retention:
        """Of ``personalize.purpose`` and ``personalize.retention_days``."""
        return cls(section.purpose, section.retention_days)

    def stamp(self, made: datetime) -> dict[str, Any] | None:
        """What the manifest of an adapter made at ``made`` says; ``None`` where nothing is configured."""
        if self.purpose is None and self.days is None:
            return None
        expires = None if self.days is None else made + timedelta(days=self.days)
        return {
            "purpose": self.purpose,
            "days": self.days,
            "expires": None if expires is None else expires.isoformat(timespec="seconds"),
        }

    def expiry(self, created: str, stamped: Mapping[str, Any] | None) -> datetime | None:
        """When an adapter's period ends: by its manifest or by this configuration, whichever is earlier."""
        ends = []
        if stamped and stamped.get("expires"):
            ends.append(datetime.fromisoformat(stamped["expires"]))
        if self.days is not None:
            ends.append(datetime.fromisoformat(created) + timedelta(days=self.days))
        return min(ends, default=None)


@dataclass(slots=True)
class Expired:
    """What :func:`collect_expired` removed, or would."""

    users: int = 0
    versions: int = 0
    n_bytes: int = 0
    problems: list[str] = field(default_factory=list)  # of versions that stay, as their period is not known


def collect_expired(store: AdapterStore, *, dry_run: bool = False) -> Expired:
    """Remove the versions whose period has ended; where that is the current one, the user's earlier ones too.

    An earlier version must not come to be served because the current one expired. A version whose manifest
    cannot be read does not tell when its period ends: it stays, unless a later one takes it along, and is
    among the problems. Needs no key.
    """
    from milp_ray.personalize.store.faults import AdapterDamagedError

    removed = Expired()
    for place in store.backend.places():
        spots = store.backend.find(place)
        manifests: dict[int, Manifest] = {}
        problems: list[str] = []
        for number, spot in spots.items():
            try:
                manifests[number] = store.manifest_at(place, number, spot)
            except AdapterDamagedError as error:
                problems.append(str(error))
        expired = [number for number, manifest in manifests.items() if store.is_expired(manifest)]
        whole = bool(spots) and max(spots) in expired
        if not whole:
            removed.problems += problems
        doomed = list(spots) if whole else expired
        removed.users += whole
        removed.versions += len(doomed)
        # What a damaged version takes is not known.
        removed.n_bytes += sum(manifests[number].n_bytes for number in doomed if number in manifests)
        if dry_run:
            continue
        if whole:
            store.backend.delete(place)
            continue
        for number in doomed:
            store.backend.delete_version(place, number, spots[number])
    return removed


def now() -> datetime:
    """The time, in UTC."""
    return datetime.now(UTC)


def told(manifest: Manifest) -> str:
    """Purpose and period in words, as far as the manifest has them."""
    stamped = manifest.retention or {}
    days, purpose = stamped.get("days"), stamped.get("purpose")
    parts = [f"kept for {days} days"] if days is not None else []
    parts += [f"for: {purpose}"] if purpose else []
    return ", ".join(parts) or "no period in its manifest"
