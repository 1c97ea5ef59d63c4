"""Proves joint attention against torch's encoder layer, and that each stream uses its own weights.

With one stream, or with the same weights in every stream, the block is
`nn.TransformerEncoderLayer(norm_first=True)` on all positions in one sequence; with different
weights it is written out head by head.
"""

import torch
from torch import nn

from xoron_core.nn.joint_attention import JointBlock
from xoron_core.nn.rope import apply_rotary
from xoron_core.nn.rope_axes import axial_tables

D, H = 32, 4


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def oracle(seed=0):
    torch.manual_seed(seed)
    layer = nn.TransformerEncoderLayer(
        D, H, 4 * D, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer.eval()


def copy_into(stream, layer):
    weights = zip(
        ("q_proj", "k_proj", "v_proj"),
        layer.self_attn.in_proj_weight.chunk(3),
        layer.self_attn.in_proj_bias.chunk(3),
        strict=True,
    )
    state = {}
    for name, weight, bias in weights:
        state |= {f"{name}.weight": weight, f"{name}.bias": bias}
    pairs = {"o_proj": layer.self_attn.out_proj, "fc1": layer.linear1, "fc2": layer.linear2}
    pairs |= {"norm1": layer.norm1, "norm2": layer.norm2}
    for name, module in pairs.items():
        state |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
    stream.load_state_dict(state)


def test_one_stream_is_torchs_encoder_layer_with_and_without_padding():
    layer, block = oracle(), JointBlock(D, H, num_streams=1)
    copy_into(block.streams[0], layer)
    x = draw(2, 7, D)
    mask = torch.arange(7) < torch.tensor([[7], [4]])
    torch.testing.assert_close(block(x)[0], layer(x), rtol=0, atol=1e-5)
    padded = layer(x, src_key_padding_mask=~mask)
    torch.testing.assert_close(block(x, mask=mask)[0][mask], padded[mask], rtol=0, atol=1e-5)
    changed = x.masked_fill(~mask[..., None], 9.0)
    assert torch.equal(block(changed, mask=mask)[0][mask], block(x, mask=mask)[0][mask])


def test_streams_with_the_same_weights_are_one_sequence():
    layer, block = oracle(), JointBlock(D, H, num_streams=2)
    for stream in block.streams:
        copy_into(stream, layer)
    x, y = draw(2, 5, D), draw(2, 3, D, seed=1)
    together = layer(torch.cat((x, y), dim=1))
    torch.testing.assert_close(torch.cat(block(x, y), dim=1), together, rtol=0, atol=1e-5)


def test_a_hidden_stream_leaves_the_other_alone():
    layer, block = oracle(), JointBlock(D, H, num_streams=2)
    copy_into(block.streams[0], layer)
    x, y = draw(2, 5, D), draw(2, 3, D, seed=1)
    mask = torch.tensor([[True] * 5 + [False] * 3]).expand(2, -1)
    torch.testing.assert_close(block(x, y, mask=mask)[0], layer(x), rtol=0, atol=1e-5)
    assert (block(x, y)[0] - layer(x)).abs().max() > 1e-3


def test_different_weights_with_norms_and_positions_head_by_head():
    torch.manual_seed(3)
    block = JointBlock(D, H, num_streams=2, qk_norm_eps=1e-6)
    x, y = draw(1, 4, D), draw(1, 3, D, seed=1)
    rope = axial_tables(draw(1, 4, 2, seed=2) * 5, D // H, theta=100.0)
    got = block(x, y, ropes=(rope, None))

    def unit(t):  # RMSNorm with weight 1
        return t / (t.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()

    made = []
    for member, stream, table in zip(block.streams, (x, y), (rope, None), strict=True):
        normed = member.norm1(stream)
        heads = [p(normed).view(1, -1, H, D // H) for p in (member.q_proj, member.k_proj)]
        heads = [unit(t) for t in heads]
        if table is not None:
            heads = [apply_rotary(t.transpose(1, 2), *table).transpose(1, 2) for t in heads]
        made.append((*heads, member.v_proj(normed).view(1, -1, H, D // H)))
    keys, values = (torch.cat([m[i] for m in made], dim=1) for i in (1, 2))
    for member, stream, (q, _, _), out in zip(block.streams, (x, y), made, got, strict=True):
        found = []
        for h in range(H):
            scores = q[0, :, h] @ keys[0, :, h].T / (D // H) ** 0.5
            found.append(scores.softmax(-1) @ values[0, :, h])
        want = stream + member.o_proj(torch.cat(found, dim=-1)[None])
        want = want + member.fc2(nn.functional.gelu(member.fc1(member.norm2(want))))
        torch.testing.assert_close(out, want, rtol=0, atol=1e-5)


def test_what_goes_on_does_not_depend_on_whether_the_others_do():
    torch.manual_seed(0)
    whole = JointBlock(D, H, num_streams=2)
    last = JointBlock(D, H, num_streams=2, num_written=1)
    state = {k: v for k, v in whole.state_dict().items() if k in last.state_dict()}
    last.load_state_dict(state)
    assert set(whole.state_dict()) - set(state) == {
        f"streams.1.{name}.{kind}"
        for name in ("q_proj", "o_proj", "norm2", "fc1", "fc2")
        for kind in ("weight", "bias")
    }
    x, y = draw(2, 5, D), draw(2, 3, D, seed=1)
    (only,) = last(x, y)
    torch.testing.assert_close(only, whole(x, y)[0], rtol=0, atol=1e-6)
    only.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for n, p in last.named_parameters()
               if "k_proj.bias" not in n)  # fmt: skip
