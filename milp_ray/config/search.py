"""``space``, ``search`` and ``choice``: which layouts are tried, how, and which one is taken of the front."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from milp_ray.config.section import NonNegativeInt, Section
from milp_ray.objectives import KNOWN_OBJECTIVES


class SpaceSection(Section):
    """The layouts that a search may propose (layers α, number n, rank r)."""

    ranks: tuple[PositiveInt, ...] = (8, 16, 32, 64, 96)
    factors: tuple[Literal["layers", "number", "rank"], ...] = ("layers", "number", "rank")
    # What a factor that is not searched is held at; None: all layers, as many LoRAs as active layers,
    # the smallest rank.
    fixed_layers: tuple[NonNegativeInt, ...] | None = None
    fixed_number: NonNegativeInt | None = None
    fixed_rank: PositiveInt | None = None


class SurrogateSection(Section):
    """The SAAS Gaussian process, one an objective (Eriksson and Jankowiak 2021)."""

    inference: Literal["nuts", "map"] = "nuts"  # full Bayesian, or an ensemble of MAP fits (much faster)
    warmup_steps: PositiveInt = 256  # nuts
    num_samples: PositiveInt = 128  # nuts
    thinning: PositiveInt = 16  # nuts
    n_ensemble: PositiveInt = 4  # map
    # How objectives are modelled: as they are, diverged ones pulled in, or by their ranks (as in AutoPEFT),
    # which loses the distances between good layouts but no scale can upset.
    outputs: Literal["standardize", "copula"] = "standardize"
    # Trials that are fitted at the most, as a fit's time grows with the cube of them; of more the best, the
    # newest and a spread of the others are taken.
    max_observations: Annotated[int, Field(ge=16)] = 400


class EarlyStoppingSection(Section):
    """Ends trials at rungs (MO-ASHA); rungs lie at first_rung · eta^k epochs, k < n_rungs, below a trial's
    last epoch.
    """

    enabled: bool = False
    eta: Annotated[int, Field(ge=2, le=4)] = 3  # a rung lets one in eta trials go on
    first_rung: PositiveInt = 1  # epochs, counted through all of a trial's stages
    # More than one, and few trials are left to show what no rung sees (ROUGE-L).
    n_rungs: PositiveInt = 1
    min_records: PositiveInt = 6  # trials that have reached a rung before one is stopped there


# Settings of a search that change where and how it runs, but no trial's values.
OPERATIONAL = frozenset(
    {
        "max_concurrent_trials",
        "cpus_per_trial",
        "gpus_per_trial",
        "processes_per_trial",
        "trials_per_gpu",
        "trials_per_process",
        "max_failures",
        "patience",
    }
)


class SearchSection(Section):
    """The layout search."""

    n_trials: PositiveInt = 200
    n_initial: PositiveInt = 100  # Sobol points before the surrogate proposes
    batch_size: PositiveInt = 4  # suggestions made from one fit
    # Which trials a batch is proposed around (as pending), so that no slot waits for it. greedy: those that
    # have not ended; repeatable: the newest `lookahead` ones, ended or not, so that timing decides nothing
    # (but for early_stopping where several trials run at once: timing then decides which are stopped).
    proposals: Literal["repeatable", "greedy"] = "greedy"
    lookahead: NonNegativeInt = 4  # repeatable only; at least as many as trials run at once keeps slots busy
    n_probe_users: PositiveInt = 1  # users a layout is measured on; 1 is the paper's single-user search
    trial_stages: Literal["memory", "both"] = "memory"  # the paper's trials do memory injection only
    # Epochs of each of a trial's stages; None: as many as users get. Fewer make a cheaper, coarser ranking.
    trial_epochs: PositiveInt | None = None
    objectives: tuple[str, ...] = ("validation_loss", "rouge_l")
    max_concurrent_trials: PositiveInt | None = None  # None: as many as the cluster's resources allow
    cpus_per_trial: PositiveFloat = 1.0
    gpus_per_trial: Annotated[float, Field(ge=0.0)] = 0.0  # a part of one, one, or several (whole ones)
    # Processes that train a trial together, its CPUs and GPUs shared out among them; None: one a GPU.
    processes_per_trial: PositiveInt | None = None
    # Trials that share one process with one base and are trained together in its pack, with a GPU or without;
    # cpus_per_trial are then the CPUs of that process.
    trials_per_gpu: PositiveInt = 1
    trials_per_process: PositiveInt = 1
    max_failures: NonNegativeInt = 2  # retries of a trial before it is marked failed
    # A trial with a process of its own that takes so many times as long as the longest before it, and ten
    # minutes at least, has hung: its process is ended, and it is tried again; None: it is waited for.
    patience: Annotated[float, Field(ge=2.0)] | None = 20.0
    # Run folders of earlier searches, over bases with as many layers: their fronts are tried first,
    # and the surrogate takes a trend from their trials where that predicts this search's own.
    warm_start: tuple[Path, ...] = ()
    surrogate: SurrogateSection = SurrogateSection()
    early_stopping: EarlyStoppingSection = EarlyStoppingSection()

    @property
    def n_processes(self) -> int:
        """Processes that train one trial."""
        return self.processes_per_trial or max(1, int(self.gpus_per_trial))

    @property
    def n_sharing(self) -> int:
        """Trials that share a process."""
        return max(self.trials_per_gpu, self.trials_per_process)

    @property
    def held_gpus(self) -> float:
        """GPUs that a trial holds, or all trials that share a process together."""
        return 1.0 if self.trials_per_gpu > 1 else self.gpus_per_trial

    @model_validator(mode="after")
    def _a_gpu_a_process(self) -> SearchSection:
        gpus = self.gpus_per_trial
        if gpus > 1 and gpus != int(gpus):
            raise ValueError(
                f"gpus_per_trial {gpus:g}: a trial takes a part of one GPU, or whole ones; use {int(gpus)} "
                f"or {int(gpus) + 1}"
            )
        if gpus and self.n_processes != max(1, int(gpus)):
            raise ValueError(
                f"processes_per_trial {self.processes_per_trial} with gpus_per_trial {gpus:g}: each process "
                "trains on a GPU of its own; make them equal, or leave processes_per_trial out"
            )
        return self

    @model_validator(mode="after")
    def _one_way_to_share(self) -> SearchSection:
        if self.n_sharing == 1:
            return self
        name = "trials_per_gpu" if self.trials_per_gpu > 1 else "trials_per_process"
        said = f"{name} {getattr(self, name)}"
        if self.trials_per_gpu > 1 and self.trials_per_process > 1:
            raise ValueError(
                f"{said} and trials_per_process {self.trials_per_process} both say how many trials share a "
                "process; give the first where it has a GPU, the second where it has none"
            )
        if self.n_processes > 1:
            raise ValueError(
                f"{said}, but a trial takes {self.n_processes} processes (gpus_per_trial or "
                f"processes_per_trial): trials share a process or have several, not both; leave {name} out, "
                "or those two"
            )
        if self.trials_per_process > 1 and self.gpus_per_trial:
            raise ValueError(
                f"{said} with gpus_per_trial {self.gpus_per_trial:g}: for trials that share a GPU give "
                "trials_per_gpu and leave both out"
            )
        if self.gpus_per_trial not in (0.0, 1.0):
            raise ValueError(
                f"{said} with gpus_per_trial {self.gpus_per_trial:g}: a part of a GPU gives every trial a "
                "process and a base of its own; leave gpus_per_trial out"
            )
        return self

    @model_validator(mode="after")
    def _known_objectives(self) -> SearchSection:
        unknown = [name for name in self.objectives if name not in KNOWN_OBJECTIVES]
        if unknown or len(self.objectives) < 2 or len(set(self.objectives)) != len(self.objectives):
            raise ValueError(
                f"objectives {list(self.objectives)}: "
                f"give two or more different ones of {list(KNOWN_OBJECTIVES)}"
            )
        if self.n_initial > self.n_trials:
            raise ValueError(f"n_initial {self.n_initial} is above n_trials {self.n_trials}; lower it")
        if self.early_stopping.enabled and self.early_stopping.min_records > self.n_trials:
            raise ValueError(
                f"early_stopping.min_records {self.early_stopping.min_records} is above n_trials "
                f"{self.n_trials}, so that no trial would ever be stopped; lower it"
            )
        return self


class ChoiceSection(Section):
    """Which layout of the Pareto front is used for everybody."""

    rule: Literal["knee", "best_loss", "best_rouge_l", "smallest_within"] = "knee"
    # smallest_within: the adapter with the fewest parameters whose validation loss is at most this share
    # above the best one.
    tolerance: Annotated[float, Field(ge=0.0)] = 0.02
