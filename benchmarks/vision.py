"""Images to a backbone's positions: `model.encode` against transformers' own parts.

Both sides take the same eight images and have the same weights, in fp32: a SigLIP tower without its
pooling head, then a resampler to 64 positions, which over there is Idefics2's. They are checked to
agree. Every ratio is transformers' time over ours in the same round, so above 1 we are faster.
Peak memory is that of one run beyond the weights, each side in a process of its own.

    hatch run bench vision
    hatch run bench vision --rows full
    hatch run bench vision --threads 2

Footguns:
- One thread counts CPU seconds. More threads, or a GPU, count wall seconds: let nothing else run.
- Only wall seconds show that `model.encode` loads the next image while the tower runs.
- `--only` chooses rows by a part of their name.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    Siglip2ImageProcessorPil,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.image_utils import load_image
from transformers.models.idefics2.configuration_idefics2 import Idefics2PerceiverConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2PerceiverResampler

import xoron_core
from benchmarks.harness import (
    arguments,
    compare,
    machine_floors,
    peak_resident_megabytes,
    say,
    synchronised,
)
from xoron_core.model import XoronModel

THEIRS, OURS = "transformers", "xoron"
FIXED, NATIVE = "siglip_vision_model", "siglip2_vision_model"
SHAPES = ((480, 640), (640, 480), (512, 512), (300, 900)) * 2
PHOTO = (2000, 3000)
SMALL = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12,
         "num_attention_heads": 6, "patch_size": 16}  # fmt: skip
SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16,
          "image_size": 384, "patch_size": 14}  # fmt: skip
TINY = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4,
        "num_attention_heads": 3, "image_size": 64, "patch_size": 8}  # fmt: skip
ROWS: dict[str, dict[str, Any]] = {
    "fixed, 196 patches": {"model_type": FIXED, "image_size": 224, **SMALL},
    "native aspect, 256 patches": {"model_type": NATIVE, "num_patches": 256, **SMALL},
    "JPEG files, 196 patches": {"model_type": FIXED, "image_size": 224, **SMALL},
    "so400m-wide, 2 layers": {"model_type": FIXED, "num_hidden_layers": 2, **SO400M},
    "tiny": {"model_type": FIXED, **TINY},
}
FULL = {"so400m": {"model_type": FIXED, "num_hidden_layers": 27, **SO400M}}
FULL_IMAGES = 2
PROJECTED = 1024


def compose(tower: dict[str, Any]) -> XoronModel:
    """Our side: the tower and a perceiver of 64 positions."""
    encoder = {"use": "siglip", "vision_config": tower}
    heads = tower["num_attention_heads"]
    projector = {"use": "perceiver", "num_heads": heads, "output_size": PROJECTED}
    model, _ = xoron_core.compose(
        {"image": {"encoder": encoder, "projector": projector}}, plugins="vision"
    )
    return model.eval()


class Pipeline(nn.Module):
    """The other side: processor, tower and resampler of transformers, then a linear layer.

    Args:
        tower: data of the tower's config.
        ours: `compose(tower)`, whose weights are copied.
    """

    def __init__(self, tower: dict[str, Any], ours: XoronModel) -> None:
        super().__init__()
        data = {key: value for key, value in tower.items() if key != "model_type"}
        data["vision_use_head"] = False
        self.processor: Any
        if tower["model_type"] == NATIVE:
            self.processor = Siglip2ImageProcessorPil(
                patch_size=tower["patch_size"], max_num_patches=tower["num_patches"]
            )
            self.tower: nn.Module = Siglip2VisionModel(Siglip2VisionConfig(**data))
        else:
            side = tower["image_size"]
            self.processor = SiglipImageProcessorPil(size={"height": side, "width": side})
            self.tower = SiglipVisionModel(SiglipVisionConfig(**data))
        width, heads = tower["hidden_size"], tower["num_attention_heads"]
        self.resampler = Idefics2PerceiverResampler(
            Idefics2PerceiverConfig(
                hidden_size=width, resampler_n_latents=64, resampler_depth=2,
                resampler_n_heads=heads, resampler_head_dim=width // heads,
                num_key_value_heads=heads, rms_norm_eps=1e-6, hidden_act="silu",
            )
        )  # fmt: skip
        self.write = nn.Linear(width, PROJECTED)
        projector = ours.part("image.projector").state_dict()
        self.tower.load_state_dict(ours.part("image.encoder").tower.state_dict())
        for name, theirs in (("resampler", self.resampler), ("write", self.write)):
            theirs.load_state_dict(
                {key: projector[f"{name}.{our_name(key)}"] for key in theirs.state_dict()}
            )
        self.eval()

    @torch.no_grad()
    def encode(self, media: list[Any]) -> Tensor:
        """Images or their files to (M, 64, D)."""
        images = [load_image(str(item)) if isinstance(item, Path) else item for item in media]
        batch = self.processor(images, return_tensors="pt").to(self.write.weight.device)
        seen = self.tower(**batch).last_hidden_state
        mask = batch.get("pixel_attention_mask", seen.new_ones(seen.shape[:2], dtype=torch.long))
        projected: Tensor = self.write(self.resampler(seen, attention_mask=mask))
        return projected


def our_name(theirs: str) -> str:
    """What a weight of Idefics2's resampler is called in ours."""
    renamed = {"self_attn.": "", "input_latents_norm": "latents_norm"}
    renamed |= {"input_context_norm": "context_norm", "post_attention_layernorm": "mlp_norm"}
    for old, new in renamed.items():
        theirs = theirs.replace(old, new)
    return theirs


