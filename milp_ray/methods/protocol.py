"""What a method is given and what it must do; and the machinery that all of them share.

A personalizer is a frozen base, an adapter or none, and a rule for the context that stands before a query.
That is all in which the methods differ, so they are built by composition out of :class:`Answerer`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol, TypeVar

from milp_ray.config.methods import MethodsSection
from milp_ray.training.text import query_prompt, response_text

if TYPE_CHECKING:
    from torch import Tensor

    from milp_ray.config.prompt import PromptSection
    from milp_ray.config.training import TrainingSection
    from milp_ray.memory.layout import CanonicalLayout
    from milp_ray.methods.shared import Shared
    from milp_ray.training.adapters import Adapter
    from milp_ray.training.base import Base
    from milp_ray.training.cross_attention import Latents
    from milp_ray.training.generation import Questions
    from milp_ray.training.response_loss import Wanted
    from milp_ray.users.records import Example, Turn, UserSplit

Unit = TypeVar("Unit")


class Personalizer(Protocol):
    """A method that is ready to answer one user."""

    @property
    def request(self) -> FitRequest:
        """What it was fitted to."""
        ...

    @property
    def stored_bytes(self) -> int:
        """What has to be kept of this user so that they can be answered: weights, texts, vectors."""
        ...

    def respond(self, queries: Sequence[str]) -> list[str]:
        """Answer every query by greedy generation, in the order given."""
        ...

    def losses(self, examples: Sequence[Example]) -> list[tuple[float, int]]:
        """(summed negative log-likelihood in nats, tokens) of each example's wanted response."""
        ...

    def questions(self, queries: Sequence[str]) -> Questions:
        """What is asked of the base for it, to be answered in one batch with others' questions."""
        ...

    def wanted(self, examples: Sequence[Example]) -> Wanted:
        """What is asked of the base for :meth:`losses`."""
        ...


@dataclass(frozen=True, slots=True)
class FitRequest:
    """Everything a method may use about one user.

    ``split`` comes without test examples (:func:`training_side`); its validation examples are for early
    stopping alone. ``adapter`` is the user's stored one, which :mod:`milp_ray.methods.milp` uses instead of
    training. ``methods`` is what the methods have to set, ``shared`` what this one's ``share`` made of all
    users.
    """

    base: Base
    split: UserSplit
    layout: CanonicalLayout
    training: TrainingSection
    prompt: PromptSection
    max_new_tokens: int
    batch_size: int
    seed: int
    adapter: Adapter | None = None
    methods: MethodsSection = field(default_factory=MethodsSection)
    shared: Shared | None = None

    @property
    def shared_adapter(self) -> Adapter | None:
        """The adapter that all users share, where the method has one."""
        return None if self.shared is None else self.shared.adapter


# The context document before a query, given the query and the tokens to keep free for the answer.
ContextRule = Callable[[str, int], str]
# The soft prompts of queries: (n_queries, n_soft, hidden).
SoftRule = Callable[[Sequence[str]], "Tensor"]


def no_context(query: str, reserve: int) -> str:
    """The context of the methods that give the model the query alone."""
    return ""


