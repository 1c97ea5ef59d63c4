"""Proves that `diffusers-image` is diffusers' own autoencoders, scaled as their configs say."""

import sys

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny

import xoron_core
from xoron_core.errors import ConfigError, PluginError
from xoron_vision.autoencoder.config import DiffusersImageConfig
from xoron_vision.image import sample_image

SLOT = "image.autoencoder"
CLASSES = {
    "kl": (
        AutoencoderKL,
        {
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "block_out_channels": (8, 16),
            "norm_num_groups": 4,
            "scaling_factor": 0.5,
            "shift_factor": 0.1,
        },
        2,
    ),
    "tiny": (
        AutoencoderTiny,
        {
            "encoder_block_out_channels": (8, 8, 8),
            "decoder_block_out_channels": (8, 8, 8),
            "num_encoder_blocks": (1, 1, 1),
            "num_decoder_blocks": (1, 1, 1),
            "scaling_factor": 0.5,
            "shift_factor": 0.1,
        },
        4,
    ),
    "dc": (
        AutoencoderDC,
        {
            "latent_channels": 4,
            "encoder_block_types": "ResBlock",
            "decoder_block_types": "ResBlock",
            "encoder_block_out_channels": (8, 8, 16),
            "decoder_block_out_channels": (8, 8, 16),
            "encoder_layers_per_block": (1, 1, 1),
            "decoder_layers_per_block": (1, 1, 1),
            "encoder_qkv_multiscales": ((), (), ()),
            "decoder_qkv_multiscales": ((), (), ()),
            "scaling_factor": 0.5,
        },
        4,
    ),
}


@pytest.mark.parametrize("kind", CLASSES)
@torch.no_grad()
def test_a_folder_gives_diffusers_numbers_and_is_carried_by_the_model(kind, tmp_path):
    cls, config, factor = CLASSES[kind]
    torch.manual_seed(0)
    theirs = cls(**config).eval()
    theirs.save_pretrained(tmp_path / "source")
    slot = {"use": "diffusers-image", "path": str(tmp_path / "source"), "image_size": 32}
    model, processor = xoron_core.compose({"name": "x", "image": {"autoencoder": slot}})
    batch = processor.media_batch(SLOT, [sample_image(seed, 1) for seed in range(2)])
    found = theirs.encode(batch["pixel_values"], return_dict=False)[0]
    raw = found if isinstance(found, torch.Tensor) else found.mode()
    want = (raw - config.get("shift_factor", 0.0)) * 0.5
    latents = model.call(SLOT, "encode", **batch)
    torch.testing.assert_close(latents, want, rtol=0, atol=1e-6)
    assert latents.shape[2:] == (32 // factor, 32 // factor)
    images = theirs.decode(raw, return_dict=False)[0]
    decoded = model.call(SLOT, "decode", latents)
    torch.testing.assert_close(decoded, (images / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)
    xoron_core.api.save(model, processor, tmp_path / "model")
    (tmp_path / "source").rename(tmp_path / "gone")
    again, _ = xoron_core.load(tmp_path / "model")
    assert torch.equal(again.call(SLOT, "encode", **batch), latents)
    assert not any(p.requires_grad for p in again.parameters())


def test_without_diffusers_the_line_that_installs_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    slot = {"use": "diffusers-image", "preset": "tiny"}
    with pytest.raises(PluginError, match=r"pip install 'xoron-vision\[diffusers\]'"):
        xoron_core.compose({"name": "x", "image": {"autoencoder": slot}})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "needs path"),
        ({"network": {"_class_name": "VQModel"}}, "expected one of AutoencoderKL"),
        ({"network": {"_class_name": "AutoencoderKL"}}, "names neither block_out_channels"),
    ],
)
def test_configs_that_make_no_sense_say_what_to_write(data, message):
    with pytest.raises(ConfigError, match=message):
        DiffusersImageConfig.parse(data)