def images_of(row: str, folder: Path) -> list[Any]:
    """Eight images in memory, or files of six million pixels."""
    rng = np.random.default_rng(0)
    count = FULL_IMAGES if row in FULL else len(SHAPES)
    if "JPEG" not in row:
        return [
            Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8))
            for shape in SHAPES[:count]
        ]
    files = [folder / f"{index}.jpg" for index in range(count)]
    for file in files:
        coarse = Image.fromarray(rng.integers(0, 256, (200, 300, 3), dtype=np.uint8))
        coarse.resize(PHOTO[::-1], Image.Resampling.BICUBIC).save(file, quality=90)
    return files


def sides(
    tower: dict[str, Any], device: str
) -> tuple[dict[str, Callable[[list[Any]], Any]], Callable[[list[Any]], float]]:
    """Both sides by name, and the largest difference between their results."""
    ours = compose(tower)
    theirs = Pipeline(tower, ours).to(device)
    ours.to(device)

    def apart(media: list[Any]) -> float:
        return float((theirs.encode(media) - ours.encode(media).values).abs().max())

    return {OURS: ours.encode, THEIRS: theirs.encode}, apart


def peak_memory(side: str, row: str, options: argparse.Namespace) -> float:
    """Megabytes of one run beyond the weights; call it in a fresh process."""
    torch.set_num_threads(options.threads)
    encode = sides(rows(options)[row], options.device)[0][side]
    with tempfile.TemporaryDirectory() as folder:
        media = images_of(row, Path(folder))
        if options.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            encode(media)
            return (torch.cuda.max_memory_allocated() - held) / 2**20
        encode([Image.new("RGB", (8, 8))])  # what a first call allocates and keeps
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
        before = peak_resident_megabytes()
        encode(media)
        return peak_resident_megabytes() - before


def rows(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The chosen towers; with `--smoke` of one narrow layer."""
    chosen = FULL if options.rows == "full" else ROWS
    narrow = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
              "num_attention_heads": 2}  # fmt: skip
    return {
        name: {**tower, **(narrow if options.smoke else {})}
        for name, tower in chosen.items()
        if options.only in name
    }


def measure(row: str, tower: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """One row: images per second, the ratio of times, peak megabytes."""
    wall = options.threads > 1 or options.device == "cuda"
    encoders, apart = sides(tower, options.device)
    with tempfile.TemporaryDirectory() as folder:
        media = images_of(row, Path(folder))
        if (off := apart(media)) > 1e-3:
            raise AssertionError(f"{row}: the sides differ by {off:.3g}")
        report = compare(
            {
                name: synchronised(partial(encode, media), options.device)
                for name, encode in encoders.items()
            },
            rounds=options.rounds,
            warmup=0,  # both have run to be compared
            clock=time.perf_counter if wall else time.process_time,
            floors=machine_floors(smoke=options.smoke, device=options.device),
        )
    theirs = report.sides[THEIRS]
    return {
        "images per second": {
            name: round(len(media) / side.seconds, 2) for name, side in report.sides.items()
        },
        f"{THEIRS} over ours": round(theirs.ratio, 3),
        "quartiles": [round(value, 3) for value in theirs.quartiles],
        "largest difference": float(f"{off:.2g}"),
        "floors": {name: round(value, 1) for name, value in report.floors.items()},
    }


def memory(row: str, options: argparse.Namespace) -> dict[str, Any]:
    """Peak megabytes of both sides."""
    peaks = {}
    for side in (OURS, THEIRS):
        spawned = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=spawned) as pool:
            peaks[side] = pool.submit(peak_memory, side, row, options).result()
    return {
        "peak megabytes": {side: round(peak, 1) for side, peak in peaks.items()},
        "peak over ours": round(peaks[THEIRS] / max(peaks[OURS], 1e-9), 2),
    }


def main() -> int:
    """Runs the benchmark; returns the exit code."""
    parser = arguments(__doc__.splitlines()[0], rounds=7)
    parser.add_argument("--rows", choices=("small", "full"), default="small", help="towers")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", default="", help="rows whose name holds this")
    options = parser.parse_args()
    if options.smoke:
        options.rounds = 1
    torch.set_num_threads(options.threads)
    found: dict[str, Any] = {"threads": options.threads, "device": options.device}
    for row, tower in rows(options).items():
        found[row] = measure(row, tower, options) | memory(row, options)
        say(f"{row}: {json.dumps(found[row])}")
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    for name, result in found.items():
        print(f"{name}: {result if isinstance(result, int | str) else json.dumps(result)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
