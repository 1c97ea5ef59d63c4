"""Proves that new vocabulary rows train alone in a composed model, start where they should, and
travel without it: a row delta over its base is the trained model bit for bit, over any other base,
token space or changed file it is refused; the old form is read as data and never run.

The toy plug-in's signal codec brings the new ids.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import peft
import pytest
import torch

import xoron_core
from xoron_core.errors import FolderError, TokenSpaceError, UsageError
from xoron_core.identity import model_weights
from xoron_core.nn.split_rows import SplitLinear
from xoron_core.row_deltas import load_rows, read_rows, save_rows
from xoron_core.rows import draw_rows, merge_rows, new_rows, separate, separate_ids
from xoron_core.sampling import Sampling
from xoron_core.session import Session
from xoron_core.storage import read_tensors, write_tensors

pytestmark = pytest.mark.usefixtures("toy")
tied_or_not = pytest.mark.parametrize("tied", [True, False])
TALK = [{"role": "user", "content": "say something"}]


CODEC = {"codec": {"use": "signal-codec"}}


def composed(tied=False, seed=1, codec=CODEC):
    declared = {
        "tokenizer": {"use": "byte"},
        "backbone": {
            "use": "xoron-moe",
            "preset": "tiny",
            "num_layers": 2,
            "tie_word_embeddings": tied,
        },
        "tokens": {"groups": ["control", "conversation"]},
    }
    signal = {"signal": codec} if codec else {}
    return xoron_core.compose({"name": "m", **declared, **signal}, seed=seed)


def train(model, steps=4):
    """A few steps on ids of all kinds; returns what was trained."""
    model.requires_grad_(False)
    rows = separate(model)
    optimizer = torch.optim.AdamW(rows.values(), lr=0.05, weight_decay=0.1)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(model.space.size, (2, 40), generator=generator)
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return rows


def differing(one, two):
    """Names of the tensors that are not the same bits, and of vocabulary matrices which rows."""
    found = {}
    for name, tensor in one.state_dict().items():
        if not torch.equal(tensor, two.state_dict()[name]):
            found[name] = (tensor != two.state_dict()[name]).flatten(1).any(1).nonzero().flatten()
    return found


@pytest.fixture
def base(tmp_path):
    xoron_core.save(*composed(), tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def delta(tmp_path):
    model, _ = composed()
    train(model)
    save_rows(model, tmp_path / "rows")
    return tmp_path / "rows"


@tied_or_not
def test_only_new_rows_change_and_the_model_saves_as_ever(tied, tmp_path):
    (model, processor), (before, _) = composed(tied), composed(tied)
    names = train(model)
    embedding = "slots.backbone.model.model.embed_tokens.rows"
    assert set(names) == {embedding} if tied else {embedding, "slots.backbone.model.lm_head.rows"}
    new = new_rows(model)
    assert new.tolist() == list(range(256, model.space.size))
    assert torch.equal(separate_ids(model), new)
    changed = differing(model, before)
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in changed} == {
        "embed_tokens",
        "lm_head",
    }
    assert all(rows.tolist() == new.tolist() for rows in changed.values())
    xoron_core.save(model, processor, tmp_path / "whole")
    opened, its_processor = xoron_core.load(tmp_path / "whole")
    assert differing(opened, model) == {}
    ids = torch.randint(model.space.size, (1, 9), generator=torch.Generator().manual_seed(9))
    model.eval()
    one, two = (m(input_ids=ids, use_cache=False).logits for m in (model, opened))
    assert torch.equal(one, two)
    options = {"max_new_tokens": 8, "sampling": Sampling()}
    said = [
        Session(*pair).generate(TALK, **options)[0].text
        for pair in ((model, processor), (opened, its_processor))
    ]
    assert said[0] == said[1]
    merge_rows(model)
    assert separate_ids(model) is None
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, one)


def test_an_adapter_trains_beside_the_rows():
    model, _ = composed()
    backbone = model.need_backbone().model
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), backbone)
    rows = separate(model)
    assert isinstance(backbone.get_output_embeddings(), SplitLinear)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained > set(rows)
    assert all("lora" in name for name in trained - set(rows) if name.startswith("slots.backbone"))
    ids = torch.randint(model.space.size, (2, 20), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert {name.rpartition(".")[2] for name in rows} == {"rows"}
    assert all(grads[name].abs().sum() > 0 for name in rows)
    assert any(grad.abs().sum() > 0 for name, grad in grads.items() if "lora_B" in name)


@tied_or_not
def test_drawn_rows_lie_around_the_mean_and_no_two_are_equal(tied):
    (model, _), (before, _) = composed(tied), composed(tied)
    for one in (model, before):
        one.to(torch.bfloat16)
        with torch.no_grad():  # a mean that is far from nothing
            for name, tensor in one.state_dict().items():
                if name.endswith("embed_tokens.weight"):
                    tensor[:256] += 0.5
    draw_rows(model, seed=3)
    changed = differing(model, before)
    assert all(rows.tolist() == new_rows(model).tolist() for rows in changed.values())
    backbone = model.need_backbone().model
    for module in (backbone.get_input_embeddings(), backbone.get_output_embeddings()):
        old, new = module.weight[:256].float(), module.weight[256:].float()
        assert len(new.unique(dim=0)) == len(new)
        assert (new.mean(0) - old.mean(0)).abs().max() < 0.1 * old.std(0).max()
        spread = (new - old.mean(0)).std() / (old - old.mean(0)).std()
        assert 0.08 < spread.item() < 0.12
    if not tied:
        weights = [m.weight[256:] for m in (backbone.lm_head, backbone.model.embed_tokens)]
        assert not torch.equal(*weights)
    first = weights_of(model).clone()
    draw_rows(model, seed=4)
    assert not torch.equal(weights_of(model), first)
    draw_rows(model, seed=3)
    assert torch.equal(weights_of(model), first)


def weights_of(model):
    return model.get_input_embeddings().weight


def test_described_rows_start_at_the_mean_of_their_words():
    model, processor = composed()
    codec = "xoron-toy/signal-codec:0"
    words = {"<|user|>": "the user speaks", codec: "zzz"}
    draw_rows(model, processor, descriptions=words, noise=1e-6)
    weight, space = weights_of(model), model.space
    user = weight[torch.tensor(list(b"the user speaks"))].mean(0)
    torch.testing.assert_close(weight[space.id_of("<|user|>")], user, rtol=1e-4, atol=1e-6)
    found = space.range(codec)
    expected = weight[ord("z")].expand(found.size, -1)
    torch.testing.assert_close(weight[found.start : found.stop], expected, rtol=1e-4, atol=1e-6)
    assert len(weight[found.start : found.stop].unique(dim=0)) == found.size
    other = weight[space.id_of("<|assistant|>")]
    torch.testing.assert_close(other, weight[:256].mean(0), rtol=1e-4, atol=1e-6)
    with pytest.raises(TokenSpaceError, match="no special token 'nobody'"):
        draw_rows(model, processor, descriptions={"nobody": "x"})
    with pytest.raises(UsageError, match="expected words of the text base"):
        draw_rows(model, processor, descriptions={"<|user|>": ""})
    with pytest.raises(UsageError, match="not all drawn"):
        draw_rows(model, processor, ids=torch.tensor([290]), descriptions={codec: "x"})
    with pytest.raises(UsageError, match="noise: expected more than 0, got 0"):
        draw_rows(model, noise=0)
    separate(model)
    with pytest.raises(UsageError, match="draw them before"):
        draw_rows(model)


@tied_or_not
@pytest.mark.parametrize("apart", [True, False])
def test_rows_over_their_base_are_the_trained_model_bit_for_bit(tied, apart, tmp_path):
    model, _ = composed(tied)
    train(model)
    save_rows(model, tmp_path / "rows")
    assert {path.name for path in (tmp_path / "rows").iterdir()} == {
        "trainable_rows.safetensors",
        "trainable_rows.json",
        "token_space.json",
    }
    record = read_rows(tmp_path / "rows").record
    assert record.rows == ((256, model.space.size),)
    assert record.parameters == len(new_rows(model)) * model.config.hidden_size * (2 - tied)
    assert record.base is not None
    assert set(record.base.slots) == {"backbone", "signal.codec"}
    fresh, _ = composed(tied)
    draw_rows(fresh, seed=5)  # whatever stood in these rows does not matter
    if apart:
        separate(fresh)
    load_rows(fresh, tmp_path / "rows")
    assert differing(fresh, model) == {}
    # Trained on from there, set apart or not.
    (one, two) = (next(iter(train_on(m).values())) for m in (fresh, model))
    assert torch.equal(one, two)


def train_on(model):
    merge_rows(model)
    return train(model, steps=1)


def test_a_folder_opens_with_rows_and_deltas_over_it(base, delta, tmp_path):
    trained, _ = composed()
    load_rows(trained, delta)
    opened, _processor = xoron_core.load(base, deltas=[delta])
    assert differing(opened, trained) == {}
    # A slot that was trained over the rows needs them, and is refused without.
    with torch.no_grad():
        opened.part("signal.codec").up.bias.add_(1.0)
    xoron_core.save_delta(opened, tmp_path / "codec", slots=["signal.codec"])
    whole, _ = xoron_core.load(base, deltas=[delta, tmp_path / "codec"])
    assert differing(whole, opened) == {}
    with pytest.raises(FolderError, match="another base: slot 'backbone'"):
        xoron_core.load(base, deltas=[tmp_path / "codec"])
    # The folder's own tensors are hashed, so it may be opened in bf16.
    rounded, _ = xoron_core.load(base, deltas=[delta], dtype=torch.bfloat16)
    assert torch.equal(weights_of(rounded), weights_of(trained).bfloat16())
    with pytest.raises(FolderError, match="rounded to fewer bits"):
        load_rows(composed()[0].to(torch.bfloat16), delta)


def test_slots_that_joined_the_base_since_do_not_matter(delta, tmp_path):
    parts = {"encoder": {"use": "signal-encoder"}, "projector": {"use": "signal-projector"}}
    model, processor = composed(codec={**CODEC, **parts})
    assert model.space.hash == read_rows(delta).space.hash
    xoron_core.save(model, processor, tmp_path / "more")
    opened, _ = xoron_core.load(tmp_path / "more", deltas=[delta])
    load_rows(model, delta)
    assert differing(opened, model) == {}
    assert not torch.equal(weights_of(opened), weights_of(composed()[0]))


def test_a_slot_delta_over_rows_that_are_apart_is_refused(tmp_path):
    model, _ = composed()
    xoron_core.save_delta(model, tmp_path / "backbone", slots=["backbone"])
    separate(model)
    with pytest.raises(UsageError, match="rows of slot 'backbone' are set apart"):
        xoron_core.load_delta(model, tmp_path / "backbone")


def test_another_base_or_token_space_is_refused(delta):
    other, _ = composed()
    before = weights_of(other).clone()
    with torch.no_grad():
        model_weights(other)["backbone"]["model.model.layers.0.input_layernorm.weight"][0] += 1e-6
    with pytest.raises(FolderError, match=r"another base: slot 'backbone' is sha256:.*expected"):
        load_rows(other, delta)
    text, _ = composed()
    with torch.no_grad():
        weights_of(text)[7, 0] += 1e-6  # one text row
    with pytest.raises(FolderError, match=r"another base: slot 'backbone'"):
        load_rows(text, delta)
    assert torch.equal(weights_of(other), before), "a refused delta changed something"
    with pytest.raises(TokenSpaceError, match=r"token space sha256:.*this model has sha256:"):
        load_rows(composed(codec=None)[0], delta)
    with pytest.raises(FolderError, match=r"this model expects"):
        load_rows(composed(tied=True)[0], delta)


def test_changed_files_are_refused_one_by_one(delta):
    model, _ = composed()
    file, record = delta / "trainable_rows.safetensors", delta / "trainable_rows.json"
    good, said = read_tensors(file), record.read_text()
    bad = {name: tensor.clone() for name, tensor in good.items()}
    next(iter(bad.values()))[3, 3] += 1.0
    write_tensors(file, bad)
    with pytest.raises(FolderError, match=r"the rows are sha256:.*changed or damaged"):
        load_rows(model, delta)
    write_tensors(file, good)
    for change, message in [
        ({"rows": [[256, 260]]}, "names 4 rows, .* has"),
        ({"rows": [[300, 290]]}, "does not say which rows"),
        ({"rows": [[256, 270], [260, 290]]}, "does not say which rows"),
        ({"rows": []}, "does not say which rows"),
        ({"format": 7}, "has delta format 7"),
        ({"base": None}, "names no base"),
        ({"token_space_hash": "sha256:1"}, "were made with sha256:1"),
        ({"rows": [[1, 1 + len(new_rows(model))]]}, "another base"),
    ]:
        record.write_text(json.dumps(json.loads(said) | change))
        with pytest.raises((FolderError, TokenSpaceError), match=message):
            load_rows(model, delta)
    record.write_text(said)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(FolderError, match="truncated"):
        load_rows(model, delta)
    record.unlink()
    with pytest.raises(FolderError, match="is no delta"):
        load_rows(model, delta)
    with pytest.raises(UsageError, match="holds something else"):
        save_rows(model, delta)


def test_some_rows_alone_are_saved_and_loaded(tmp_path):
    model, fresh = composed()[0], composed()[0]
    ids = torch.tensor([290, 258, 259])
    with torch.no_grad():
        weights_of(model)[ids] = 1.0
        fresh.get_output_embeddings().weight[ids] = 9.0
    save_rows(model, tmp_path / "some", ids=ids)
    assert read_rows(tmp_path / "some").record.rows == ((258, 260), (290, 291))
    load_rows(fresh, tmp_path / "some")
    assert differing(fresh, model) == {}
    with pytest.raises(UsageError, match="ids: expected rows of"):
        save_rows(model, tmp_path / "none", ids=torch.tensor([10_000]))


class Evil:
    """What a malicious pickle does when it is run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def old_form(folder: Path, tensors: object, **record: object) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save(tensors, folder / "trainable_rows.pt")
    (folder / "trainable_rows.json").write_text(json.dumps(record))
    return folder


