"""Typed configuration: one frozen section a stage, and YAML that mirrors it key for key.

Functions take the section they need, never the whole. Reading YAML, applying ``key=value`` overrides and
wording the errors is in :mod:`milp_ray.config_loader`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    WithJsonSchema,
    model_validator,
)

from milp_ray.objectives import KNOWN_OBJECTIVES

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegativeInt = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """Base of every section: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class BaseSection(Section):
    """The frozen language model."""

    model: str = "embedded"  # "embedded", a folder, or a Hugging Face model id
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: float32 on CPU, bfloat16 on GPU
    device: str = "auto"  # "auto", "cpu", "cuda", "cuda:1", …
    # Where its weights lie. cpu: in main memory, for a base that does not fit the device. ZeRO-3 then trains
    # on the device, which gets its share of them; answers and final losses are computed on the CPU.
    keep_on: Literal["device", "cpu"] = "device"
    context_length: PositiveInt | None = None  # None: what the model's own configuration states
    # Names of the linear maps of a feed-forward block, relative to one layer (for example "mlp.up_proj").
    # None: known by architecture (Llama, Mistral, Qwen, GPT-2, RoBERTa, …).
    ffn_modules: tuple[str, ...] | None = None


class PersonaWorldSection(Section):
    """How many embedded users to make; see :mod:`milp_ray.users.persona_world`."""

    n_short_users: NonNegativeInt = 12  # histories that fit the embedded base's context
    n_long_users: NonNegativeInt = 4  # histories several times the context
    n_examples: PositiveInt = 50  # query → response pairs of a user, all splits together


class SplitSection(Section):
    """Shares of a user's examples, in time order; the rest is test."""

    train: Fraction = 0.7
    validation: Fraction = 0.1

    @model_validator(mode="after")
    def _leaves_a_test_share(self) -> SplitSection:
        if self.train + self.validation >= 1.0:
            raise ValueError(
                f"train {self.train} + validation {self.validation} leaves nothing for test; "
                "keep the sum below 1"
            )
        return self


def _path_or_uri(value: Any) -> Any:
    """A path, or the text of a URI, which as a path would lose a slash."""
    if not isinstance(value, str) or "://" not in value:
        return Path(value) if isinstance(value, str) else value
    parts = urlsplit(value)
    if parts.scheme == "file":
        return Path(parts.path)
    if "@" in parts.netloc:
        raise ValueError(
            f"a URI holds no credentials ({parts.scheme}://BUCKET/…), as it is written into the run folder: "
            "they come from the environment or the provider's own files"
        )
    return value


Source = Annotated[Path | str, BeforeValidator(_path_or_uri), WithJsonSchema({"type": "string"})]

UsersFormat = Literal[
    "persona_world",
    "jsonl",
    "parquet",
    "malp",
    "amazon_qa",
    "reddit_msp",
    "reddit_pchatbot",
    "personachat",
    "lamp",
    "memorybank",
    "casino",
]


class UsersSection(Section):
    """Who is personalised."""

    # The embedded users, users files, or a published dataset's own files (milp_ray/users/<format>.py).
    format: UsersFormat = "persona_world"
    # Files to read, relative to the working directory; of jsonl and parquet also files or folders by URI:
    # s3://BUCKET/…, gs://BUCKET/…, or what an installed fsspec filesystem knows.
    paths: tuple[Source, ...] = ()
    limit: PositiveInt | None = None  # at most so many users, in the order of the files
    # Users whose record says nothing about consent. required: they are neither trained nor served.
    consent: Literal["assumed", "required"] = "assumed"
    persona_world: PersonaWorldSection = PersonaWorldSection()
    split: SplitSection = SplitSection()

    @model_validator(mode="after")
    def _files_have_paths(self) -> UsersSection:
        if self.format != "persona_world" and not self.paths:
            raise ValueError(f"format {self.format!r} reads files: name at least one under users.paths")
        by_uri = self.format in {"jsonl", "parquet"}
        if not by_uri and any(isinstance(path, str) for path in self.paths):
            raise ValueError(
                f"format {self.format!r} reads files of this machine: give paths under users.paths, no URI"
            )
        return self


