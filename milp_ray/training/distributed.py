"""One job trained by several processes: who computes what, and what is put together again.

The processes are those of torch's process group, made before (by Ray Train, by a launcher, by a test);
without one there is one process and nothing here communicates. All of them call the same functions with the
same arguments and get the same results; what leaves a job (callbacks, files) leaves by the first one.

The rows of a batch are dealt out so that every process runs the model equally often, as ZeRO-3 requires: the
weights of a layer are collected from all processes when it runs. A process without a row of its own runs one
of the others' with no weight in the loss.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from milp_ray.training.checkpoint import Checkpoint, Progress, Tensors
from milp_ray.training.data import Batch, Sequence, chunks, make_batch, make_batches, pieces
from milp_ray.training.loss import sequence_losses

if TYPE_CHECKING:
    from milp_ray.training.base import Base

_IGNORED = -100  # cross-entropy's label for "no loss and no gradient"
_PROGRESS = "progress"


@dataclass(frozen=True)
class Window:
    """What one optimizer step is made from: this process's part of each of its batches, in pieces.

    ``total_weight`` of the targets (their number, where all count alike) and ``n_tokens`` are over all
    processes.
    """

    batches: tuple[list[Batch], ...]
    total_weight: float
    n_tokens: int


@dataclass(frozen=True)
class Processes:
    """The ``size`` processes that train a job together, seen from the one with number ``rank``."""

    rank: int
    size: int

    @classmethod
    def here(cls) -> Processes:
        """Those of torch's process group, or this one alone."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls(0, 1)

    @property
    def is_first(self) -> bool:
        """Whether files and callbacks are this process's."""
        return self.rank == 0

    def window(
        self, sequences: SequenceOf[Sequence], plan: SequenceOf[SequenceOf[int]], base: Base
    ) -> Window:
        """This process's part of the batches that ``plan`` names by their sequences' indices."""
        chosen = [sequences[i] for indices in plan for i in indices]
        return Window(
            batches=tuple(self._batches(sequences, indices, base) for indices in plan),
            total_weight=sum(s.total_weight for s in chosen),
            n_tokens=sum(len(s.ids) for s in chosen),
        )

    def scale(self, window: Window, n_accumulate: int) -> float:
        """Factor on a process's sum of losses with which a step follows the mean over all targets.

        DeepSpeed divides by the batches that it expects in a window and by the number of processes.
        """
        return n_accumulate * self.size / window.total_weight

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, with the same bits on each."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sequence_losses(
        self,
        base: Base,
        loss: Callable[[SequenceOf[Batch]], Tensor],
        sequences: SequenceOf[Sequence],
        batch_size: int,
    ) -> list[tuple[float, int]]:
        """:func:`milp_ray.training.loss.sequence_losses` with the work divided."""
        if self.size == 1:
            return sequence_losses(base, loss, sequences, batch_size)
        sums = torch.zeros(len(sequences), dtype=torch.float64, device=base.device)
        with torch.no_grad():
            for indices in chunks(range(len(sequences)), batch_size * self.size):
                for own in self._deal(sequences, indices):
                    batch = _batch(sequences, own, base)
                    values = loss([batch]).double()
                    if own.counts:
                        places = torch.tensor(own.indices, device=base.device)
                        sums.index_add_(0, places[batch.rows], values)
        counts = [sequence.n_targets for sequence in sequences]
        return list(zip(self.sum(sums.to(base.engine_device)).tolist(), counts, strict=True))

    def gather(self, content: bytes, device: torch.device) -> list[bytes]:
        """Every process's ``content``, in the order of ranks."""
        sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(content)], device=device))
        longest = max(int(size) for size in sizes)
        # Collective calls want equal shapes.
        buffers = [torch.zeros(longest, dtype=torch.uint8, device=device) for _ in range(self.size)]
        dist.all_gather(buffers, _as_tensor(content.ljust(longest, b"\0"), device))
        return [_as_bytes(b[: int(size)]) for b, size in zip(buffers, sizes, strict=True)]

    def broadcast(self, content: bytes, device: torch.device) -> bytes:
        """The first process's ``content``."""
        size = torch.tensor([len(content)], device=device)
        dist.broadcast(size, 0)
        buffer = torch.zeros(int(size), dtype=torch.uint8, device=device)
        if self.is_first:
            buffer = _as_tensor(content, device)
        dist.broadcast(buffer, 0)
        return _as_bytes(buffer)

    def _batches(self, sequences: SequenceOf[Sequence], indices: SequenceOf[int], base: Base) -> list[Batch]:
        if self.size == 1:
            return make_batches(sequences, indices, base)
        return [_batch(sequences, own, base) for own in self._deal(sequences, indices)]

    def _deal(self, sequences: SequenceOf[Sequence], indices: SequenceOf[int]) -> list[_Share]:
        """This process's rows of each piece of a batch; as many pieces for every process.

        Rows are dealt out like cards, longest first, so that the processes' rows differ little in length, and
        the pieces are cut between rounds.
        """
        longest_first = sorted(indices, key=lambda i: -len(sequences[i].ids))
        rounds = list(chunks(longest_first, self.size))
        sizes = pieces([len(sequences[cards[0]].ids) for cards in rounds])
        shares, start = [], 0
        for size in sizes:
            cards = rounds[start : start + size]
            own = tuple(card[self.rank] for card in cards if self.rank < len(card))
            shares.append(_Share(own, counts=True) if own else _Share(cards[0][-1:], counts=False))
            start += size
        return shares


