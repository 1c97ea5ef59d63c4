"""Proves that models outgrow their token space without losing anything: `compose --extend` appends
and moves nothing, `tokens migrate` carries rows by name, and logits over shared names are the same
bits afterwards; `tokens diff` says by name what two spaces do not share.

The toy plug-in's signal codec stands for what is added.
"""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import xoron_core
from tests.lively import ids_of
from xoron_core.cli import run
from xoron_core.descriptors import TokenGroup
from xoron_core.errors import TokenSpaceError
from xoron_core.migrate import migrate, migrate_rows, row_sources
from xoron_core.origins import origins
from xoron_core.row_deltas import load_rows, read_rows, save_rows
from xoron_core.rows import new_rows, separate
from xoron_core.sampling import Sampling
from xoron_core.session import Session
from xoron_core.tokens.difference import difference
from xoron_core.tokens.space import TokenSpace

BACKBONE = {"use": "xoron-moe", "preset": "tiny", "num_layers": 2}
CODEC = {"codec": {"use": "signal-codec"}}
GROUPS = ["control", "conversation"]

pytestmark = pytest.mark.usefixtures("toy")


def compose(tie=False, groups=GROUPS, **slots):
    backbone = {**BACKBONE, "tie_word_embeddings": tie}
    declared = {"tokenizer": {"use": "byte"}, "backbone": backbone, "tokens": {"groups": groups}}
    return xoron_core.compose({"name": "m", **declared, **slots}, seed=1)


def shared_logits(model, processor, names):
    """Logits at every position of a chat, of the ids of these names and of the text base."""
    ids = processor([{"role": "user", "content": "a question"}])["input_ids"]
    rows = torch.cat([torch.arange(256), torch.tensor([model.space.id_of(n) for n in names])])
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits[..., rows]


@pytest.fixture
def saved(tmp_path):
    def save(name, *pair):
        xoron_core.save(*pair, tmp_path / name)
        return tmp_path / name

    return save


@pytest.mark.parametrize("tie", [True, False])
def test_extending_moves_nothing_and_keeps_every_bit(saved, tie, tmp_path):
    text = compose(tie)
    folder, out = saved("text", *text), tmp_path / "more"
    arguments = ["compose", "--extend", str(folder), "-o", str(out)]
    assert run([*arguments, "--set", "signal.codec.use=signal-codec"]) == 0
    model, processor = xoron_core.load(out)
    old = text[0].space
    assert row_sources(old, model.space)[: old.size].tolist() == list(range(old.size))
    assert model.space.size > old.size
    names = [special.key for special in old]
    before, after = shared_logits(*text, names), shared_logits(model, processor, names)
    assert torch.equal(before, after)
    new = model.backbone.model.get_input_embeddings().weight[old.size :]
    assert 0.001 < new.std() < 1
    assert "signal.codec" in model.composition.slots
    reply = Session(model, processor).generate(
        [{"role": "user", "content": "x"}], begin_with="signal", max_new_tokens=4
    )[0]
    assert reply.media[0][0] == "signal"