class PromptSection(Section):
    """The fixed phrases around a user's texts; the same ones in training, prompting and generation."""

    history: str = "User history:\n"  # the fixed phrase before turns (memory injection and text prompts)
    profile: str = "User profile:\n"
    turn_separator: str = "\n"
    query: str = "Question: {query}\nAnswer:"  # the response follows after one space
    assistant_turn: str = "Assistant: {text}"  # how a turn of another role than "user" is written


class SpaceSection(Section):
    """The layouts that a search may propose (layers α, number n, rank r)."""

    ranks: tuple[PositiveInt, ...] = (8, 16, 32, 64, 96)
    factors: tuple[Literal["layers", "number", "rank"], ...] = ("layers", "number", "rank")
    # What a factor that is not searched is held at; None: all layers, as many LoRAs as active layers,
    # the smallest rank.
    fixed_layers: tuple[NonNegativeInt, ...] | None = None
    fixed_number: NonNegativeInt | None = None
    fixed_rank: PositiveInt | None = None


class LoraAlphaSection(Section):
    """``lora_alpha`` as a function of the rank r; the update is scaled by lora_alpha / r.

    constant: lora_alpha = value; proportional: lora_alpha = value × r;
    sqrt: lora_alpha = value × √r (rank-stabilised, Kalajdzievski 2023: the scale falls with 1/√r).
    """

    rule: Literal["constant", "proportional", "sqrt"] = "proportional"
    value: PositiveFloat = 2.0


class DeepSpeedSection(Section):
    """What the DeepSpeed engine is given."""

    # What the processes of a job share out: 0 nothing, 1 and 2 the optimizer's state, 3 the base as well.
    zero_stage: Literal[0, 1, 2, 3] = 0
    offload_optimizer: Literal["none", "cpu"] = "none"
    offload_parameters: Literal["none", "cpu"] = "none"  # ZeRO-3 only
    activation_checkpointing: bool = False

    @model_validator(mode="after")
    def _offload_needs_its_stage(self) -> DeepSpeedSection:
        if self.offload_parameters != "none" and self.zero_stage != 3:
            raise ValueError(
                f"offload_parameters is {self.offload_parameters!r} with zero_stage {self.zero_stage}: only "
                "ZeRO-3 divides parameters; set zero_stage to 3 or offload_parameters to none"
            )
        if self.offload_optimizer != "none" and self.zero_stage == 0:
            raise ValueError(
                f"offload_optimizer is {self.offload_optimizer!r} with zero_stage 0, which keeps the "
                "optimizer whole; set zero_stage to 1, 2 or 3, or offload_optimizer to none"
            )
        return self


class TrainingSection(Section):
    """How one user's adapter is trained; the defaults are the paper's recipe."""

    stages: Literal["sequential", "joint"] = "sequential"  # memory then instruction, or both mixed
    memory_epochs: NonNegativeInt = 10
    instruction_epochs: NonNegativeInt = 10  # joint: the larger of the two counts
    memory_block_turns: PositiveInt | None = None  # turns a memory sequence; None: as many as fit max_length
    order: Literal["chronological", "shuffled"] = "shuffled"
    batch_size: PositiveInt = 8
    gradient_accumulation: PositiveInt = 1
    learning_rate: PositiveFloat = 5e-4
    weight_decay: Annotated[float, Field(ge=0.0)] = 1e-4
    warmup_ratio: Fraction = 0.1
    max_grad_norm: PositiveFloat = 1.0
    max_length: PositiveInt | None = None  # tokens a sequence; None: the base's context length
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    lora_alpha: LoraAlphaSection = LoraAlphaSection()
    # Epochs without a better validation loss after which training ends, best weights kept; None: never early.
    early_stopping_patience: PositiveInt | None = None
    # Jobs trained at once over one base (:mod:`milp_ray.training.pack`); None: as many as memory allows.
    pack_size: PositiveInt | None = None
    deepspeed: DeepSpeedSection = DeepSpeedSection()


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


class SearchSection(Section):
    """The layout search."""

    n_trials: PositiveInt = 200
    n_initial: PositiveInt = 100  # Sobol points before the surrogate proposes
    batch_size: PositiveInt = 4  # suggestions made from one fit
    # Which trials a batch is proposed around (as pending), so that no slot waits for it. greedy: those that
    # have not ended; repeatable: the newest `lookahead` ones, ended or not, so that timing decides nothing.
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