def test_the_old_form_is_read_as_data_and_never_run(tmp_path):
    model, _ = composed()
    rows = (256, model.space.size)
    values = {
        name: torch.randn(rows[1] - rows[0], model.config.hidden_size)
        for name in ("embed_tokens.weight", "lm_head.weight")
    }
    sizes = {"base_vocab_size": rows[0], "vocab_size": rows[1]}
    old = old_form(tmp_path / "old", values, **sizes)
    with pytest.raises(FolderError, match="old form, which names no base"):
        load_rows(model, old)
    load_rows(model, old, trust_base=True)
    assert torch.equal(weights_of(model)[256:], values["embed_tokens.weight"])
    assert torch.equal(model.get_output_embeddings().weight[256:], values["lm_head.weight"])

    evil = old_form(tmp_path / "evil", {"embed": Evil(tmp_path / "harm")}, rows=[rows])
    with pytest.raises(FolderError, match="is not plain tensors"):
        load_rows(model, evil, trust_base=True)
    assert not (tmp_path / "harm").exists()
    for tensors, record, message in [
        (values, {}, "does not say which rows"),
        (values, {"rows": [[9, 2]]}, "does not say which rows"),
        (values, {"rows": [[256, 260]]}, "this model expects"),
        ({"embed": values["lm_head.weight"]}, sizes, "one tensor with 'head' in its name"),
        (values, {**sizes, "token_space_hash": "sha256:1"}, "token space sha256:1"),
    ]:
        bad = old_form(tmp_path / "bad", tensors, **record)
        with pytest.raises((FolderError, TokenSpaceError), match=message):
            load_rows(model, bad, trust_base=True)
