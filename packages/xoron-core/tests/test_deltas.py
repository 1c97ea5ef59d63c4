"""Proves that a delta goes over the base it was made with, whatever its path, shards or wider
dtype, and over no other; and that changed tensors, configs and components are refused by name.

The parts are two small modalities of an in-test plug-in: core needs no sibling for this.
"""

from __future__ import annotations

import importlib
import json
import shutil
import sys
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import xoron_core
from xoron_core.cli import run as cli
from xoron_core.deltas import base_slots, read_delta
from xoron_core.errors import CompositionError, FolderError, TokenSpaceError, UsageError
from xoron_core.folder import save_model
from xoron_core.identity import folder_weights, identities, model_weights
from xoron_core.origins import origins
from xoron_core.plugins import registry
from xoron_core.storage import read_tensors, write_tensors

PLUGIN = """
import torch
from torch import nn
from xoron_core.components import Encoder, Features, Projector
from xoron_core.config import Config
from xoron_core.descriptors import Component
from xoron_core.hookspecs import hookimpl

xoron_api = 1


class Width(Config):
    width: int = 8
    path: str | None = None


class Wave(Encoder):
    def __init__(self, config, context):
        super().__init__(config, context)
        self.feature_size = config.width
        self.read = nn.Linear(4, config.width)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, values):
        made = self.read(values) * self.scale
        return Features(made, torch.ones(made.shape[:2], dtype=torch.bool), None)

    def dummy_batch(self):
        return {"values": torch.zeros(1, 3, 4)}


class Connector(Projector):
    def __init__(self, config, context):
        super().__init__(config, context)
        self.write = nn.Linear(context.feature_size, config.width)

    def forward(self, features):
        return Features(self.write(features.values), features.mask, None)

    @classmethod
    def num_positions(cls, config, num_features):
        return num_features


class Other(Connector):
    pass


@hookimpl
def xoron_components():
    here = "delta_parts"
    made = [("encoder", "wave", "Wave"), ("projector", "line", "Connector"),
            ("projector", "other", "Other")]
    return [Component(kind, name, "wave", f"{here}:{factory}", f"{here}:Width", "A test part.")
            for kind, name, factory in made]
"""

SLOT = "wave.projector"


@pytest.fixture(scope="module", autouse=True)
def _plugin(tmp_path_factory):
    site = tmp_path_factory.mktemp("site")
    (site / "delta_parts.py").write_text(textwrap.dedent(PLUGIN))
    info = site / "xoron_deltaparts-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: xoron-deltaparts\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[xoron]\ndeltaparts = delta_parts\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        importlib.invalidate_caches()
        registry.cache_clear()
        yield
    registry.cache_clear()
    sys.modules.pop("delta_parts", None)


def composed(*overrides, seed=0):
    """Two modalities, each with encoder and projector; another seed is another base."""
    parts = {"encoder": {"use": "wave"}, "projector": {"use": "line"}}
    data = {"name": "waves", "wave": parts, "tide": parts}
    return xoron_core.compose(data, overrides=overrides, seed=seed)


def saved(folder, *overrides, seed=0):
    xoron_core.save(*composed(*overrides, seed=seed), folder)
    return folder


def trained(*overrides):
    """A base whose connector has been trained."""
    model, processor = composed(*overrides)
    with torch.no_grad():
        for parameter in model.part(SLOT).parameters():
            parameter.add_(1.0)
    return model, processor


@pytest.fixture
def base(tmp_path):
    return saved(tmp_path / "base")


@pytest.fixture
def connector(tmp_path):
    model, _ = trained()
    xoron_core.save_delta(model, tmp_path / "connector", slots=[SLOT])
    return tmp_path / "connector"


def same(one, two):
    ours, theirs = one.state_dict(), two.state_dict()
    assert ours.keys() == theirs.keys()
    return {name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])}


