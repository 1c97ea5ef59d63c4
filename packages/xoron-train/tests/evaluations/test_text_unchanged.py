"""Proves that `text-unchanged` sees any change of the text model and none of new rows, against a
base of ours and against the bare transformers model.
"""

from __future__ import annotations

import pytest
import torch

from xoron_core.api import compose, save
from xoron_core.errors import ConfigError, DataError, FolderError, TokenSpaceError
from xoron_train.conversation import Conversation
from xoron_train.evaluations import evaluate_text_unchanged
from xoron_train.evaluations.config import TextUnchangedConfig
from xoron_train.evaluations.text_unchanged import TextUnchanged

TEXTS = [
    Conversation(str(number), [{"role": "user", "content": text}])
    for number, text in enumerate(["one text", "<|user|> is text here", "ä" * 200])
]


def build(backbone="standin-qwen", **slots):
    return compose(
        {
            "name": "text",
            "tokenizer": {"use": "standin-byte"},
            "backbone": {"use": backbone},
            "tokens": {"groups": ["control", "conversation", "multimodal"]},
            **slots,
        }
    )


@pytest.fixture
def pair():
    return build(word={"codec": {"use": "letters"}})


@pytest.mark.parametrize("bare", [False, True])
def test_new_rows_change_nothing_and_anything_else_does(pair, bare, tmp_path):
    model, processor = pair
    if bare:
        model.backbone.model.save_pretrained(tmp_path / "base")
    else:
        save(model, processor, tmp_path / "base")
    size = model.space.text_size
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            module.weight[size:].normal_(std=9.0)
    record = evaluate_text_unchanged(model, processor, TEXTS, base=tmp_path / "base")
    assert record["largest"] == 0
    assert record["changed"] == 0
    assert record["samples"] == 3
    assert record["positions"] == len("one text") + len("<|user|> is text here") + 64
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for name in (n for n, p in model.named_parameters() if n.startswith("slots.backbone")):
        with torch.no_grad():
            parameter = model.get_parameter(name)
            row = parameter[ord("o")] if len(parameter) > size else parameter.view(-1)[:1]
            row.add_(0.5)
        record = evaluate_text_unchanged(model, processor, TEXTS, base=tmp_path / "base")
        assert record["largest"] > 0, name
        model.load_state_dict(before)


def test_thresholds_decide_and_mistakes_are_said(pair, tmp_path):
    model, processor = pair
    save(model, processor, tmp_path / "base")
    with torch.no_grad():
        model.get_input_embeddings().weight[ord("o")].add_(0.5)

    def run(samples=TEXTS, **config):
        evaluation = TextUnchanged(TextUnchangedConfig.parse({"source": "text", **config}))
        record = evaluation.run(model, processor, samples)
        return record, evaluation.checks(record)

    record, (check,) = run(base=str(tmp_path / "base"))
    assert (record["passed"], check.passed, check.at_most) == (False, False, 0.0)
    assert run(base=str(tmp_path / "base"), at_most=1e9)[0]["passed"]
    assert run(base=str(tmp_path / "base"), at_most=None)[1] == []
    with pytest.raises(ConfigError, match="base is not set"):
        run()
    with pytest.raises(FolderError, match="is no model folder"):
        run(base=str(tmp_path / "nothing"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(FolderError, match="cannot be opened as a text model"):
        run(base=str(tmp_path / "other"))
    empty = Conversation("silent", [{"role": "user", "content": [{"type": "word"}]}])
    with pytest.raises(DataError, match="'silent': expected text"):
        run([empty], base=str(tmp_path / "base"))


def test_another_text_base_is_refused(pair, tmp_path):
    save(*build(), tmp_path / "base")
    object.__setattr__(pair[0].space.text, "identity", "another vocabulary")
    with pytest.raises(TokenSpaceError, match="its text base is not this model's"):
        evaluate_text_unchanged(*pair, TEXTS, base=tmp_path / "base")