@dataclass(frozen=True, slots=True)
class Answerer:
    """A :class:`Personalizer`: the base with an adapter or without, behind a context rule and a soft prompt.

    ``soft`` (n_soft, hidden) is kept of the user; ``soft_rule`` makes one for each query instead, from what
    ``context_bytes`` counts. ``latents`` are kept of the user, too; the blocks by which the base looks at
    them are everybody's.
    """

    request: FitRequest
    adapter: Adapter | None = None
    context: ContextRule = no_context
    context_bytes: int = 0  # of what the context rule has to keep of the user
    kept: Adapter | None = None  # the user's own part, where ``adapter`` holds others' as well
    soft: Tensor | None = None
    soft_rule: SoftRule | None = None
    latents: Latents | None = None

    @property
    def stored_bytes(self) -> int:
        """See :class:`Personalizer`; an adapter that all users share is not counted here."""
        own = None if self.adapter is self.request.shared_adapter else self.kept or self.adapter
        weights = [*(own.tensors.values() if own is not None else ())]
        if self.soft is not None:
            weights.append(self.soft)
        if self.latents is not None:
            weights.append(self.latents.values)
        return self.context_bytes + sum(t.numel() * t.element_size() for t in weights)

    def respond(self, queries: Sequence[str]) -> list[str]:
        """See :class:`Personalizer`."""
        return respond_all([self], [queries])[0]

    def losses(self, examples: Sequence[Example]) -> list[tuple[float, int]]:
        """See :class:`Personalizer`; the context makes room for the wanted response where that is longer."""
        return losses_all([self], [examples])[0]

    def questions(self, queries: Sequence[str]) -> Questions:
        """The complete prompts, and who answers them."""
        from milp_ray.training.generation import Questions

        request, soft = self.request, self._soft(queries)
        reserve = request.max_new_tokens + _n_soft(soft)
        prompts = [query_prompt(q, request.prompt, self.context(q, reserve)) for q in queries]
        return Questions(prompts, self.adapter, soft, self.latents)

    def wanted(self, examples: Sequence[Example]) -> Wanted:
        """The examples behind their contexts, and who is asked about them."""
        from milp_ray.training.response_loss import Wanted

        request, soft = self.request, self._soft([example.query for example in examples])
        contexts = []
        for example in examples:
            n_response = count_tokens(request.base, response_text(example.response))
            reserve = max(request.max_new_tokens, n_response) + _n_soft(soft)
            contexts.append(self.context(example.query, reserve))
        return Wanted(examples, contexts, self.adapter, soft, self.latents)

    def _soft(self, queries: Sequence[str]) -> Tensor | None:
        return self.soft if self.soft_rule is None or not queries else self.soft_rule(queries)


def _n_soft(soft: Tensor | None) -> int:
    return 0 if soft is None else int(soft.shape[-2])


def respond_all(personalizers: Sequence[Personalizer], queries: Sequence[Sequence[str]]) -> list[list[str]]:
    """The answers of several personalizers of one method, each to its own queries, in shared batches."""
    from milp_ray.training.generation import generate

    if not personalizers:
        return []
    request = personalizers[0].request
    asked = [one.questions(own) for one, own in zip(personalizers, queries, strict=True)]
    return generate(request.base, asked, max_new_tokens=request.max_new_tokens, batch_size=request.batch_size)


def losses_all(
    personalizers: Sequence[Personalizer], examples: Sequence[Sequence[Example]]
) -> list[list[tuple[float, int]]]:
    """:meth:`Personalizer.losses` of several personalizers of one method, in shared batches."""
    from milp_ray.training.response_loss import response_losses

    if not personalizers:
        return []
    request = personalizers[0].request
    wanted = [one.wanted(own) for one, own in zip(personalizers, examples, strict=True)]
    return response_losses(request.base, wanted, request.prompt, batch_size=request.batch_size)


def training_side(split: UserSplit) -> UserSplit:
    """The split without its test examples: what a method may see."""
    return replace(split, test=())


def text_bytes(turns: Iterable[Turn]) -> int:
    """Bytes of turns' texts in UTF-8."""
    return sum(len(turn.text.encode("utf-8", "surrogatepass")) for turn in turns)


def count_tokens(base: Base, text: str) -> int:
    """Tokens of a text, without beginning and end tokens."""
    return base.count_tokens([text])[0]


def fits(base: Base, prompt_text: str, reserve: int) -> bool:
    """Whether a prompt leaves ``reserve`` tokens of the base's context free, start and end tokens counted."""
    return len(base.start_ids) + count_tokens(base, prompt_text) + reserve + 1 <= base.context_length


def most_that_fits(
    units: Sequence[Unit], render: Callable[[Sequence[Unit]], str], accept: Callable[[str], bool]
) -> int:
    """The largest n for which ``render`` of n units is accepted; 0 where not even one is.

    ``render`` is called with the first n units. More units make a longer text, so bisection finds the limit
    in log2(len(units)) tokenisations.
    """
    if accept(render(units)):
        return len(units)
    low, high = 0, len(units)  # low units are accepted (or low is 0), high are not
    while high - low > 1:
        middle = (low + high) // 2
        if accept(render(units[:middle])):
            low = middle
        else:
            high = middle
    return low