def test_a_delta_over_its_base_is_the_trained_model_bit_for_bit(base, connector):
    whole, _ = xoron_core.load(base, deltas=[connector])
    assert same(whole, trained()[0]) == set()
    plain, _ = xoron_core.load(base)
    assert same(plain, whole) == {"slots.wave__projector.write." + n for n in ("weight", "bias")}
    xoron_core.load_delta(plain, connector)
    assert same(plain, whole) == set()
    assert origins(whole.config) == {
        slot: "trained" if slot == SLOT else "random" for slot in model_weights(whole)
    }


def test_it_holds_its_slot_alone(connector):
    assert {p.name for p in connector.iterdir()} == {"delta.json", "delta.safetensors"}
    names = set(read_tensors(connector / "delta.safetensors"))
    assert names == {f"slots.wave__projector.write.{n}" for n in ("weight", "bias")}
    assert set(read_delta(connector).record.base.slots) == {"wave.encoder"}


def test_the_base_may_lie_anywhere_in_any_shards(base, connector, tmp_path):
    moved = tmp_path / "elsewhere" / "copy"
    model, processor = xoron_core.load(base)
    xoron_core.save(model, processor, moved)
    save_model(model, moved, max_shard_bytes=20)
    assert len(list((moved / "slots").iterdir())) > len(list((base / "slots").iterdir()))
    shutil.rmtree(base)
    assert same(xoron_core.load(moved, deltas=[connector])[0], trained()[0]) == set()


def test_another_base_is_refused_naming_the_slot_that_differs(connector, tmp_path):
    model, processor = composed()
    with torch.no_grad():
        model.part("wave.encoder").read.weight[0, 0] += 1e-7
    other = tmp_path / "other"
    xoron_core.save(model, processor, other)
    for act in (
        lambda: xoron_core.load(other, deltas=[connector]),
        lambda: xoron_core.load_delta(model, connector),
    ):
        with pytest.raises(FolderError, match=r"another base: slot 'wave.encoder' is sha256:") as e:
            act()
        assert "expected sha256:" in str(e.value)
        assert "Use the model folder that it was made with" in str(e.value)
    assert same(model, xoron_core.load(other)[0]) == set(), "a refused delta changed something"


def test_a_changed_buffer_of_the_base_is_another_base(connector):
    model, _ = composed()
    model.part("wave.encoder").scale.fill_(3.0)
    with pytest.raises(FolderError, match=r"slot 'wave.encoder'"):
        xoron_core.load_delta(model, connector)


def test_parts_of_other_modalities_are_no_base(connector):
    model, _ = composed()
    with torch.no_grad():
        model.part("tide.encoder").read.weight.zero_()
    xoron_core.load_delta(model, connector)
    assert torch.equal(model.part(SLOT).write.bias, trained()[0].part(SLOT).write.bias)


def test_the_backbone_belongs_to_every_base_and_every_slot_to_its():
    composition = composed()[0].composition
    slots = dict(composition.slots)
    slots["backbone"] = slots["wave.encoder"].model_copy(update={"kind": "backbone"})
    slots["wave.shared"] = slots["tide.encoder"].model_copy(update={"ref": "tide.encoder"})
    composition = composition.model_copy(update={"slots": slots})
    near = ["backbone", "tide.encoder", "wave.encoder"]
    assert base_slots(composition, [SLOT]) == near
    assert base_slots(composition, ["backbone"]) == sorted([*near[1:], SLOT, "tide.projector"])
    assert base_slots(composition, [SLOT], backbone_too=True) == sorted([*near, "tide.projector"])


