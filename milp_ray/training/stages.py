"""How one job is trained: its stages, their epochs and steps, early stopping and checkpoints."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from milp_ray.config.training import TrainingSection
from milp_ray.errors import MilpError
from milp_ray.training.adapters import load_tensors, lora_parameters, read_tensors
from milp_ray.training.checkpoint import (
    Checkpoint,
    Progress,
    Tensors,
    optimizer_tensors,
    restore_optimizer,
)
from milp_ray.training.data import Sequence, epoch_plan
from milp_ray.training.distributed import Processes, Window, checkpoint_of
from milp_ray.training.engine import copy_to_scatter, deepspeed_engine, inner_optimizer, stepped_parameters
from milp_ray.training.frozen import frozen_prefix
from milp_ray.training.job import Stage
from milp_ray.training.loss import TargetLoss, mean_token_loss

if TYPE_CHECKING:
    from peft import PeftModel

    from milp_ray.memory.architecture import FfnSpec
    from milp_ray.training.base import Base

StepCallback = Callable[[int, int], None]
EpochCallback = Callable[[int, Tensors], None]


@dataclass
class JobTraining:
    """Everything that the stages of one job share.

    ``model`` carries the LoRA weights on ``base.model``. ``checkpoint`` is where the job is kept, after every
    epoch or, without ``checkpoint_every_epoch``, where it pauses; ``fingerprint`` is what it was made from.
    """

    base: Base
    model: PeftModel
    first_layer: int
    stages: tuple[Stage, ...]
    validation: tuple[Sequence, ...]
    section: TrainingSection
    seed: int
    fingerprint: str
    checkpoint: Checkpoint | None = None
    on_step: StepCallback | None = None
    on_epoch: EpochCallback | None = None
    validate_every_epoch: bool = False
    checkpoint_every_epoch: bool = True
    processes: Processes = field(default_factory=Processes.here, init=False)

    @cached_property
    def _kept(self) -> Checkpoint | None:
        return checkpoint_of(self.checkpoint, self.processes, self._on_engine.device)

    @cached_property
    def _on_engine(self) -> Base:
        """The base as an engine sees it, which may train elsewhere than its weights lie."""
        return replace(self.base, device=self.base.engine_device)

    @cached_property
    def _n_steps(self) -> int:
        return sum(stage.n_steps(self.section) for stage in self.stages)

    def run(self, until_epoch: int | None = None) -> tuple[Progress, float | None]:
        """Train all stages, or pause once ``until_epoch`` epochs of the whole plan are done.

        Epochs count through the stages; a stage that early stopping ends counts as done to its last one. The
        learning rate follows the whole plan, wherever the job pauses.

        Returns:
            How far the job is, and the validation loss of the weights that it would end with were this its
            end (under early stopping the best ones of the stage so far).
        """
        progress, tensors = Progress(self.fingerprint), None
        found = self._kept.read(self.fingerprint) if self._kept is not None else None
        if found is not None:
            progress, tensors = found
            load_tensors(self.model, _part(tensors, "lora."))
        with self._own_randomness(tensors), self._loss() as loss:
            for index in range(progress.stage, len(self.stages)):
                if index > progress.stage:
                    tensors = None
                    progress.begin_stage(index)
                n_before = sum(stage.epochs for stage in self.stages[:index])
                until = None if until_epoch is None else until_epoch - n_before
                self._run_stage(loss, progress, tensors, until)
                if until is not None and until <= self.stages[index].epochs:
                    break
            return progress, mean_token_loss(self._validation_losses(loss))

    # ------------------------------------------------------------------------------------------ one stage

    def _run_stage(
        self, loss: TargetLoss, progress: Progress, tensors: Tensors | None, until_epoch: int | None
    ) -> None:
        """Train the stage that ``progress`` is in, to its end or until its epoch ``until_epoch`` is done."""
        stage = self.stages[progress.stage]
        patience = self.section.early_stopping_patience
        best = _part(tensors, "best.") if tensors else {}
        last = stage.epochs if until_epoch is None else min(until_epoch, stage.epochs)
        if progress.epoch < last and not _is_over(progress, patience):
            loss = self._own_copy(loss)
            engine_of_stage = deepspeed_engine(
                loss,
                list(lora_parameters(loss.model).values()),
                self._on_engine,
                self.section,
                n_steps=stage.n_steps(self.section),
                first_step=progress.stage_steps,
            )
            with engine_of_stage as engine, _training_mode(loss, self.base.spec, self.section):
                if tensors:
                    restore_optimizer(inner_optimizer(engine), stepped_parameters(engine), tensors)
                while progress.epoch < last and not _is_over(progress, patience):
                    self._run_epoch(engine, stage, progress, best)
                    if self.on_epoch is not None:
                        self._tell_epoch(progress.epoch, read_tensors(engine.module.model))
                    if self.checkpoint_every_epoch:
                        self._write(engine, progress, best)
                if until_epoch is not None and not self.checkpoint_every_epoch:
                    self._write(engine, progress, best)
                if loss.model is not self.model:
                    load_tensors(self.model, read_tensors(loss.model))
        if best:
            load_tensors(self.model, best)

    def _own_copy(self, loss: TargetLoss) -> TargetLoss:
        """The module itself; under ZeRO-3, which scatters and frees the weights that it is given, a copy."""
        if self.section.deepspeed.zero_stage != 3:
            return loss
        return TargetLoss(copy_to_scatter(self.model), self.base.first_position, registered=True)

    def _run_epoch(self, engine: Any, stage: Stage, progress: Progress, best: Tensors) -> None:
        """One pass over the stage's sequences, and its entry in the curve."""
        training_loss = self._train_epoch(engine, stage, progress)
        validation_loss = self._validate(engine, progress, best)
        progress.curve.append(
            {
                "stage": stage.name,
                "epoch": progress.epoch,
                "training_loss": training_loss,
                "validation_loss": validation_loss,
            }
        )

    def _train_epoch(self, engine: Any, stage: Stage, progress: Progress) -> float:
        """The optimizer steps of one epoch; gives the (weighted) mean training loss a target token."""
        n_accumulate = self.section.gradient_accumulation
        rng = random.Random(f"{self.seed}/{stage.name}/{progress.epoch}")
        plan = epoch_plan(stage.sequences, self.section.batch_size, self.section.order, rng)
        total = torch.zeros((), device=self._on_engine.device)
        total_weight = 0.0
        for start in range(0, len(plan), n_accumulate):
            window = self.processes.window(
                stage.sequences, plan[start : start + n_accumulate], self._on_engine
            )
            total += self._step(engine, window)
            total_weight += window.total_weight
            progress.tokens += window.n_tokens
            progress.steps += 1
            progress.stage_steps += 1
            if self.on_step is not None and self.processes.is_first:
                self.on_step(progress.steps, self._n_steps)
        progress.epoch += 1
        mean = float(self.processes.sum(total)) / total_weight
        if not math.isfinite(mean):
            raise MilpError(
                f"training diverged in epoch {progress.epoch} of the {stage.name} stage: the loss is no "
                f"longer a number; lower training.learning_rate (now {self.section.learning_rate:g}) or "
                f"training.lora_alpha.value (now {self.section.lora_alpha.value:g})"
            )
        return mean

    def _step(self, engine: Any, window: Window) -> torch.Tensor:
        """One optimizer step on the (weighted) mean loss over *all* target tokens of the window's batches.

        So accumulation over k batches is one k times larger batch, whatever the batches' numbers of targets.
        Gives the weighted sum of the targets' losses, of this process's part.
        """
        scale = self.processes.scale(window, self.section.gradient_accumulation)
        total = torch.zeros((), device=self._on_engine.device)
        for batch in window.batches:
            scaled = engine(batch, scale)
            engine.set_gradient_accumulation_boundary(batch is window.batches[-1])
            engine.backward(scaled)
            engine.step()
            total += scaled.detach() / scale
        return total

    # -------------------------------------------------------------------------------- validation, early end

    def _validate(self, engine: Any, progress: Progress, best: Tensors) -> float | None:
        """Validation loss where somebody asks for it; keeps the best weights for early stopping."""
        patience = self.section.early_stopping_patience
        if not self.validation or (patience is None and not self.validate_every_epoch):
            return None
        loss = mean_token_loss(self._validation_losses(engine))
        if patience is not None and loss is not None:
            if progress.best_loss is None or loss < progress.best_loss:
                progress.best_loss, progress.n_worse = loss, 0
                best.update(read_tensors(engine.module.model))
            else:
                progress.n_worse += 1
        return loss

    def _validation_losses(self, loss: Any) -> list[tuple[float, int]]:
        model, base = self.model, self.base
        if not isinstance(loss, TargetLoss):
            model, base = loss.module.model, self._on_engine
        with _measuring_mode(model):
            return self.processes.sequence_losses(base, loss, self.validation, self.section.batch_size)

    def _tell_epoch(self, epoch: int, tensors: Tensors) -> None:
        if self.on_epoch is not None and self.processes.is_first:
            self.on_epoch(epoch, tensors)

    # ------------------------------------------------------------------------------- state of the whole job

    def _write(self, engine: Any, progress: Progress, best: Tensors) -> None:
        if self._kept is None:
            return
        tensors = {f"lora.{name}": t for name, t in read_tensors(engine.module.model).items()}
        tensors |= {f"best.{name}": t for name, t in best.items()}
        tensors |= optimizer_tensors(inner_optimizer(engine), stepped_parameters(engine))
        tensors["rng.cpu"] = torch.get_rng_state()
        device = self._on_engine.device
        if device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(device)
        self._kept.write(progress, tensors)

    @contextmanager
    def _own_randomness(self, tensors: Tensors | None) -> Iterator[None]:
        """Torch's generators as this job wants them (only dropout draws from them); restored afterwards."""
        device = self._on_engine.device
        on_gpu = device.type == "cuda"
        with torch.random.fork_rng(devices=[device.index or 0] if on_gpu else []):
            torch.manual_seed(self.seed + self.processes.rank)
            if tensors:
                torch.set_rng_state(tensors["rng.cpu"])
                if on_gpu:
                    torch.cuda.set_rng_state(tensors["rng.cuda"], device)
            yield

    @contextmanager
    def _loss(self) -> Iterator[TargetLoss]:
        """The module that is trained, with what lies below the lowest LoRA computed once."""
        sequences = [s for stage in self.stages for s in stage.sequences] + list(self.validation)
        # ZeRO-3 wants to see every layer run: it fetches weights in the order that it saw.
        first_layer = 0 if self.section.deepspeed.zero_stage == 3 else self.first_layer
        with frozen_prefix(self.base, first_layer, sequences, self.section.batch_size) as prefix:
            trained = list(lora_parameters(self.model).values())
            yield TargetLoss(self.model, self.base.first_position, prefix, trained=trained)