class EncryptionSection(Section):
    """Where the key is that adapters are encrypted with (AES-256-GCM); neither: they are stored in the clear.

    A key is 32 random bytes in base64 or hexadecimal (``openssl rand -base64 32``). Every machine with a
    worker reads it for itself: it is never sent, logged or stored.
    """

    key_env: str | None = None  # name of the environment variable that holds it
    key_file: Path | None = None  # the file that holds it, the same path on every machine

    @model_validator(mode="after")
    def _one_place(self) -> EncryptionSection:
        if self.key_env is not None and self.key_file is not None:
            raise ValueError(
                f"key_env is {self.key_env!r} and key_file is {str(self.key_file)!r}: a key comes from one "
                "place; leave one of them out"
            )
        return self


AdapterPrecision = Literal["float32", "bfloat16", "int8"]
LayoutMode = Literal["chosen", "race", "portfolio"]


class RaceSection(Section):
    """Successive halving among layouts of the front, by each user's own validation loss."""

    # The chosen one, and the others of the front with the lowest validation loss in the search.
    max_layouts: Annotated[int, Field(ge=2, le=64)] = 4
    reduction: Annotated[int, Field(ge=2, le=8)] = 2  # a rung lets the better one in so many go on


class PortfolioSection(Section):
    """A user's layout by what the search measured on similar probe users."""

    # Weight of "no layout is better than the chosen one" in a prediction, in probe users exactly like the
    # user: the larger, the more evidence another layout needs. 0: what was measured is taken as it is.
    shrinkage: Annotated[float, Field(ge=0.0)] = 1.0


class PersonalizeSection(Section):
    """The batch that makes every user's adapter."""

    n_workers: PositiveInt | None = None  # None: as many as the cluster's resources allow
    cpus_per_worker: PositiveFloat = 1.0
    gpus_per_worker: Annotated[float, Field(ge=0.0)] = 0.0
    # Where the adapters go: a folder that every worker sees, s3://BUCKET/… or gs://BUCKET/…
    # None: `adapters/` in the run folder. Runs that share one publish versions of the same users.
    store: str | None = None
    # How weights are stored; they are read as float32. int8 keeps one scale a rank component;
    # `milp-ray store precision` measures what it costs.
    adapter_precision: AdapterPrecision = "float32"
    encryption: EncryptionSection = EncryptionSection()
    # Both go into each adapter's manifest. An adapter older than its days is not served, and
    # `milp-ray store gc --expired` removes it; None: it may be kept.
    purpose: str | None = None  # what the adapters are for, in words
    retention_days: PositiveInt | None = None

    @model_validator(mode="after")
    def _a_known_kind_of_store(self) -> PersonalizeSection:
        kind, separator, _ = (self.store or "").partition("://")
        if separator and kind not in {"file", "s3", "gs"}:
            raise ValueError(
                f"store is {self.store!r}: give a folder, s3://BUCKET/… or gs://BUCKET/…, or leave it out"
            )
        return self

    # Of a user whose worker was lost while it worked on that user alone; a worker that is lost with its node
    # (a preempted machine) does not count. 1: who kills two workers is set aside.
    max_retries: NonNegativeInt = 1
    # A user with more to train on is set aside rather than hold up others for hours; None: nobody is.
    max_characters: PositiveInt | None = 4_000_000

    # Which layout a user gets. chosen: the one that was chosen for all. race: several of the front are begun
    # for each user, and the worse ones stopped by the user's validation loss; costs about twice the training.
    # portfolio: the one that did best on similar probe users of the search, where that is surer than its
    # own error; costs nothing. Both fall back to the chosen one, and every manifest says why.
    layout: LayoutMode = "chosen"
    race: RaceSection = RaceSection()
    portfolio: PortfolioSection = PortfolioSection()
    # race and portfolio: only layouts whose adapters are at most so many times as large as the chosen one's.
    # Larger ones mostly have the lower validation loss, and the choice has weighed that already; None: any.
    max_growth: Annotated[float, Field(gt=0.0)] | None = 1.0


