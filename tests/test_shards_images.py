"""Proves on real images what tokenised conversations promise: a build that is killed goes on to the
same bytes, its audit passes, and an image's ids decode to what its codec makes of it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import xoron_core

pytest.importorskip("xoron_llm", reason="needs xoron-llm")
pytest.importorskip("xoron_vision", reason="needs xoron-vision")
pytest.importorskip("xoron_train", reason="needs xoron-train")

from PIL import Image  # comes with xoron-vision

from xoron_core.cli import run
from xoron_core.pieces import CodedPiece
from xoron_train.shards.record import read_record
from xoron_train.shards.rows import read_table

COUNT = 60


def talk(n):
    """Number n: an image to read, or to make."""
    image = {"type": "image", "path": f"{n}.png"}
    if n % 2:
        return [{"role": "user", "content": f"draw {n}"}, {"role": "assistant", "content": [image]}]
    return [{"role": "user", "content": [image]}, {"role": "assistant", "content": f"{n}"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sixty images of random blocks, a conversation about each, and an untrained model."""
    folder = tmp_path_factory.mktemp("images")
    for n in range(COUNT):
        blocks = np.random.default_rng(n).integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(blocks.repeat(9, axis=0).repeat(9, axis=1)).save(folder / f"{n}.png")
    lines = [json.dumps({"messages": talk(n)}) + "\n" for n in range(COUNT)]
    (folder / "talks.jsonl").write_text("".join(lines))
    model, processor = xoron_core.compose(
        {
            "tokenizer": {"use": "byte"},
            "backbone": {"use": "xoron-moe", "preset": "tiny", "num_layers": 2},
            "image": {"codec": {"use": "vq-image", "preset": "tiny"}},
        }
    )
    xoron_core.save(model, processor, folder / "model")
    return folder


def line(folder, output):
    return ["-q", "tokens", "build", str(folder / "talks.jsonl"), "-o", str(output),
            "--model", str(folder / "model"), "--shard-size", "2"]  # fmt: skip


def test_a_killed_build_goes_on_to_the_same_bytes(folder):
    assert run(line(folder, folder / "whole")) == 0
    output = folder / "killed"
    program = f"from xoron_core.cli import main; main({line(folder, output)!r})"
    child = subprocess.Popen([sys.executable, "-c", program])
    while child.poll() is None and not list(output.glob("shard-*.parquet")):
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert 0 < len(list(output.glob("shard-*.parquet"))) < COUNT // 2
    assert not (output / "shards.json").exists()
    assert run(line(folder, output)) == 0
    whole, again = (
        {path.name: path.read_bytes() for path in sorted(where.glob("[!.]*"))}
        for where in (folder / "whole", output)
    )
    assert whole == again


def test_its_audit_passes_and_ids_decode_to_what_the_codec_makes_of_an_image(folder, capsys):
    output = folder / "audited"
    assert run(line(folder, output)) == 0
    capsys.readouterr()
    assert run(["tokens", "audit", str(output), "--model", str(folder / "model"), "--json"]) == 0
    found = {check["check"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert all(check["passed"] for check in found.values())
    assert found["decode"]["detail"] == f"{COUNT} media"
    model, processor = xoron_core.load(folder / "model")
    grammar = processor.span_grammar()
    files = [output / shard.file for shard in read_record(output).shards]
    for row in [row for file in files[:6] for row in read_table(file).to_pylist()]:
        (piece,) = (
            piece
            for piece in grammar.parse(torch.tensor(row["input_ids"]))
            if isinstance(piece, CodedPiece)
        )
        image = folder / f"{row['number']}.png"
        codes = model.call("image.codec", "encode", **processor.media_batch("image.codec", [image]))
        assert torch.equal(piece.codes[None], codes.ids)
        metadata = [json.loads(span["metadata"]) for span in row["spans"]]
        assert metadata == codes.metadata == [{"original_size": [36, 45]}]
        assert row["task"] == ("text->image" if row["number"] % 2 else "image->text")
