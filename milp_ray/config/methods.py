"""``methods``: which methods there are, and what those that MiLP is compared with have to set."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, model_validator

from milp_ray.config.section import NonNegativeInt, Section

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


def _check_heads(width: int, n_heads: int) -> None:
    if width % n_heads:
        raise ValueError(f"width {width} cannot be shared out among {n_heads} heads; make it a multiple")


class UserEncoderSection(Section):
    """What makes a few vectors of a user's texts, for `uelp` and `soft_fused`; trained on all users."""

    n_soft: PositiveInt = 16  # vectors of a user; in a soft prompt each takes a token's place in the context
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
        _check_heads(self.width, self.n_heads)
        return self


class CrossAttentionSection(Section):
    """The blocks by which the base looks at a user's latents; trained on all users together."""

    n_blocks: PositiveInt = 4  # evenly spread over the base's layers, at most one after each
    width: PositiveInt = 64  # of the attention within a block, and with it a block's parameters
    n_heads: PositiveInt = 4

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> CrossAttentionSection:
        _check_heads(self.width, self.n_heads)
        return self


class UelpSection(Section):
    """How a user's embedding is integrated into the base (both ways are those of Ning et al. 2024)."""

    # soft_prompt: its vectors stand before the query, and take tokens' places; cross_attention: the base's
    # layers look at them.
    integration: Literal["soft_prompt", "cross_attention"] = "soft_prompt"
    cross_attention: CrossAttentionSection = CrossAttentionSection()


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
    # Pairs of earlier conversations that each one is trained on with; 0: they are discarded, as in the paper.
    earlier_pairs: NonNegativeInt = 0
    # Texts of the base's own that each one is trained on with, so that it unlearns less of the world.
    own_texts: NonNegativeInt = 0
    # What is learnt from these: their tokens, or at each of them the distribution that the base has there.
    # The latter holds the adapter more closely, and keeps a hidden state of each token in main memory.
    own_texts_target: Literal["token", "distribution"] = "token"
    own_texts_weight: PositiveFloat = 1.0  # of each of their tokens, against answer_weight
    # Before each conversation, and after each round of ``epochs``, the adapter is asked about everything in
    # the rule-based teacher's vocabulary. Its answers are trained on beside, for so many rounds at most,
    # until it gives them again; the least wrong round is kept, and training.order is not heeded. No data of
    # earlier conversations is kept for it. 0: nothing is asked.
    rehearsal_rounds: NonNegativeInt = 0
    # How much each token of a part counts in the loss.
    instruction_weight: Annotated[float, Field(ge=0.0)] = 0.0
    question_weight: Annotated[float, Field(ge=0.0)] = 0.1
    answer_weight: PositiveFloat = 1.0

    @model_validator(mode="after")
    def _answers_differ(self) -> PlumSection:
        if self.yes == self.no:
            raise ValueError(f"yes and no are both {self.yes!r}; give them different words")
        return self

    @model_validator(mode="after")
    def _own_texts_are_there(self) -> PlumSection:
        if not self.own_texts and (self.own_texts_target != "token" or self.own_texts_weight != 1.0):
            raise ValueError(
                "own_texts is 0, so that own_texts_target and own_texts_weight say nothing; set own_texts to "
                "the number of texts that each conversation is trained on with, or leave them out"
            )
        return self

    @model_validator(mode="after")
    def _can_be_rehearsed(self) -> PlumSection:
        if self.rehearsal_rounds and (
            self.teacher.kind != "rule" or self.earlier_pairs or not self.negatives
        ):
            raise ValueError(
                "rehearsal_rounds asks about the vocabulary of the rule-based teacher, in place of earlier "
                "pairs; set teacher.kind to rule, earlier_pairs to 0 and negatives to true, or "
                "rehearsal_rounds to 0"
            )
        return self


class MethodsSection(Section):
    """What the methods that MiLP is compared with have to set."""

    retrieval: RetrievalSection = RetrievalSection()
    malp: MalpSection = MalpSection()
    user_encoder: UserEncoderSection = UserEncoderSection()
    uelp: UelpSection = UelpSection()
    soft_fused: SoftFusedSection = SoftFusedSection()
    dpo: DpoSection = DpoSection()
    plum: PlumSection = PlumSection()