class GuardSection(Section):
    """What an update may cost of what the adapter knew before."""

    # The loss over the validation examples of the version that is continued, which no update of it trains on,
    # may grow by at most this share; otherwise that version stays. Negative: it has to fall. None: no bound.
    tolerance: Annotated[float, Field(gt=-1.0)] | None = 0.05


class UpdateSection(Section):
    """How an adapter is continued with what is new since it was made."""

    data: Literal["new", "replay"] = "replay"  # what is new alone, or with a sample of what was before
    # replay: the share of turns, and of examples, that are a sample of earlier ones; 0.5: as many as are new.
    replay_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    memory_epochs: NonNegativeInt | None = None  # None: as training.memory_epochs
    instruction_epochs: NonNegativeInt | None = None  # None: as training.instruction_epochs
    learning_rate: PositiveFloat | None = None  # None: as training.learning_rate
    guard: GuardSection = GuardSection()


# The methods that a run evaluates unless it says otherwise, and all that come with the package, from nothing
# known about the user to the full method.
METHODS = ("base", "text_prompt", "oracle_profile", "memory_only", "instruction_only", "milp")
ALL_METHODS = (
    "base",
    "text_prompt",
    "retrieval_recency",
    "retrieval_bm25",
    "retrieval_dense",
    "retrieval_fusion",
    "oracle_profile",
    "malp",
    "shared_adapter",
    "oppu",
    "uelp",
    "soft_fused",
    "memory_only",
    "instruction_only",
    "plum",
    "milp",
    "dpo",
    "hybrid",
)


# Those of which a part is trained on all users together.
SHARED_METHODS = frozenset({"malp", "shared_adapter", "oppu", "uelp", "soft_fused", "dpo"})


def _known_method(name: str) -> str:
    if name not in ALL_METHODS and "." not in name:
        raise ValueError(
            f"there is no method {name!r}; use one of {', '.join(ALL_METHODS)}, or a module of your own by "
            "its full name, such as my_package.my_method"
        )
    return name


def _of_a_user_alone(name: str) -> str:
    if name in SHARED_METHODS:
        raise ValueError(
            f"method {name!r} is trained on all users together, and a run takes them as they come; use "
            "`milp-ray compare`"
        )
    return _known_method(name)


Method = Annotated[str, AfterValidator(_known_method)]
OwnMethod = Annotated[str, AfterValidator(_of_a_user_alone)]


class RetrievalSection(Section):
    """Which of a user's past turns are put before a query."""

    k: PositiveInt = 8  # turns at most
    # What dense retrieval compares: mean hidden states of the base, or a sentence-transformers model by name.
    encoder: str = "base"
    fusion_constant: PositiveFloat = 60.0  # of reciprocal rank fusion (Cormack et al. 2009)


class MalpSection(Section):
    """The memories of MaLP; turns each."""

    working: PositiveInt = 8  # the most recent ones, which wait to be taken into short-term memory
    short_term: PositiveInt = 32  # beyond that the least recently used is dropped
    promote_after: PositiveInt = 2  # accesses after which a turn moves to long-term memory
    k: PositiveInt = 8  # turns that are retrieved from both for a query


class UserEncoderSection(Section):
    """What makes soft prompts of users' texts; trained on all users together."""

    n_soft: PositiveInt = 16  # vectors of a soft prompt; each takes a token's place in the context
    width: PositiveInt = 96
    n_layers: PositiveInt = 2  # of the transformer over a user's turns
    n_latent_layers: PositiveInt = 2  # in which the latents look at what it found
    n_heads: PositiveInt = 4
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    max_turns: PositiveInt = 256  # the latest ones of a longer history
    batch_size: PositiveInt = 16
    examples_of_user: PositiveInt = 4  # of a user in a batch: more, and fewer histories are encoded a step
    pretraining_epochs: NonNegativeInt = 20
    pretraining_learning_rate: PositiveFloat = 1e-3
    epochs: NonNegativeInt = 10  # over everybody's past examples
    learning_rate: PositiveFloat = 1e-3
    weight_decay: Annotated[float, Field(ge=0.0)] = 1e-2

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> UserEncoderSection:
        if self.width % self.n_heads:
            raise ValueError(
                f"width {self.width} cannot be shared out among {self.n_heads} heads; make it a multiple"
            )
        return self


