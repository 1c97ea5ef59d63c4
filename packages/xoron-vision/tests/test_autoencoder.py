"""Proves that `kl-image` is the published KL autoencoder: diffusers' numbers from its folders, a
stored scale, pixels mapped once, a posterior with the closed-form divergence."""

import json
import pickle

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file

import xoron_core
from xoron_core.components import Context
from xoron_core.errors import ConfigError, DataError, FolderError
from xoron_core.folder import load_slot
from xoron_vision.autoencoder.config import KlImageConfig
from xoron_vision.autoencoder.kl_image import KlImage
from xoron_vision.image import load_image, sample_image

SLOT = "image.autoencoder"
ALONE = {"name": "codec", "image": {"autoencoder": {"use": "kl-image", "preset": "tiny"}}}
SMALL = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (16, 32, 32),
    "layers_per_block": 2,
    "norm_num_groups": 8,
    "scaling_factor": 0.36,
    "shift_factor": 0.11,
}
FAMILIES = {
    "4 channels": {"latent_channels": 4},
    "16 channels": {
        "latent_channels": 16,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "no attention": {"latent_channels": 4, "mid_block_add_attention": False},
    "means and deviations": {
        "latent_channels": 4,
        "latents_mean": [0.1, 0.2, 0.3, 0.4],
        "latents_std": [1.0, 2.0, 3.0, 4.0],
    },
}


def folder_of(path, **config):
    """A folder as diffusers writes it, its weights moved off their start."""
    torch.manual_seed(0)
    theirs = AutoencoderKL(**SMALL | config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    theirs.save_pretrained(path)
    return theirs


def part_of(**data):
    config = KlImageConfig.parse(data).resolved()
    torch.manual_seed(1)
    return KlImage(config, Context(SLOT)).eval()


def loaded(path, **data):
    part = part_of(path=str(path), image_size=None, **data)
    part.load_source_weights(torch.Generator())
    return part


@pytest.fixture
def pixels():
    return 2 * torch.rand(2, 3, 24, 40, generator=torch.Generator().manual_seed(0)) - 1


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_weights_of_a_diffusers_folder_give_diffusers_numbers(family, tmp_path, pixels):
    theirs = folder_of(tmp_path, **FAMILIES[family])
    ours = loaded(tmp_path)
    want = theirs.encode(pixels).latent_dist
    mean, log_variance = ours.posterior(pixels)
    torch.testing.assert_close(mean, want.mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(log_variance, want.logvar, rtol=0, atol=1e-5)
    reconstruction = theirs.decode(want.mean).sample
    assert reconstruction.abs().max() > 1.5  # so that a clamp would show
    output = ours(pixels)
    torch.testing.assert_close(output["reconstruction"], reconstruction, rtol=0, atol=2e-5)
    latents = ours.encode(pixels)
    if "latents_std" in FAMILIES[family]:
        shift, deviation = (
            torch.tensor(FAMILIES[family][name]).view(4, 1, 1)
            for name in ("latents_mean", "latents_std")
        )
        scaled = (want.mean - shift) * 0.36 / deviation
    else:
        scaled = (want.mean - 0.11) * 0.36
    torch.testing.assert_close(latents, scaled, rtol=0, atol=1e-5)
    images = ours.decode(latents)
    torch.testing.assert_close(images, (reconstruction / 2 + 0.5).clamp(0, 1), rtol=0, atol=2e-5)


@torch.no_grad()
def test_the_older_spelling_of_the_attention_is_read_too(tmp_path, pixels):
    theirs = folder_of(tmp_path, latent_channels=4)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(file)
    renamed = {}
    for name, tensor in weights.items():
        for new, old in older.items():
            name = name.replace(new, old)
        renamed[name] = tensor
    assert renamed.keys() - weights.keys()
    save_file(renamed, file)
    want = theirs.encode(pixels).latent_dist.mean
    torch.testing.assert_close(loaded(tmp_path).posterior(pixels)[0], want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("preset", "parameters"), [("sd", 83_653_863), ("flux", 83_819_683)])
def test_the_published_shapes_have_their_published_sizes(preset, parameters):
    composition = {"name": "x", "image": {"autoencoder": {"use": "kl-image", "preset": preset}}}
    with torch.device("meta"):
        model, _ = xoron_core.compose(composition)
        part = model.part(SLOT)
        config = part.config
        theirs = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=config.channels,
            layers_per_block=config.layers_per_block,
            latent_channels=config.latent_channels,
            use_quant_conv=config.quant_conv,
            use_post_quant_conv=config.post_quant_conv,
        )
        latents = part.encode(torch.zeros(1, 3, 256, 192))
    assert sum(p.numel() for p in part.parameters()) == parameters
    assert sum(p.numel() for p in theirs.parameters()) == parameters
    assert latents.shape == (1, config.latent_channels, 32, 24)


def test_a_composition_of_a_folder_carries_its_sizes_scale_and_weights(tmp_path, pixels):
    folder_of(tmp_path / "vae", latent_channels=4)
    slot = {"use": "kl-image", "path": str(tmp_path / "vae"), "image_size": None}
    model, processor = xoron_core.compose({"name": "x", "image": {"autoencoder": slot}})
    want = loaded(tmp_path / "vae").encode(pixels)
    assert torch.equal(model.call(SLOT, "encode", pixel_values=pixels), want)
    xoron_core.api.save(model, processor, tmp_path / "model")
    (tmp_path / "vae").rename(tmp_path / "gone")
    again, _ = xoron_core.load(tmp_path / "model")
    assert torch.equal(again.call(SLOT, "encode", pixel_values=pixels), want)


def test_a_folder_that_does_not_fit_is_refused_by_name(tmp_path):
    folder_of(tmp_path, latent_channels=4)
    with pytest.raises(ConfigError, match=r"latent_channels is 16 here and 4 in"):
        part_of(path=str(tmp_path), latent_channels=16)
    with pytest.raises(ConfigError, match=r"nowhere.*cannot be read.*hf download"):
        part_of(path=str(tmp_path / "nowhere"))
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["decoder.mid_block.resnets.1.conv2.bias"]
    save_file(weights, file)
    with pytest.raises(FolderError, match=r"'decoder\.mid\.2\.conv2\.bias'.*got none"):
        loaded(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"_class_name": "AutoencoderTiny"}, "expected AutoencoderKL"),
        ({"act_fn": "gelu"}, "use diffusers-image"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ConfigError, match=message):
            part_of(path=str(tmp_path))


# the scale


def test_measured_latents_have_unit_deviation_and_the_scale_is_saved_with_the_weights(tmp_path):
    model, processor = xoron_core.compose(ALONE)
    part = model.part(SLOT)
    batches = [
        processor.media_batch(SLOT, [sample_image(seed, 1) for seed in seeds])
        for seeds in (range(6), range(6, 9))
    ]
    together = torch.cat([batch["pixel_values"] for batch in batches])
    with torch.no_grad():
        before = part.encode(together)
        recovered = part.decode(before)
    model.call(SLOT, "measure_scale", batches)
    with torch.no_grad():
        after = part.encode(together)
    assert (before.std() - 1).abs() > 0.05
    for channel in after.unbind(1):
        assert abs(float(channel.mean())) < 1e-4
        assert abs(float(channel.std(correction=0)) - 1) < 1e-4
    torch.testing.assert_close(part.decode(after), recovered, rtol=0, atol=1e-5)
    xoron_core.api.save(model, processor, tmp_path)
    for again in (xoron_core.load(tmp_path)[0].part(SLOT), load_slot(tmp_path, SLOT).eval()):
        assert torch.equal(again.latent_scale.scale, part.latent_scale.scale)
        assert torch.equal(again.encode(together), part.encode(together))
        assert torch.equal(again.decode(after), part.decode(after))
    half, _ = xoron_core.load(tmp_path, dtype=torch.bfloat16)
    assert half.part(SLOT).decoder.conv_in.weight.dtype == torch.bfloat16
    assert torch.equal(half.part(SLOT).latent_scale.scale, part.latent_scale.scale)


def test_a_scale_is_not_measured_on_nothing():
    part = part_of(channels=[8, 8], norm_groups=2)
    with pytest.raises(DataError, match="no latents to measure"):
        part.measure_scale([])
    with torch.no_grad():
        part.quant_conv.weight.zero_()
    with pytest.raises(DataError, match=r"channels \[0, 1, 2, 3\] are the same everywhere"):
        part.measure_scale([{"pixel_values": torch.rand(2, 3, 8, 8)}])


# the posterior


def test_mode_by_default_and_samples_of_the_posterior_under_a_generator():
    part = part_of(channels=[8, 8], norm_groups=2, latent_scale=2.0, latent_shift=0.5)
    pixels = (torch.rand(1, 3, 4, 4) * 2 - 1).expand(20_000, -1, -1, -1)
    with torch.no_grad():
        mean, log_variance = part.posterior(pixels[:1])
        drawn = part.encode(pixels, sample=torch.Generator().manual_seed(0))
        again = part.encode(pixels, sample=torch.Generator().manual_seed(0))
        mode = part.encode(pixels[:1])
    assert torch.equal(drawn, again)
    torch.testing.assert_close(mode, 2 * (mean - 0.5))
    deviation = 2 * torch.exp(0.5 * log_variance)
    assert ((drawn.mean(0) - mode[0]).abs() / deviation < 0.04).all()
    assert ((drawn.std(0) / deviation - 1).abs() < 0.03).all()


def test_training_samples_and_evaluation_does_not(pixels):
    part = part_of(channels=[8, 8], norm_groups=2)
    with torch.no_grad():
        assert torch.equal(part(pixels)["reconstruction"], part(pixels)["reconstruction"])
        part.train()
        first, other = part(pixels), part(pixels)
    assert torch.equal(first["mean"], other["mean"])
    assert not torch.equal(first["reconstruction"], other["reconstruction"])


def test_the_losses_are_the_published_objective_per_colour_value(pixels):
    part = part_of(channels=[8, 8], norm_groups=2, kl_weight=0.01)
    output = part(pixels)
    terms = part.aux_losses(output, {"pixel_values": pixels})
    posterior = torch.distributions.Normal(output["mean"], torch.exp(0.5 * output["log_variance"]))
    unit = torch.distributions.Normal(torch.tensor(0.0), torch.tensor(1.0))
    nats = torch.distributions.kl_divergence(posterior, unit).sum()
    error = (output["reconstruction"] - pixels).abs().sum()
    torch.testing.assert_close(terms["kl"].sum, 0.01 * nats)
    torch.testing.assert_close(terms["kl"].metrics["nats"][0], nats)
    torch.testing.assert_close(terms["pixel"].sum, error)
    total = sum(term.sum / term.count for term in terms.values())
    torch.testing.assert_close(total, (error + 0.01 * nats) / pixels.numel())


def test_counts_are_known_before_the_forward_pass_and_splitting_a_batch_changes_no_gradient():
    model, processor = xoron_core.compose(ALONE)
    pixels = processor.media_batch(SLOT, [sample_image(i, 1) for i in range(3)])["pixel_values"]
    # Without the posterior's noise, which differs from draw to draw.
    model.part(SLOT).quant_conv.weight.data[4:] = 0
    model.part(SLOT).quant_conv.bias.data[4:] = -60
    model.train()

    def gradient(*pieces):
        model.zero_grad()
        batches = [{"media": {SLOT: {"pixel_values": piece}}} for piece in pieces]
        totals = {}
        for batch in batches:
            for name, count in model.loss_counts(batch).items():
                totals[name] = totals.get(name, 0) + count
        assert set(totals) == {f"{SLOT}/pixel", f"{SLOT}/kl"}
        for batch in batches:
            losses = model(**batch).losses
            assert {k: float(v.count) for k, v in losses.items()} == {
                k: float(v) for k, v in model.loss_counts(batch).items()
            }
            sum(term.sum / totals[name] for name, term in losses.items()).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    whole, split = gradient(pixels), gradient(pixels[:1], pixels[1:])
    assert whole.abs().max() > 1e-3
    torch.testing.assert_close(split, whole, rtol=1e-4, atol=1e-5)


def test_the_decoder_gets_a_gradient_where_an_image_is_clamped(pixels):
    part = part_of(channels=[8, 8], norm_groups=2)
    part.decoder.conv_out.bias.data.fill_(9.0)  # far beyond white
    output = part(pixels)
    assert (output["reconstruction"] > 1).all()
    assert (part.decode(part.encode(pixels)) == 1).all()
    part.aux_losses(output, {"pixel_values": pixels})["pixel"].sum.backward()
    assert all(p.grad is not None and p.grad.any() for p in part.decoder.conv_out.parameters())
    assert part.encoder.conv_in.weight.grad.any()


# pixels


def test_pixels_are_mapped_once_on_the_way_in_and_once_on_the_way_out():
    processor = pickle.loads(pickle.dumps(KlImage.processor(KlImageConfig())))  # noqa: S301 - ours
    ramp = np.arange(256, dtype=np.uint8).repeat(256).reshape(256, 256)
    image = Image.fromarray(ramp.repeat(3).reshape(256, 256, 3))
    values = torch.from_numpy(processor.load(image)["pixel_values"])
    assert (values.min(), values.max()) == (-1, 1)
    torch.testing.assert_close(values[0, :, 0], torch.arange(256) / 127.5 - 1)
    part = part_of(channels=[8, 8], norm_groups=2)
    part.reconstruct = lambda latents: values[None]  # a perfect decoder
    (decoded,) = part.decode(torch.zeros(1, 4, 128, 128))
    assert np.array_equal(np.asarray(load_image(decoded)), np.asarray(image))


def test_images_are_scaled_to_cover_the_size_and_their_middle_is_cut_out():
    processor = KlImage.processor(KlImageConfig(image_size=(32, 64)))
    wide = np.zeros((20, 80, 3), np.uint8)
    wide[:, :20], wide[:, 60:] = (255, 0, 0), (0, 0, 255)  # what is cut off
    item = processor.load(Image.fromarray(wide))
    assert item["pixel_values"].shape == (3, 32, 64)
    assert processor.num_positions(item) == 4 * 8
    assert (item["pixel_values"] == -1).mean() > 0.9


def test_own_sizes_are_cut_to_whole_latents_and_batches_are_of_one_size():
    part = part_of(image_size=None, channels=[8, 8, 8, 8], norm_groups=2)
    processor = part.processor(part.config)
    image = np.random.default_rng(0).integers(0, 256, (37, 50, 3), dtype=np.uint8)
    item = processor.load(Image.fromarray(image))
    want = image[2:34, 1:49].astype(np.float32) / 127.5 - 1
    np.testing.assert_allclose(item["pixel_values"], want.transpose(2, 0, 1), atol=1e-6)
    assert part.encode(**processor.collate([item])).shape == (1, 4, 4, 6)
    other = processor.load(Image.fromarray(image[:20]))
    with pytest.raises(DataError, match="32 by 48 and 16 by 48 pixels, expected one size"):
        processor.collate([item, other])
    with pytest.raises(DataError, match="6 by 50 pixels, expected at least 8 by 8"):
        processor.load(Image.fromarray(image[:6]))
    with pytest.raises(DataError, match=r"\(1, 3, 30, 48\), expected .* multiples of 8"):
        part.encode(torch.zeros(1, 3, 30, 48))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"image_size": 100}, "multiple of 8"),
        ({"channels": [100, 200]}, "norm_groups 32"),
        ({"latent_scale": [1.0, 2.0]}, "2 numbers for 4 latent_channels"),
        ({"latent_scale": 0.0}, "greater than 0"),
    ],
)
def test_configs_that_make_no_sense_say_what_to_write(data, message):
    with pytest.raises(ConfigError, match=message):
        KlImageConfig.parse(data)