def test_a_base_rounded_to_fewer_bits_is_refused_and_a_wider_one_is_the_same(base, tmp_path):
    model, _ = xoron_core.load(base)
    xoron_core.save_delta(model, tmp_path / "exact", slots=[SLOT])
    rounded, _ = xoron_core.load(base, dtype=torch.bfloat16)
    with pytest.raises(FolderError, match=r"rounded to fewer bits .* \(here they are bfloat16"):
        xoron_core.load_delta(rounded, tmp_path / "exact")
    # Hashed as the folder holds it, the base may be opened in bf16.
    opened, _ = xoron_core.load(base, deltas=[tmp_path / "exact"], dtype=torch.bfloat16)
    assert opened.part(SLOT).write.weight.dtype == torch.bfloat16
    # What was made over bf16 weights fits the same weights held in fp32.
    xoron_core.save_delta(rounded, tmp_path / "half", slots=[SLOT])
    xoron_core.load_delta(rounded.float(), tmp_path / "half")


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["float16", "bfloat16"]), st.integers(0, 99))
def test_identity_is_of_values_in_whatever_dtype_holds_them(dtype, seed):
    narrow = torch.randn(3, 5, generator=torch.Generator().manual_seed(seed)).to(
        getattr(torch, dtype)
    )

    def identity(tensor, name="w"):
        return identities({"s": {name: tensor}})["s"]

    assert identity(narrow) == identity(narrow.float())
    changed = narrow.clone()
    changed[2, 4] = torch.nextafter(changed[2, 4].float(), torch.tensor(9.0)).to(narrow) + 1
    others = [changed, narrow.reshape(5, 3), narrow.t(), narrow.float() + 1e-6, narrow[:2]]
    found = {identity(tensor) for tensor in others} | {identity(narrow, "v")}
    assert len(found) == 6
    assert identity(narrow) not in found


def test_identity_in_memory_is_that_of_the_folder(base):
    model, _ = xoron_core.load(base)
    weights = model_weights(model)
    assert identities(weights) == identities(folder_weights(base, weights))
    with pytest.raises(FolderError, match="on the meta device"):
        identities({"s": {"w": torch.zeros(1, device="meta")}})


def test_a_changed_tensor_or_record_is_refused(base, connector):
    file = connector / "delta.safetensors"
    good = read_tensors(file)
    bad = {name: tensor.clone() for name, tensor in good.items()}
    bad["slots.wave__projector.write.bias"][0] = 7.0
    write_tensors(file, bad)
    with pytest.raises(
        FolderError, match=r"the tensors of slot 'wave.projector' are sha256:.*says"
    ):
        xoron_core.load(base, deltas=[connector])
    write_tensors(file, good | {"slots.tide__projector.write.bias": torch.ones(8)})
    with pytest.raises(FolderError, match=r"holds tensors of slots that delta.json does not name"):
        read_delta(connector)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(FolderError, match="truncated"):
        read_delta(connector)
    (connector / "delta.json").write_text(json.dumps({"format": 2}))
    with pytest.raises(FolderError, match="has delta format 2, this xoron-core reads 1"):
        read_delta(connector)
    (connector / "delta.json").unlink()
    with pytest.raises(FolderError, match="is no delta"):
        read_delta(connector)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("wave.projector.use=other", "holds projector/other here, expected projector/line"),
        ("wave.projector.width=4", "width is 4, expected 8"),
    ],
)
def test_another_component_or_config_is_refused(connector, override, message):
    model, _ = composed(override)
    with pytest.raises(CompositionError, match=message):
        xoron_core.load_delta(model, connector)


def test_where_weights_came_from_is_no_difference(connector):
    model, _ = composed("wave.projector.path=somewhere")
    xoron_core.load_delta(model, connector)


def test_another_token_space_is_refused_with_both_hashes(connector):
    record = json.loads((connector / "delta.json").read_text())
    record["token_space_hash"] = "sha256:123"
    (connector / "delta.json").write_text(json.dumps(record))
    with pytest.raises(TokenSpaceError, match="token space sha256:123, this model has None"):
        xoron_core.load_delta(composed()[0], connector)


def test_a_slot_that_the_base_lacks_is_composed_in(connector, tmp_path):
    parts = {"encoder": {"use": "wave"}}
    bare = tmp_path / "bare"
    xoron_core.save(*xoron_core.compose({"name": "waves", "wave": parts}), bare)
    values = torch.randn(2, 3, 4)
    whole, processor = xoron_core.load(bare, deltas=[connector])
    model, _ = trained()
    for one, two in ((whole, model), (model, whole)):
        got = one.part(SLOT)(one.part("wave.encoder")(values=values)).values
        expected = two.part(SLOT)(two.part("wave.encoder")(values=values)).values
        assert torch.equal(got, expected)
    assert SLOT in processor.composition.slots
    xoron_core.save(whole, processor, tmp_path / "whole")
    assert same(xoron_core.load(tmp_path / "whole")[0], whole) == set()
    with pytest.raises(CompositionError, match=r"no slot wave.projector; .* composes it in"):
        xoron_core.load_delta(xoron_core.load(bare)[0], connector)


