"""Proves the image codecs: TiTok's transformer equals torch's own, ids and images belong together,
ids depend neither on the batch nor on a save and load, what does not fit is refused, and a codebook
moves by the statistics of a step and not by a forward pass.
"""

import numpy as np
import pytest
import torch
from torch import nn

import xoron_core
from xoron_core.components import Context
from xoron_core.errors import ConfigError, DataError
from xoron_vision.codec.config import TitokConfig, VqImageConfig
from xoron_vision.codec.titok import TitokFsq
from xoron_vision.codec.vq_image import VqImage
from xoron_vision.image import sample_image

SLOT = "image.codec"
CODECS = ("titok-fsq", "vq-image")
NUM_TOKENS = {"titok-fsq": 16, "vq-image": 64}


def compose(use, **extra):
    torch.manual_seed(0)
    slot = {"use": use, "preset": "tiny", **extra}
    return xoron_core.compose({"name": "x", "image": {"codec": slot}})


def images(count):
    return [sample_image(seed, 1 + seed % 3) for seed in range(count)]


def on_meta(cls, config):
    with torch.device("meta"):
        return cls(config, Context(SLOT))


@torch.no_grad()
def torchs_own(transformer, width, heads):
    """torch's encoder with the weights of ours."""
    layers = []
    for (stream,) in (layer.streams for layer in transformer.layers):
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        rows = (stream.q_proj, stream.k_proj, stream.v_proj)
        layer.self_attn.in_proj_weight.copy_(torch.cat([row.weight for row in rows]))
        layer.self_attn.in_proj_bias.copy_(torch.cat([row.bias for row in rows]))
        layer.self_attn.out_proj.load_state_dict(stream.o_proj.state_dict())
        layer.linear1.load_state_dict(stream.fc1.state_dict())
        layer.linear2.load_state_dict(stream.fc2.state_dict())
        layer.norm1.load_state_dict(stream.norm1.state_dict())
        layer.norm2.load_state_dict(stream.norm2.state_dict())
        layers.append(layer)
    return nn.Sequential(transformer.norm_in, *layers, transformer.norm_out)


def test_titok_equals_torchs_transformer_over_patches_and_latents():
    config = TitokConfig.parse(
        {
            "image_size": [16, 24],
            "patch_size": 8,
            "num_latents": 5,
            "levels": [5, 4, 3],
            "encoder": {"hidden_size": 32, "num_layers": 2, "num_heads": 4},
            "decoder": {"hidden_size": 48, "num_layers": 3, "num_heads": 2},
        }
    )
    torch.manual_seed(0)
    part = TitokFsq(config, Context(SLOT)).eval()
    encoder, decoder = part.encoder, part.decoder
    pixels = torch.randn(2, 3, 16, 24)
    flat = pixels.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).reshape(2, 6, 192)
    patches = flat @ encoder.patches.weight.flatten(1).T + encoder.patches.bias
    latents = encoder.latents.expand(2, -1, -1)
    both = torch.cat([patches + encoder.positions, latents], 1)
    kept = torchs_own(encoder.transformer, 32, 4)(both)[:, 6:]
    torch.testing.assert_close(encoder(pixels), encoder.to_codes(kept))

    codes = part.quantizer(encoder(pixels)).codes
    both = torch.cat(
        [decoder.masks.expand(2, -1, -1), decoder.from_codes(codes) + decoder.positions], 1
    )
    tiles = decoder.to_patches(torchs_own(decoder.transformer, 48, 2)(both)[:, :6])
    tiles = tiles.view(2, 2, 3, 3, 8, 8).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 16, 24)
    torch.testing.assert_close(decoder(codes), decoder.smooth(tiles))
    torch.testing.assert_close(part(pixels)["reconstruction"], decoder(codes))


@pytest.mark.parametrize("use", CODECS)
def test_images_to_ids_and_back(use):
    model, processor = compose(use)
    batch = processor.media_batch(SLOT, [*images(3), np.zeros((40, 70, 3), np.uint8)])
    codes = model.call(SLOT, "encode", **batch)
    assert codes.ids.shape == (4, NUM_TOKENS[use], 1)
    assert codes.ids.dtype == torch.int64
    assert codes.mask.all()
    assert len(codes.ids.unique()) > 10
    # 32 by 32 is the codec's own size.
    sizes = [[32, 32], [32, 64], [32, 96], [40, 70]]
    assert codes.metadata[0] == {}
    assert [entry["original_size"] for entry in codes.metadata[1:]] == sizes[1:]
    decoded = model.call(SLOT, "decode", codes.ids, codes.metadata)
    assert decoded.shape == (4, 3, 32, 32)
    model.eval()
    forward = model.part(SLOT)(**batch)
    torch.testing.assert_close(decoded, ((forward["reconstruction"] + 1) / 2).clamp(0, 1))
    assert torch.equal(forward["ids"], codes.ids[..., 0])
    assert float(decoded.detach().std()) > 0


@pytest.mark.parametrize("use", CODECS)
def test_ids_do_not_depend_on_the_batch(use):
    model, processor = compose(use)
    batch = processor.media_batch(SLOT, images(8))
    whole = model.call(SLOT, "encode", **batch).ids
    for size in (1, 3):
        pieces = [
            model.call(SLOT, "encode", pixel_values=part).ids
            for part in batch["pixel_values"].split(size)
        ]
        assert torch.equal(torch.cat(pieces), whole)
    assert not torch.equal(whole[0], whole[1])


