"""Long-context and multi-axis rotary positions are those of transformers.

YaRN and LongRoPE frequencies and attention factors equal `modeling_rope_utils`; YaRN keeps the fast
frequencies and divides the slow ones; interleaved M-RoPE equals `Qwen3VLTextRotaryEmbedding`, and
1-D RoPE on text.
"""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

from xoron_core.errors import ConfigError, SequenceError
from xoron_core.nn.rope import inverse_frequencies, rotary_tables
from xoron_core.nn.rope_scaling import Rotary, yarn_frequencies, yarn_temperature

SHORT = [1.0 + 0.01 * i for i in range(32)]
LONG = [1.0 + 0.5 * i for i in range(32)]
CASES = {
    "xoron-dev": {"factor": 16.0, "beta_fast": 32, "beta_slow": 1},
    "betas": {"factor": 4.0, "beta_fast": 16, "beta_slow": 2, "truncate": False},
    "one-factor": {"factor": 8.0, "attention_factor": 1.25},
    "mscales": {"factor": 40.0, "mscale": 0.7, "mscale_all_dim": 1.1},
    "equal-mscales": {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0},
    "factor-one": {"factor": 1.0},
}


def _theirs(kind: str, theta: float, parameters: dict) -> tuple[torch.Tensor, float]:
    config = LlamaConfig(
        hidden_size=128,
        num_attention_heads=2,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": kind, "rope_theta": theta, **parameters},
    )
    return ROPE_INIT_FUNCTIONS[kind](config, "cpu")


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("case", CASES)
def test_yarn_is_transformers(case: str, theta: float) -> None:
    parameters = {**CASES[case], "original_max_position_embeddings": 8192}
    frequencies, factor = _theirs("yarn", theta, parameters)
    rotary = Rotary(64, theta, "yarn", parameters)
    # Small positions: an angle of thousands of radians shows the last bit of its frequency.
    positions = torch.tensor([[0, 1, 2, 50]])
    angles = positions[..., None].float() * torch.cat((frequencies, frequencies))
    cos, sin = rotary.tables(positions)
    assert rotary.table_factor == pytest.approx(factor, rel=1e-12)
    torch.testing.assert_close(cos, angles.cos() * factor, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sin, angles.sin() * factor, rtol=1e-5, atol=1e-5)
    given = {
        k: v for k, v in CASES[case].items() if k.split("_")[0] in ("factor", "beta", "truncate")
    }
    ours = yarn_frequencies(64, theta, original_length=8192, **given)
    torch.testing.assert_close(ours, frequencies, rtol=1e-6, atol=0)


def test_yarn_keeps_fast_frequencies_and_divides_slow_ones() -> None:
    plain = inverse_frequencies(64, 500000.0)
    scaled = yarn_frequencies(64, 500000.0, factor=16.0, original_length=8192)
    turns = 8192 * plain / (2 * math.pi)
    assert (turns > 40).any()
    assert (turns < 0.5).any()
    assert torch.equal(scaled[turns > 40], plain[turns > 40])
    torch.testing.assert_close(scaled[turns < 0.5], plain[turns < 0.5] / 16)
    ratio = plain / scaled
    assert (ratio.diff() >= -1e-5).all()
    assert 1 < ratio[(turns > 2) & (turns < 20)].mean() < 16
    assert yarn_temperature(16.0) == pytest.approx(0.1 * math.log(16) + 1)


def test_equal_mscales_move_the_sharpening_from_the_tables_into_the_scores() -> None:
    common = {"factor": 16.0, "original_max_position_embeddings": 8192}
    tables = Rotary(64, 1e4, "yarn", common)
    scores = Rotary(64, 1e4, "yarn", {**common, "mscale": 1.0, "mscale_all_dim": 1.0})
    assert (tables.logit_factor, scores.table_factor) == (1.0, 1.0)
    assert tables.table_factor**2 == pytest.approx(scores.logit_factor)


@pytest.mark.parametrize("given", [{"factor": 16.0}, {"factor": 16.0, "attention_factor": 1.1}])
def test_longrope_is_transformers(given: dict) -> None:
    parameters = {
        **given,
        "original_max_position_embeddings": 60,
        "short_factor": SHORT,
        "long_factor": LONG,
    }
    config = LlamaConfig(
        hidden_size=128,
        num_attention_heads=2,
        max_position_embeddings=960,
        rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, **parameters},
    )
    rotary = Rotary(64, 1e4, "longrope", parameters)
    for last in (59, 60):  # of a row that is just within the trained length, and one beyond
        positions = torch.tensor([[3, last]])
        frequencies, factor = ROPE_INIT_FUNCTIONS["longrope"](config, "cpu", seq_len=last + 1)
        angles = positions[..., None].float() * torch.cat((frequencies, frequencies))
        cos, sin = rotary.tables(positions)
        torch.testing.assert_close(cos, angles.cos() * factor, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sin, angles.sin() * factor, rtol=1e-5, atol=1e-5)


def test_a_long_row_does_not_change_a_short_one() -> None:
    rotary = Rotary(
        64,
        1e4,
        "longrope",
        {
            "factor": 2.0,
            "original_max_position_embeddings": 100,
            "short_factor": SHORT,
            "long_factor": LONG,
        },
    )
    both, _ = rotary.tables(torch.tensor([[5, 99], [5, 100]]))
    alone, _ = rotary.tables(torch.tensor([[5, 99]]))
    assert torch.equal(both[:1], alone)
    assert not torch.equal(both[0, 0], both[1, 0])


@pytest.mark.parametrize("sections", [(24, 20, 20), (16, 8, 8), (4, 2, 2)])
def test_interleaved_mrope_is_qwen3_vls(sections: tuple[int, int, int]) -> None:
    dim = 2 * sum(sections)
    config = Qwen3VLTextConfig(
        hidden_size=2 * dim,
        num_attention_heads=2,
        head_dim=dim,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 5e5,
            "mrope_section": list(sections),
            "mrope_interleaved": True,
        },
    )
    positions = torch.randint(0, 3000, (3, 2, 7))
    expected = Qwen3VLTextRotaryEmbedding(config)(torch.zeros(1), positions)
    got = rotary_tables(positions, dim, theta=5e5, sections=sections)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["default", "yarn"])
def test_mrope_is_one_dimensional_on_text(kind: str) -> None:
    parameters = {"factor": 16.0, "original_max_position_embeddings": 8192}
    rotary = Rotary(64, 5e5, kind, parameters, sections=(12, 10, 10))
    text = torch.randint(0, 100_000, (2, 9))
    flat = rotary.tables(text)
    for a, b in zip(rotary.tables(text.expand(3, -1, -1)), flat, strict=True):
        assert torch.equal(a, b)
    moved = text.expand(3, -1, -1).clone()
    moved[1] += 7  # height alone
    assert not torch.equal(rotary.tables(moved)[0], flat[0])


def test_what_is_not_declared_is_refused() -> None:
    with pytest.raises(ConfigError, match="rope_type 'linear' is not supported"):
        Rotary(64, 1e4, "linear")
    with pytest.raises(SequenceError, match=r"shape \(3, 1, 4\), expected \(B, N\)"):
        Rotary(64, 1e4).tables(torch.zeros(3, 1, 4))
