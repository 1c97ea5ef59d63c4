"""xoron-moe is at home in transformers.

Auto classes open what it saves, bit for bit, in bf16, on meta, with a device map and with layers on
disk; the experts' kernel, beams, sampling and PEFT adapters work; sizes that do not fit are
refused.
"""

from __future__ import annotations

import pytest
import torch
from accelerate import infer_auto_device_map
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import xoron_core
from xoron_core.errors import ConfigError
from xoron_core.nn import experts
from xoron_llm.hf import XoronMoeConfig, XoronMoeForCausalLM, XoronMoeModel
from xoron_llm.moe.config import MoeConfig


def _meaning(config: XoronMoeConfig) -> dict:
    where_from = ("_name_or_path", "architectures", "dtype")
    return {key: value for key, value in config.to_dict().items() if key not in where_from}


@pytest.mark.parametrize("tied", [False, True])
def test_saved_and_opened_by_auto_classes_is_bit_equal(tmp_path, tied: bool, make, ids) -> None:
    model, x = make(tie_word_embeddings=tied), ids(2, 9)
    model.save_pretrained(tmp_path)
    for options in ({}, {"device_map": "cpu"}):
        again = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
        assert type(again) is XoronMoeForCausalLM
        assert (again.lm_head.weight is again.model.embed_tokens.weight) is tied
        assert _meaning(again.config) == _meaning(model.config)
        for seed in range(20):
            # Small matrix products differ in the last bit now and then if weights are misaligned.
            y = ids(2, 9, seed=seed)
            assert torch.equal(again(y).logits, model(y).logits)
    body = AutoModel.from_pretrained(tmp_path)
    assert type(body) is XoronMoeModel
    assert torch.equal(body(x).last_hidden_state, model.model(x).last_hidden_state)


def test_opened_in_half_precision_keeps_the_router_and_stays_close(tmp_path, make, ids) -> None:
    model, x = make(initializer_range=0.05), ids(2, 9)
    model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    dtypes = {name: parameter.dtype for name, parameter in half.named_parameters()}
    routers = {name for name in dtypes if "router" in name}
    assert len(routers) == 2
    assert all((dtypes[n] == torch.float32) is (n in routers) for n in dtypes)
    logits = half(x).logits
    assert logits.dtype == torch.bfloat16
    expected = model(x).logits
    assert (logits.float() - expected).abs().max() < 0.05 * expected.abs().max()


def test_built_on_meta_it_has_no_stale_buffers(tmp_path, make, ids, sizes) -> None:
    config = XoronMoeConfig(**sizes)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert {name for name, _ in empty.named_buffers()} <= set(empty.state_dict())
    model = make()
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(empty.eval()(ids(1, 5)).logits, model(ids(1, 5)).logits)


