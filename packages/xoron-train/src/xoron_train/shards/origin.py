"""What of a model folder decides ids: its token space, its tokenizer, its codecs and their weights.

Footgun: a codec's range in the token space says what its sizes are, not which weights it has. Two
trainings of one codec have one token space and different ids, so shards name the weights too.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

from xoron_core.composer.composition import Slot, load_factory
from xoron_core.composer.parts import typed_config
from xoron_core.errors import ConfigError
from xoron_core.fill import codec_range_names
from xoron_core.identity import folder_weights, identities
from xoron_core.plugins import registry
from xoron_core.processor import XoronProcessor
from xoron_core.tokens.space import TokenSpace
from xoron_train.shards.record import CodecRecord, MarkerRecord


class Origin(NamedTuple):
    """What of a model folder decides ids.

    Attributes:
        space: its token space.
        tokenizer_hash: of its tokenizer and chat template.
        codecs: by slot.
        markers: by modality.
    """

    space: TokenSpace
    tokenizer_hash: str
    codecs: dict[str, CodecRecord]
    markers: dict[str, MarkerRecord]


def origin(folder: str | Path) -> Origin:
    """Reads it from a model folder; no part is built.

    Raises:
        ConfigError: if the model takes no text.
        FolderError, TokenSpaceError: if files are missing, damaged or inconsistent.
    """
    processor = XoronProcessor.from_pretrained(folder)
    if processor.tokenizer is None or processor.space is None:
        raise ConfigError(
            f"{folder}: this model has no tokenizer, so conversations have no ids; compose one in"
            " (it comes with: pip install xoron-llm)"
        )
    codecs = processor.composition.of_kind("codec")
    weights = identities(folder_weights(folder, codecs))
    parts = [
        json.loads(processor.tokenizer.backend_tokenizer.to_str()),
        processor.tokenizer.chat_template,
    ]
    text = json.dumps(parts, sort_keys=True).encode()
    return Origin(
        processor.space,
        f"sha256:{hashlib.sha256(text).hexdigest()}",
        {slot: _codec(found, weights[slot]) for slot, found in codecs.items()},
        {
            name: MarkerRecord(
                begin=found.begin,
                end=found.end,
                gen_begin=found.gen_begin,
                gen_end=found.gen_end,
                placeholder=found.placeholder,
            )
            for name, found in processor.modalities.items()
        },
    )


def _codec(slot: Slot, weights: str) -> CodecRecord:
    installed = registry()
    codec = load_factory(installed, installed.component(slot.kind, slot.use))
    config = typed_config(installed, slot)
    return CodecRecord(
        use=f"{slot.kind}/{slot.use}",
        config=slot.data()["config"],
        weights=weights,
        name=codec_range_names(codec, config)[0].rpartition(":")[0],
        frames=codec.frame_limits(config),
    )
