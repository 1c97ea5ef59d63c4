"""Proves that `siglip` is transformers' own pipeline: from a checkpoint, the same features.

Checkpoints are made on the spot with `save_pretrained`, as the published ones are: a model of two
towers with a preprocessor beside it.
"""

import json
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import (
    Siglip2Config,
    Siglip2ImageProcessorPil,
    Siglip2Model,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers import (
    SiglipConfig as TwoTowerConfig,
)

from xoron_core.components import Context
from xoron_core.errors import ConfigError, FolderError
from xoron_vision.config import SiglipConfig, read_preprocess
from xoron_vision.image import sample_image
from xoron_vision.siglip import SiglipEncoder, resize_positions

TEXT = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "vocab_size": 64}  # fmt: skip
SIZES = [(48, 96), (96, 48), (50, 61), (17, 200), (32, 32)]


def picture(height, width, seed=0):
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encoder(**data):
    config = SiglipConfig.parse(data).resolved()
    torch.manual_seed(0)
    return SiglipEncoder(config, Context("image.encoder")).eval()


def run(part, images):
    processor = pickle.loads(pickle.dumps(part.processor(part.config)))  # noqa: S301 - our own
    items = [processor.load(image) for image in images]
    with torch.no_grad():
        features = part(**processor.collate(items))
    assert features.mask.sum(-1).tolist() == [processor.num_positions(item) for item in items]
    return features


@pytest.fixture
def checkpoint(tmp_path, fixed):
    torch.manual_seed(1)
    config = TwoTowerConfig(text_config=TEXT, vision_config=fixed)
    model = SiglipModel(config).eval()
    model.save_pretrained(tmp_path)
    processor = SiglipImageProcessorPil(
        size={"height": 32, "width": 32}, image_mean=[0.4, 0.5, 0.6], image_std=[0.3, 0.4, 0.5],
        resample=2,
    )  # fmt: skip
    processor.save_pretrained(tmp_path)
    return tmp_path, model, processor


