"""Proves that blockwise attention is torch's attention, forward and backward, in linear memory.

Every chunk size, grouped heads, full and causal, at 16k positions; the block operators themselves
against the math kernel; and that no tensor as large as a score matrix is made.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from xoron_core.errors import SequenceError, XoronError
from xoron_core.nn.blockwise import Block, block_forward, blockwise_attention, merge_


def _inputs(N, *, B=1, H=4, G=2, d=8, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    shapes = [(B, H, N, d), (B, G, N, d), (B, G, N, d)]
    return [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes]


def _math(q, k, v, *, causal=True, scale=None):
    """The oracle: torch's unfused kernel."""
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)


def _gradients(out, *inputs):
    torch.manual_seed(1)
    grads = torch.autograd.grad(out, inputs, torch.randn_like(out))
    assert all(g.abs().max() > 1e-3 for g in grads)
    return grads


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 70),
    chunk=st.integers(1, 80),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]),
    causal=st.booleans(),
    scale=st.sampled_from([None, 0.3]),
    rows=st.integers(1, 2),
)
def test_any_chunk_equals_the_unfused_kernel(length, chunk, heads, causal, scale, rows) -> None:
    inputs = _inputs(length, B=rows, H=heads[0], G=heads[1])
    expected = _math(*inputs, causal=causal, scale=scale)
    got = blockwise_attention(*inputs, causal=causal, scale=scale, chunk=chunk)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    cotangent = torch.randn_like(got)
    for one, right in zip(
        torch.autograd.grad(got, inputs, cotangent),
        torch.autograd.grad(expected, inputs, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(one, right, atol=2e-5, rtol=1e-5)


def test_16k_equals_full_attention_to_1e5() -> None:
    inputs = _inputs(16_384, H=2, G=1, d=16)
    k, v = (t.repeat_interleave(2, 1) for t in inputs[1:])
    expected = F.scaled_dot_product_attention(inputs[0], k, v, is_causal=True)
    wanted = _gradients(expected, *inputs)
    got = blockwise_attention(*inputs)
    assert (got - expected).abs().max() < 1e-5
    for one, right in zip(_gradients(got, *inputs), wanted, strict=True):
        assert (one - right).abs().max() < 1e-5 * max(1.0, right.abs().max().item())


def test_gradients_are_those_of_finite_differences_in_fp64() -> None:
    inputs = _inputs(7, H=2, G=1, d=4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *x: blockwise_attention(*x, chunk=3), inputs)


def test_bf16_is_no_worse_than_the_fused_kernel_in_one_piece() -> None:
    inputs = _inputs(256)
    halves = [t.detach().bfloat16() for t in inputs]
    exact = _math(*(t.float() for t in halves))
    fused = F.scaled_dot_product_attention(*halves, is_causal=True, enable_gqa=True)
    pieces = blockwise_attention(*halves, chunk=64)
    assert pieces.dtype == torch.bfloat16
    assert (pieces - exact).abs().max() <= 1.5 * (fused - exact).abs().max()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = blockwise_attention(*(t.detach().bfloat16().float() for t in inputs), chunk=64)
    assert torch.equal(cast, pieces)


class _Largest(TorchDispatchMode):
    """Remembers the elements of the largest tensor that was made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("way", ["blockwise", "math"])
def test_memory_is_linear_in_the_length(way) -> None:
    inputs = _inputs(1024, H=2, G=1)
    with _Largest() as seen:
        out = blockwise_attention(*inputs, chunk=128) if way == "blockwise" else _math(*inputs)
        out.sum().backward()
    assert (seen.elements <= inputs[0].numel()) == (way == "blockwise")


def test_merging_is_exact_where_exponentials_would_overflow() -> None:
    q, k, v = (t.detach() for t in _inputs(40, H=2, G=2))
    q = q * 60
    first = block_forward(q, k[:, :, :10], v[:, :, :10], causal=False, scale=None)
    rest = block_forward(q, k[:, :, 10:], v[:, :, 10:], causal=False, scale=None)
    assert rest.lse.max() > 100
    out, lse = first.out.clone(), first.lse.clone()
    merge_(out, lse, rest)
    scores = (q.double() @ k.double().mT) / 8**0.5
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), atol=1e-4, rtol=1e-5)
    right = scores.softmax(-1) @ v.double()
    torch.testing.assert_close(out.double(), right, atol=1e-4, rtol=1e-4)


def test_merging_does_not_depend_on_the_order() -> None:
    q, k, v = (t.detach() for t in _inputs(30, H=2, G=2))
    blocks = [
        block_forward(q, k[:, :, s], v[:, :, s], causal=False, scale=None)
        for s in (slice(0, 5), slice(5, 20), slice(20, 30))
    ]

    def merged(order) -> Block:
        out, lse = blocks[order[0]].out.clone(), blocks[order[0]].lse.clone()
        for index in order[1:]:
            merge_(out, lse, blocks[index])
        return Block(out, lse)

    first, second = merged([0, 1, 2]), merged([2, 0, 1])
    torch.testing.assert_close(first.out, second.out, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(first.lse, second.lse, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(first.out, _math(q, k, v, causal=False), atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_kernels_equal_the_unfused_one(dtype) -> None:
    inputs = [t.detach().to("cuda", dtype).requires_grad_() for t in _inputs(200, d=64)]
    exact = [t.detach().float().requires_grad_() for t in inputs]
    expected, got = _math(*exact), blockwise_attention(*inputs, chunk=72)
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(got.float(), expected, atol=tolerance, rtol=tolerance)
    cotangent = torch.randn_like(got)
    for one, right in zip(
        torch.autograd.grad(got, inputs, cotangent),
        torch.autograd.grad(expected, exact, cotangent.float()),
        strict=True,
    ):
        torch.testing.assert_close(one.float(), right, atol=2 * tolerance, rtol=tolerance)


def test_what_the_kernels_cannot_take_is_refused() -> None:
    q, k, v = _inputs(8)
    with pytest.raises(SequenceError, match=r"k \(1, 2, 7, 8\) float32"):
        blockwise_attention(q, k[:, :, 1:], v[:, :, 1:])
    with pytest.raises(SequenceError, match="pad the values"):
        blockwise_attention(q, k, v[..., :4])
    with pytest.raises(SequenceError, match="bfloat16"):
        blockwise_attention(q, k, v.bfloat16())
    with pytest.raises(XoronError, match="got tensors on meta"):
        blockwise_attention(q.to("meta"), k.to("meta"), v.to("meta"))
