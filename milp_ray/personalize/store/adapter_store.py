"""The adapter store: adapters of many users by URI, each version there whole or not at all.

A version is a set of files and a manifest, which is written last and publishes it; the highest version is the
current one. Every read checks the bytes that it uses against the manifest, so that what was damaged later is
refused by name rather than served. Where files lie and how a version becomes visible is the backend's work
(:mod:`~milp_ray.personalize.store.local`, :mod:`~milp_ray.personalize.store.objects`).

A user id is opaque and may hold anything (slashes, "..", NUL, any length): only its hash reaches a path. A
read of one user is one listing of that user's versions and the files of one of them, however many users
there are.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milp_ray.personalize.governance.retention import Retention, now, told
from milp_ray.personalize.store.backend import Backend, local_path, open_backend
from milp_ray.personalize.store.encryption import Cipher, KeySource, no_key
from milp_ray.personalize.store.faults import AdapterDamagedError, AdapterExpiredError, AdapterMissingError
from milp_ray.personalize.store.local import LocalBackend
from milp_ray.personalize.store.manifest import (
    MANIFEST,
    Manifest,
    damaged,
    decode_manifest,
    describe,
    encode_manifest,
    problem_of,
)
from milp_ray.personalize.store.names import hash_id, shown

if TYPE_CHECKING:
    from milp_ray.config.personalize import AdapterPrecision, PersonalizeSection
    from milp_ray.personalize.store.faults import OnDamaged
    from milp_ray.training.adapters import Adapter

Files = dict[str, bytes]


def run_store(own: Path | str, section: PersonalizeSection) -> AdapterStore:
    """The store that a run's configuration means; ``own`` is the run folder's.

    Raises:
        MilpError: ``personalize.store`` is no place that a store can have.
    """
    return AdapterStore(
        section.store if section.store is not None else own,
        precision=section.adapter_precision,
        key=KeySource.of(section.encryption),
        retention=Retention.of(section),
    )


class AdapterStore:
    """Adapters of many users at one URI.

    Instances hold the URI and where the key is, never the key, so that they can be sent to workers and made
    anew at will.

    Args:
        root: a folder, ``s3://BUCKET/…`` or ``gs://BUCKET/…``.
        precision: how adapters are stored that are published from now on; any is read.
        key: where the key is that adapters published from now on are encrypted with, and encrypted ones read.
        retention: for what and how long adapters are kept.

    Raises:
        MilpError: the URI is none that a store can have.
    """

    def __init__(
        self,
        root: Path | str,
        *,
        precision: AdapterPrecision = "float32",
        key: KeySource | None = None,
        retention: Retention | None = None,
    ) -> None:
        self.uri = str(root)
        self.precision = precision
        self.key = key
        self.retention = retention or Retention()
        self.backend: Backend = open_backend(self.uri)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_remade, (self.uri, self.precision, self.key, self.retention))

    @property
    def root(self) -> Path:
        """The folder of a local store."""
        path = local_path(self.uri)
        if path is None:
            raise RuntimeError(f"{self.uri} is no folder")
        return path

    @cached_property
    def _cipher(self) -> Cipher | None:
        return None if self.key is None else self.key.cipher()

    def check(self, *, writable: bool = True) -> None:
        """Try the store before any work is done for it.

        Raises:
            StoreUnavailableError: it cannot be reached, read, or (where that is asked) written.
            KeyProblemError: the key is not where it should be.
        """
        self.backend.check(writable=writable)
        self._cipher  # noqa: B018 -- reads the key

    # ----------------------------------------------------------------------------------------- writing

    def publish(
        self,
        user_id: str,
        adapter: Adapter,
        meta: Mapping[str, Any],
        *,
        fingerprint: str = "",
        replaces: Manifest | None = None,
    ) -> int:
        """Add an adapter as the user's next version, which makes it the current one.

        Args:
            user_id: any string.
            adapter: what training returned.
            meta: JSON-able facts for the manifest (numbers, names; never a user's text).
            fingerprint: hash of what it was made from; :meth:`has` compares it.
            replaces: of a version of the same weights that this one stands in for: when these were made and
                how long they may be kept stays as it was. ``None``: they are made now, and kept as the
                store's configuration has it.

        Returns:
            The version's number.

        Raises:
            StoreUnavailableError: the store cannot be written; nothing of this version is seen then.
            KeyProblemError: the key is missing or malformed.
        """
        from milp_ray.personalize.store.precision import to_stored
        from milp_ray.training.adapters import adapter_files

        cipher = self._cipher
        stored, precision = to_stored(adapter, self.precision)
        place, files = hash_id(user_id), adapter_files(stored)
        if cipher is not None:
            files = {name: cipher.seal(content, _context(place, name)) for name, content in files.items()}
        made = now()
        manifest = Manifest(
            user_id=user_id,
            version=0,
            layout=adapter.layout,
            fingerprint=fingerprint,
            created=made.isoformat(timespec="milliseconds") if replaces is None else replaces.created,
            meta=dict(meta),
            files={name: describe(content) for name, content in files.items()},
            precision=precision,
            retention=self.retention.stamp(made) if replaces is None else replaces.retention,
        )
        version, _ = self.backend.publish(
            place, files, lambda version: encode_manifest(replace(manifest, version=version), cipher)
        )
        return version

    def delete(self, user_id: str) -> bool:
        """Remove every version of a user's adapter; whether there was anything.

        The user is gone at once; a deletion that is interrupted afterwards is finished by repeating it. An
        object storage that keeps old versions of objects keeps these too: turn that off for the bucket.
        """
        return self.backend.delete(hash_id(user_id))

    def delete_version(self, user_id: str, version: int) -> None:
        """Remove one version of a user's adapter.

        Raises:
            AdapterMissingError: there is none of this number.
        """
        self.backend.delete_version(hash_id(user_id), *self._spot(user_id, version))

    # ----------------------------------------------------------------------------------------- reading

    def has(self, user_id: str, fingerprint: str) -> bool:
        """Whether the current adapter is sound, may be served, and was made from what ``fingerprint`` says.

        Reads and hashes the files, so that a damaged adapter is made again by the next run.
        """
        return self.find(user_id, fingerprint) is not None

    def find(self, user_id: str, fingerprint: str) -> Manifest | None:
        """The manifest of the current adapter where :meth:`has` says yes."""
        try:
            manifest = self.verify(user_id)
        except (AdapterMissingError, AdapterDamagedError):
            return None
        if manifest.fingerprint != fingerprint or self.is_expired(manifest):
            return None
        return manifest

    def load(self, user_id: str, *, version: int | None = None) -> Adapter:
        """A user's adapter in float32, checked; the current version unless another is named.

        Raises:
            AdapterMissingError: there is none.
            AdapterDamagedError: a file of it is missing or is not the one that was published.
            AdapterExpiredError: it may not be kept any longer.
            KeyProblemError: it is encrypted, and the key is missing or another one.
            StoreUnavailableError: the store does not answer.
        """
        return self._read(user_id, version)[1]

    def folder(self, user_id: str, *, version: int | None = None) -> Path:
        """A PEFT folder of a user's adapter, checked as :meth:`load` does.

        The store's own folder where that is one PEFT can read. Otherwise (an object storage, an encrypted or
        an 8-bit adapter) a private copy **in the clear**, which is removed when this process ends.
        """
        manifest, adapter, spot = self._read(user_id, version)
        readable = manifest.key_id is None and manifest.precision["name"] != "int8"
        if isinstance(self.backend, LocalBackend) and readable:
            return self.backend.folder(hash_id(user_id)) / spot
        from milp_ray.training.adapters import save_adapter

        copy = Path(tempfile.mkdtemp(prefix="milp-adapter-"))  # mode 700
        atexit.register(shutil.rmtree, copy, ignore_errors=True)
        save_adapter(adapter, copy)
        return copy

    def verify(self, user_id: str, *, version: int | None = None) -> Manifest:
        """Check every file of an adapter; its manifest. Raises as :meth:`load` does."""
        number, spot = self._spot(user_id, version)
        manifest = self._manifest(user_id, number, spot)
        for name in manifest.files:
            self._content(manifest, spot, name)
        return manifest

    def manifest(self, user_id: str, *, version: int | None = None) -> Manifest:
        """The manifest of a user's adapter; the manifest itself is checked, the other files are not."""
        return self._manifest(user_id, *self._spot(user_id, version))

    def manifest_at(self, place: str, version: int, spot: str) -> Manifest:
        """The manifest of a version by where it is; unopened where it is encrypted and no key is given."""
        return self._read_manifest(place, None, version, spot, open_sealed=self.key is not None)

    def verify_at(self, place: str, version: int, spot: str) -> Manifest:
        """Check every file of a version by where it is; with a key, also that nobody without it changed them.

        Raises:
            AdapterDamagedError: a file is missing or not the one that was published.
        """
        manifest = self.manifest_at(place, version, spot)
        for name in manifest.files:
            if manifest.is_sealed:
                self._stored(place, manifest, spot, name)
            else:
                self._content(manifest, spot, name)
        return manifest

    def is_expired(self, manifest: Manifest) -> bool:
        """Whether an adapter's period has ended."""
        expiry = self.retention.expiry(manifest.created, manifest.retention)
        return expiry is not None and expiry <= now()

    def versions(self, user_id: str) -> list[int]:
        """Numbers of the user's published versions, ascending; the last one is the current."""
        return list(self.backend.find(hash_id(user_id)))

    def users(self, *, on_damaged: OnDamaged | None = None) -> Iterator[str]:
        """Ids of the users that have an adapter, in no order of meaning; nothing grows with their number.

        Args:
            on_damaged: is told of a user whose manifest is damaged and does not say whose it is, and who is
                passed over; ``None``: that raises.

        Raises:
            AdapterDamagedError: as above.
            KeyProblemError: the ids are encrypted, and the key is missing or another one.
        """
        for place in self.backend.places():
            spots = self.backend.find(place)
            if not spots:
                continue
            number = max(spots)
            try:
                manifest = self._read_manifest(place, None, number, spots[number])
            except AdapterDamagedError as error:
                if on_damaged is None:
                    raise
                on_damaged(error)
            else:
                yield manifest.user_id

    # ---------------------------------------------------------------------------------------- internals

    def _spot(self, user_id: str, version: int | None) -> tuple[int, str]:
        """The number of a version and where it is; the current one for ``None``."""
        spots = self.backend.find(hash_id(user_id))
        if not spots or (version is not None and version not in spots):
            what = "adapter" if version is None else f"version {version} of an adapter"
            raise AdapterMissingError(
                f"{self.uri} holds no {what} of user {shown(user_id)}; run `milp-ray personalize` for a run "
                "that has this user"
            )
        number = max(spots) if version is None else version
        return number, spots[number]

    def _read(self, user_id: str, version: int | None) -> tuple[Manifest, Adapter, str]:
        from milp_ray.personalize.store.precision import from_stored
        from milp_ray.training.adapters import parse_adapter

        number, spot = self._spot(user_id, version)
        manifest = self._manifest(user_id, number, spot)
        if self.is_expired(manifest):
            raise AdapterExpiredError(
                f"the adapter of user {shown(user_id)}, made on {manifest.created[:10]}, has expired "
                f"({told(manifest)}) and is not served; `milp-ray personalize` makes a new one while the "
                "user is among the run's users, `milp-ray store gc --expired` removes what has expired"
            )
        files = {name: self._content(manifest, spot, name) for name in manifest.files}
        stored = parse_adapter(files, f"{self.uri} of user {shown(user_id)}")
        return manifest, from_stored(stored, manifest.precision["name"]), spot

    def _manifest(self, user_id: str, number: int, spot: str) -> Manifest:
        return self._read_manifest(hash_id(user_id), user_id, number, spot)

    def _read_manifest(
        self, place: str, user_id: str | None, number: int, spot: str, *, open_sealed: bool = True
    ) -> Manifest:
        try:
            content = self.backend.read(place, spot, MANIFEST)
        except FileNotFoundError:
            raise damaged(user_id, place, number, f"{MANIFEST} is missing") from None
        return decode_manifest(
            content, place, number, user_id=user_id, cipher=self._cipher, open_sealed=open_sealed
        )

    def _content(self, manifest: Manifest, spot: str, name: str) -> bytes:
        """One file of an adapter, checked and opened."""
        place = hash_id(manifest.user_id)
        content = self._stored(place, manifest, spot, name)
        if manifest.key_id is None:
            return content
        whose = f"the adapter of user {shown(manifest.user_id)}"
        if self._cipher is None:
            raise no_key(manifest.key_id, whose)
        self._cipher.check(manifest.key_id, whose)
        try:
            return self._cipher.open(content, _context(place, name))
        except ValueError:
            problem = f"{name} was changed by someone without the key"
            raise damaged(manifest.user_id, place, manifest.version, problem) from None

    def _stored(self, place: str, manifest: Manifest, spot: str, name: str) -> bytes:
        """One file of an adapter as it is stored, checked."""
        user_id = None if manifest.is_sealed else manifest.user_id
        try:
            content = self.backend.read(place, spot, name)
        except FileNotFoundError:
            raise damaged(user_id, place, manifest.version, f"{name} is missing") from None
        problem = problem_of(content, manifest.files[name])
        if problem:
            raise damaged(user_id, place, manifest.version, f"{name} {problem}")
        return content


def _context(place: str, name: str) -> bytes:
    """What an encrypted file is bound to, so that it cannot stand in for another one."""
    return f"milp_ray adapter\0{place}\0{name}".encode("ascii")


def _remade(
    uri: str, precision: AdapterPrecision, key: KeySource | None, retention: Retention
) -> AdapterStore:
    return AdapterStore(uri, precision=precision, key=key, retention=retention)
