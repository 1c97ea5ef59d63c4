"""The checks that open a model: whose shards they are, whether it would make the same ids again,
and whether they decode.

Footgun: `retokenise` compares bit for bit. On another kind of machine a rounding may turn a code
where a number lies between two; the finding then says how few ids differ.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from xoron_core.descriptors import resolve
from xoron_core.errors import XoronError
from xoron_core.fill import codec_range_names
from xoron_core.flattening import CodeLayout
from xoron_core.testing.tensors import named, not_finite
from xoron_train.data.order import permutation
from xoron_train.shards.findings import Check, TableCheck
from xoron_train.shards.inputs import Chunk, Inputs, chunks
from xoron_train.shards.origin import Origin
from xoron_train.shards.record import Settings
from xoron_train.shards.rows import Row
from xoron_train.shards.tokenize import Rules, Tokenization

_COMPARED = ("split", "digests", "learned", "spans")


class TokenizerCheck(Check):
    """The model's tokenizer and chat template are those that the rows were made with."""

    name = "tokenizer"

    def __init__(self, settings: Settings, model: Origin) -> None:
        super().__init__()
        if model.tokenizer_hash != settings.tokenizer_hash:
            self.fault(
                "the model",
                f"has {model.tokenizer_hash}, rows were made with {settings.tokenizer_hash}; build"
                " them again, or name their model",
            )


class CodecCheck(Check):
    """The model's codecs are those that the ids were made with, weights included."""

    name = "codecs"

    def __init__(self, settings: Settings, model: Origin) -> None:
        super().__init__()
        for slot, made_with in settings.codecs.items():
            found = model.codecs.get(slot)
            if found is None:
                self.fault(slot, "the model has no codec there")
            elif (found.use, found.config) != (made_with.use, made_with.config):
                self.fault(slot, f"is {found.use} with another config than ids were made with")
            elif found.weights != made_with.weights:
                self.fault(
                    slot, f"has the weights {found.weights}, ids were made with {made_with.weights}"
                )


class Retokenise(TableCheck):
    """Some blocks of conversations, tokenised again, give the rows that are there.

    Args:
        settings: of the shards.
        inputs: the source, as it is now.
        tokenization: of the model.
        samples: conversations, at least; whole blocks are taken.
    """

    name = "retokenise"

    def __init__(
        self, settings: Settings, inputs: Inputs, tokenization: Tokenization, *, samples: int
    ) -> None:
        super().__init__()
        self.settings = settings
        self.inputs = inputs
        self.tokenization = tokenization
        self.compared = self.ids = 0
        every = chunks(settings.parts, settings.shard_size)
        blocks = [(c, block) for c in every for block in c.blocks(settings.batch_size)]
        count = -(-samples // settings.batch_size)
        order = permutation(len(blocks), "retokenise")[:count].tolist()
        self.chosen = [blocks[index] for index in sorted(order)]

    def feed(self, table: pa.Table, shard: int) -> None:
        for chunk, block in self.chosen:
            if chunk.number == shard:
                numbers = table["number"]
                inside = pc.and_(
                    pc.greater_equal(numbers, block.start), pc.less(numbers, block.stop)
                )
                rows = {row["number"]: row for row in table.filter(inside).to_pylist()}
                self._compare(chunk, block, rows)

    def passes(self) -> str:
        return f"{self.compared} conversations, {self.ids} ids"

    def _compare(self, chunk: Chunk, block: range, rows: dict[int, dict[str, Any]]) -> None:
        settings = self.settings
        rules = Rules(settings.eval_fraction, settings.max_length)
        with self.tokenization.one_thread():
            again = self.tokenization.block(self.inputs, chunk.part, block, rules=rules).rows
        made = {row.number: row for row in again}
        for number in block:
            new, old = made.get(number), rows.get(number)
            if new is None and old is None:
                continue
            if new is None or old is None:
                self.fault(
                    f"{chunk.part}[{number}]",
                    "has a row, but cannot be tokenised now" if new is None else "has no row",
                )
                continue
            self._compare_row(new, old)

    def _compare_row(self, new: Row, old: dict[str, Any]) -> None:
        self.compared += 1
        ids, before = new.input_ids.tolist(), old["input_ids"]
        self.ids += len(ids)
        if ids != before:
            pairs = list(zip(ids, before, strict=False))
            differing = sum(one != other for one, other in pairs) + abs(len(ids) - len(before))
            self.fault(new.name, f"{differing} of {len(ids)} ids come out otherwise")
            return
        again = {**new._asdict(), "learned": new.learned.tolist()}
        if other := [column for column in _COMPARED if again[column] != old[column]]:
            self.fault(new.name, f"{', '.join(other)} come out otherwise")


class Decode(TableCheck):
    """Some media, decoded, are finite and take as many codes again.

    Args:
        tokenization: of the model, for its codecs.
        shards: how many there are.
        samples: media, about as many of each shard.
    """

    name = "decode"

    def __init__(self, tokenization: Tokenization, *, shards: int, samples: int) -> None:
        super().__init__()
        self.tokenization = tokenization
        self.share = -(-samples // max(1, shards))
        self.decoded = 0

    def feed(self, table: pa.Table, shard: int) -> None:
        left = self.share
        for index in permutation(table.num_rows, "decode", shard).tolist():
            for span in table["spans"][index].as_py():
                if left:
                    left -= 1
                    ids = table["input_ids"][index].values.to_numpy()
                    self._decode(table["name"][index].as_py(), ids, span)

    def passes(self) -> str:
        return f"{self.decoded} media"

    def _decode(self, name: str, ids: np.ndarray, span: dict[str, Any]) -> None:
        codec = self.tokenization.codecs.get(span["slot"])
        if codec is None:
            self.fault(name, f"the model has no codec in slot {span['slot']!r}")
            return
        self.decoded += 1
        names = codec_range_names(type(codec), codec.config)
        layout = CodeLayout(self.tokenization.space, names)
        body = ids[span["start"] : span["start"] + span["length"]].astype(np.int64)
        try:
            codes = layout.unflatten(torch.from_numpy(body))
            with torch.no_grad():
                (medium,) = codec.decode(
                    codes[None].to(self.tokenization.device), [json.loads(span["metadata"])]
                )
            self._judge(name, span["slot"], medium, frames=len(codes))
        except (XoronError, ValueError) as error:
            self.fault(name, f"its medium at {span['start']} does not decode: {error}")

    def _judge(self, name: str, slot: str, medium: Any, *, frames: int) -> None:
        if isinstance(medium, Tensor):
            medium = medium.detach().cpu()
        if off := not_finite(named(medium, slot)):
            self.fault(name, f"its medium of {slot} decodes to numbers that are not finite: {off}")
            return
        processor = self.tokenization.processor
        modality = processor.modalities[processor.composition.slots[slot].modality]
        own = processor.processors[slot]
        again = own.num_positions(own.load(resolve(modality.load)(medium)))
        if again != frames:
            self.fault(
                name, f"its medium of {slot} has {frames} frames but decodes to one of {again}"
            )
