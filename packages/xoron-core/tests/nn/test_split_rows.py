"""Proves that training rows apart is training the merged matrix and nothing else of it.

Values, gradients and 50 optimizer steps are compared with an ordinary model whose whole matrix has
gradients; rows that are not trained keep every bit under weight decay; no tensor of the matrix's
size is made on the way.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Qwen3Config, Qwen3ForCausalLM

from xoron_core.errors import CompositionError, UsageError
from xoron_core.losses import text_loss
from xoron_core.nn.split_rows import merge, put_rows, split, vocabulary

V, D = 71, 32
IDS = torch.tensor([70, 9, 60, 61, 62])  # two lone rows, a range, not in order
OLD = [row for row in range(V) if row not in IDS]
SIZES = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
}
tied_or_not = pytest.mark.parametrize("tied", [True, False])


def model(tied: bool, dtype: torch.dtype = torch.float32) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    made = Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=tied)).eval()
    return made.to(dtype).requires_grad_(False)


def draw(seed: int = 1) -> torch.Tensor:
    ids = torch.randint(V, (3, 17), generator=torch.Generator().manual_seed(seed))
    ids[:, 3:8] = IDS  # the last position, which has no target, is another's
    return ids


def loss(of: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The text loss by its own path: a split head goes through it in chunks."""
    head = of.get_output_embeddings()
    hidden = of.base_model(ids).last_hidden_state
    term = text_loss(hidden, ids, head, head=head)
    return term.sum / term.count


@tied_or_not
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_those_of_the_merged_matrix_bit_for_bit(tied, dtype):
    plain, apart = model(tied, dtype), model(tied, dtype)
    (rows, *more) = split(apart, IDS)
    assert len(more) == (not tied)
    values = torch.randn(5, D).to(dtype)
    with torch.no_grad():
        rows.copy_(values)
        plain.get_input_embeddings().weight[IDS.sort().values] = values
    ids = draw()
    assert torch.equal(apart(ids).logits, plain(ids).logits)
    state = apart.state_dict()
    assert state.keys() == plain.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in plain.state_dict().items())
    chosen = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(apart.generate(ids, **chosen), plain.generate(ids, **chosen))
    merge(apart)
    assert type(apart.lm_head) is nn.Linear
    assert type(apart.model.embed_tokens) is nn.Embedding
    assert (apart.lm_head.weight is apart.model.embed_tokens.weight) is tied
    assert torch.equal(apart(ids).logits, plain(ids).logits)
    assert [n for n, _ in apart.named_parameters()] == [n for n, _ in plain.named_parameters()]


@tied_or_not
def test_gradients_are_the_rows_of_the_whole_gradient(tied):
    plain, apart = model(tied), model(tied)
    rows = split(apart, IDS)
    for module in vocabulary(plain):
        module.weight.requires_grad_(True)
    for one in (plain, apart):
        loss(one, draw()).backward()
    whole = [module.weight.grad for module in vocabulary(plain)][: len(rows)]
    for parameter, grad in zip(rows, whole, strict=True):
        expected = grad[IDS.sort().values]
        assert expected.abs().min() > 0
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-7)
    assert {name for name, p in apart.named_parameters() if p.grad is not None} == {
        name for name, p in apart.named_parameters() if name.endswith(".rows")
    }


@tied_or_not
def test_fifty_steps_with_weight_decay_move_the_rows_as_alone_and_no_other_bit(tied):
    """The reference decays and steps copies of the rows by slices of whole gradients."""
    plain, apart = model(tied), model(tied)
    before = copy.deepcopy(plain).state_dict()
    rows = split(apart, IDS)
    options = {"lr": 1e-2, "weight_decay": 0.1}
    optimizer = torch.optim.AdamW(rows, **options)
    order = IDS.sort().values
    modules = vocabulary(plain)[: len(rows)]
    copies = [nn.Parameter(module.weight[order].clone()) for module in modules]
    reference = torch.optim.AdamW(copies, **options)
    for step in range(50):
        ids = draw(step)
        optimizer.zero_grad()
        loss(apart, ids).backward()
        optimizer.step()
        whole = [module.weight.requires_grad_(True) for module in modules]
        grads = torch.autograd.grad(loss(plain, ids), whole)
        for parameter, grad in zip(copies, grads, strict=True):
            parameter.grad = grad[order]
        reference.step()
        for module, parameter in zip(modules, copies, strict=True):
            module.weight.data[order] = parameter.data
    after = apart.state_dict()
    for name, tensor in before.items():
        if tensor.shape[:1] == (V,):
            assert torch.equal(after[name][OLD], tensor[OLD]), name
            assert (after[name][IDS] != tensor[IDS]).any(-1).all(), name
        else:
            assert torch.equal(after[name], tensor), name
    for parameter, expected in zip(rows, copies, strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-3, atol=1e-4)
    states = [s for p in optimizer.state.values() for s in p.values() if s.ndim]
    assert {tuple(state.shape) for state in states} == {(5, D)}