def _part(tensors: Tensors, head: str) -> Tensors:
    return {name.removeprefix(head): t for name, t in tensors.items() if name.startswith(head)}


def _is_over(progress: Progress, patience: int | None) -> bool:
    return patience is not None and progress.n_worse >= patience


@contextmanager
def _training_mode(loss: TargetLoss, spec: FfnSpec, section: TrainingSection) -> Iterator[None]:
    """LoRA's dropout on, and activation checkpointing if asked for; the base itself stays in eval mode."""
    with contextlib.ExitStack() as stack:
        for dropout in _dropouts(loss.model):
            dropout.train()
        if section.deepspeed.activation_checkpointing:
            stack.enter_context(_activation_checkpointing(loss.model, spec))
        yield


@contextmanager
def _measuring_mode(model: nn.Module) -> Iterator[None]:
    """LoRA's dropout off, then as it was."""
    training = [dropout for dropout in _dropouts(model) if dropout.training]
    for dropout in training:
        dropout.eval()
    try:
        yield
    finally:
        for dropout in training:
            dropout.train()


def _dropouts(model: nn.Module) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if name.endswith(".lora_dropout")]


@contextmanager
def _activation_checkpointing(model: Any, spec: FfnSpec) -> Iterator[None]:
    """Each layer recomputed in the backward pass: less memory, a third more work.

    Set on the layers themselves: the model's own switch also hooks the embeddings to ask for gradients, which
    would send the backward pass through the layers below the lowest LoRA.
    """
    layers: list[Any] = list(model.get_base_model().get_submodule(spec.layers_path).children())
    unable = [type(layer).__name__ for layer in layers if not hasattr(layer, "gradient_checkpointing")]
    if unable:
        raise MilpError(
            f"the base's layers ({unable[0]}) cannot be checkpointed; "
            "set training.deepspeed.activation_checkpointing to false"
        )
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        # A layer checkpoints in training mode only; what is inside it (its dropout) stays in eval mode.
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
            layer.gradient_checkpointing = False
            del layer._gradient_checkpointing_func
