"""Proves that the chunked cross-entropies are `F.cross_entropy` on the full logits.

Values and gradients, for every chunk size, under autocast, with a scaled upstream gradient, with
tied and frozen weights and without positions; that logits of all positions are never made, in
forward or backward; and that a head which is more than a matrix product is never bypassed.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from xoron_core import losses
from xoron_core.errors import SequenceError, XoronError
from xoron_core.nn import linear_loss
from xoron_core.nn.linear_loss import (
    chunked_cross_entropy,
    is_plain_linear,
    linear_cross_entropy,
)


def _case(P=23, D=16, V=61, *, dtype=torch.float32, bias=True, seed=0):
    torch.manual_seed(seed)
    hidden = torch.randn(P, D, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, D, dtype=dtype, requires_grad=True)
    return (
        hidden,
        weight,
        torch.randn(V, dtype=dtype, requires_grad=True) if bias else None,
        torch.randint(0, V, (P,)),
        torch.rand(P) + 0.1,
    )


def _oracle(hidden, weight, bias, targets, weights, z_loss):
    """The loss from full logits in fp64, with the logits."""
    hidden, weight = hidden.double(), weight.double()
    scores = F.linear(hidden, weight, None if bias is None else bias.double())
    each = F.cross_entropy(scores, targets, reduction="none")
    each = each + z_loss * scores.logsumexp(-1) ** 2
    return (each if weights is None else each * weights.double()).sum(), scores


def _gradients(total, *inputs):
    grads = torch.autograd.grad(total, [t for t in inputs if t is not None])
    assert all(g.abs().max() > 0 for g in grads)
    return grads


def _close(got, expected, tolerance=1e-5):
    scale = max(1.0, expected.abs().max().item())
    assert (got.double() - expected.double()).abs().max().item() <= tolerance * scale


@settings(max_examples=40, deadline=None)
@given(
    positions=st.integers(1, 40),
    chunk=st.one_of(st.none(), st.integers(1, 50)),
    bias=st.booleans(),
    weighted=st.booleans(),
    z_loss=st.sampled_from([0.0, 1e-2]),
)
def test_both_ways_equal_full_logits(positions, chunk, bias, weighted, z_loss) -> None:
    hidden, weight, b, targets, weights = _case(positions, bias=bias)
    weights = weights if weighted else None
    expected, scores = _oracle(hidden, weight, b, targets, weights, z_loss)
    wanted = _gradients(expected, hidden, weight, b)
    options = {"targets": targets, "weights": weights, "z_loss": z_loss, "chunk": chunk}
    for got in (
        linear_cross_entropy(hidden, weight, bias=b, **options),
        chunked_cross_entropy(hidden, lambda x: F.linear(x, weight, b), **options),
    ):
        _close(got.sum, expected)
        _close(got.log_probs, scores.log_softmax(-1).gather(-1, targets[:, None])[:, 0])
        _close(got.log_z, scores.logsumexp(-1))
        assert torch.equal(got.correct, scores.argmax(-1) == targets)
        for gradient, right in zip(_gradients(got.sum, hidden, weight, b), wanted, strict=True):
            _close(gradient, right)


def test_gradients_are_those_of_finite_differences_in_fp64() -> None:
    hidden, weight, bias, targets, weights = _case(5, 4, 7, dtype=torch.float64)

    def loss(h, w, b):
        return linear_cross_entropy(
            h, w, targets=targets, bias=b, weights=weights, z_loss=1e-2, chunk=2
        ).sum

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_costs_no_accuracy_on_a_cpu(dtype) -> None:
    hidden, weight, bias, targets, weights = _case()
    expected, _ = _oracle(hidden, weight, bias, targets, weights, 1e-3)
    wanted = _gradients(expected, hidden, weight, bias)
    with torch.autocast("cpu", dtype=dtype):
        got = linear_cross_entropy(
            hidden, weight, targets=targets, bias=bias, weights=weights, z_loss=1e-3, chunk=7
        )
    assert got.sum.dtype == torch.float32
    _close(got.sum, expected)
    # As a gradient scaler does it; the plain way loses small probabilities without one in fp16.
    for gradient, right in zip(
        _gradients(got.sum * 65536, hidden, weight, bias), wanted, strict=True
    ):
        assert gradient.dtype == torch.float32
        _close(gradient / 65536, right)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights_get_half_gradients_summed_in_fp32(dtype) -> None:
    hidden, weight, bias, targets, weights = (
        t.detach().to(dtype).requires_grad_() if t.is_floating_point() else t for t in _case(64)
    )
    expected, _ = _oracle(hidden, weight, bias, targets, weights.detach(), 0.0)
    wanted = _gradients(expected, hidden, weight, bias)
    got = linear_cross_entropy(
        hidden, weight, targets=targets, bias=bias, weights=weights.detach(), chunk=4
    )
    _close(got.sum, expected)
    for gradient, right in zip(_gradients(got.sum, hidden, weight, bias), wanted, strict=True):
        assert gradient.dtype == dtype
        # One rounding at the end, not one per chunk: half a unit in the last place.
        _close(gradient, right, tolerance=torch.finfo(dtype).eps / 2 * 1.01)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_on_cuda_is_as_exact_as_its_inputs(dtype) -> None:
    hidden, weight, bias, targets, weights = _case(200, 64, 500)
    inputs = [t.detach().cuda().requires_grad_() for t in (hidden, weight, bias)]
    expected, _ = _oracle(*inputs, targets.cuda(), weights.cuda(), 1e-3)
    wanted = _gradients(expected, *inputs)
    with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
        got = linear_cross_entropy(
            *inputs[:2],
            targets=targets.cuda(),
            bias=inputs[2],
            weights=weights.cuda(),
            z_loss=1e-3,
            chunk=64,
        )
    tolerance = 1e-4 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    _close(got.sum, expected, tolerance)
    for gradient, right in zip(_gradients(got.sum, *inputs), wanted, strict=True):
        _close(gradient, right, tolerance)


def test_the_upstream_gradient_scales_and_a_retained_graph_answers_twice() -> None:
    hidden, weight, _, targets, _ = _case()
    loss = linear_cross_entropy(hidden, weight, targets=targets).sum
    once = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    scaled = torch.autograd.grad(-2.5 * loss, (hidden, weight), retain_graph=True)
    again = torch.autograd.grad(loss, (hidden, weight))
    for first, second, third in zip(once, scaled, again, strict=True):
        assert first.abs().max() > 0
        torch.testing.assert_close(second, -2.5 * first)
        assert torch.equal(first, third)
    with pytest.raises(XoronError, match="retain_graph=True"):
        torch.autograd.grad(loss, (hidden, weight))


def test_a_backward_that_keeps_nothing_scales_in_place() -> None:
    hidden, weight, _, targets, _ = _case()
    loss = linear_cross_entropy(hidden, weight, targets=targets).sum
    address = loss.grad_fn.grads[1].data_ptr()
    loss.backward()
    assert weight.grad.data_ptr() == address


def test_a_tied_weight_collects_both_gradients_over_micro_batches() -> None:
    torch.manual_seed(0)
    ids, targets = torch.randint(0, 50, (2, 12)), torch.randint(0, 50, (2, 12))
    results = []
    for fused in (True, False):
        torch.manual_seed(1)
        table = nn.Embedding(50, 8)
        for row in range(2):
            hidden = table(ids[row]).tanh()
            if fused:
                loss = linear_cross_entropy(hidden, table.weight, targets=targets[row]).sum
            else:
                scores = F.linear(hidden, table.weight)
                loss = F.cross_entropy(scores, targets[row], reduction="sum")
            (loss / 24).backward()
        results.append(table.weight.grad)
    assert results[1].abs().max() > 0
    torch.testing.assert_close(results[0], results[1], atol=1e-6, rtol=1e-5)


def test_what_is_frozen_gets_no_gradient_and_costs_no_product() -> None:
    hidden, weight, _, targets, _ = _case()
    (expected,) = torch.autograd.grad(
        F.cross_entropy(hidden @ weight.T, targets, reduction="sum"), hidden
    )
    frozen = weight.detach()
    loss = linear_cross_entropy(hidden, frozen, targets=targets).sum
    assert loss.grad_fn.grads[1] is None
    loss.backward()
    torch.testing.assert_close(hidden.grad, expected, atol=1e-5, rtol=1e-5)
    loss = linear_cross_entropy(hidden.detach(), weight, targets=targets).sum
    assert loss.grad_fn.grads[0] is None
    with torch.no_grad():
        silent = linear_cross_entropy(hidden, weight, targets=targets)
    assert not silent.sum.requires_grad
    assert silent.sum.item() == pytest.approx(loss.item())


def test_no_positions_give_zero_and_zero_gradients() -> None:
    hidden, weight, bias, targets, _ = _case(0)
    for got in (
        linear_cross_entropy(hidden, weight, targets=targets, bias=bias),
        chunked_cross_entropy(hidden, lambda x: F.linear(x, weight, bias), targets=targets),
    ):
        assert got.sum.item() == 0
        assert got.log_probs.shape == got.correct.shape == (0,)
        grads = torch.autograd.grad(got.sum, (hidden, weight, bias))
        assert [g.shape for g in grads] == [hidden.shape, weight.shape, bias.shape]
        assert all(not g.any() for g in grads)


def test_it_compiles_into_one_graph() -> None:
    hidden, weight, _, targets, _ = _case()

    def loss(h, w):
        return linear_cross_entropy(h * 2, w, targets=targets, chunk=9).sum

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    got = torch.autograd.grad(compiled(hidden, weight), (hidden, weight))
    for one, right in zip(got, expected, strict=True):
        torch.testing.assert_close(one, right)


def test_large_logits_stay_exact() -> None:
    hidden, weight, _, targets, _ = _case()
    expected, _ = _oracle(hidden * 2000, weight, None, targets, None, 0.0)
    got = linear_cross_entropy(hidden * 2000, weight, targets=targets)
    assert expected.item() > 1e5
    assert got.sum.item() == pytest.approx(expected.item(), rel=1e-5)


class _Largest(TorchDispatchMode):
    """Remembers the largest number of elements among tensors with a vocabulary axis of `rows`."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows, self.positions = rows, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and self.rows in tensor.shape:
                self.positions = max(self.positions, tensor.numel() // self.rows)
        return result


@pytest.mark.parametrize("way", ["fused", "slices", "plain"])
def test_logits_of_all_positions_are_never_made(way, monkeypatch) -> None:
    monkeypatch.setattr(linear_loss, "_CPU_ELEMENTS", 101 * 32)
    monkeypatch.setattr(linear_loss, "_FIRST_SLICE", 32)
    hidden, weight, _, targets, _ = _case(300, 8, 101)
    with _Largest(101) as seen:
        if way == "fused":
            loss = linear_cross_entropy(hidden, weight, targets=targets).sum
        elif way == "slices":
            loss = chunked_cross_entropy(hidden, lambda x: x @ weight.T, targets=targets).sum
        else:
            loss = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
        loss.backward()
    # Autograd runs the backward in this thread on a CPU, so the mode sees it too.
    assert seen.positions == 300 if way == "plain" else seen.positions <= 32


def test_wrong_shapes_and_targets_are_named() -> None:
    hidden, weight, _, targets, weights = _case()
    with pytest.raises(SequenceError, match=r"got hidden \(1, 23, 16\)"):
        linear_cross_entropy(hidden[None], weight, targets=targets)
    with pytest.raises(SequenceError, match=r"weights \(22,\)"):
        linear_cross_entropy(hidden, weight, targets=targets, weights=weights[1:])
    targets[3] = -100
    with pytest.raises(SequenceError, match=r"targets lie in -100 .. \d+, expected 0 .. 60"):
        linear_cross_entropy(hidden, weight, targets=targets)


def _text_case():
    torch.manual_seed(0)
    hidden = torch.randn(3, 11, 8, requires_grad=True)
    labels = torch.randint(0, 40, (3, 11))
    labels[0, :4] = losses.IGNORE
    documents = torch.ones_like(labels)
    documents[1, 5:] = 2
    documents[2, 8:] = 0
    return hidden, labels, documents, torch.rand(3, 11) + 0.5


def _slow_text_loss(hidden, labels, documents, weights, head):
    total, count = 0.0, 0.0
    for b in range(labels.shape[0]):
        for n in range(labels.shape[1] - 1):
            same = documents[b, n] == documents[b, n + 1] != 0
            if labels[b, n + 1] != losses.IGNORE and same:
                each = F.cross_entropy(head(hidden[b, n]), labels[b, n + 1])
                total, count = total + weights[b, n + 1] * each, count + weights[b, n + 1]
    return total, count


def test_text_loss_is_the_same_through_every_head_and_a_loop_over_positions() -> None:
    hidden, labels, documents, weights = _text_case()
    head = nn.Linear(8, 40)
    expected, count = _slow_text_loss(hidden, labels, documents, weights, head)
    wanted = _gradients(expected, hidden, *head.parameters())
    metrics = []
    for given_head in (head, None):
        term = losses.text_loss(
            hidden, labels, head, head=given_head, document_ids=documents, loss_weights=weights
        )
        torch.testing.assert_close(term.sum, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(term.count, count)
        torch.testing.assert_close(term.count, losses.text_count(labels, documents, weights))
        for got, right in zip(
            _gradients(term.sum, hidden, *head.parameters()), wanted, strict=True
        ):
            torch.testing.assert_close(got, right, atol=1e-5, rtol=1e-5)
        metrics.append(term.metrics["accuracy"])
    assert metrics[0] == metrics[1]
    assert metrics[0][1] == losses.target_mask(labels, documents).sum()


def test_a_head_that_is_more_than_its_weight_is_called() -> None:
    from peft import LoraConfig
    from peft.tuners.lora import Linear as LoraLinear

    plain = nn.Linear(8, 40)
    assert is_plain_linear(plain)
    hooked = nn.Linear(8, 40)
    hooked.register_forward_hook(lambda module, args, out: out * 2)
    replaced = nn.Linear(8, 40)
    replaced.forward = lambda x: F.linear(x, replaced.weight) * 2
    normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 40))
    lora = LoraLinear(nn.Linear(8, 40), "default", LoraConfig(), r=2, lora_alpha=4)
    nn.init.normal_(lora.lora_B["default"].weight)
    hidden, labels, *_ = _text_case()
    for head in (hooked, replaced, normed, lora):
        assert not is_plain_linear(head)
        scores = head(hidden[:, :-1]).flatten(0, 1)
        expected = F.cross_entropy(scores, labels[:, 1:].flatten(), reduction="sum")
        got = losses.text_loss(hidden, labels, head, head=head).sum
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-5)


def test_processes_call_an_opaque_head_equally_often(monkeypatch) -> None:
    monkeypatch.setattr(linear_loss, "_FIRST_SLICE", 4)
    hidden, labels, *_ = _text_case()
    calls = []

    def head(x):
        calls.append(len(x))
        return x @ torch.ones(8, 40)

    losses.text_loss(hidden, labels, head)
    assert len(calls) > 1
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    for some in (labels, torch.full_like(labels, losses.IGNORE)):
        calls.clear()
        losses.text_loss(hidden, some, head)
        assert len(calls) == 1


def test_z_loss_is_added_and_measured() -> None:
    hidden, labels, *_ = _text_case()
    head = nn.Linear(8, 40)
    plain = losses.text_loss(hidden, labels, head, head=head)
    both = losses.text_loss(hidden, labels, head, head=head, z_loss=0.01)
    squared, number = both.metrics["log_z_squared"]
    assert number == plain.count
    torch.testing.assert_close(both.sum, plain.sum + 0.01 * squared)
