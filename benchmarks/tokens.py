"""Tokenisation with one and with two workers: conversations and images per second, and the ratio.

A table of conversations about PNG images of 64 by 64 pixels, shown or made, becomes ids of an
untrained tiny `vq-image` codec: read, hashed, laid out, encoded and written as `xoron tokens build`
does it. Seconds are of the wall, because workers are processes. What starting two of them takes is
measured apart, on two conversations, so that the speed-up is given with it and without. Both sides
are checked to write the same bytes.

    hatch run bench tokens
    hatch run bench tokens --conversations 8000

Footgun: let nothing else run, least of all on a machine with two cores.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

import xoron_core
from benchmarks.harness import Report, arguments, compare
from xoron_train.data.config import SourceConfig
from xoron_train.shards.build import build
from xoron_train.shards.record import ShardsRecord, read_record
from xoron_train.shards.rows import read_table

ONE, TWO, START = "1 worker", "2 workers", "2 workers, start alone"


def compose(folder: Path) -> None:
    """Writes the model folder: a codec, a byte tokenizer, and a backbone that is never opened."""
    model, processor = xoron_core.compose(
        {
            "name": "tokens",
            "tokenizer": {"use": "byte"},
            "backbone": {"use": "xoron-moe", "preset": "tiny", "num_layers": 2},
            "image": {"codec": {"use": "vq-image", "preset": "tiny"}},
        }
    )
    xoron_core.save(model, processor, folder)


def write_talks(folder: Path, count: int) -> Path:
    """A table whose even conversations show an image and whose odd ones make one."""
    lines = []
    for number in range(count):
        rng = np.random.default_rng(number)
        blocks = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(blocks.repeat(4, axis=0).repeat(4, axis=1)).save(folder / f"{number}.png")
        image, text = [{"type": "image", "path": f"{number}.png"}], f"number {number}"
        asked, said = (text, image) if number % 2 else (image, text)
        talk = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        lines.append(json.dumps({"messages": talk}) + "\n")
    path = folder / "talks.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    return path


def tokenise(folder: Path, *, workers: int, limit: int, shard_size: int) -> None:
    """Builds from nothing."""
    output = folder / f"shards-{workers}-{limit}"
    shutil.rmtree(output, ignore_errors=True)
    source = SourceConfig(kind="conversations", path=str(folder / "talks.jsonl"))
    model = folder / "model"
    build(source, output, model=model, limit=limit, shard_size=shard_size, workers=workers)


def images(folder: Path, record: ShardsRecord) -> int:
    """How many media the rows hold."""
    tables = (read_table(folder / shard.file) for shard in record.shards)
    return sum(len(spans) for table in tables for spans in table["spans"].to_pylist())


def rates(report: Report, conversations: int, media: int) -> dict[str, dict[str, float]]:
    """Per second, and how much faster than one worker, by side; the last without its start."""
    seconds = {name: report.sides[name].seconds for name in (ONE, TWO)}
    beyond = seconds[TWO] - report.sides[START].seconds
    if beyond > 0:  # in a build that is all start the difference is noise
        seconds[f"{TWO}, started"] = beyond
    return {
        name: {
            "conversations_per_second": conversations / taken,
            "images_per_second": media / taken,
            "speedup": seconds[ONE] / taken,
        }
        for name, taken in seconds.items()
    }


def main() -> int:
    """Prints the rates of both sides."""
    parser = arguments("Tokenisation with one and with two workers.", rounds=3)
    parser.add_argument("--conversations", type=int, default=4000, help="(default: %(default)s)")
    options = parser.parse_args()
    conversations = 24 if options.smoke else options.conversations
    size = max(1, conversations // 8)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        compose(folder / "model")
        write_talks(folder, conversations)
        run = partial(tokenise, folder, limit=conversations, shard_size=size)
        sides = {
            ONE: partial(run, workers=1),
            TWO: partial(run, workers=2),
            START: partial(run, workers=2, limit=2, shard_size=1),
        }
        report = compare(
            sides,
            rounds=1 if options.smoke else options.rounds,
            warmup=0 if options.smoke else 1,
            clock=time.perf_counter,
        )
        output = folder / f"shards-1-{conversations}"
        record = read_record(output)
        if record != read_record(folder / f"shards-2-{conversations}"):
            raise SystemExit("one worker and two wrote different shards; the times say nothing")
        media = images(output, record)
    found = rates(report, conversations, media)
    if options.json:
        print(json.dumps({"rates": found, "time": asdict(report)}, indent=2))
        return 0
    print(f"{conversations} conversations, {media} images, {record.positions} ids\n")
    print(f"{'':18}  {'conversations/s':>15}  {'images/s':>9}  {'speed-up':>8}")
    for name, rate in found.items():
        print(f"{name:18}  " + "  ".join(
            f"{value:{width}.2f}" for value, width in zip(rate.values(), (15, 9, 8), strict=True)
        ))  # fmt: skip
    print(f"\n{report.table()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
