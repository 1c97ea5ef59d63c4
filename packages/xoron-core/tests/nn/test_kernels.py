"""Proves that every attention kernel that runs here is plain attention, whatever its mask's form.

Forward and gradients against the formula in fp64, with grouped heads, padding and packed documents;
block masks and lengths against the dense mask on random rows; the rule which kernel a name takes;
and that no kernel overflows in half precision where the plain formula does.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask, create_mask
from transformers.modeling_utils import AttentionInterface

from xoron_core.errors import SequenceError
from xoron_core.nn import kernel_choice, kernels, masks
from xoron_core.nn.kernel_choice import Interface, choose
from xoron_core.nn.latent_attention import LatentAttention
from xoron_core.nn.rope import rotary_tables

B, H, G, N, D = 2, 4, 2, 12, 8
CPU = torch.device("cpu")
NAMES = ("eager", "sdpa", "blockwise", "flex_attention", "flash_stand_in", "paged_stand_in")


def _inputs(dtype: torch.dtype = torch.float32, size: float = 1.0) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = [(B, H, N, D), (B, G, N, D), (B, G, N, D)]
    return [(torch.randn(s) * size).to(dtype).requires_grad_() for s in shapes]


def _columns(what: str) -> dict[str, torch.Tensor]:
    attention_mask = torch.ones(B, N, dtype=torch.long)
    documents = torch.ones(B, N, dtype=torch.long)
    if what == "left":
        attention_mask[0, :5] = 0
    if what == "inside":
        attention_mask[1, 3:6] = 0
    if what == "packed":
        documents[0, 4:7], documents[0, 7:], documents[1, 6:9], documents[1, 9:] = 2, 3, 2, 0
    if what == "none":
        return {}
    if what == "packed":
        return {"document_ids": documents}
    return {"attention_mask": attention_mask}


def _valid(columns: dict[str, torch.Tensor]) -> torch.Tensor:
    valid = torch.ones(B, N, dtype=torch.bool)
    for tensor in columns.values():
        valid &= tensor != 0
    return valid


def _formula(q, k, v, columns, scale=None):
    """The oracle: softmax of the allowed scores in fp64, every pair written out."""
    q, k, v = (t.double() for t in (q, k, v))
    k, v = (t.repeat_interleave(H // G, 1) for t in (k, v))
    scores = q @ k.mT * (D**-0.5 if scale is None else scale)
    allowed = torch.ones(B, N, N, dtype=torch.bool).tril()
    if "attention_mask" in columns:
        allowed &= columns["attention_mask"][:, None, :] != 0
    if "document_ids" in columns:
        ids = columns["document_ids"]
        allowed &= (ids[:, :, None] == ids[:, None, :]) & (ids != 0)[:, None, :]
    allowed |= torch.eye(N, dtype=torch.bool)
    return scores.masked_fill(~allowed[:, None], -torch.inf).softmax(-1) @ v


@torch.autocast("cpu", enabled=False)
def _flash_stand_in(module, query, key, value, attention_mask, *, scaling, is_causal, **kwargs):
    """What flash-attn computes from the same arguments: each stretch alone, padding left out."""
    assert is_causal
    assert query.dtype == torch.bfloat16
    groups = module.num_key_value_groups
    q, k, v = (t.transpose(1, 2).float().flatten(0, 1) for t in (query, key, value))
    k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
    if attention_mask is not None:
        rows = attention_mask.bool().flatten().nonzero().flatten()
        lengths = attention_mask.sum(-1).tolist()
        pieces = list(rows.split(lengths))
    elif "cu_seq_lens_q" in kwargs:
        starts = kwargs["cu_seq_lens_q"]
        assert starts.dtype == torch.int32
        assert kwargs["max_length_k"] == starts.diff().max()
        pieces = list(torch.arange(len(q)).split(starts.diff().tolist()))
    else:
        pieces = list(torch.arange(len(q)).split(query.shape[2]))
    out = torch.zeros_like(q)
    for piece in pieces:
        scores = torch.einsum("qhd,khd->hqk", q[piece], k[piece]) * scaling
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        out[piece] = torch.einsum("hqk,khd->qhd", weights, v[piece])
    return out.unflatten(0, query.transpose(1, 2).shape[:2]).to(query.dtype), None


def _dense_stand_in(module, query, key, value, attention_mask, **kwargs):
    """A function that somebody else registered: it takes a boolean mask, as `sdpa` does."""
    out = kernels.eager(
        query, key, value, mask=attention_mask, causal=kwargs["is_causal"], scale=kwargs["scaling"]
    )
    return out.transpose(1, 2), None


@pytest.fixture(autouse=True)
def _registered():
    AttentionInterface.register("flash_stand_in", _flash_stand_in)
    AttentionInterface.register("paged_stand_in", _dense_stand_in)
    kernel_choice.register()
    yield
    for name in ("flash_stand_in", "paged_stand_in"):
        del AttentionInterface._global_mapping[name]


@pytest.mark.parametrize("what", ["none", "left", "inside", "packed"])
@pytest.mark.parametrize("name", NAMES)
def test_each_kernel_is_plain_attention(name: str, what: str) -> None:
    columns, flash = _columns(what), name == "flash_stand_in"
    if name == "blockwise" and what != "none":
        with pytest.raises(SequenceError, match="keeps nothing apart"):
            choose(name, length=N, device=CPU, **columns)
        return
    inputs = _inputs(torch.bfloat16 if flash else torch.float32)
    choice = choose(name, length=N, device=CPU, **columns)
    recorded = name != "flex_attention"  # which has no backward on a CPU
    given = inputs if recorded else [t.detach() for t in inputs]
    got = choice.kernel(*given, mask=choice.mask, causal=True)
    expected, keep = _formula(*inputs, columns), _valid(columns)[:, None, :, None].expand_as(got)
    close = {"atol": 2e-2, "rtol": 2e-2} if flash else {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(got.double()[keep], expected[keep], **close)
    if not recorded:
        return
    cotangent = torch.randn(got.shape, generator=torch.Generator().manual_seed(1)) * keep
    wanted = torch.autograd.grad((expected * cotangent).sum(), inputs)
    grads = torch.autograd.grad((got * cotangent).sum(), inputs)
    for gradient, right in zip(grads, wanted, strict=True):
        assert right.abs().max() > 0.1
        torch.testing.assert_close(gradient, right, **close)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), rows=st.integers(1, 3), length=st.integers(1, 20))
def test_blocks_and_lengths_say_what_the_dense_mask_says(data, rows: int, length: int) -> None:
    runs = st.lists(st.integers(0, 3), min_size=length, max_size=length)
    documents = torch.tensor([sorted(data.draw(runs), reverse=True) for _ in range(rows)])
    holes = torch.tensor([data.draw(runs) for _ in range(rows)]).clamp(max=1)
    dense = masks.causal_mask(length, attention_mask=holes, document_ids=documents)
    if dense is None:
        dense = torch.ones(rows, 1, length, length, dtype=torch.bool).tril()
    blocks = masks.block_mask(length, attention_mask=holes, document_ids=documents)
    assert torch.equal(create_mask(blocks.mask_mod, rows, 1, length, length, device="cpu"), dense)
    starts, longest = masks.segments(documents)
    segment = torch.bucketize(torch.arange(rows * length), starts, right=True).view(rows, length)
    same = (segment[:, :, None] == segment[:, None, :]) & torch.ones(length, length).tril().bool()
    packed = masks.causal_mask(length, document_ids=documents)
    if packed is not None:
        valid = documents != 0
        assert torch.equal(same[valid], packed.expand(rows, -1, -1, -1)[:, 0][valid])
    assert longest == max(int((segment == s).sum()) for s in segment.unique())


def test_the_rule_which_kernel_a_name_takes(monkeypatch) -> None:
    cuda, packed = torch.device("cuda"), _columns("packed")
    assert choose("sdpa", length=N, device=CPU) == (kernels.sdpa, None)
    dense = choose("sdpa", length=N, device=CPU, **packed)
    assert dense.kernel is kernels.sdpa
    assert dense.mask.dtype == torch.bool
    monkeypatch.setattr(kernel_choice, "flex_is_fused", lambda: False)
    assert choose("sdpa", length=N, device=cuda, **packed).kernel is kernels.sdpa
    monkeypatch.setattr(kernel_choice, "flex_is_fused", lambda: True)
    blocks = choose("sdpa", length=N, device=cuda, **packed)
    assert blocks.kernel is kernels.flex
    assert isinstance(blocks.mask, BlockMask)
    assert choose("eager", length=N, device=cuda, **packed).kernel is kernels.eager
    assert choose("sdpa", length=N, device=cuda, **_columns("left")).kernel is kernels.sdpa
    for name in ("blockwise", "flex_attention", "flash_stand_in", "sdpa"):
        step = choose(name, length=1, past=N - 1, device=CPU, **packed)
        assert step.kernel is kernels.sdpa
        assert step.mask.shape == (B, 1, 1, N)
        static = choose(name, length=4, keys=N, device=CPU)
        assert static.kernel is kernels.sdpa
        assert static.mask.shape == (1, 1, 4, N)
        ready = torch.ones(1, 1, N, N)
        assert choose(name, length=N, device=CPU, attention_mask=ready) == (kernels.sdpa, ready)
    lengths = choose("flash_stand_in", length=N, device=CPU, **packed)
    assert isinstance(lengths.kernel, Interface)
    assert isinstance(lengths.mask, masks.Segments)


def test_what_flash_cannot_take_is_refused() -> None:
    packed = _columns("packed")
    with pytest.raises(SequenceError, match="inside packed documents"):
        choose("flash_stand_in", length=N, device=CPU, **packed, **_columns("inside"))
    kernel = choose("flash_stand_in", length=N, device=CPU, **packed).kernel
    with pytest.raises(SequenceError, match="got float32; load the model with dtype"):
        kernel(*_inputs(), causal=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert kernel(*_inputs(), causal=True).dtype == torch.bfloat16


@pytest.mark.parametrize("width", [4, 8, 12])
@pytest.mark.parametrize("causal", [False, True])
def test_blockwise_serves_layers_of_transformers(causal: bool, width: int) -> None:
    """Self- and cross-attention, values narrower and wider than keys, a cache behind."""
    function = AttentionInterface._global_mapping["blockwise"]
    q, k, _ = (t.detach() for t in _inputs())
    v = torch.randn(B, G, N, width)
    for length in (N, 5, 1):  # 5: keys of a static cache that are not filled yet, or of another
        one = q[:, :, :length]
        got, _ = function(None, one, k, v, None, scaling=0.5, is_causal=causal)
        keys = length if causal and length > 1 else N
        scores = 0.5 * one @ k[:, :, :keys].repeat_interleave(2, 1).mT
        if causal and length > 1:
            scores += torch.full((length, keys), -torch.inf).triu(1)
        expected = scores.softmax(-1) @ v[:, :, :keys].repeat_interleave(2, 1)
        torch.testing.assert_close(got.transpose(1, 2), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(SequenceError, match="has no softcap or s_aux"):
        function(None, q, k, v, None, softcap=1.0, s_aux=torch.zeros(H))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("what", ["none", "left", "packed"])
@pytest.mark.parametrize("name", ["sdpa", "flex_attention"])
def test_cuda_kernels_are_plain_attention(name: str, what: str, dtype: torch.dtype) -> None:
    columns = {key: tensor.cuda() for key, tensor in _columns(what).items()}
    inputs = [t.detach().to("cuda", dtype).requires_grad_() for t in _inputs()]
    choice = choose(name, length=N, device=inputs[0].device, **columns)
    got = choice.kernel(*inputs, mask=choice.mask, causal=True)
    exact = [t.detach().cpu().requires_grad_() for t in inputs]
    expected, keep = _formula(*exact, _columns(what)), _valid(_columns(what))[:, None, :, None]
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)) * keep
    close = {"atol": 3e-2, "rtol": 3e-2} if dtype == torch.bfloat16 else {"atol": 2e-3, "rtol": 0}
    torch.testing.assert_close((got.cpu().double() * keep), expected * keep, **close)
    wanted = torch.autograd.grad((expected * cotangent).sum(), exact)
    grads = torch.autograd.grad((got * cotangent.to(got)).sum(), inputs)
    for gradient, right in zip(grads, wanted, strict=True):
        torch.testing.assert_close(gradient.cpu(), right, **close)


def _relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    assert got.isfinite().all()
    return float((got.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["eager", "sdpa", "blockwise", "flex_attention"])
def test_no_kernel_overflows_where_the_formula_does(name: str, dtype: torch.dtype) -> None:
    # A query equal to a key of length 280 gives 78,400, and 65,504 is the largest fp16.
    q, k, v = (t.detach() for t in _inputs())
    k = 280 * torch.nn.functional.normalize(k, dim=-1)
    q, k, v = (t.to(dtype) for t in (k.repeat_interleave(2, 1), k, v))
    naive = (q @ k.repeat_interleave(2, 1).mT) * D**-0.5
    assert naive.isinf().any() == (dtype == torch.float16)
    expected = _formula(q, k, v, {})
    choice = choose(name, length=N, device=CPU)
    error = _relative(choice.kernel(q, k, v, mask=choice.mask, causal=True), expected)
    assert error < (1e-3 if dtype == torch.float16 else 1e-2)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_absorbed_decoding_scales_before_it_multiplies(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"kv_lora_rank": 16, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32}
    module = LatentAttention(32, 4, v_head_dim=64, **sizes)
    torch.nn.init.uniform_(module.kv_b_proj.weight, 30.0, 31.0)
    module.to(dtype)
    q = 90 + torch.rand(1, 4, 1, 32), torch.randn(1, 4, 1, 32)
    rows = torch.randn(1, 9, 48) * 1e-2
    half = [t.to(dtype) for t in (*q, rows)]
    to_key = module.kv_b_proj.weight.unflatten(0, (4, 96))[:, :32]
    naive = torch.einsum("bhnd,hdr->bhnr", half[0], to_key) * module.scale
    assert naive.isinf().any() == (dtype == torch.float16)
    got = module.absorbed(half[0], half[1], half[2])
    exact = module.float().absorbed(*(t.float() for t in half)).double()
    assert _relative(got, exact) < (1e-2 if dtype == torch.float16 else 0.1)


@torch.no_grad()
def test_rotary_and_norms_of_a_whole_layer_keep_half_precision_finite() -> None:
    torch.manual_seed(0)
    layer = LatentAttention(
        32, 4, kv_lora_rank=16, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=64
    )
    for weight in (layer.q_proj.weight, layer.kv_b_proj.weight):
        weight.mul_(100)
    x, tables = torch.randn(2, 9, 32), rotary_tables(torch.arange(9)[None], 32, theta=1e4)
    exact = layer.half().float()(x.half().float(), tables).double()
    raw: list[float] = []
    for name in ("eager", "sdpa", "blockwise", "flex_attention"):
        choice = choose(name, length=9, device=CPU)

        def kernel(q, k, v, choice=choice, **options):
            raw.append(float((q.float() @ k.float().mT).max()))
            return choice.kernel(q, k, v, **options)

        got = layer.half()(x.half(), tables, mask=choice.mask, kernel=kernel)
        assert _relative(got, exact) < 0.05
    assert min(raw) > torch.finfo(torch.float16).max