@dataclass(frozen=True)
class _Share:
    """Indices of the sequences of one forward pass; ``counts``: not only there to take part in it."""

    indices: tuple[int, ...]
    counts: bool


def _batch(sequences: SequenceOf[Sequence], share: _Share, base: Base) -> Batch:
    batch = make_batch([sequences[i] for i in share.indices], base)
    if share.counts:
        return batch
    return replace(batch, labels=torch.full_like(batch.labels, _IGNORED), reference=None)


def _as_tensor(content: bytes, device: torch.device) -> Tensor:
    if not content:
        return torch.zeros(0, dtype=torch.uint8, device=device)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).to(device)


def _as_bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().numpy().tobytes()


# ------------------------------------------------------------------------------------------- checkpoints


class SharedCheckpointFile:
    """The checkpoint of a job of several processes: one file, which the first of them reads and writes.

    One file is whole or not there; a file from each process could be of different epochs after a kill. What
    processes have in common (LoRA weights) is stored once, beside each one's part of the optimizer and its
    generator. As many processes as wrote it can go on from it; for any other number there is none. It is
    removed like any other.
    """

    def __init__(self, file: Checkpoint, processes: Processes, device: torch.device) -> None:
        self._file = file
        self._processes = processes
        self._device = device

    def write(self, progress: Progress, tensors: Tensors) -> None:
        """Replace the checkpoint; every process calls this with its own tensors."""
        from safetensors.torch import load, save

        first = self._processes.is_first
        own = {n: t.contiguous() for n, t in tensors.items() if first or not _is_common(n)}
        contents = self._processes.gather(save(own), self._device)
        if first:
            together = {
                name if _is_common(name) else f"rank.{rank}.{name}": tensor
                for rank, content in enumerate(contents)
                for name, tensor in load(content).items()
            }
            fingerprint = self._fingerprint(progress.fingerprint)
            self._file.write(replace(progress, fingerprint=fingerprint), together)
        self._wait()

    def read(self, fingerprint: str) -> tuple[Progress, Tensors] | None:
        """What was written last, this process's part of it; ``None`` on all of them if there is nothing."""
        from safetensors.torch import load, save

        content = b""
        if self._processes.is_first:
            found = self._file.read(self._fingerprint(fingerprint))
            if found is not None:
                written = json.dumps(asdict(replace(found[0], fingerprint=fingerprint))).encode()
                progress_tensor = torch.frombuffer(bytearray(written), dtype=torch.uint8)
                content = save({**found[1], _PROGRESS: progress_tensor})
        content = self._processes.broadcast(content, self._device)
        if not content:
            return None
        tensors = load(content)
        progress = Progress(**json.loads(_as_bytes(tensors.pop(_PROGRESS))))
        head = f"rank.{self._processes.rank}."
        own = {n.removeprefix(head): t for n, t in tensors.items() if _is_common(n) or n.startswith(head)}
        return progress, own

    def _fingerprint(self, fingerprint: str) -> str:
        return f"{fingerprint}, {self._processes.size} processes"

    def _wait(self) -> None:
        """Until all processes are here: none goes on before the file is as this one believes it to be."""
        self._processes.sum(torch.zeros(1, device=self._device))


def _is_common(name: str) -> bool:
    return name.startswith(("lora.", "best."))


def checkpoint_of(file: Checkpoint | None, processes: Processes, device: torch.device) -> Checkpoint | None:
    """Where a job is kept, whatever the number of processes that train it."""
    if file is None or processes.size == 1:
        return file
    return SharedCheckpointFile(file, processes, device)