def test_a_base_that_lacks_what_the_slot_stands_on_is_refused(connector, tmp_path):
    parts = {"encoder": {"use": "wave"}, "projector": {"use": "line"}}
    model, _ = xoron_core.compose({"name": "waves", "tide": parts})
    with pytest.raises(CompositionError, match=r"no slot wave.projector"):
        xoron_core.load_delta(model, connector)
    xoron_core.save(*xoron_core.compose({"name": "waves", "tide": parts}), tmp_path / "tide")
    with pytest.raises(FolderError, match=r"a base with wave.encoder, and this model has tide"):
        xoron_core.load(tmp_path / "tide", deltas=[connector])


def test_deltas_of_two_modalities_combine_in_any_order(base, connector, tmp_path):
    model, _ = composed()
    with torch.no_grad():
        model.part("tide.projector").write.bias.fill_(5.0)
    xoron_core.save_delta(model, tmp_path / "tide", slots=["tide.projector"])
    both = [connector, tmp_path / "tide"]
    one, two = (xoron_core.load(base, deltas=order)[0] for order in (both, both[::-1]))
    assert same(one, two) == set()
    assert same(one, composed()[0]) == {
        f"slots.{modality}__projector.write.bias" for modality in ("wave", "tide")
    } | {"slots.wave__projector.write.weight"}


def test_a_delta_over_a_delta_needs_it(base, tmp_path):
    model, _ = composed()
    with torch.no_grad():
        model.part("wave.encoder").read.bias.fill_(5.0)
    xoron_core.save_delta(model, tmp_path / "first", slots=["wave.encoder"])
    with torch.no_grad():
        model.part(SLOT).write.bias.fill_(5.0)
    xoron_core.save_delta(model, tmp_path / "second", slots=[SLOT])
    whole, _ = xoron_core.load(base, deltas=[tmp_path / "first", tmp_path / "second"])
    assert same(whole, model) == set()
    with pytest.raises(FolderError, match=r"slot 'wave.encoder' is"):
        xoron_core.load(base, deltas=[tmp_path / "second"])


def test_names_of_slots_are_checked_and_foreign_folders_kept(tmp_path):
    model, _ = composed()
    with pytest.raises(
        UsageError, match=r"no slot 'wave.projektor'. Did you mean 'wave.projector'"
    ):
        xoron_core.save_delta(model, tmp_path / "d", slots=["wave.projektor"])
    with pytest.raises(UsageError, match="at least one slot"):
        xoron_core.save_delta(model, tmp_path / "d", slots=[])
    (tmp_path / "thesis").mkdir()
    with pytest.raises(UsageError, match="holds something else than a delta"):
        xoron_core.save_delta(model, tmp_path / "thesis", slots=[SLOT])
    assert not (tmp_path / "d").exists()


def test_the_command_line_saves_shows_and_applies(base, tmp_path, capsys):
    xoron_core.save(*trained(), tmp_path / "trained")
    source, delta, out = (str(tmp_path / name) for name in ("trained", "delta", "out"))
    assert cli(["delta", "save", source, "--slot", SLOT, "-o", delta, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["slots"][SLOT]["parameters"] == 8 * 8 + 8
    assert cli(["delta", "show", delta]) == 0
    assert "projector/line" in capsys.readouterr().out
    assert cli(["delta", "apply", str(base), delta, "-o", out]) == 0
    assert same(xoron_core.load(out)[0], trained()[0]) == set()
    saved(tmp_path / "other", seed=1)
    assert cli(["delta", "apply", str(tmp_path / "other"), delta, "-o", out]) == 1
    assert "another base" in capsys.readouterr().err
    assert same(xoron_core.load(out)[0], trained()[0]) == set(), "the old folder was touched"
