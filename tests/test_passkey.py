"""Proves that YaRN reaches beyond the trained length: a model trained to find a passkey within 512
tokens finds it in 4,096 with YaRN, and with the same weights but without it does not."""

import pytest
import torch

from examples import passkey


@pytest.mark.slow
def test_yarn_finds_at_4096_what_was_learned_at_512():
    model = passkey.train()
    scores = {}
    for name in ("plain", "yarn"):
        other = passkey.with_rotary(model, name)
        scores[name] = [passkey.score(other, length) for length in passkey.LENGTHS]
    print(f"\n{passkey.table(scores)}")
    plain, yarn = scores["plain"], scores["yarn"]
    assert plain[0].keys >= 0.9
    # With 96 keys one standard error of this difference is at most 0.07.
    assert yarn[-1].keys - plain[-1].keys >= 0.4
    assert yarn[-1].digits - plain[-1].digits >= 0.4


def test_a_passage_holds_its_key_once_and_asks_for_it_at_the_end():
    depths = torch.linspace(0, 0.999, 50)
    length, digits = 40, passkey.NUM_DIGITS
    ids = passkey.passages(length, depths, generator=torch.Generator().manual_seed(0))
    starts = (ids == 10).nonzero()
    assert starts[:, 0].tolist() == list(range(50))
    last_start = length - 2 * digits - 2
    assert {0, last_start} <= set(starts[:, 1].tolist()) <= set(range(last_start + 1))
    keys = ids.gather(1, starts[:, 1:] + 1 + torch.arange(digits))
    assert torch.equal(keys, ids[:, -digits:])
    assert ((ids < 10).sum(-1) == 2 * digits).all()
    assert (ids[:, -digits - 1] == 11).all()
    assert ((ids == 11).sum(-1) == 1).all()