def test_pixels_and_features_are_those_of_transformers_pipeline(checkpoint):
    path, model, processor = checkpoint
    part = encoder(path=str(path))
    part.load_source_weights(torch.Generator())
    images = [picture(*size, seed=i) for i, size in enumerate(SIZES)]
    theirs = processor(images, return_tensors="pt")["pixel_values"]
    own = part.processor(part.config)
    ours = own.collate([own.load(image) for image in images])["pixel_values"]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    with torch.no_grad():
        want = model.vision_model(pixel_values=theirs).last_hidden_state
    got = run(part, images)
    torch.testing.assert_close(got.values, want, rtol=0, atol=1e-5)
    grid = [[i // 4, i % 4] for i in range(16)]
    assert got.positions.tolist() == [grid] * len(images)


@pytest.mark.parametrize("left_out", ["do_rescale", "do_normalize"])
def test_what_a_checkpoint_leaves_out_is_left_out(checkpoint, left_out):
    path, _, processor = checkpoint
    setattr(processor, left_out, False)
    processor.save_pretrained(path)
    part = encoder(path=str(path))
    image = picture(40, 30)
    theirs = processor([image], return_tensors="pt")["pixel_values"][0]
    ours = part.processor(part.config).load(image)["pixel_values"]
    torch.testing.assert_close(torch.from_numpy(ours), theirs, rtol=1e-5, atol=1e-5)


def test_a_preprocessor_that_is_merely_not_cached_is_not_taken_for_absent(monkeypatch, tmp_path):
    """Offline with a cached config.json alone, how pixels are normalised would be a guess."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"preprocessor_config\.json cannot be fetched"):
        read_preprocess("someone/tower")


def test_the_towers_own_folder_gives_the_same_as_the_model_of_both(checkpoint, tmp_path):
    path, model, _ = checkpoint
    tower = SiglipVisionModel(SiglipVisionConfig(**model.config.vision_config.to_dict()))
    tower.load_state_dict(model.vision_model.state_dict())
    tower.save_pretrained(tmp_path / "tower")
    parts = [encoder(path=str(p)) for p in (path, tmp_path / "tower")]
    for part in parts:
        part.load_source_weights(torch.Generator())
    assert all(map(torch.equal, *(p.state_dict().values() for p in parts)))
    assert parts[1].config.preprocess.resample == "bicubic"  # no preprocessor_config there


def test_other_sizes_interpolate_positions_as_transformers_does(checkpoint):
    path, model, _ = checkpoint
    part = encoder(path=str(path), image_size=[48, 64])
    part.load_source_weights(torch.Generator())
    features = run(part, [picture(40, 40)])
    pixels = part.processor(part.config).load(picture(40, 40))["pixel_values"]
    with torch.no_grad():
        want = model.vision_model(
            pixel_values=torch.from_numpy(pixels)[None], interpolate_pos_encoding=True
        ).last_hidden_state
    torch.testing.assert_close(features.values, want, rtol=0, atol=1e-5)
    assert features.values.shape == (1, 48, 32)
    assert features.positions[0, -1].tolist() == [5, 7]


def test_pixels_that_fill_no_patch_are_left_out(fixed):
    part = encoder(vision_config={**fixed, "image_size": 34})
    assert run(part, [picture(34, 34)]).values.shape == (1, 16, 32)


@pytest.fixture
def native_checkpoint(tmp_path, native):
    torch.manual_seed(1)
    model = Siglip2Model(Siglip2Config(text_config=TEXT, vision_config=native)).eval()
    model.save_pretrained(tmp_path)
    processor = Siglip2ImageProcessorPil(
        patch_size=8, max_num_patches=16, image_mean=[0.4, 0.5, 0.6], image_std=[0.3, 0.4, 0.5],
        resample=3,
    )  # fmt: skip
    processor.save_pretrained(tmp_path)
    return tmp_path, model, processor


def test_native_aspect_is_transformers_naflex(native_checkpoint):
    path, model, processor = native_checkpoint
    part = encoder(path=str(path))
    part.load_source_weights(torch.Generator())
    images = [picture(*size, seed=i) for i, size in enumerate(SIZES)]
    theirs = processor(images, return_tensors="pt")
    with torch.no_grad():
        want = model.vision_model(**theirs).last_hidden_state
    got = run(part, images)
    assert got.mask.sum(-1).tolist() == theirs["pixel_attention_mask"].sum(-1).tolist()
    assert len(set(got.mask.sum(-1).tolist())) > 1
    for row, valid, other in zip(got.values, got.mask, want, strict=True):
        torch.testing.assert_close(row[valid], other[: valid.sum()], rtol=0, atol=1e-5)
    for (h, w), positions, valid in zip(
        theirs["spatial_shapes"].tolist(), got.positions, got.mask, strict=True
    ):
        assert positions[valid].tolist() == [[i // w, i % w] for i in range(h * w)]


def test_padding_of_a_native_batch_changes_no_valid_feature(native):
    part = encoder(vision_config=native)
    images = [picture(*size, seed=i) for i, size in enumerate(SIZES)]
    together = run(part, images)
    for image, row, valid in zip(images, together.values, together.mask, strict=True):
        torch.testing.assert_close(row[valid], run(part, [image]).values[0], rtol=0, atol=1e-5)
    processor = part.processor(part.config)
    batch = processor.collate([processor.load(image) for image in images])
    padding = ~batch["pixel_attention_mask"].bool()
    batch["pixel_values"] = batch["pixel_values"].masked_fill(padding[..., None], 50.0)
    with torch.no_grad():
        changed = part(**batch)
    assert torch.equal(changed.values[changed.mask], together.values[together.mask])


def test_padding_of_a_native_batch_changes_no_gradient(native):
    part = encoder(vision_config=native)
    processor = part.processor(part.config)
    items = [processor.load(picture(*size, seed=i)) for i, size in enumerate(SIZES)]
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))

    def learn(items):
        batch = processor.collate(items)
        pixels = batch["pixel_values"].requires_grad_(True)
        features = part(**batch)
        (features.values[features.mask] @ direction).square().sum().backward()
        return pixels.grad, batch["pixel_attention_mask"].bool()

    with_padding, mask = learn(items)
    together = {name: p.grad.clone() for name, p in part.named_parameters()}
    part.zero_grad()
    alone = [learn([item])[0][0] for item in items]
    assert not mask.all()
    assert not with_padding[~mask].any()
    for row, valid, one in zip(with_padding, mask, alone, strict=True):
        torch.testing.assert_close(row[valid], one, rtol=1e-4, atol=1e-4)
    for name, parameter in part.named_parameters():  # the sum over images, each alone
        # Softmax does not see what is added to all keys: their bias has no gradient but rounding.
        assert parameter.grad.abs().max() > 1e-2 or name.endswith("k_proj.bias")
        torch.testing.assert_close(together[name], parameter.grad, rtol=1e-4, atol=1e-3)


def test_a_fixed_image_is_the_same_alone_and_beside_others(fixed):
    part = encoder(vision_config=fixed)
    images = [picture(*size, seed=i) for i, size in enumerate(SIZES)]
    together = run(part, images).values
    for image, row in zip(images, together, strict=True):
        torch.testing.assert_close(run(part, [image]).values[0], row, rtol=0, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["fixed", "native"])
def test_layers_read_rows_that_are_rows_in_memory(request, kind):
    """Else every layer copies them; see the benchmark."""
    part = encoder(vision_config=request.getfixturevalue(kind))
    seen = []
    part.tower.encoder.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    run(part, [picture(40, 40), picture(30, 50)])
    assert seen[0].shape[0] == 2
    assert seen[0].is_contiguous()


@pytest.mark.parametrize("max_patches", [4, 16, 64, 100])
def test_every_image_stays_within_the_patches_and_near_its_aspect(native, max_patches):
    part = encoder(vision_config=native, max_patches=max_patches)
    for seed, (height, width) in enumerate([(64, 64), (30, 90), (500, 20), (1, 1), (3000, 2000)]):
        features = run(part, [picture(height, width, seed)])
        h, w = (int(n) + 1 for n in features.positions[0].amax(0))
        assert h * w == features.mask.sum() <= max_patches
        if h > 1 and w > 1:
            assert (h - 1) / w < height / width < h / (w - 1)


@pytest.mark.parametrize(
    ("side", "shapes"), [(4, [[4, 4], [2, 8], [1, 13]]), (16, [[3, 5], [20, 7]])]
)
def test_resized_positions_are_torchs_antialiased_interpolation(side, shapes):
    table = torch.randn(side, side, 6, generator=torch.Generator().manual_seed(0))
    longest = max(h * w for h, w in shapes) + 3
    got = resize_positions(table, torch.tensor(shapes), longest)
    for row, (h, w) in zip(got, shapes, strict=True):
        want = F.interpolate(
            table.permute(2, 0, 1)[None], size=(h, w), mode="bilinear", antialias=True
        )
        torch.testing.assert_close(row[: h * w], want[0].flatten(1).T, rtol=0, atol=1e-5)
        assert not row[h * w :].any()


def test_so400m_has_the_published_size():
    config = SiglipConfig.parse({"vision_config": _preset("siglip-so400m")["vision_config"]})
    with torch.device("meta"):
        part = SiglipEncoder(config.resolved(), Context("image.encoder"))
        features = part(pixel_values=torch.zeros(2, 3, 384, 384))
        whole = SiglipVisionModel(SiglipVisionConfig(**config.tower))
    E, inner, layers = 1152, 4304, 27
    block = 4 * (E * E + E) + 2 * E * inner + inner + E + 4 * E
    want = layers * block + (3 * 14 * 14 + 1) * E + 729 * E + 2 * E
    assert sum(p.numel() for p in part.parameters()) == want == 412_987_248
    assert sum(p.numel() for p in whole.parameters()) == 428_225_600  # with the pooling head
    assert features.values.shape == (2, 729, 1152)
    assert part.processor(part.config).num_positions({}) == 729


def test_a_damaged_or_foreign_checkpoint_is_refused_by_name(checkpoint, tmp_path):
    path, _, _ = checkpoint
    part = encoder(path=str(path))
    (path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(FolderError, match="cannot be loaded"):
        part.load_source_weights(torch.Generator())
    (path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ConfigError, match="model_type 'bert', expected one of siglip"):
        SiglipConfig.parse({"path": str(path)}).resolved()
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        SiglipConfig.parse({"path": str(tmp_path.parent)}).resolved()


def test_missing_weights_are_named(fixed, tmp_path):
    from safetensors.torch import load_file, save_file

    SiglipVisionModel(SiglipVisionConfig(**fixed)).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    gone = next(name for name in weights if "layers.1.mlp.fc2.weight" in name)
    del weights[gone]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FolderError, match=r"lacks 1 weights.*layers\.1\.mlp\.fc2\.weight"):
        encoder(path=str(tmp_path)).load_source_weights(torch.Generator())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "needs path"),
        ({"vision_config": {"model_type": "vit"}}, "model_type is 'vit'"),
        ({"vision_config": {"model_type": "siglip2_vision_model"}, "image_size": 8}, "max_patches"),
        ({"vision_config": {"model_type": "siglip_vision_model"}, "max_patches": 8}, "image_size"),
    ],
)
def test_configs_that_make_no_sense_say_what_to_write(data, message):
    with pytest.raises(ConfigError, match=message):
        SiglipConfig.parse(data)


def test_a_native_tower_builds_and_runs_on_the_meta_device_and_resets_after_a_load(fixed, native):
    with torch.device("meta"):
        part = SiglipEncoder(SiglipConfig.parse({"vision_config": native}), Context("x"))
        assert part(**part.dummy_batch()).values.shape == (1, 4, 32)
    part = encoder(vision_config=fixed)
    want = run(part, [Image.fromarray(sample_image(0, 1))]).values
    part.tower.embeddings.position_ids.zero_()
    assert not torch.equal(run(part, [Image.fromarray(sample_image(0, 1))]).values, want)
    part.reset_buffers()
    assert torch.equal(run(part, [Image.fromarray(sample_image(0, 1))]).values, want)


def _preset(name):
    from importlib import resources

    import yaml

    return yaml.safe_load(
        resources.files("xoron_vision").joinpath(f"presets/{name}.yaml").read_text()
    )
