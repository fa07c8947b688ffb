"""The store of every user's adapter, by URI: versions, manifests, precision, encryption, export."""

from milp_ray.personalize.store.adapter_store import AdapterStore, run_store
from milp_ray.personalize.store.faults import (
    AdapterDamagedError,
    AdapterExpiredError,
    AdapterMissingError,
    KeyProblemError,
    StoreUnavailableError,
)
from milp_ray.personalize.store.manifest import Manifest
from milp_ray.personalize.store.names import hash_id, shown

__all__ = [
    "AdapterDamagedError",
    "AdapterExpiredError",
    "AdapterMissingError",
    "AdapterStore",
    "KeyProblemError",
    "Manifest",
    "StoreUnavailableError",
    "hash_id",
    "run_store",
    "shown",
]
