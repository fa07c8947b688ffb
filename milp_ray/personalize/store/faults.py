"""What can be wrong with a store, each with a class of its own."""

from __future__ import annotations

from collections.abc import Callable

from milp_ray.errors import MilpError


class AdapterMissingError(MilpError):
    """The store holds no adapter of the user."""


class AdapterDamagedError(MilpError):
    """What the store holds of the user is not what was published."""


class AdapterExpiredError(MilpError):
    """The period for which the adapter may be kept has ended."""


class StoreUnavailableError(MilpError):
    """The store cannot be reached, read or written: nothing is known to be wrong with what it holds."""


class KeyProblemError(MilpError):
    """The encryption key is missing, malformed or not the one that was used."""


OnDamaged = Callable[[AdapterDamagedError], None]  # is told of what is damaged and passed over