class SoftFusedSection(Section):
    """Which of a user's texts soft-fused prompting reads beside the whole history and all past examples."""

    n_recent: PositiveInt = 8  # the latest turns
    n_retrieved: PositiveInt = 8  # turns that share rare words with the query
    bottleneck: PositiveInt = 32  # numbers through which a query decides the sources' weights


class DpoSection(Section):
    """Preference alignment of users' adapters."""

    beta: PositiveFloat = 0.1  # how dearly an adapter pays for leaving the base
    epochs: NonNegativeInt = 2
    batch_size: PositiveInt = 8  # pairs
    learning_rate: PositiveFloat | None = None  # None: a tenth of training.learning_rate
    rejected_per_example: PositiveInt = 1  # other users' responses against each of the user's own
    pool_size: PositiveInt = 5000  # past responses of all users together that these are taken from


class ConversationSection(Section):
    """Where a history is cut into conversations."""

    cut_by: Literal["turns", "day", "gap"] = "turns"
    turns: PositiveInt = 2  # of a conversation
    gap_hours: PositiveFloat = 6.0  # between two turns, above which a new one begins


class TeacherSection(Section):
    """Who writes questions and answers about conversations; the texts go to it and nowhere else."""

    # rule: by rule, in this process; hf: a causal language model in this process; openai: an endpoint.
    kind: Literal["rule", "hf", "openai"] = "rule"
    model: str = ""  # hf: a folder or a Hugging Face model id with safetensors; openai: the endpoint's name
    revision: str | None = None  # hf
    device: str = "auto"  # hf
    base_url: str = ""  # openai: such as http://localhost:8000/v1
    key_env: str = ""  # openai: the environment variable that holds the key; empty: none is sent
    timeout_seconds: PositiveFloat = 60.0  # openai: of an attempt
    attempts: PositiveInt = 5  # openai
    at_once: PositiveInt = 4  # openai: requests on the way
    max_new_tokens: PositiveInt = 768  # hf, openai: of what is written about a conversation

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> TeacherSection:
        if self.kind != "rule" and not self.model:
            raise ValueError(f"kind is {self.kind!r} without a model; name one")
        if self.kind == "openai" and not self.base_url:
            raise ValueError(
                "kind is 'openai' without a base_url; give one, such as http://localhost:8000/v1"
            )
        return self


class PlumSection(Section):
    """PLUM: conversations remembered as questions and answers (Magister et al. 2024)."""

    conversation: ConversationSection = ConversationSection()
    teacher: TeacherSection = TeacherSection()
    questions_per_statement: PositiveInt = 3  # yes/no ones by the rule-based teacher, and as many negative
    # How yes/no questions are answered; a base that has never read these words is better given others.
    yes: str = "Yes."
    no: str = "No."
    negatives: bool = True  # without them the answer to everything becomes yes
    epochs: PositiveInt = 10  # of each conversation
    learning_rate: PositiveFloat | None = None  # None: that of training
    # How much each token of a part counts in the loss.
    instruction_weight: Annotated[float, Field(ge=0.0)] = 0.0
    question_weight: Annotated[float, Field(ge=0.0)] = 0.1
    answer_weight: PositiveFloat = 1.0


class MethodsSection(Section):
    """What the methods that MiLP is compared with have to set."""

    retrieval: RetrievalSection = RetrievalSection()
    malp: MalpSection = MalpSection()
    user_encoder: UserEncoderSection = UserEncoderSection()
    soft_fused: SoftFusedSection = SoftFusedSection()
    dpo: DpoSection = DpoSection()
    plum: PlumSection = PlumSection()


