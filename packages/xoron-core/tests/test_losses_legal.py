"""Proves that a loss over legal ranges is the loss whose illegal logits are -inf, in value,
gradient, accuracy and z-loss, for plain, split and opaque heads.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from xoron_core.errors import SequenceError
from xoron_core.losses import codec_ranges, text_loss, token_loss
from xoron_core.nn.split_rows import split
from xoron_core.tokens.space import CodecRange, TextBase, TokenSpace

V, D, P = 40, 16, 24
LEGAL = ((20, 28), (28, 36))  # 36 .. 39 are legal everywhere, as 0 .. 19 are
TRAINED = torch.arange(18, 34)  # parts of the ranges, and rows outside of them


class Head(nn.Module):
    """An embedding and a head, as a causal language model shows them."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(V, D), nn.Linear(D, V, bias=bias)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def inputs(low: int = 0, high: int = V) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(P, D, generator=generator).requires_grad_(True)
    targets = torch.randint(low, high, (P,), generator=generator)
    return hidden, targets, torch.rand(P, generator=generator)


def masked(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The definition: -inf where an id may not stand."""
    ids = torch.arange(V)
    for start, stop in LEGAL:
        inside = (targets >= start) & (targets < stop)
        illegal = inside[:, None] & ((ids < start) | (ids >= stop))
        logits = logits.masked_fill(illegal, float("-inf"))
    return logits


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["plain", "split", "opaque"])
def test_it_equals_masking_with_minus_infinity(kind: str, bias: bool) -> None:
    model = Head(bias)
    plain = copy.deepcopy(model)
    if kind == "split":
        split(model, TRAINED)
    head = None if kind == "opaque" else model.head
    hidden, targets, weights = inputs()
    options = {"weights": weights, "z_loss": 0.01}
    term = token_loss(hidden, targets, model.head, head=head, legal=LEGAL, **options)
    term.sum.backward()
    reference = hidden.detach().clone().requires_grad_(True)
    scores = masked(plain.head(reference), targets)
    losses = F.cross_entropy(scores, targets, reduction="none")
    expected = (weights * (losses + 0.01 * scores.logsumexp(-1).square())).sum()
    expected.backward()
    torch.testing.assert_close(term.sum, expected)
    torch.testing.assert_close(hidden.grad, reference.grad)
    whole = plain.head.weight.grad
    if kind == "split":
        torch.testing.assert_close(model.head.rows.grad, whole[TRAINED])
        assert whole[TRAINED].abs().sum() > 0
        assert model.head.weight.grad is None
    else:
        torch.testing.assert_close(model.head.weight.grad, whole)
    correct, count = term.metrics["accuracy"]
    assert (correct, count) == ((scores.argmax(-1) == targets).sum(), P)
    log_z, _ = term.metrics["log_z_squared"]
    torch.testing.assert_close(log_z, scores.detach().logsumexp(-1).square().sum())
    assert not torch.isclose(term.sum, token_loss(hidden, targets, model.head, **options).sum)


def test_ranges_without_targets_add_nothing() -> None:
    model = Head(bias=False)
    hidden, targets, _ = inputs(high=20)
    with_ranges = token_loss(hidden, targets, model.head, head=model.head, legal=LEGAL)
    without = token_loss(hidden, targets, model.head, head=model.head)
    torch.testing.assert_close(with_ranges.sum, without.sum)
    torch.testing.assert_close(with_ranges.metrics["accuracy"][0], without.metrics["accuracy"][0])


def test_the_text_loss_hands_them_on() -> None:
    model = Head(bias=False)
    hidden, targets, _ = inputs(20, 28)
    labels = targets.view(2, P // 2)
    rows = hidden.view(2, P // 2, D)
    term = text_loss(rows, labels, model.head, head=model.head, legal=LEGAL)
    scores = masked(model.head(rows[:, :-1].reshape(-1, D)), labels[:, 1:].reshape(-1))
    expected = F.cross_entropy(scores, labels[:, 1:].reshape(-1), reduction="sum")
    torch.testing.assert_close(term.sum, expected)
    assert term.count == P - 2


def test_a_token_space_names_its_codebooks_and_bad_ranges_are_refused() -> None:
    codecs = [CodecRange("toy/a", q, 5, "a", None, "signal") for q in range(2)]
    text = TextBase("test/base", 20, "vocabulary")
    space = TokenSpace.allocate(text=text, groups=[], codecs=codecs)
    assert codec_ranges(space) == ((20, 25), (25, 30))
    less = TokenSpace.allocate(text=text, groups=[], codecs=codecs[:1], lock=space)
    assert codec_ranges(less) == ((20, 25),)
    hidden, targets, _ = inputs()
    for wrong in [((20, 28), (27, 30)), ((20, 20),), ((-1, 4),)]:
        with pytest.raises(SequenceError, match="must not be empty or overlap"):
            token_loss(hidden, targets, Head(bias=False).head, legal=wrong)