@pytest.mark.parametrize("use", CODECS)
def test_a_model_folder_gives_the_same_ids(use, tmp_path):
    model, processor = compose(use)
    batch = processor.media_batch(SLOT, images(4))
    train(model, batch, steps=2)
    model.save_pretrained(tmp_path)
    again, _ = xoron_core.load(tmp_path)
    ids = [m.eval().call(SLOT, "encode", **batch).ids for m in (model, again)]
    assert torch.equal(*ids)
    decoded = [m.call(SLOT, "decode", ids[0], []) for m in (model, again)]
    assert torch.equal(*decoded)


def train(model, batch, *, steps):
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    model.train()
    for _ in range(steps):
        output = model(media={SLOT: batch})
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.after_optimizer_step({SLOT: output.outputs[SLOT]["statistics"]})


def test_the_codebook_moves_by_statistics_alone():
    model, processor = compose("vq-image")
    batch = processor.media_batch(SLOT, images(4))
    codec = model.part(SLOT).train()
    before = codec.quantizer.codebook.clone()
    output = codec(**batch)
    assert torch.equal(codec.quantizer.codebook, before)
    codec.after_optimizer_step(output["statistics"])
    assert not torch.equal(codec.quantizer.codebook, before)
    entropy = codec.metrics(output["statistics"])["code_entropy"]
    assert 0 < entropy < 1
    assert "statistics" not in codec.eval()(**batch)
    codec.train().requires_grad_(False)
    assert "statistics" not in codec(**batch)


def test_losses_are_what_they_say():
    model, processor = compose("vq-image", pixel_loss="l1")
    batch = processor.media_batch(SLOT, images(3))
    codec = model.part(SLOT).train()
    output = codec(**batch)
    terms = codec.aux_losses(output, batch)
    error = (output["reconstruction"] - batch["pixel_values"]).abs().mean()
    torch.testing.assert_close(terms["pixel"].sum / terms["pixel"].count, error)
    with torch.no_grad():
        hidden = codec.encoder(batch["pixel_values"]).permute(0, 2, 3, 1).flatten(1, 2)
        distance = (hidden - codec.quantizer.lookup(output["ids"])).square().mean()
    term = terms["commitment"]
    torch.testing.assert_close((term.sum / term.count).detach(), 0.25 * distance)
    counts = codec.aux_counts(batch)
    assert {name: float(count) for name, count in counts.items()} == {
        "pixel": 3 * 3 * 32 * 32,
        "commitment": 3 * 64,
    }


@pytest.mark.parametrize("use", CODECS)
def test_ids_and_pixels_that_do_not_fit_are_refused(use):
    model, _ = compose(use)
    T, C = NUM_TOKENS[use], model.part(SLOT).config.num_codes
    ids = torch.zeros(1, T, 1, dtype=torch.int64)
    for wrong in (C, -1):
        with pytest.raises(DataError, match=f"expected 0 to {C - 1}"):
            model.call(SLOT, "decode", ids + wrong, [{}])
    with pytest.raises(DataError, match=f"an image is {T} ids"):
        model.call(SLOT, "decode", ids[:, 1:], [{}])
    with pytest.raises(DataError, match="expected \\(images, 3, 32, 32\\)"):
        model.call(SLOT, "encode", pixel_values=torch.zeros(1, 3, 32, 40))


def test_published_sizes():
    titok = on_meta(TitokFsq, TitokConfig())
    assert titok.quantizer.num_codes == 8192
    assert titok.ranges(titok.config)[0].size == 8192
    assert titok.frame_limits(titok.config) == (256, 256)
    layers = (titok.encoder.transformer.layers, titok.decoder.transformer.layers)
    sizes = [sum(p.numel() for p in side.parameters()) for side in layers]
    # A block of width D has 12 D^2 + 13 D parameters.
    assert sizes == [8 * (12 * 512**2 + 13 * 512), 24 * (12 * 1024**2 + 13 * 1024)]
    vq = on_meta(VqImage, VqImageConfig())
    assert vq.frame_limits(vq.config) == (256, 256)
    assert vq.quantizer.codebook.shape == (16384, 256)


def test_configs_that_make_no_codec_are_refused():
    with pytest.raises(ConfigError, match="image_size is none"):
        TitokConfig.parse({"image_size": None})
    with pytest.raises(ConfigError, match="multiple of 16"):
        VqImageConfig.parse({"image_size": 40})
    with pytest.raises(ConfigError, match="no multiple of num_heads"):
        TitokConfig.parse({"encoder": {"hidden_size": 10, "num_layers": 1, "num_heads": 4}})
    with pytest.raises(ConfigError, match="from 3 to 256"):
        compose("titok-fsq", levels=[8, 2])


def test_other_sizes_are_another_identity():
    identities = {
        config.identity
        for config in (
            TitokConfig(),
            TitokConfig(levels=(16, 8, 8, 8)),
            TitokConfig(image_size=128),
            TitokConfig(num_latents=128),
            VqImageConfig(),
            VqImageConfig(code_dim=8),
        )
    }
    assert len(identities) == 6
    assert TitokConfig(pixel_loss="l2").identity == TitokConfig().identity
