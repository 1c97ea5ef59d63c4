"""Proves the losses beside an autoencoder: a perceptual distance in the tower's own pixels that
moves the autoencoder alone, and a discriminator whose one backward pass is two separate ones."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F
from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

import xoron_core
from xoron_core.errors import CompositionError, ConfigError, DataError, FolderError
from xoron_core.folder import load_slot
from xoron_vision.autoencoder.config import PatchGanConfig, PerceptualConfig
from xoron_vision.autoencoder.patch_gan import Discriminator
from xoron_vision.autoencoder.perceptual import tower_pixels
from xoron_vision.image import load_image, sample_image

SLOT = "image.autoencoder"
CODEC = {"use": "kl-image", "preset": "tiny"}
GAN = {"use": "patch-gan", "preset": "tiny", "weight": 0.25}


def composed(**slots):
    return xoron_core.compose({"name": "x", "image": {"autoencoder": CODEC, **slots}})


def batch_of(processor, *seeds):
    return {"media": {SLOT: processor.media_batch(SLOT, [sample_image(s, 1) for s in seeds])}}


def gradients(part):
    return [p.grad.clone() for p in part.parameters() if p.requires_grad]


@pytest.fixture
def checkpoint(tmp_path, fixed):
    """A SigLIP folder with a normalisation of its own, in a fresh place."""
    torch.manual_seed(3)
    folder = tmp_path / "siglip"
    SiglipVisionModel(SiglipVisionConfig(**fixed)).save_pretrained(folder)
    SiglipImageProcessorPil(
        size={"height": 32, "width": 32}, image_mean=[0.4, 0.5, 0.6], image_std=[0.3, 0.4, 0.5]
    ).save_pretrained(folder)
    return folder


# perceptual


def test_the_tower_sees_the_pixels_that_its_own_processor_makes(checkpoint):
    model, processor = composed(look={"use": "perceptual", "path": str(checkpoint)})
    judge = model.part("image.look").judge()
    own = judge.processor(judge.config)
    image = load_image(sample_image(0, 1))
    want = own.collate([own.load(image)])["pixel_values"]
    pixels = batch_of(processor, 0)["media"][SLOT]["pixel_values"]
    torch.testing.assert_close(tower_pixels(pixels, judge), want, rtol=0, atol=1e-5)
    larger = F.interpolate(pixels, scale_factor=2, mode="nearest")
    assert tower_pixels(larger, judge).shape == want.shape


def test_perceptual_is_the_distance_of_transformers_features_at_the_named_layers(checkpoint):
    look = {"use": "perceptual", "path": str(checkpoint), "layers": [0, 2], "weight": 3.0}
    model, processor = composed(look=look)
    batch = batch_of(processor, 0, 1)
    pixels = batch["media"][SLOT]["pixel_values"]
    other = 0.5 * pixels
    term = model.part("image.look")({SLOT: {"reconstruction": other}}, batch)
    tower = SiglipVisionModel.from_pretrained(checkpoint)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.3, 0.4, 0.5])
    seen = [
        tower(
            pixel_values=((each + 1) / 2 - mean.view(3, 1, 1)) / std.view(3, 1, 1),
            output_hidden_states=True,
        ).hidden_states
        for each in (pixels, other)
    ]
    cosines = [F.cosine_similarity(seen[0][k], seen[1][k], dim=-1).mean(1) for k in (0, 2)]
    want = sum(3.0 * (2 - 2 * cosine) for cosine in cosines) / 2  # squared distance on the sphere
    torch.testing.assert_close(term.sum, want.sum(), rtol=1e-4, atol=1e-5)
    assert term.sum > 1e-3
    assert float(term.count) == 2


def test_perceptual_moves_the_autoencoder_and_never_the_tower():
    tower = {"use": "siglip", "preset": "tiny"}
    model, processor = composed(
        encoder=tower, look={"use": "perceptual", "encoder": "image.encoder"}
    )
    model.train()
    model(**batch_of(processor, 0, 1)).losses["image.look"].sum.backward()
    part, encoder = model.part(SLOT), model.part("image.encoder")
    assert part.decoder.conv_out.weight.grad.abs().max() > 1e-6
    assert part.encoder.conv_in.weight.grad.abs().max() > 1e-6
    assert all(p.requires_grad and p.grad is None for p in encoder.parameters())


def test_a_tower_of_a_path_is_never_saved_and_a_folder_opens_without_it(checkpoint, tmp_path):
    model, processor = composed(look={"use": "perceptual", "path": str(checkpoint)})
    assert not list(model.part("image.look").state_dict())
    xoron_core.api.save(model, processor, tmp_path / "model")
    checkpoint.rename(tmp_path / "gone")
    again, _ = xoron_core.load(tmp_path / "model")
    batch = batch_of(processor, 0)
    media = batch["media"][SLOT]
    for each in (model, again):
        assert torch.equal(each.call(SLOT, "encode", **media), model.call(SLOT, "encode", **media))
    with pytest.raises(ConfigError, match=r"config\.json"):
        again.train()(**batch)


def test_a_judge_that_cannot_judge_is_refused(checkpoint, native):
    with pytest.raises(CompositionError, match=r"'image\.encoder', which holds nothing"):
        composed(look={"use": "perceptual", "encoder": "image.encoder"})
    with pytest.raises(ConfigError, match="NaFlex"):
        composed(
            encoder={"use": "siglip", "vision_config": native},
            look={"use": "perceptual", "encoder": "image.encoder"},
        )
    with pytest.raises(ConfigError, match=r"layers \[9\], but the tower has 0 to 2"):
        composed(look={"use": "perceptual", "path": str(checkpoint), "layers": [9]})
    with pytest.raises(ConfigError, match="either path"):
        PerceptualConfig.parse({})
    for loss in ({"use": "perceptual", "path": str(checkpoint)}, GAN):
        with pytest.raises(CompositionError, match=r"'image\.other'.*there are: image\.autoenc"):
            composed(look={**loss, "of": "image.other"})


# patch-gan


def test_one_backward_pass_is_the_two_of_alternating_training():
    model, processor = composed(gan=GAN)
    model.train()
    batch = batch_of(processor, 0, 1, 2)
    torch.manual_seed(0)
    output = model(**batch)
    term = output.losses["image.gan"]
    part, judge = model.part(SLOT), model.part("image.gan").discriminator
    term.sum.backward(retain_graph=True)
    got = gradients(part), gradients(judge)

    real = batch["media"][SLOT]["pixel_values"]
    fake = output.outputs[SLOT]["reconstruction"]
    model.zero_grad()
    judge.requires_grad_(False)
    (0.25 * -judge(fake)).sum().backward(retain_graph=True)
    generator = gradients(part)
    model.zero_grad()
    judge.requires_grad_(True)
    hinge = F.relu(1 - judge(real)).sum() + F.relu(1 + judge(fake.detach())).sum()
    (0.5 * hinge).backward()
    assert all(p.grad is None for p in part.parameters())
    discriminator = gradients(judge)
    for ours, theirs in zip(got, (generator, discriminator), strict=True):
        assert max(float(g.abs().max()) for g in theirs) > 1e-3
        for one, two in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-6 * max(1, float(two.abs().max())))
    counted = model.loss_counts(batch)["image.gan"]
    assert float(term.count) == float(counted) == judge(real).numel()


def test_the_discriminator_has_the_published_size_and_sees_70_by_70_pixels():
    judge = Discriminator(PatchGanConfig())
    widths = [64, 128, 256, 512]
    want = 16 * 3 * 64 + 64 + 16 * 512 + 1
    want += sum(16 * a * b + 2 * b for a, b in itertools.pairwise(widths))
    assert sum(p.numel() for p in judge.parameters()) == want == 2_765_633
    convolutions = torch.nn.Sequential(
        *(layer for layer in judge.layers if not isinstance(layer, torch.nn.GroupNorm))
    )
    pixels = torch.zeros(1, 3, 256, 256, requires_grad=True)
    convolutions(pixels)[0, 0, 15, 15].backward()
    rows = pixels.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    assert int(rows.max() - rows.min()) + 1 == 70


def test_images_smaller_than_a_patch_are_refused_before_the_forward_pass():
    model, processor = composed(gan={**GAN, "num_layers": 4})
    with pytest.raises(DataError, match=r"\(32, 32\) pixels, expected at least 48"):
        model.loss_counts(batch_of(processor, 0))


def test_without_images_a_discriminator_has_zero_gradients_and_counts_nothing():
    model, _ = composed(gan=GAN)
    loss = model.part("image.gan")
    term = loss({}, {"media": {}})
    term.sum.backward()
    assert float(term.count) == float(loss.count({"media": {}})) == 0
    assert all(not p.grad.any() for p in loss.parameters())


def test_a_discriminator_is_not_in_the_folder_and_starts_anew_in_a_model_that_is_opened(tmp_path):
    model, processor = composed(gan=GAN)
    with torch.no_grad():
        for parameter in model.part("image.gan").parameters():
            parameter.fill_(7.0)
    xoron_core.api.save(model, processor, tmp_path)
    names = [path.name for path in (tmp_path / "slots").iterdir()]
    assert names == ["image.autoencoder-00001.safetensors"]
    again, _ = xoron_core.load(tmp_path)
    assert torch.equal(
        again.part(SLOT).encoder.conv_in.weight, model.part(SLOT).encoder.conv_in.weight
    )
    fresh = again.part("image.gan").discriminator
    for layer in fresh.layers:
        if isinstance(layer, torch.nn.Conv2d):
            deviation = float(layer.weight.detach().std())
            assert math.isclose(deviation, 0.02, rel_tol=0.15)
    with pytest.raises(FolderError, match=r"no slot 'image\.gan'; it has: image\.autoencoder"):
        load_slot(tmp_path, "image.gan")
