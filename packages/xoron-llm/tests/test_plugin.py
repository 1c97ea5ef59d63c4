"""What the plug-in declares is true.

It answers without torch, every reference resolves, presets configure their components, and the
compositions `tiny` and `xoron-dev` are the models the documentation describes.
"""

from __future__ import annotations

import subprocess
import sys
from importlib import resources

import pytest
import torch

import xoron_core
from xoron_core.config import Config, parse_yaml
from xoron_core.descriptors import resolve
from xoron_core.plugins import registry
from xoron_llm import plugin
from xoron_llm.moe.config import MoeConfig

HEAVY = {"torch", "transformers", "tokenizers", "numpy"}


@pytest.mark.parametrize(
    "module",
    [
        "xoron_llm",
        "xoron_llm.plugin",
        *sorted({c.config.partition(":")[0] for c in plugin.xoron_components()}),
    ],
)
def test_light_modules_import_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not HEAVY & set(loaded)
    assert module in loaded


@pytest.mark.parametrize("component", plugin.xoron_components(), ids=lambda c: c.key)
def test_references_resolve_and_schemas_print(component) -> None:
    config = resolve(component.config)
    assert issubclass(config, Config)
    assert config.model_json_schema()["properties"].keys() == config.model_fields.keys()
    interface = resolve(f"xoron_core.components:{component.kind.capitalize()}")
    assert issubclass(resolve(component.factory), interface)
    assert not getattr(resolve(component.factory), "__abstractmethods__", None)


def _preset(name: str, component: str | None) -> dict:
    (found,) = [p for p in plugin.xoron_presets() if (p.name, p.component) == (name, component)]
    package, _, path = found.resource.partition(":")
    return parse_yaml(resources.files(package).joinpath(path).read_text(), found.resource)[0]


def test_xoron_dev_is_the_published_specification() -> None:
    config = MoeConfig.parse(_preset("xoron-dev", "backbone/xoron-moe"))
    published = {
        "hidden_size": 1024,
        "num_layers": 12,
        "num_heads": 16,
        "intermediate_size": 2048,
        "max_position_embeddings": 131072,
        "use_moe": True,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_layer_freq": 2,
        "use_shared_expert": True,
    }
    assert {name: getattr(config, name) for name in published} == published
    assert {name: getattr(MoeConfig(), name) for name in published} == published
    assert (config.attention, config.kv_lora_rank, config.cache_width) == ("latent", 512, 544)
    assert config.rope_scaling is not None
    scaling = config.rope_scaling.parameters()
    reach = scaling["factor"] * scaling["original_max_position_embeddings"]
    assert (scaling["rope_type"], reach) == ("yarn", config.max_position_embeddings)


@torch.no_grad()
def test_tiny_composes_saves_and_opens(tmp_path) -> None:
    model, processor = xoron_core.compose(preset="tiny", plugins=["llm"], seed=1)
    assert model.space.text_size == 256
    assert model.backbone.num_rows == model.space.size == model.config.vocab_size
    parameters = sum(p.numel() for p in model.parameters())
    assert 2.0e6 < parameters < 3.0e6
    ids = processor.tokenizer("def f(x):\n    return", return_tensors="pt")["input_ids"]
    assert ids.tolist() == [list(b"def f(x):\n    return")]
    inner = model.backbone.model(ids).logits
    torch.testing.assert_close(model(ids).logits, inner)
    text = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert text.shape == (1, ids.shape[1] + 8)
    xoron_core.save(model, processor, tmp_path / "model")
    again, _ = xoron_core.load(tmp_path / "model")
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-6, atol=1e-6)


def test_xoron_dev_plans_without_a_byte_of_weights() -> None:
    from xoron_core.composer.composition import read_composition
    from xoron_core.composer.planner import plan

    chosen = registry().select("llm")
    planned = plan(read_composition(chosen, preset="xoron-dev"), chosen)
    assert planned.space.text_size == 151643
    rows, width, inner = planned.space.size, 1024, 2048
    swiglu = 3 * width * inner
    # Query, latent and rotary key, latent norm, keys and values of 16 heads, output.
    latent = width * width + width * 544 + 512 + 512 * 16 * (32 + 64) + width * width
    layers = 12 * (latent + 2 * width) + 6 * swiglu + 6 * (9 * swiglu + 8 * width)
    total = 2 * rows * width + layers + width
    backbone, fusion = planned.rows
    assert backbone.parameters == total
    assert backbone.active == total - 6 * 6 * swiglu
    # Four adapters of 8 heads: query, key, value and output, and two norms.
    assert (fusion.slot, fusion.parameters) == ("fusion", 4 * (4 * width * width + 2 * width))
    assert planned.composition.slots["fusion"].fusion_layers == tuple(range(12))
