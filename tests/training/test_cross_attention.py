"""A base looks at latents as the formula says, in any company, on any architecture, and is left as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from milp_ray.config.base import BaseSection
from milp_ray.config.methods import CrossAttentionSection
from milp_ray.config.prompt import PromptSection
from milp_ray.config.training import LoraAlphaSection
from milp_ray.errors import MilpError
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.memory.lora import lora_config
from milp_ray.training import cross_attention, response_loss
from milp_ray.training.adapters import Adapter, adapter_config, attached, injected, read_tensors
from milp_ray.training.base import Base, load_base
from milp_ray.training.cross_attention import CrossAttention, Latents, cross_attended, new_cross_attention
from milp_ray.training.data import instruction_set, make_batch
from milp_ray.training.generation import Questions, generate
from milp_ray.training.loss import target_nll
from milp_ray.training.response_loss import Wanted, response_losses
from milp_ray.users.records import Example

SECTION = CrossAttentionSection(n_blocks=2, width=8, n_heads=2)
SIZE, N_LATENTS = 6, 3
PROMPT = PromptSection()
EXAMPLES = (Example("Where do I live?", "In Rome."), Example("Who?", "Your sister, who plays the piano."))
PROMPTS = ("Question: What is the colour of my dog?\nAnswer:", "Hi", "Question: Who?\nAnswer:")


@pytest.fixture(scope="module", params=["tiny_llama_dir", "tiny_gpt2_dir", "tiny_roberta_dir"])
def base(request: pytest.FixtureRequest) -> Base:
    base = load_base(BaseSection(model=str(request.getfixturevalue(request.param)), device="cpu"))
    # As small as they are drawn, the last token alone would decide the next one.
    for name, weight in base.model.named_parameters():
        if weight.dim() == 2 and not any(part in name for part in ("embed", "wte", "wpe", "head")):
            weight.data.mul_(12.0)
    return base


@pytest.fixture(scope="module")
def blocks(base: Base) -> CrossAttention:
    """With gates wide open, and updates as large as the states that they are added to."""
    made = new_cross_attention(base, SIZE, SECTION, seed=0)
    for number, block in enumerate(made.blocks):
        block.gate.data.fill_(0.05 - 0.1 * number)
        block.leave.weight.data.mul_(8.0)
    return made


@pytest.fixture(scope="module")
def adapter(base: Base) -> Adapter:
    layout = CanonicalLayout((True,) + (False,) * (base.n_layers - 1), 2)
    config = lora_config(layout, base.spec, LoraAlphaSection(rule="constant", value=2.0), 0.0, base.model_id)
    with injected(base, config, seed=1) as model:
        tensors = read_tensors(model)
    generator = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(t.shape, generator=generator) for name, t in tensors.items()}
    return Adapter(adapter_config(config, base, tensors), tensors, layout)


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, N_LATENTS, SIZE, generator=torch.Generator().manual_seed(seed))


@contextmanager
def plainly_attended(base: Base, blocks: CrossAttention, latents: Tensor | None) -> Iterator[None]:
    """The formula, one head after the other, for a single row."""

    def after(number: int) -> Any:
        def hook(layer: Any, args: Any, output: Any) -> Any:
            block = blocks[number]
            h = output[0] if isinstance(output, tuple) else output
            looked_at = block.norm_latents(latents)
            query = block.norm(h[0]) @ block.query.weight.T
            key, value = looked_at @ block.key_value.weight[:8].T, looked_at @ block.key_value.weight[8:].T
            heads = []
            for head in (slice(0, 4), slice(4, 8)):
                weights = (query[:, head] @ key[:, head].T / 4**0.5).softmax(-1)
                heads.append(weights @ value[:, head])
            found = torch.tanh(cross_attention._GATE_SPEED * block.gate) * (
                torch.cat(heads, 1) @ block.leave.weight.T
            )
            return (h + found, *output[1:]) if isinstance(output, tuple) else h + found

        return hook

    layers: Any = base.model.get_submodule(base.spec.layers_path)
    own = [] if latents is None else list(enumerate(blocks.layers))
    handles = [layers[place].register_forward_hook(after(number)) for number, place in own]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def plain_logits(base: Base, model: Any, ids: list[int]) -> Tensor:
    """(length, n_tokens) of a single row, without cache and padding."""
    places = torch.arange(len(ids))[None] + base.first_position
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.tensor([ids]), position_ids=places).logits[0]
    return logits


def plain_answer(base: Base, model: Any, prompt: str, n_tokens: int) -> list[int]:
    ids = [*base.start_ids, *base.tokenize([prompt])[0]]
    n_prompt = len(ids)
    while len(ids) < n_prompt + n_tokens:
        token = int(plain_logits(base, model, ids)[-1].argmax())
        if token == base.eos_id:
            break
        ids.append(token)
    return ids[n_prompt:]


def n_hooks(base: Base) -> int:
    return sum(len(module._forward_hooks) for module in base.model.modules())


def test_a_fresh_block_hands_on_exactly_what_it_gets(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(response_loss, "can_lie_flat", lambda base: False)  # rows alike, for equal rounding
    fresh = new_cross_attention(base, SIZE, SECTION, seed=0)
    looking = Latents(noise(0), fresh)
    how = {"max_new_tokens": 8, "batch_size": 3}
    assert generate(base, [Questions(PROMPTS, latents=looking)], **how) == generate(
        base, [Questions(PROMPTS)], **how
    )
    found = response_losses(base, [Wanted(EXAMPLES, latents=looking)], PROMPT)
    assert found == response_losses(base, [Wanted(EXAMPLES)], PROMPT)


def test_rows_of_many_users_are_answered_as_the_formula_answers_each_alone(
    base: Base, blocks: CrossAttention, adapter: Adapter
) -> None:
    each = noise(2, 3)
    asked = [
        Questions(PROMPTS, latents=Latents(noise(1), blocks)),
        Questions(PROMPTS),
        Questions(PROMPTS, latents=Latents(each, blocks)),
        Questions(PROMPTS[:2], adapter, latents=Latents(noise(1), blocks)),
    ]
    latents = [*[noise(1)] * 3, *[None] * 3, *each, *[noise(1)] * 2]
    # An end token that some rows come to before others do.
    with plainly_attended(base, blocks, latents[0]):
        ending = replace(base, eos_id=plain_answer(base, base.model, PROMPTS[0], 4)[2])
    alone = []
    for questions in asked:
        for prompt in questions.prompts:
            with (
                plainly_attended(base, blocks, latents[len(alone)]),
                attached(base, questions.adapter) as model,
            ):
                alone.append(plain_answer(ending, model, prompt, 8))
    texts = [base.tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in alone]
    assert len({len(answer) for answer in alone}) > 1, "no row leaves before another"
    assert len(set(texts)) > 3
    for batch_size in (4, 11):
        found = generate(ending, asked, max_new_tokens=8, batch_size=batch_size)
        assert [answer for own in found for answer in own] == texts


def test_losses_of_many_users_are_those_of_the_formula(
    base: Base, blocks: CrossAttention, adapter: Adapter
) -> None:
    wanted = [
        Wanted(EXAMPLES, latents=Latents(noise(1), blocks)),
        Wanted(EXAMPLES),
        Wanted(EXAMPLES, adapter=adapter, latents=Latents(noise(2, 2), blocks)),
        Wanted(EXAMPLES, adapter=adapter),
    ]
    latents = [*[noise(1)] * 2, None, None, *noise(2, 2), None, None]
    expected: list[tuple[float, int]] = []
    for one in wanted:
        for sequence in instruction_set(EXAMPLES, base, PROMPT, max_length=100):
            ids, first = list(sequence.ids), sequence.target_from
            with plainly_attended(base, blocks, latents[len(expected)]), attached(base, one.adapter) as model:
                logits = plain_logits(base, model, ids)[first - 1 : -1]
            nll = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[first:]), reduction="sum")
            expected.append((float(nll), sequence.n_targets))
    for batch_size in (3, 8):
        found = [loss for own in response_losses(base, wanted, PROMPT, batch_size=batch_size) for loss in own]
        assert [n for _, n in found] == [n for _, n in expected]
        assert [one for one, _ in found] == pytest.approx([one for one, _ in expected], rel=1e-4)
    assert expected[0][0] != pytest.approx(expected[2][0], rel=2e-3)


def test_gradients_are_slopes_and_reach_latents_and_blocks_and_not_the_base(
    base: Base, blocks: CrossAttention
) -> None:
    batch = make_batch(instruction_set(EXAMPLES, base, PROMPT, max_length=100), base)
    latents = noise(3).requires_grad_()
    weights = [latents, *blocks.parameters()]

    def loss() -> Tensor:
        with cross_attended(base, blocks) as view:
            view.show([latents, None])
            return target_nll(base.model, batch, base.first_position).double().sum()

    gradients = torch.autograd.grad(loss(), weights)
    assert all(float(gradient.norm()) > 1e-4 for gradient in gradients)
    assert all(weight.grad is None for weight in base.model.parameters())
    for index in (0, [name for name, _ in blocks.named_parameters()].index("blocks.0.query.weight") + 1):
        weight, size = weights[index], float(gradients[index].norm())
        step = 1e-2 * gradients[index] / size
        with torch.no_grad():
            before = weight.clone()
            weight.copy_(before + step)
            high = loss()
            weight.copy_(before - step)
            low = loss()
            weight.copy_(before)
        assert float(high - low) / 2e-2 == pytest.approx(size, rel=0.05)


def test_the_base_is_left_as_it_was_whatever_happens(
    base: Base, blocks: CrossAttention, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {name: weight.clone() for name, weight in base.model.state_dict().items()}
    n_before = n_hooks(base)
    generate(base, [Questions(PROMPTS, latents=Latents(noise(1), blocks))], max_new_tokens=2, batch_size=2)
    assert n_hooks(base) == n_before
    with cross_attended(base, blocks) as view:
        assert n_hooks(base) == n_before + SECTION.n_blocks
        with pytest.raises(RuntimeError):
            view.show([torch.zeros(N_LATENTS, SIZE + 1)])
    monkeypatch.setattr(cross_attention.CrossAttentionBlock, "forward", None)
    with pytest.raises(TypeError):
        generate(
            base, [Questions(PROMPTS, latents=Latents(noise(1), blocks))], max_new_tokens=2, batch_size=2
        )
    assert n_hooks(base) == n_before
    assert all(torch.equal(weights[name], weight) for name, weight in base.model.state_dict().items())


def test_the_seed_alone_decides_fresh_blocks_which_are_evenly_spread(base: Base) -> None:
    first = new_cross_attention(base, SIZE, SECTION, seed=0)
    torch.rand(3)
    again, other = (new_cross_attention(base, SIZE, SECTION, seed=seed) for seed in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first[0].query.weight, other[0].query.weight)
    assert first.layers == {4: (1, 3), 3: (0, 2)}[base.n_layers]


def test_latents_and_blocks_that_do_not_fit_are_refused(base: Base, blocks: CrossAttention) -> None:
    for values in (torch.zeros(N_LATENTS, 7), torch.zeros(4, N_LATENTS, SIZE), torch.zeros(SIZE)):
        with pytest.raises(MilpError, match="latents of shape"):
            generate(
                base, [Questions(["Hi"], latents=Latents(values, blocks))], max_new_tokens=2, batch_size=2
            )
    many = SECTION.model_copy(update={"n_blocks": base.n_layers + 1})
    with pytest.raises(MilpError, match=rf"n_blocks is {base.n_layers + 1}.*use at most {base.n_layers}"):
        new_cross_attention(base, SIZE, many, seed=0)
    own = [Latents(noise(1), blocks), Latents(noise(1), new_cross_attention(base, SIZE, SECTION, seed=0))]
    with pytest.raises(MilpError, match="2 sets of blocks"):
        response_losses(base, [Wanted(EXAMPLES, latents=one) for one in own], PROMPT)
    with (
        pytest.raises(MilpError, match="after layer 9"),
        cross_attended(base, CrossAttention((9,), 32, 6, 8, 2)),
    ):
        pass