class EvaluationSection(Section):
    """What is measured on the held-out queries."""

    methods: tuple[OwnMethod, ...] = METHODS
    max_new_tokens: PositiveInt = 48
    batch_size: PositiveInt = 16  # rows generated at once
    n_bootstrap: PositiveInt = 2000
    confidence: Annotated[float, Field(gt=0.5, lt=1.0)] = 0.95
    # What the queries ask for: free answers, one of `labels`, or a number on `scale` (lowest, highest).
    task: Literal["answers", "classification", "rating"] = "answers"
    labels: tuple[str, ...] = ()
    scale: tuple[float, float] = (1.0, 5.0)

    @model_validator(mode="after")
    def _task_has_its_answers(self) -> EvaluationSection:
        distinct = {" ".join(label.lower().split()) for label in self.labels} - {""}
        if self.task == "classification" and not 2 <= len(distinct) == len(self.labels):
            raise ValueError(
                f"evaluation.labels names {len(distinct)} different labels in {len(self.labels)} entries; a "
                "classification needs two or more, each named once (case does not tell them apart)"
            )
        if self.labels and self.task != "classification":
            raise ValueError(
                f"evaluation.labels is given, but evaluation.task is {self.task!r}; set it to classification"
            )
        if not self.scale[0] < self.scale[1]:
            raise ValueError(f"evaluation.scale is {list(self.scale)}; give [lowest, highest]")
        return self


class LayoutSection(Section):
    """A layout given by hand."""

    layers: tuple[NonNegativeInt, ...]  # that carry a LoRA
    rank: PositiveInt


class CompareSection(Section):
    """`milp-ray compare`: every method on the same users, quality against cost."""

    methods: tuple[Method, ...] = ALL_METHODS
    n_seeds: PositiveInt = 3  # of training: config.seed, and those after it
    layout: LayoutSection | None = None  # of all adapters; None: the one that the run has chosen


class RaySection(Section):
    """The cluster."""

    address: str | None = None  # None: start Ray in this process; "auto" or ray://… joins a cluster
    num_cpus: PositiveInt | None = None  # None: what the machine has
    num_gpus: NonNegativeInt | None = None
    object_store_mib: PositiveInt = 256
    include_dashboard: bool = False
    threads_per_worker: PositiveInt = 1  # torch, OpenMP and BLAS threads


class Config(Section):
    """Everything one run needs."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    seed: NonNegativeInt = 0
    output_dir: Path = Path("runs")
    base: BaseSection = BaseSection()
    users: UsersSection = UsersSection()
    prompt: PromptSection = PromptSection()
    space: SpaceSection = SpaceSection()
    training: TrainingSection = TrainingSection()
    search: SearchSection = SearchSection()
    choice: ChoiceSection = ChoiceSection()
    personalize: PersonalizeSection = PersonalizeSection()
    update: UpdateSection = UpdateSection()
    methods: MethodsSection = MethodsSection()
    evaluation: EvaluationSection = EvaluationSection()
    compare: CompareSection = CompareSection()
    ray: RaySection = RaySection()

    @model_validator(mode="after")
    def _weights_in_main_memory_need_zero_3(self) -> Config:
        stage = self.training.deepspeed.zero_stage
        if self.base.keep_on == "cpu" and stage != 3:
            raise ValueError(
                f"base.keep_on is 'cpu' with training.deepspeed.zero_stage {stage}, which needs the whole "
                "base on the device; set zero_stage to 3, or keep_on to device"
            )
        return self

    @model_validator(mode="after")
    def _several_gpus_have_no_name(self) -> Config:
        search, device = self.search, self.base.device
        if search.gpus_per_trial and search.n_processes > 1 and device not in {"auto", "cuda"}:
            raise ValueError(
                f"search.gpus_per_trial is {search.gpus_per_trial:g} and base.device {device!r}: the "
                "processes of a trial each take a GPU of their own; set base.device to 'auto' or 'cuda'"
            )
        return self

    @model_validator(mode="after")
    def _trials_share_a_pack(self) -> Config:
        if self.search.n_sharing == 1:
            return self
        deepspeed = self.training.deepspeed
        hindrances = {
            f"training.deepspeed.zero_stage {deepspeed.zero_stage}": deepspeed.zero_stage > 0,
            "training.deepspeed.activation_checkpointing": deepspeed.activation_checkpointing,
            "base.dtype float16": self.base.dtype == "float16",
        }
        found = [name for name, is_there in hindrances.items() if is_there]
        if found:
            raise ValueError(
                f"search.trials_per_gpu or trials_per_process is {self.search.n_sharing}, but {found[0]} "
                "trains one job at a time, not packs, which is what trials share; leave one of the two out"
            )
        return self
