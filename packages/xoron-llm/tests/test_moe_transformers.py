"""xoron-moe is at home in transformers.

Auto classes open what it saves, bit for bit, in bf16, on meta and with a device map; beams,
sampling and PEFT adapters work; initial weights are what the config says; sizes that do not fit are
refused.
"""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from xoron_core.errors import ConfigError
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


def test_initial_weights_have_the_declared_spread(sizes) -> None:
    torch.manual_seed(0)
    model = XoronMoeForCausalLM(
        XoronMoeConfig(
            **{**sizes, "hidden_size": 256, "num_experts": 64, "initializer_range": 0.05}
        )
    )
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert abs(parameter.std().item() / 0.05 - 1) < 0.05, name
            assert abs(parameter.mean().item()) < 0.005, name


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