def test_a_pretrained_backbone_keeps_what_it_learned_since(saved, tmp_path):
    """Its source's weights are not loaded again, and ids grow over its padding rows and beyond."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 280}
    source = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    source.save_pretrained(tmp_path / "source")
    backbone = {"use": "hf", "path": str(tmp_path / "source")}
    declared = {"tokenizer": {"use": "byte"}, "backbone": backbone, "tokens": {"template": "xoron"}}
    text = xoron_core.compose({"name": "m", **declared})
    with torch.no_grad():
        text[0].backbone.model.get_input_embeddings().weight[:] += 1
    folder, out = saved("text", *text), tmp_path / "more"
    added = ["--set", "signal.codec.use=signal-codec"]
    assert run(["compose", "--extend", str(folder), "-o", str(out), *added]) == 0
    model, processor = xoron_core.load(out)
    assert text[0].space.size < 280 < model.space.size
    weights = [m.backbone.model.get_input_embeddings().weight for m in (text[0], model)]
    assert weights[0].shape[0] == 280
    used = text[0].space.size
    assert torch.equal(weights[0][:used], weights[1][:used])
    assert weights[1][used:].mean().abs() < 0.1
    assert origins(model.config) == {"backbone": "source", "signal.codec": "random"}
    names = [special.key for special in text[0].space]
    assert torch.equal(shared_logits(*text, names), shared_logits(model, processor, names))


def test_what_a_model_has_is_not_changed_by_extending(saved, capsys):
    other = ["backbone.use=xoron-moe", "backbone.preset=tiny", "backbone.num_layers=5"]
    folder = saved("text", *compose())
    arguments = ["compose", "--extend", str(folder), "--dry-run"]
    assert run([*arguments, *(word for item in other for word in ("--set", item))]) == 2
    assert "num_layers: 5 instead of 2" in capsys.readouterr().err


def test_token_groups_alone_extend(saved, tmp_path):
    folder, out = saved("text", *compose()), tmp_path / "more"
    added = ["--set", "tokens.groups=[reasoning]"]
    assert run(["compose", "--extend", str(folder), "-o", str(out), *added]) == 0
    old, new = TokenSpace.load(folder), TokenSpace.load(out)
    assert {c.what for c in difference(old, new)} == {"added"}
    assert {c.name.rpartition("/")[0] for c in difference(old, new)} == {"xoron-core/reasoning"}
    assert {c.what for c in difference(new, old)} == {"removed"}


def other_history(space):
    """The same names, allocated in two steps: first some groups, then the codec and the rest."""
    groups = groups_of(space)
    few = [group for group in groups if not group.name.endswith(("reasoning", "signal"))]
    codecs = [entry.range for entry in space.codecs]
    first = TokenSpace.allocate(text=space.text, groups=few, codecs=codecs)
    return TokenSpace.allocate(text=space.text, groups=groups, codecs=codecs, lock=first)


def groups_of(space):
    groups = []
    for name, members in space.groups().items():
        hidden = frozenset(special.name for special in members if special.hidden)
        groups.append(TokenGroup(name, {s.name: s.string for s in members}, hidden))
    return groups


@pytest.mark.parametrize("tie", [True, False])
def test_migrated_rows_mean_and_give_the_same(tie):
    model, processor = compose(tie, groups=[*GROUPS, "reasoning"], signal=CODEC)
    target = other_history(model.space)
    moves = {change.what for change in difference(model.space, target)}
    assert moves == {"moved"}
    moved, its_processor = migrate(model, processor, target)
    assert moved.space.hash == target.hash
    names = [special.key for special in model.space]
    assert torch.equal(
        shared_logits(model, processor, names), shared_logits(moved, its_processor, names)
    )
    talk = [{"role": "user", "content": "say something"}]
    options = {"max_new_tokens": 12, "sampling": Sampling()}
    one, two = (
        Session(*pair).generate(talk, **options)[0]
        for pair in ((model, processor), (moved, its_processor))
    )
    assert one.text == two.text
    assert its_processor.decode(its_processor.encode_text("héllo")) == "héllo"


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("some", [True, False])
def test_row_deltas_move_with_their_base_by_name(tie, some, tmp_path):
    """The moved delta over the migrated base gives the logits of the delta over the base."""
    model, processor = compose(tie, groups=[*GROUPS, "reasoning"], signal=CODEC)
    target = other_history(model.space)
    ids = new_rows(model)[::3] if some else new_rows(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in separate(model, ids).values():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    save_rows(model, tmp_path / "rows")
    base = compose(tie, groups=[*GROUPS, "reasoning"], signal=CODEC)
    moved, _ = migrate_rows(*base, tmp_path / "rows", space=target, output=tmp_path / "moved")
    delta = read_rows(tmp_path / "moved")
    assert delta.record.token_space_hash == target.hash == delta.space.hash
    assert len(delta.record.ids()) == len(ids)
    assert some is (delta.record.rows != ((256, target.size),))

    base[0].load_state_dict(before)
    there, its_processor = migrate(*base, target)
    names = [special.key for special in model.space]
    without = shared_logits(there, its_processor, names)
    load_rows(there, tmp_path / "moved")
    expected = shared_logits(model.eval(), processor, names)
    assert not torch.equal(without, expected)
    assert torch.equal(shared_logits(there, its_processor, names), expected)
    assert torch.equal(shared_logits(moved, its_processor, names), expected)
    with pytest.raises(TokenSpaceError, match="was made with token space"):
        load_rows(base[0], tmp_path / "moved")


def test_a_model_with_rows_set_apart_migrates_as_a_merged_one():
    model, processor = compose(groups=[*GROUPS, "reasoning"], signal=CODEC)
    with torch.no_grad():
        for parameter in separate(model).values():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    moved, its_processor = migrate(model, processor, other_history(model.space))
    names = [special.key for special in model.space]
    assert torch.equal(
        shared_logits(model, processor, names), shared_logits(moved, its_processor, names)
    )


def test_there_and_back_is_the_same_model():
    model, processor = compose()
    old = model.space
    more = TokenGroup("aaa/more", {"one": "<|one|>", "two": "<|two|>"})
    first = TokenSpace.allocate(text=old.text, groups=[more])
    wider = TokenSpace.allocate(text=old.text, groups=[more, *groups_of(old)], lock=first)
    there, its_processor = migrate(model, processor, wider)
    weights = [m.backbone.model.get_input_embeddings().weight for m in (model, there)]
    assert not torch.equal(weights[0], weights[1][: old.size])
    assert torch.equal(weights[0], weights[1][row_sources(wider, old)])
    ids = [ids_of(*pair, "ab") for pair in ((model, processor), (there, its_processor))]
    assert ids[0][0, 1:].tolist() == ids[1][0, 1:].tolist()


def test_a_space_that_lacks_or_changes_something_is_refused():
    model, processor = compose(signal=CODEC)
    with pytest.raises(TokenSpaceError, match="lacks xoron-toy/signal"):
        migrate(model, processor, compose()[0].space)
    other = compose()[0].space
    changed = TokenSpace.from_json(other.to_json())
    object.__setattr__(changed.text, "identity", "another vocabulary")
    with pytest.raises(TokenSpaceError, match="does not mean the same"):
        migrate(*compose(), changed)
    assert [c.what for c in difference(other, changed)] == ["changed"]


def test_the_commands_compare_and_move(saved, tmp_path, capsys):
    text = saved("text", *compose())
    wider = saved("wider", *compose(groups=[*GROUPS, "reasoning"], signal=CODEC))
    out = tmp_path / "moved"
    assert run(["tokens", "diff", str(text), str(wider), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert not found["same"]
    assert ("added", "xoron-toy/signal-codec:0") in {
        (change["what"], change["name"]) for change in found["changes"]
    }
    assert run(["tokens", "migrate", str(text), "--to", str(wider), "-o", str(out)]) == 0
    assert run(["tokens", "verify", str(out)]) == 0
    capsys.readouterr()
    assert run(["tokens", "diff", str(out), str(wider)]) == 0
    assert capsys.readouterr().out.startswith("the same: sha256:")
