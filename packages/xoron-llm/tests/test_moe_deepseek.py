"""xoron-moe with latent attention is transformers' `DeepseekV3ForCausalLM`, logit for logit.

A weight converter both ways gives the same logits within 1e-5 in fp32: with YaRN, with a cache,
with left padding, leading dense layers, both orders of rotary rows and selection biases that
are not zero; and what DeepSeek-V3 cannot express is refused.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from xoron_core.errors import ConfigError
from xoron_llm.moe.convert import from_deepseek_v3, to_deepseek_v3

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
LATENT: dict[str, Any] = {
    "attention": "latent",
    "num_key_value_heads": None,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "moe_layer_freq": 1,
    "moe_intermediate_size": 40,
    "initializer_range": 0.1,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 8,
    "beta_fast": 2.0,
    "beta_slow": 0.2,
}
FORMS: dict[str, dict[str, Any]] = {
    "all-experts": {},
    "one-dense": {"first_k_dense_replace": 1},
    "three-dense": {"first_k_dense_replace": 3, "routed_scaling_factor": 2.5},
    "no-experts": {"use_moe": False},
    "query-latent": {"q_lora_rank": 12, "norm_topk_prob": False},
    "two-shared": {"num_shared_experts": 2, "tie_word_embeddings": True},
    "narrow-value": {"v_head_dim": 12, "num_experts_per_tok": 3},
    "yarn": {"rope_parameters": YARN},
    "yarn-equal-mscales": {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
    "yarn-mscales": {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2}},
}


def _stir(model: torch.nn.Module) -> None:
    """Makes norms and selection biases tell, and the biases change choices."""
    torch.manual_seed(3)
    for name, tensor in model.state_dict().items():
        if "norm" in name:
            tensor.uniform_(0.5, 1.5)
        elif "bias" in name:
            tensor.normal_(std=0.3)


@pytest.fixture(params=FORMS)
def ours(request, make):
    model = make(**LATENT, **FORMS[request.param])
    _stir(model)
    return model


@torch.no_grad()
@pytest.mark.parametrize("interleave", [False, True])
def test_logits_agree_whole_cached_and_left_padded(interleave: bool, ours, ids) -> None:
    theirs = to_deepseek_v3(ours, rope_interleave=interleave).eval()
    x, mask = ids(3, 21), torch.ones(3, 21, dtype=torch.long)
    mask[0, :9] = mask[2, :1] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    valid = mask.bool()
    expected = theirs(x, attention_mask=mask, position_ids=positions).logits
    assert expected.std() > 0.1
    got = ours(x, attention_mask=mask).logits
    torch.testing.assert_close(got[valid], expected[valid], **CLOSE)
    a = ours(x[:, :15], attention_mask=mask[:, :15], use_cache=True)
    b = theirs(
        x[:, :15], attention_mask=mask[:, :15], position_ids=positions[:, :15], use_cache=True
    )
    for n in range(15, 21):
        step, upto = slice(n, n + 1), slice(0, n + 1)
        a = ours(x[:, step], attention_mask=mask[:, upto], past_key_values=a.past_key_values)
        b = theirs(
            x[:, step],
            attention_mask=mask[:, upto],
            position_ids=positions[:, step],
            past_key_values=b.past_key_values,
        )
        torch.testing.assert_close(a.logits, b.logits, **CLOSE)
        torch.testing.assert_close(a.logits, expected[:, step], **CLOSE)


def test_there_and_back_is_bit_equal(ours) -> None:
    for interleave in (False, True):
        again = from_deepseek_v3(to_deepseek_v3(ours, rope_interleave=interleave))
        state = again.state_dict()
        assert state.keys() == ours.state_dict().keys()
        for name, tensor in ours.state_dict().items():
            assert torch.equal(state[name], tensor), name
        unequal = {
            key: (value, getattr(again.config, key))
            for key, value in ours.config.to_dict().items()
            if getattr(again.config, key, None) != value
        }
        # What has no meaning without experts does not come back.
        moe_only = {"moe_layer_freq", "first_k_dense_replace"} if not ours.config.use_moe else set()
        assert set(unequal) <= moe_only | {"dtype", "transformers_version", "architectures"}


@torch.no_grad()
def test_their_own_random_model_runs_here(ids) -> None:
    torch.manual_seed(1)
    config = DeepseekV3Config(
        vocab_size=67,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=6,
        num_experts_per_tok=3,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=16,
        q_lora_rank=20,
        qk_nope_head_dim=10,
        qk_rope_head_dim=6,
        v_head_dim=8,
        initializer_range=0.1,
        rope_parameters={**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    )
    theirs = DeepseekV3ForCausalLM(config).eval()
    _stir(theirs)
    ours, x = from_deepseek_v3(theirs), ids(2, 30)
    torch.testing.assert_close(ours(x).logits, theirs(x).logits, **CLOSE)
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    options |= {"eos_token_id": 66}
    assert torch.equal(ours.generate(x, **options), theirs.generate(x, **options))
    grouped = DeepseekV3Config(**{**config.to_dict(), "n_group": 2, "topk_group": 1})
    with pytest.raises(ConfigError, match="n_group 2 of which 1"):
        from_deepseek_v3(DeepseekV3ForCausalLM(grouped))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": "gqa"}, "attention is 'gqa', expected 'latent'"),
        ({"moe_layer_freq": 2}, "moe_layer_freq is 2, expected 1"),
        ({"use_shared_expert": False}, "there is no shared expert"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ({"mrope_section": (2, 1, 1)}, "mrope_section is set"),
    ],
)
def test_what_it_cannot_express_is_refused(changes: dict, message: str, make) -> None:
    with pytest.raises(ConfigError, match=message):
        to_deepseek_v3(make(**{**LATENT, **changes}))
