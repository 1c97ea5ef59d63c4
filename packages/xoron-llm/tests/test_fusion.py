"""Where the fusion's adapters stand, and what they keep of media.

Evenly spaced over any backbone, the last one behind its last layer; the published specification is
four of eight heads over twelve layers. Keys and values kept for all layers are those of each.
"""

from __future__ import annotations

import pytest
import torch

import xoron_core
from xoron_core.components import Context
from xoron_core.errors import CompositionError, ConfigError
from xoron_llm.fusion import CrossAttentionFusion, spaced
from xoron_llm.fusion_config import CrossAttentionConfig

FUSION = {"use": "cross-attention", "num_layers": 2, "num_heads": 4, "head_dim": 8}
TEXT = {
    "tokenizer": {"use": "byte"},
    "backbone": {"use": "xoron-moe", "preset": "tiny", "num_layers": 3},
    "fusion": FUSION,
}


def build(width: int | None = 32, layers: int = 12, **config) -> CrossAttentionFusion:
    context = Context("fusion", hidden_size=width, fusion_layers=tuple(range(layers)))
    return CrossAttentionFusion(CrossAttentionConfig.parse(config), context)


@pytest.mark.parametrize(
    ("layers", "number", "expected"),
    [
        (12, 4, (2, 5, 8, 11)),
        (12, 12, tuple(range(12))),
        (10, 4, (1, 4, 6, 9)),
        (4, 4, (0, 1, 2, 3)),
        (2, 4, (0, 1)),
        (5, 1, (4,)),
    ],
)
def test_layers_are_evenly_spaced_and_end_with_the_last(layers, number, expected) -> None:
    assert spaced(tuple(range(layers)), number) == expected
    assert build(layers=layers, num_layers=number).layers == expected


def test_named_layers_are_taken_as_they_are() -> None:
    config = CrossAttentionConfig.parse({"layers": [0, 7], "num_heads": 2})
    assert CrossAttentionFusion(config, Context("fusion", hidden_size=8)).layers == (0, 7)


def test_what_is_kept_belongs_to_each_layer() -> None:
    fusion = build(num_heads=4)
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.normal_(0, 0.3)
    hidden, features = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
    visible = torch.rand(2, 5, 7) > 0.5
    memory = fusion.remember(features)
    assert {tuple(tensor.shape) for tensor in memory} == {(2, 7, 32)}
    outputs = [fusion(hidden, memory, visible=visible, layer=layer) for layer in fusion.layers]
    for block, output in zip(fusion.adapters, outputs, strict=True):
        expected = hidden + block(hidden, *block.keys_values(features), visible=visible)
        torch.testing.assert_close(output, expected, rtol=0, atol=0)
    assert not any(torch.equal(outputs[0], other) for other in outputs[1:])


@torch.no_grad()
def test_positions_that_see_nothing_are_not_changed_at_all() -> None:
    fusion = build(num_heads=4)
    for block in fusion.adapters:
        block.o_proj.weight.normal_()
    hidden, features = torch.randn(2, 5, 32), torch.randn(2, 3, 32)
    visible = torch.zeros(2, 5, 3, dtype=torch.bool)
    visible[0, 2:, :2] = True
    out = fusion(hidden, fusion.remember(features), visible=visible, layer=fusion.layers[1])
    sees = visible.any(-1)
    assert torch.equal(out[~sees], hidden[~sees])
    assert (out - hidden)[sees].abs().amax(-1).min() > 1e-4


@pytest.mark.parametrize("layers", [[], [1, 1], [3, 1]])
def test_layers_that_are_no_ascending_list_are_refused(layers) -> None:
    with pytest.raises(ConfigError, match="ascending, each once"):
        CrossAttentionConfig.parse({"layers": layers})


def test_widths_that_do_not_fit_are_refused() -> None:
    with pytest.raises(CompositionError, match="36 is not a multiple of num_heads 8"):
        build(width=36)
    assert build(width=36, head_dim=4).adapters[0].q_proj.weight.shape == (32, 36)
    with pytest.raises(CompositionError, match="takes its width from a backbone"):
        build(width=None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fusion": {**FUSION, "layers": [1, 3]}}, r"after layers \[3\].*after \[0, 1, 2\]"),
        ({"fusion": {**FUSION, "num_heads": 7, "head_dim": None}}, "192 is not a.*num_heads 7"),
        ({"more_fusion": FUSION}, "'fusion' and 'more_fusion' both hold a fusion"),
        ({"backbone": {"use": "hf", "hf_config": {
            "model_type": "qwen3", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
            "head_dim": 16}}}, "HfBackbone takes no fusion"),
    ],
)  # fmt: skip
def test_a_fusion_that_does_not_fit_is_refused(changes, words) -> None:
    with pytest.raises(CompositionError, match=words):
        xoron_core.compose({**TEXT, **changes})


def test_a_fusion_needs_a_backbone() -> None:
    with pytest.raises(CompositionError, match=r"add backbone: \{use: xoron-moe\}"):
        xoron_core.compose({"tokenizer": {"use": "byte"}, "fusion": FUSION})