class _Made(TorchDispatchMode):
    """Records the shapes that operations make anew, writes into given tensors left out."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func._schema.name.endswith("_"):
            given = {t.data_ptr() for t in args if isinstance(t, torch.Tensor)}
            if result.data_ptr() not in given:
                self.shapes.add(tuple(result.shape))
        return result


@tied_or_not
def test_nothing_of_the_size_of_the_matrix_is_made(tied):
    apart, plain = model(tied), model(tied)
    split(apart, IDS)
    vocabulary(plain)[-1].weight.requires_grad_(True)
    made = {}
    for name, one in (("plain", plain), ("apart", apart)):
        with _Made() as recorder:
            loss(one, draw()).backward()
        made[name] = recorder.shapes & {(V, D), (D, V)}
    assert made == {"plain": {(V, D)}, "apart": set()}


@tied_or_not
def test_a_state_dict_goes_in_and_a_copy_shares_nothing(tied):
    apart, other = model(tied), model(tied)
    with torch.no_grad():
        other.get_input_embeddings().weight.add_(1.0)
    split(apart, IDS)
    twin = copy.deepcopy(apart)
    assert (twin.lm_head.rows is twin.model.embed_tokens.rows) is tied
    apart.load_state_dict(other.state_dict())
    assert torch.equal(apart(draw()).logits, other(draw()).logits)
    assert torch.equal(twin(draw()).logits, model(tied)(draw()).logits)
    expected = other.model.embed_tokens.weight[IDS.sort().values]
    assert torch.equal(apart.model.embed_tokens.rows, expected)


def test_fp32_rows_over_bf16_weights_keep_small_updates():
    apart = model(False, torch.bfloat16)
    embedding, head = split(apart, IDS, dtype=torch.float32)
    before = head.detach().clone()
    optimizer = torch.optim.SGD([embedding, head], lr=1e-6)
    for step in range(3):
        optimizer.zero_grad()
        loss(apart, draw(step)).backward()
        assert head.grad.dtype == torch.float32
        optimizer.step()
    assert (head != before).any()
    assert torch.equal(head.bfloat16(), before.bfloat16())
    assert apart.lm_head.weight.dtype == torch.bfloat16


def test_autocast_casts_the_head_as_an_ordinary_one():
    plain, apart = model(False), model(False)
    split(apart, IDS)
    with torch.autocast("cpu", torch.bfloat16):
        one, two = plain(draw()).logits, apart(draw()).logits
    assert one.dtype == two.dtype == torch.bfloat16
    assert torch.equal(one, two)
    two.float().square().mean().backward()
    assert apart.lm_head.rows.grad.abs().min() > 0


def test_rows_written_into_a_split_module_are_trained_on_from_there():
    apart = model(True)
    split(apart, IDS)
    ids = torch.tensor([60, 3])
    put_rows(apart.lm_head, ids, torch.stack([torch.full((D,), 2.0), torch.full((D,), 3.0)]))
    embedding = apart.model.embed_tokens
    assert (embedding.rows[1] == 2.0).all()  # 60 is the second of the sorted ids
    assert (embedding.weight[60] == 2.0).all()
    assert (embedding.weight[3] == 3.0).all()


def test_a_change_of_rows_before_the_backward_pass_is_an_error():
    apart = model(False)
    _, head = split(apart, IDS)
    total = apart(draw()).logits.sum()
    with torch.no_grad():
        head.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_what_cannot_be_split_is_refused_with_the_fix():
    with pytest.raises(UsageError, match=r"got 5 \.\. 71, expected ids of 0 \.\. 70"):
        split(model(True), torch.tensor([5, 71]))
    with pytest.raises(UsageError, match=r"got none, expected ids of 0 \.\. 70"):
        split(model(True), torch.tensor([], dtype=torch.int64))
    apart = model(True)
    split(apart, IDS)
    with pytest.raises(UsageError, match="split already; merge them first"):
        split(apart, IDS)
    scaled = Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, layer_types=["full_attention"] * 2))
    with pytest.raises(CompositionError, match="ScaledWordEmbedding cannot be trained apart"):
        split(scaled, IDS)
    assert type(scaled.lm_head) is nn.Linear, "a refused split changed something"
