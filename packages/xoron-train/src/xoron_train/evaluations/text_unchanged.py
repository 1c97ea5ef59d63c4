"""Are text logits what they were? A model against the text model that it came from.

New vocabulary rows must not cost what the text model knew. Both models read the same ids of plain
text, without a chat template, whose markers may be new rows; their logits over the ids of the text
base are compared number by number.

The record:

    samples     texts that were compared
    positions   ids in them
    largest     the largest difference of two logits
    changed     share of the positions whose best id of the text base is another one
    passed      where there is a gate

Footgun: two models on different devices, or in different dtypes, differ by rounding; the base is
brought to the device and the dtype of the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from xoron_core.errors import ConfigError, DataError, FolderError, TokenSpaceError, XoronError
from xoron_core.hf import XoronModel  # importing it also lets our folders open as theirs do
from xoron_train.conversation import Conversation
from xoron_train.evaluations.base import Check, Evaluation
from xoron_train.evaluations.config import TextUnchangedConfig
from xoron_train.evaluations.interventions import judging

if TYPE_CHECKING:
    from xoron_core.processor import XoronProcessor

Logits = Callable[[Tensor], Tensor]


class TextUnchanged(Evaluation):
    """The evaluation `text-unchanged`."""

    config: TextUnchangedConfig

    def run(
        self, model: XoronModel, processor: XoronProcessor, samples: Sequence[Conversation]
    ) -> dict[str, Any]:
        """See `evaluate_text_unchanged`; with a gate the record says whether it is passed."""
        if self.config.base is None:
            raise ConfigError(
                "text-unchanged: base is not set; name the folder of the text model that this model"
                " came from (xoron gate ... --base DIR)"
            )
        record = evaluate_text_unchanged(
            model, processor, samples, base=self.config.base, max_length=self.config.max_length
        )
        checks = self.checks(record)
        return record | ({"passed": all(check.passed for check in checks)} if checks else {})

    def checks(self, record: Mapping[str, Any]) -> list[Check]:
        """The largest difference, if there is a gate."""
        most = self.config.at_most
        if most is None:
            return []
        return [Check("largest difference", record["largest"], record["samples"], at_most=most)]

    def suits(self, sample: Conversation) -> bool:
        """Whether it holds text."""
        return bool(text_of(sample).strip())


def evaluate_text_unchanged(
    model: XoronModel,
    processor: XoronProcessor,
    samples: Sequence[Conversation],
    *,
    base: str | Path,
    max_length: int = 64,
) -> dict[str, Any]:
    """Compares the logits of two models over the ids of the text base.

    Nothing of the model is changed, not its mode and not the random state of torch either.

    Args:
        model: on any device, in any mode.
        processor: of the model.
        samples: conversations whose text is read; their media are left out.
        base: folder of the text model: one of ours, or a causal language model of transformers.
        max_length: ids of a text; a longer one is cut.

    Returns:
        The record that this module describes, without `passed`.

    Raises:
        FolderError: if the base cannot be opened.
        TokenSpaceError: if its text base is another one.
        DataError: if a sample holds no text.
        XoronError: if a logit is not finite.
    """
    size = _text_size(model)
    reference = _open(base, model, size)
    largest, changed, positions = 0.0, 0, 0
    with judging(model, seed=0):
        for sample in samples:
            ids = processor.encode_text(text_of(sample))[:max_length]
            if not ids:
                raise DataError(f"conversation {sample.name!r}: expected text, and it holds none")
            row = torch.tensor([ids], device=model.device)
            ours = model(input_ids=row, use_cache=False).logits[0, :, :size]
            theirs = reference(row)[0, :, :size]
            apart = float((ours.float() - theirs.float()).abs().max())
            if not math.isfinite(apart):
                raise XoronError(f"the logits on conversation {sample.name!r} are not finite")
            largest = max(largest, apart)
            changed += int((ours.argmax(-1) != theirs.argmax(-1)).sum())
            positions += len(ids)
    return {
        "samples": len(samples),
        "positions": positions,
        "largest": largest,
        "changed": changed / max(1, positions),
    }


def text_of(sample: Conversation) -> str:
    """All text of a conversation, message by message."""
    texts = []
    for message in sample.messages:
        content = message.get("content") or ""
        parts = [content] if isinstance(content, str) else content
        texts += [part if isinstance(part, str) else part.get("text", "") for part in parts]
    return "\n".join(text for text in texts if text)


def _text_size(model: XoronModel) -> int:
    if model.space is None or not model.space.text_size:
        raise TokenSpaceError(
            "text-unchanged: this model has no text base, so there is no text to have changed"
        )
    return model.space.text_size


def _open(folder: str | Path, model: XoronModel, size: int) -> Logits:
    """The base: ids (1, N) to logits (1, N, V).

    Raises:
        FolderError, TokenSpaceError: as `evaluate_text_unchanged`.
    """
    if not (Path(folder) / "config.json").is_file():
        raise FolderError(f"{folder}: is no model folder (it has no config.json)")
    try:
        opened: Any = AutoModelForCausalLM.from_pretrained(
            str(folder), local_files_only=True, dtype=model.dtype
        )
    except (OSError, ValueError) as error:
        raise FolderError(f"{folder}: cannot be opened as a text model ({error})") from None
    if isinstance(opened, XoronModel):
        texts = [None if m.space is None else m.space.text for m in (model, opened)]
        if texts[0] != texts[1]:
            raise TokenSpaceError(
                f"{folder}: its text base is not this model's, so their logits are of different"
                " ids; name the model that this one came from"
            )
    elif (rows := opened.get_output_embeddings().weight.shape[0]) < size:
        raise TokenSpaceError(
            f"{folder}: has {rows} rows and this model a text base of {size} ids; name the model"
            " that this one came from"
        )
    opened.to(model.device).eval()
    return lambda ids: opened(input_ids=ids, use_cache=False).logits
