"""Proves both resamplers: against transformers, against torch's attention, and prefix by prefix."""

import pytest
import torch
from torch import nn

from xoron_core.nn.resampler import CrossAttentionResampler, PerceiverResampler

E, D, K, H = 24, 32, 6, 4


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def noisy(module):
    """Moves every parameter off its initial value, so that norms and biases count."""
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.add_(0.1 * draw(*parameter.shape, seed=i))
    return module.eval()


def perceiver(input_size=D, **changes):
    torch.manual_seed(0)
    options = {"num_latents": K, "num_layers": 2, "num_heads": H, "num_kv_heads": 2, **changes}
    return noisy(PerceiverResampler(input_size, D, **options))


def cross(**changes):
    torch.manual_seed(0)
    options = {"num_latents": K, "num_layers": 2, "num_heads": H, "head_dim": 8, **changes}
    return noisy(CrossAttentionResampler(E, D, **options))


def test_the_general_form_is_idefics2s():
    from transformers.models.idefics2.configuration_idefics2 import Idefics2PerceiverConfig
    from transformers.models.idefics2.modeling_idefics2 import Idefics2PerceiverResampler

    ours = perceiver()
    config = Idefics2PerceiverConfig(
        hidden_size=D, resampler_n_latents=K, resampler_depth=2, resampler_n_heads=H,
        resampler_head_dim=D // H, num_key_value_heads=2, rms_norm_eps=1e-6, hidden_act="silu",
    )  # fmt: skip
    theirs = Idefics2PerceiverResampler(config).eval()
    renamed = {"self_attn.": "", "input_latents_norm": "latents_norm"}
    renamed |= {"input_context_norm": "context_norm", "post_attention_layernorm": "mlp_norm"}
    state = {}
    for name in theirs.state_dict():
        mine = name
        for old, new in renamed.items():
            mine = mine.replace(old, new)
        state[name] = ours.state_dict()[mine]
    assert len(state) == len(ours.state_dict())
    theirs.load_state_dict(state)
    context, mask = draw(2, 9, D), torch.arange(9) < torch.tensor([[9], [5]])
    want = theirs(context, attention_mask=mask.long())
    torch.testing.assert_close(ours(context, mask), want, rtol=0, atol=1e-5)


def test_the_cross_attention_form_written_with_torchs_attention():
    ours = cross()
    context, mask = draw(2, 9, E), torch.arange(9) < torch.tensor([[9], [5]])
    latents = ours.latents.expand(2, -1, -1)
    seen = nn.functional.linear(context, ours.input_proj.weight, ours.input_proj.bias)
    for layer in ours.layers:
        attention = nn.MultiheadAttention(D, H, batch_first=True)
        parts = (layer.q_proj, layer.k_proj, layer.v_proj)
        attention.load_state_dict(
            {
                "in_proj_weight": torch.cat([p.weight for p in parts]),
                "in_proj_bias": torch.cat([p.bias for p in parts]),
                "out_proj.weight": layer.o_proj.weight,
                "out_proj.bias": layer.o_proj.bias,
            }
        )
        normed = layer.norm1(latents)
        latents = latents + attention(normed, seen, seen, key_padding_mask=~mask)[0]
        hidden = nn.functional.gelu(layer.fc1(layer.norm2(latents)))
        latents = latents + layer.fc2(hidden)
    torch.testing.assert_close(ours(context, mask), latents, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("L", "D_in", "size"), [(64, 1152, 512), (16, 20, 32)])
def test_parameters_of_the_published_connector_by_closed_form(L, D_in, size):
    with torch.device("meta"):
        made = CrossAttentionResampler(
            D_in, size, num_latents=L, num_layers=2, num_heads=8, head_dim=size // 8
        )
    attention, feed = 4 * (size * size + size), 8 * size * size + 5 * size
    want = L * size + (D_in + 1) * size + 2 * (attention + feed + 4 * size)
    assert sum(p.numel() for p in made.parameters()) == want
    assert (L, D_in, size) != (64, 1152, 512) or want == 6_927_872


@pytest.mark.parametrize("make", [lambda: perceiver(E, nested=True), cross])
def test_a_prefix_of_a_full_run_is_a_run_of_the_prefix(make):
    resampler = make()
    context, mask = draw(2, 9, E), torch.arange(9) < torch.tensor([[9], [5]])
    whole = resampler(context, mask)
    for count in (1, 3, K):
        part = resampler(context, mask, num_latents=count)
        assert part.shape == (2, count, D)
        torch.testing.assert_close(part, whole[:, :count], rtol=0, atol=1e-5)
    plain = perceiver(E)
    apart = plain(context, mask, num_latents=3) - plain(context, mask)[:, :3]
    assert apart.abs().max() > 1e-3  # without nesting latents see those behind them


@pytest.mark.parametrize("make", [lambda: perceiver(E), lambda: perceiver(E, nested=True), cross])
def test_padding_changes_nothing(make):
    resampler = make()
    context = draw(2, 9, E)
    mask = torch.arange(9) < torch.tensor([[9], [5]])
    padded = resampler(context, mask)
    torch.testing.assert_close(padded[1:], resampler(context[1:, :5]), rtol=0, atol=1e-5)
    changed = context.masked_fill(~mask[..., None], 100.0)
    assert torch.equal(resampler(changed, mask), padded)
