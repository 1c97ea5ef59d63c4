"""Proves that `hf-vq` gives the ids and images of transformers' own tokenizers, from config data
and from folders: the tokenizer's own and that of a whole model; and that what is missing is told.
"""

import json

import pytest
import torch
import transformers
from safetensors.torch import save_file

import xoron_core
from xoron_core.errors import ConfigError, DataError, FolderError
from xoron_vision.codec.hf_config import HfVqConfig
from xoron_vision.image import sample_image

SLOT = "image.codec"
SHARED = {"latent_channels": 4, "base_channels": 32, "channel_multiplier": [1, 1]}
NETWORKS = {
    "emu3_vqgan": {"codebook_size": 64, "embed_dim": 4, "hidden_size": 32, "num_res_blocks": 1},
    "janus_vqgan": {"num_embeddings": 64, "embed_dim": 4, "num_patches": 16, "num_res_blocks": 1},
    "chameleon_vqgan": {"num_embeddings": 64, "embed_dim": 4, "num_res_blocks": 1},
}
CLASSES = {
    "emu3_vqgan": ("Emu3VQVAE", "Emu3VQVAEConfig"),
    "janus_vqgan": ("JanusVQVAE", "JanusVQVAEConfig"),
    "chameleon_vqgan": ("ChameleonVQVAE", "ChameleonVQVAEConfig"),
}
KINDS = tuple(NETWORKS)
NORM = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.3, 0.4], "rescale_factor": 1 / 255}


def theirs(kind):
    torch.manual_seed(1)
    model, config = (getattr(transformers, name) for name in CLASSES[kind])
    return model(config(**SHARED, **NETWORKS[kind])).eval()


@torch.no_grad()
def their_ids(network, kind, pixels):
    if kind == "emu3_vqgan":
        sizes = torch.tensor([[32, 32]] * len(pixels))
        return torch.stack(network.encode(pixels, sizes).image_tokens).flatten(1)
    return network.encode(pixels).image_tokens.view(len(pixels), -1)


def compose(**slot):
    slot = {"use": "hf-vq", "image_size": 32, **slot}
    return xoron_core.compose({"name": "x", "image": {"codec": slot}})


def media(processor):
    return processor.media_batch(SLOT, [sample_image(seed, 1) for seed in range(5)])


@pytest.fixture(params=["own", "whole"])
def write(request, tmp_path):
    """Writes a tokenizer's folder, of its own or inside a whole model's."""

    def folder(network, kind):
        if request.param == "own":
            network.save_pretrained(tmp_path)
        else:
            weights = {f"model.vqmodel.{n}": t.clone() for n, t in network.state_dict().items()}
            save_file({**weights, "lm_head.weight": torch.zeros(2, 2)}, tmp_path / "w.safetensors")
            data = {
                "model_type": kind.removesuffix("_vqgan"),
                "vq_config": network.config.to_dict(),
            }
            (tmp_path / "config.json").write_text(json.dumps(data))
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(NORM))
        return tmp_path

    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_images_are_transformers_own(kind, write, tmp_path):
    network = theirs(kind)
    model, processor = compose(path=str(write(network, kind)))
    batch = media(processor)
    codes = model.call(SLOT, "encode", **batch)
    expected = their_ids(network, kind, batch["pixel_values"])
    assert torch.equal(codes.ids[..., 0], expected)
    assert len(expected.unique()) > 5
    assert not any(p.requires_grad for p in model.parameters())
    mean, std = (torch.tensor(NORM[name]).view(3, 1, 1) for name in ("image_mean", "image_std"))
    colours = (batch["pixel_values"] * std + mean) * 255
    assert abs(colours - colours.round()).max() < 1e-2
    model.save_pretrained(tmp_path / "model")
    again, _ = xoron_core.load(tmp_path / "model")
    assert torch.equal(again.call(SLOT, "encode", **batch).ids, codes.ids)
    if kind == "chameleon_vqgan":
        with pytest.raises(DataError, match="no decoder of Chameleon"):
            model.call(SLOT, "decode", codes.ids, codes.metadata)
        return
    shape = (len(expected), 16, 16) if kind == "emu3_vqgan" else (len(expected), 256)
    with torch.no_grad():
        pixels = network.decode(expected.view(shape))
    decoded = model.call(SLOT, "decode", codes.ids, codes.metadata)
    torch.testing.assert_close(decoded, (pixels * std + mean).clamp(0, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_random_weights_from_a_config(kind):
    model, processor = compose(network={"model_type": kind, **SHARED, **NETWORKS[kind]})
    codes = model.call(SLOT, "encode", **media(processor))
    assert codes.ids.shape == (5, 256, 1)
    assert model.part(SLOT).ranges(model.part(SLOT).config)[0].size == 64


def test_what_is_missing_or_does_not_fit_is_told(tmp_path):
    with pytest.raises(ConfigError, match="hf-vq needs path"):
        HfVqConfig.parse({})
    with pytest.raises(ConfigError, match="expected one of emu3_vqgan"):
        HfVqConfig.parse({"network": {"model_type": "vqgan"}})
    with pytest.raises(ConfigError, match="set image_size: 384"):
        HfVqConfig.parse({"network": {"model_type": "janus_vqgan", "num_patches": 24}})
    with pytest.raises(ConfigError, match="cannot be read"):
        compose(path=str(tmp_path))
    theirs("emu3_vqgan").config.save_pretrained(tmp_path)
    with pytest.raises(FolderError, match=r"no \*.safetensors"):
        compose(path=str(tmp_path))
    save_file({"quantize.embedding.weight": torch.zeros(64, 5)}, tmp_path / "w.safetensors")
    with pytest.raises(FolderError, match="copy the"):
        compose(path=str(tmp_path))