LATENT = {"attention": "latent", "num_key_value_heads": None, "kv_lora_rank": 16}


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, LATENT], ids=["gqa", "latent"])
def test_layers_on_disk_compute_the_same(tmp_path, make, ids, changes) -> None:
    """accelerate brings a weight only while its own module's forward runs."""
    make(**changes).save_pretrained(tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path)
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "lm_head"), "cpu")
    places |= {f"model.layers.{index}": ("cpu", "disk")[index % 2] for index in range(4)}
    parted = AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map=places, offload_folder=tmp_path / "aside"
    )
    assert parted.model.layers[1].mlp.router.weight.is_meta
    x = ids(2, 9)
    torch.testing.assert_close(parted(x).logits, whole(x).logits, rtol=1e-5, atol=1e-5)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(parted.generate(x, **options), whole.generate(x, **options))
    split = infer_auto_device_map(
        whole,
        {"cpu": sum(tensor.nbytes for tensor in whole.parameters()) // 2, "disk": 10**9},
        no_split_module_classes=list(whole._no_split_modules),
    )
    assert {name.count(".") for name in split if "layers" in name} == {2}  # layers stay whole


@torch.no_grad()
def test_the_experts_kernel_is_chosen_by_transformers_name(
    tmp_path, make, ids, monkeypatch
) -> None:
    model, x, calls = make(), ids(2, 9), []
    grouped = experts._grouped
    monkeypatch.setattr(experts, "_grouped", lambda *a, **k: calls.append(1) or grouped(*a, **k))
    expected = model(x).logits
    assert model.get_experts_implementation() == {"": "eager"}
    assert not calls
    for name, used in (("grouped", 2), ("slices", 0), ("grouped_mm", 2)):
        calls.clear()
        model.set_experts_implementation(name)
        torch.testing.assert_close(model(x).logits, expected, rtol=1e-5, atol=1e-5)
        assert len(calls) == used, name
    model.save_pretrained(tmp_path)
    calls.clear()
    AutoModelForCausalLM.from_pretrained(tmp_path)(x)  # the choice is no part of the weights
    assert not calls
    AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="grouped")(x)
    assert len(calls) == 2
    with pytest.raises(ConfigError, match=r"'batched_mm', expected one of eager, slices, grouped"):
        model.set_experts_implementation("batched_mm")
    small = {"num_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 1, "vocab_size": 67}
    theirs = Qwen3MoeForCausalLM(Qwen3MoeConfig(hidden_size=32, num_attention_heads=4, **small))
    theirs.set_experts_implementation("slices")
    with pytest.raises(ConfigError, match="'slices' is for xoron-moe; Qwen3MoeExperts takes"):
        theirs(x)


def test_a_composed_model_hands_the_choice_to_its_backbone(ids, monkeypatch) -> None:
    composition = {
        "tokenizer": {"use": "byte"},
        "backbone": {"use": "xoron-moe", "preset": "tiny"},
        "tokens": {"groups": ["control"]},
    }
    model, _ = xoron_core.compose(composition, plugins=["llm"])
    monkeypatch.setattr(experts, "_grouped", None)
    model(ids(1, 4))
    model.set_experts_implementation("grouped")
    with pytest.raises(TypeError, match="not callable"):
        model(ids(1, 4))


def test_beams_sampling_and_hidden_states_run(make, ids) -> None:
    model, x = make(), ids(2, 5)
    options = {"max_new_tokens": 6, "pad_token_id": 0}
    greedy = model.generate(x, do_sample=False, **options)
    beams = model.generate(x, num_beams=4, do_sample=False, **options)

    def score(sequence: torch.Tensor) -> torch.Tensor:
        logs = model(sequence).logits[:, :-1].log_softmax(-1)
        return logs.gather(-1, sequence[:, 1:, None])[:, 4:, 0].sum(-1)

    assert (score(beams) >= score(greedy) - 1e-4).all()
    torch.manual_seed(3)
    one = model.generate(x, do_sample=True, **options)
    torch.manual_seed(3)
    assert torch.equal(model.generate(x, do_sample=True, **options), one)
    states = model(x, output_hidden_states=True).hidden_states
    assert len(states) == 5
    assert torch.equal(states[0], model.model.embed_tokens(x))
    assert torch.equal(states[-1], model.model(x).last_hidden_state)


def test_a_lora_adapter_trains_saves_and_opens(tmp_path, make, ids) -> None:
    x = ids(2, 8)
    targets = ["q_proj", "v_proj", "down_proj"]
    model = get_peft_model(make(), LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    before = make()(x).logits
    torch.testing.assert_close(model(x).logits, before)  # an untrained adapter is the identity
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(3):
        model(input_ids=x, labels=x).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = model.eval()(x).logits
    assert (after - before).abs().max() > 1e-3
    assert any("experts.3.down_proj.lora" in name for name, _ in model.named_parameters())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make(), tmp_path)
    torch.testing.assert_close(again(x).logits, after)
    torch.testing.assert_close(again.merge_and_unload()(x).logits, after, rtol=1e-4, atol=1e-4)


def test_xoron_dev_has_the_parameters_of_its_closed_form() -> None:
    config, vocabulary = MoeConfig(), 151643 + 300
    with torch.device("meta"):
        model = XoronMoeForCausalLM(XoronMoeConfig(vocab_size=vocabulary, **config.hf_data()))
    width, inner = 1024, 2048
    swiglu = 3 * width * inner
    moe = (8 + 1) * swiglu + 8 * width
    layers = 12 * (4 * width * width + 2 * width) + 6 * swiglu + 6 * moe
    expected = 2 * vocabulary * width + layers + width
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    kinds = [type(layer.mlp).__name__ for layer in model.model.layers]
    assert kinds == ["SwiGLU", "MoE"] * 6


def test_published_names_and_transformers_names_are_one(tmp_path) -> None:
    config = XoronMoeConfig(num_layers=3, num_heads=2, hidden_size=64, rope_theta=123.0)
    assert (config.num_hidden_layers, config.num_attention_heads) == (3, 2)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 123.0}
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is XoronMoeConfig
    assert _meaning(again) == _meaning(config)
    assert XoronMoeConfig(**MoeConfig().hf_data()).to_dict() == XoronMoeConfig().to_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 30, "num_heads": 4}, "30 is not a multiple of num_heads 4"),
        ({"hidden_size": 12, "num_heads": 4}, "head_dim is 3 .* even"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"num_experts": 4, "num_experts_per_tok": 5}, "num_experts_per_tok 5 exceeds .* 4"),
        ({"num_layers": 3, "moe_layer_freq": 4}, "moe_layer_freq 4 exceeds num_layers 3"),
        ({"num_layers": 0}, "num_layers.*greater than or equal to 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MoeConfig.parse(changes)
    with pytest.raises(ConfigError, match=message):
        XoronMoeConfig(**changes)


def test_a_rotary_type_it_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigError, match="rope_type 'linear'"):
        XoronMoeConfig(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4})
