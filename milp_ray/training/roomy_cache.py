"""A key-value cache that is allocated once: transformers' own copies everything for each new token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

if TYPE_CHECKING:
    from milp_ray.training.base import Base


def roomy_cache(base: Base, capacity: int) -> DynamicCache:
    """A cache for rows of at most ``capacity`` tokens; layers with a window keep transformers' kind."""
    cache = DynamicCache(config=base.model.config)
    cache.layers = [_RoomyLayer(capacity) if type(one) is DynamicLayer else one for one in cache.layers]
    return cache


class _RoomyLayer(DynamicLayer):
    """Keys and values (rows, heads, tokens so far, size) are the beginning of what was allocated."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._capacity = capacity
        self._room: list[Tensor] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write what is new behind what is there, and give all of it."""
        done = self.get_seq_length()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._room = [
                new.new_empty((*new.shape[:2], self._capacity, new.shape[3]))
                for new in (key_states, value_states)
            ]
        end = done + key_states.shape[-2]
        for room, new in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, done:end] = new
        keys, values = self._show(end)
        return keys, values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows; ``indices`` (n_rows,) ascend."""
        length = self.get_seq_length()
        if length:
            for room in self._room:
                room[: len(indices), :, :length] = room[indices, :, :length]
            self._room = [room[: len(indices)] for room in self._room]
            self._show(length)

    def _show(self, length: int) -> tuple[Tensor, Tensor]:
        keys, values = (room[:, :, :length] for room in self._room)
        self.keys, self.values = keys, values
        return keys, values
