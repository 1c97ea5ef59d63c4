"""The backbone adapters add nothing and lose nothing.

An adapter's logits are those of the wrapped transformers model, over several architectures; packed
documents equal separate ones; pretrained rows stay bit for bit while only new rows are drawn; what
cannot work is refused with the fix.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from xoron_core.components import Context
from xoron_core.descriptors import TokenGroup
from xoron_core.errors import CompositionError, ConfigError, FolderError, SequenceError
from xoron_core.tokens.space import TextBase, TokenSpace
from xoron_llm.backbone import XoronMoeBackbone
from xoron_llm.hf_backbone import HfBackbone
from xoron_llm.hf_config import HfConfig
from xoron_llm.moe.config import MoeConfig

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
TINY = {
    "vocab_size": 70,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen3": {"model_type": "qwen3"},
    "qwen2": {"model_type": "qwen2"},
    "llama": {"model_type": "llama"},
    "qwen3-eager": {"model_type": "qwen3", "attn_implementation": "eager"},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
    "mistral-sliding": {"model_type": "mistral", "sliding_window": 3},
    "gemma2": {"model_type": "gemma2", "sliding_window": 4, "final_logit_softcapping": 2.0},
    "gemma3_text": {"model_type": "gemma3_text", "sliding_window": 4},
    "granite": {"model_type": "granite", "logits_scaling": 3.0, "embedding_multiplier": 2.0},
    "cohere": {"model_type": "cohere", "logit_scale": 0.3},
    "xoron-moe": {"model_type": "xoron-moe", "num_experts": 4},
}


def space(text: int = 60, specials: int = 8) -> TokenSpace:
    tokens = {f"t{i}": f"<|t{i}|>" for i in range(specials)}
    base = TextBase(name="test/base", size=text, identity="sha256:test")
    return TokenSpace.allocate(text=base, groups=[TokenGroup("test/group", tokens)])


def moe(**changes: Any) -> XoronMoeBackbone:
    sizes = {
        "hidden_size": 32,
        "num_layers": 4,
        "num_heads": 4,
        "num_kv_heads": 2,
        "intermediate_size": 48,
        "num_experts": 4,
        "initializer_range": 0.2,
    }
    torch.manual_seed(0)
    config = MoeConfig.parse({**sizes, **changes})
    return XoronMoeBackbone(config, Context(slot="backbone", space=space())).eval()


def hf_backbone(data: dict[str, Any], *, path: str | None = None, rows: int = 68) -> HfBackbone:
    config = HfConfig.parse({"path": path, "hf_config": {**TINY, **data}})
    torch.manual_seed(0)
    return HfBackbone(config, Context(slot="backbone", space=space(rows - 8))).eval()


def ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(seed))


def run(backbone, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return backbone.logits(backbone(backbone.embed(x), **kwargs).hidden)


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_those_of_the_wrapped_model(name: str) -> None:
    backbone, x = hf_backbone(ARCHITECTURES[name]), ids(2, 9)
    torch.testing.assert_close(run(backbone, x), backbone.model(x).logits, **CLOSE)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    logits = run(backbone, x, attention_mask=mask)
    torch.testing.assert_close(logits[:1, 4:], run(backbone, x[:1, 4:]), **CLOSE)
    torch.testing.assert_close(logits[1:], run(backbone, x[1:]), **CLOSE)
    backbone.load_source_weights(torch.Generator())  # its own check agrees


@torch.no_grad()
@pytest.mark.parametrize("name", [*ARCHITECTURES, "own"])
def test_packed_documents_equal_separate_ones(name: str) -> None:
    backbone = moe() if name == "own" else hf_backbone(ARCHITECTURES[name])
    assert backbone.honours_documents
    parts = [ids(1, n, seed=n) for n in (6, 1, 7)]
    packed = torch.cat([*parts, torch.zeros(1, 2, dtype=torch.long)], 1).repeat(2, 1)
    documents = torch.tensor([[1] * 6 + [2] + [3] * 7 + [0] * 2, [1] * 14 + [0] * 2])
    logits = run(backbone, packed, document_ids=documents)
    start = 0
    for part in parts:
        stop = start + part.shape[1]
        torch.testing.assert_close(logits[:1, start:stop], run(backbone, part), **CLOSE)
        start = stop
    whole = run(backbone, packed[1:, :14])
    torch.testing.assert_close(logits[1:, :14], whole, **CLOSE)
    assert (whole[:, 6:] - logits[:1, 6:14]).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3", "mistral-sliding", "own"])
def test_cached_positions_go_on_where_they_stopped(name: str) -> None:
    backbone = moe() if name == "own" else hf_backbone(ARCHITECTURES[name])
    x, mask = ids(2, 8), torch.ones(2, 8, dtype=torch.long)
    mask[0, :2] = 0
    expected = run(backbone, x, attention_mask=mask)
    first = backbone(backbone.embed(x[:, :5]), attention_mask=mask[:, :5], use_cache=True)
    assert first.cache is not None
    second = backbone(backbone.embed(x[:, 5:]), attention_mask=mask, cache=first.cache)
    logits = backbone.logits(torch.cat([first.hidden, second.hidden], 1))
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], **CLOSE)
    assert backbone(backbone.embed(x)).cache is None


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> tuple[str, Qwen3ForCausalLM]:
    """A Qwen3 folder with 64 ids of 70 rows, the last six padding."""
    folder = tmp_path_factory.mktemp("qwen3")
    torch.manual_seed(5)
    model = Qwen3ForCausalLM(Qwen3Config(**TINY)).eval()
    model.save_pretrained(folder)
    return str(folder), model


@torch.no_grad()
@pytest.mark.parametrize("specials", [5, 20])
def test_pretrained_rows_stay_and_only_new_ones_are_drawn(checkpoint, specials: int) -> None:
    path, source = checkpoint
    config = HfConfig(path=path).resolved()
    assert config.hf_config is not None
    context = Context(slot="backbone", space=space(64, specials))
    backbone = HfBackbone(config, context).eval()
    backbone.load_source_weights(torch.Generator().manual_seed(1))
    rows = max(70, 64 + specials)
    assert backbone.num_rows == rows == backbone.hf_fields()["vocab_size"]
    theirs = source.state_dict()
    new = torch.arange(64, 64 + specials)
    for name, tensor in backbone.model.state_dict().items():
        if tensor.shape[:1] != (rows,):
            assert torch.equal(tensor, theirs[name]), name
            continue
        assert torch.equal(tensor[:64], theirs[name][:64]), name
        assert torch.equal(tensor[64 + specials : 70], theirs[name][64 + specials : 70]), name
        assert abs(tensor[new].std() / 0.02 - 1) < 0.2
    assert not torch.equal(
        backbone.model.model.embed_tokens.weight[new], backbone.model.lm_head.weight[new]
    )
    x = ids(2, 9)
    torch.testing.assert_close(run(backbone, x)[..., :64], source(x).logits[..., :64], **CLOSE)
    again = HfBackbone(config, context)
    again.load_source_weights(torch.Generator().manual_seed(1))
    assert torch.equal(again.model.lm_head.weight, backbone.model.lm_head.weight)


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", [60, 68, 90])
def test_resize_draws_exactly_the_named_and_the_added_rows(tied: bool, rows: int) -> None:
    backbone = moe(tie_word_embeddings=tied)
    model = backbone.model
    before = {name: t.clone() for name, t in model.state_dict().items()}
    new = torch.tensor([3, 17])
    backbone.resize_rows(rows, new, torch.Generator().manual_seed(2))
    total = max(rows, 68)  # rows are never taken away
    assert backbone.num_rows == model.config.vocab_size == model.lm_head.out_features == total
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    kept = torch.ones(68, dtype=torch.bool).index_fill(0, new, False)
    for name, tensor in model.state_dict().items():
        if tensor.shape[:1] == (total,):
            assert torch.equal(tensor[:68][kept], before[name][kept]), name
            drawn = torch.cat([tensor[new], tensor[68:]])
            assert abs(drawn.std() / 0.02 - 1) < 0.35
            assert (tensor[new] != before[name][new]).any(1).all()
        else:
            assert torch.equal(tensor, before[name]), name
    assert run(backbone, torch.tensor([[total - 1]])).shape == (1, 1, total)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_new_rows_follow_the_generator_alone() -> None:
    one, two = moe(), moe()
    torch.manual_seed(1)
    one.resize_rows(75, torch.tensor([2]), torch.Generator().manual_seed(9))
    torch.manual_seed(2)
    two.resize_rows(75, torch.tensor([2]), torch.Generator().manual_seed(9))
    assert torch.equal(one.model.lm_head.weight, two.model.lm_head.weight)


def test_a_saved_composition_needs_no_path(checkpoint) -> None:
    path, _ = checkpoint
    data = HfConfig(path=path).resolved().data()
    assert data["hf_config"] == json.loads(Path(path, "config.json").read_text())
    moved = HfConfig.parse(json.loads(json.dumps({**data, "path": "/nowhere"})))
    with torch.device("meta"):
        backbone = HfBackbone(moved, Context(slot="backbone", space=space(64, 20)))
    assert backbone.num_rows == 84
    assert all(parameter.is_meta for parameter in backbone.parameters())
    fields = backbone.hf_fields()
    assert {name: fields[name] for name in ("num_hidden_layers", "num_key_value_heads")} == {
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
    }


@torch.no_grad()
def test_buffers_are_recomputed_after_a_load() -> None:
    backbone, x = hf_backbone(ARCHITECTURES["qwen3"]), ids(1, 6)
    expected = run(backbone, x)
    weights = {name: p.clone() for name, p in backbone.named_parameters()}
    for buffer in backbone.buffers():
        buffer.fill_(7.0)
    assert (run(backbone, x) - expected).abs().max() > 1e-2
    backbone.reset_buffers()
    assert torch.equal(run(backbone, x), expected)
    assert all(torch.equal(p, weights[name]) for name, p in backbone.named_parameters())


def test_xoron_moe_needs_a_token_space_and_takes_its_rows_from_it() -> None:
    assert moe().num_rows == 68
    with pytest.raises(CompositionError, match="add tokenizer"):
        XoronMoeBackbone(MoeConfig(), Context(slot="backbone"))


@pytest.mark.parametrize("name", ["own", "qwen3_moe", "qwen3"])
def test_active_parameters_are_those_that_get_a_gradient_from_one_position(name: str) -> None:
    backbone = moe() if name == "own" else hf_backbone(ARCHITECTURES[name])
    run(backbone, ids(1, 1)).square().sum().backward()
    used = 0
    for key, parameter in backbone.named_parameters():
        if ".experts." in key and parameter.ndim == 3:  # one parameter for all experts
            used += parameter.grad[parameter.grad.abs().amax((1, 2)) > 0].numel()
        elif ".experts." not in key or parameter.grad.abs().max() > 0:
            used += parameter.numel()
    assert backbone.active_parameters() == used


def test_what_cannot_work_is_refused(checkpoint, tmp_path, monkeypatch) -> None:
    path, _ = checkpoint
    with pytest.raises(ConfigError, match=r"needs path .* or hf_config"):
        HfConfig.parse({})
    with pytest.raises(ConfigError, match="no model_type"):
        HfConfig.parse({"hf_config": {}})
    with pytest.raises(ConfigError, match="cannot be read"):
        HfConfig(path=str(tmp_path)).resolved()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"'some/model' is no folder here .* give its folder"):
        HfConfig(path="some/model").resolved()
    context = Context(slot="backbone", space=space())
    with pytest.raises(ConfigError, match="no usable config of type 'qwen99'"):
        HfBackbone(HfConfig(hf_config={"model_type": "qwen99"}), context)
    with pytest.raises(CompositionError, match="no causal language model"):
        HfBackbone(HfConfig(hf_config={"model_type": "siglip_vision_model"}), context)
    config = HfConfig(path=path).resolved()
    assert config.hf_config is not None
    gone = HfBackbone(HfConfig(path=str(tmp_path / "gone"), hf_config=config.hf_config), context)
    with pytest.raises(FolderError, match=r"gone' cannot be loaded .* give a folder"):
        gone.load_source_weights(torch.Generator())
    other = HfBackbone(
        HfConfig(path=path, hf_config={**config.hf_config, "intermediate_size": 48}), context
    )
    with pytest.raises(FolderError, match=r"expected \(48, 32\).*compose again"):
        other.load_source_weights(torch.Generator())


def test_truncated_weights_are_one_clear_error(tmp_path) -> None:
    Qwen3ForCausalLM(Qwen3Config(**TINY)).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-500])
    backbone = HfBackbone(HfConfig(path=str(tmp_path)).resolved(), Context(slot="backbone"))
    with pytest.raises(FolderError, match="cannot be loaded"):
        backbone.load_source_weights(torch.Generator())


def test_an_architecture_it_does_not_reproduce_is_refused() -> None:
    backbone = hf_backbone({"model_type": "qwen3"})
    head = backbone.model.forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        out = head(*args, **kwargs)
        out.logits = out.logits * 3
        return out

    backbone.model.forward = scaled
    with pytest.raises(CompositionError, match="Qwen3ForCausalLM makes logits from hidden states"):
        backbone.load_source_weights(torch.Generator())


def test_documents_are_refused_where_they_cannot_be_kept_apart() -> None:
    linear = hf_backbone(
        {
            "model_type": "qwen3_next",
            "layer_types": ["linear_attention", "full_attention"],
            "num_experts": 0,
        }
    )
    assert not linear.honours_documents
    embeddings, documents = linear.embed(ids(1, 4)), torch.tensor([[1, 1, 2, 2]])
    with pytest.raises(CompositionError, match="pad instead of packing"):
        linear(embeddings, document_ids=documents)
    sliding = hf_backbone(ARCHITECTURES["mistral-sliding"])
    cache = sliding(sliding.embed(ids(1, 4)), use_cache=True).cache
    with pytest.raises(SequenceError, match="slides over 3"):
        sliding(embeddings, document_ids=documents.repeat(1, 2), cache=cache)


def test_the_auto_class_of_a_folder_is_the_wrapped_one(checkpoint) -> None:
    path, source = checkpoint
    backbone = HfBackbone(HfConfig(path=path).resolved(), Context(slot="backbone"))
    assert type(backbone.model) is type(AutoModelForCausalLM.from_pretrained(path))
    assert AutoConfig.from_pretrained(path).model_type == source.config.model_type
