"""Proves that an adapter is PEFT's own on the bare transformers model, that its base stays bit for
bit, that merging changes no answer, and that a killed run goes on exactly.

Every equality has a control: the adapter has moved, or the two sides were made on two paths.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import xoron_core
from xoron_core.api import compose, load, save
from xoron_core.errors import ConfigError, FolderError, UsageError
from xoron_core.identity import folder_weights, identities, model_weights
from xoron_core.origins import origins, record
from xoron_train import train
from xoron_train.deltas import Trained
from xoron_train.lora import Adapter, load_adapter
from xoron_train.recipe import Recipe
from xoron_train.selectors import linear_layers

GRID = {"encoder": {"use": "standin-grid"}, "projector": {"use": "standin-grid"}}
TALKS = {"grids": {"kind": "dataset", "path": "standin-grids", "options": {"size": 24}}}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory, standin: None) -> Path:
    """A folder as `save_pretrained` writes it: the bare transformers model."""
    from standin_qwen import qwen

    model, _ = compose(composition())
    assert model.space is not None
    folder = tmp_path_factory.mktemp("qwen")
    torch.manual_seed(0)
    qwen(model.space.size).save_pretrained(folder)
    return folder


def composition(**backbone: Any) -> dict[str, Any]:
    return {
        "name": "standin",
        "tokenizer": {"use": "standin-byte"},
        "backbone": {"use": "standin-qwen", **backbone},
        "grid": GRID,
        "tokens": {"template": "xoron"},
    }


@pytest.fixture(scope="module")
def base(pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder over the pretrained backbone, with an untrained connector."""
    folder = tmp_path_factory.mktemp("base") / "m"
    save(*compose(composition(path=str(pretrained))), folder)
    return folder


@pytest.fixture
def lora_recipe(new_recipe: Callable[..., Recipe]) -> Callable[..., Recipe]:
    """A recipe of an adapter and the connector, with changes; decay would move what is frozen."""

    def make(**changes: Any) -> Recipe:
        return new_recipe(
            **{
                "mixture": TALKS,
                "sequence_length": 64,
                "train": ["grid.projector"],
                "lora": {"r": 4, "alpha": 16, "dropout": 0.1},
                "weight_decay": 0.5,
                **changes,
            }
        )

    return make


def logits(model: Any, seed: int = 0) -> torch.Tensor:
    ids = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(input_ids=ids).logits


def states(run: Path) -> dict[str, torch.Tensor]:
    return load(run / "model")[0].state_dict()


@pytest.mark.parametrize("flags", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_peft_opens_the_adapter_on_the_bare_model_with_the_same_logits(
    pretrained: Path,
    base: Path,
    lora_recipe: Callable[..., Recipe],
    tmp_path: Path,
    flags: dict[str, bool],
) -> None:
    lora = {"r": 4, "alpha": 16, "dropout": 0.1, **flags}
    result = train(lora_recipe(lora=lora), tmp_path / "run", model=base, quiet=True)
    bare = AutoModelForCausalLM.from_pretrained(pretrained).eval()
    untouched = logits(bare)
    adapted = peft.PeftModel.from_pretrained(bare, tmp_path / "run/adapter").eval()
    expected = logits(adapted)
    assert (expected - untouched).abs().max() > 0.1, "the adapter has not moved"
    # Merged by us, and attached by us to our own base.
    merged, _ = load(result.model_folder)
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)
    model, _ = load(base)
    load_adapter(model, tmp_path / "run/adapter")
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-6)


def test_the_base_stays_bit_for_bit_and_the_rest_moves(
    base: Path, lora_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = lora_recipe(lora={"r": 4, "merge": False}, max_steps=50, batch_size=1)
    train(recipe, tmp_path / "run", model=base, quiet=True)
    before, after = load(base)[0].state_dict(), states(tmp_path / "run")
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert moved == {"slots.grid__projector.layers.weight", "slots.grid__projector.layers.bias"}
    # And the adapter has been trained meanwhile: B starts at zero.
    model, _ = load(base)
    adapter = load_adapter(model, tmp_path / "run/adapter")
    assert all(t.abs().max() > 0 for n, t in adapter.tensors().items() if "lora_B" in n)
    assert torch.equal(
        model.part("grid.projector").layers.bias, after["slots.grid__projector.layers.bias"]
    )


def test_merging_changes_the_adapted_layers_alone(
    base: Path, lora_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = lora_recipe(train=[], lora={"r": 2, "targets": ["*.q_proj", "*.0.mlp.down_proj"]})
    train(recipe, tmp_path / "run", model=base, quiet=True)
    before, after = load(base)[0].state_dict(), states(tmp_path / "run")
    assert before.keys() == after.keys()
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    layer = "slots.backbone.model.model.layers"
    assert moved == {
        f"{layer}.0.self_attn.q_proj.weight",
        f"{layer}.1.self_attn.q_proj.weight",
        f"{layer}.0.mlp.down_proj.weight",
    }
    saved = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert saved["target_modules"] == sorted(
        name.removeprefix("slots.backbone.model.").removesuffix(".weight") for name in moved
    )


def test_a_killed_run_goes_on_bit_for_bit(
    base: Path, lora_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = lora_recipe(max_steps=8, save_every=2, keep_checkpoints=4)
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    expected = train(recipe, straight, model=base, quiet=True)
    shutil.copytree(straight, broken)
    for name in ("model", "adapter", "checkpoints/step-00000006", "checkpoints/step-00000008"):
        shutil.rmtree(broken / name)
    resumed = train(recipe, broken, resume=True, quiet=True)
    assert resumed.steps == 8
    assert resumed.evaluation == expected.evaluation
    ours, theirs = states(broken), states(straight)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert identical(straight / "adapter", broken / "adapter")


def identical(one: Path, two: Path) -> bool:
    names = {path.name for path in one.iterdir()}
    return names == {path.name for path in two.iterdir()} and all(
        (one / name).read_bytes() == (two / name).read_bytes() for name in names
    )


def test_checkpoints_hold_the_plain_base_once(
    base: Path, lora_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = lora_recipe(save_every=2, keep_checkpoints=3)
    train(recipe, tmp_path / "run", model=base, quiet=True)
    folders = sorted((tmp_path / "run/checkpoints").iterdir())
    assert len(folders) == 3
    inodes = {
        slot: {(f / f"slots/{slot}-00001.safetensors").stat().st_ino for f in folders}
        for slot in ("backbone", "grid.encoder", "grid.projector")
    }
    assert {slot: len(found) for slot, found in inodes.items()} == {
        "backbone": 1,
        "grid.encoder": 1,
        "grid.projector": 3,
    }
    original = identities(folder_weights(base, ["backbone"]))
    assert all(identities(folder_weights(f, ["backbone"])) == original for f in folders)
    last = load(folders[-1])[0]
    assert not [name for name in last.state_dict() if "lora" in name or "base_layer" in name]
    assert "lora" not in (folders[-1] / "README.md").read_text()


def test_lora_over_random_weights_is_refused(
    base: Path, lora_recipe: Callable[..., Recipe], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "random"
    save(*compose(composition()), folder)
    with pytest.raises(ConfigError, match=r"slot 'backbone' are random.*freeze this noise.*path="):
        train(lora_recipe(), tmp_path / "run", model=folder, quiet=True)
    assert not (tmp_path / "run").exists()
    # What a run has trained whole is random no more.
    whole = lora_recipe(lora=None, train=["backbone"], max_steps=2, warmup_steps=0)
    train(whole, tmp_path / "whole", model=folder, quiet=True)
    assert origins(load(tmp_path / "whole/model")[0].config) == {
        "backbone": "trained",
        "grid.encoder": "random",
        "grid.projector": "random",
    }
    Trained(load(tmp_path / "whole/model")[0], lora_recipe())
    assert not caplog.records
    # Of noise with trained norms that cannot be said.
    Trained(partly := load(folder)[0], lora_recipe(lora=None, train=["*norm.weight"]))
    assert origins(partly.config)["backbone"] == "random"
    # A folder without the record may be anything.
    model, _ = load(folder)
    model.config.weight_origins = {}
    Trained(model, lora_recipe())
    assert "does not say where the weights of slot 'backbone' come from" in caplog.text


def test_where_weights_come_from_is_kept_by_folders(base: Path, tmp_path: Path) -> None:
    model, processor = load(base)
    assert origins(model.config)["backbone"] == "source"
    record(model.config, ["backbone"], "trained")
    save(model, processor, tmp_path / "again")
    assert origins(load(tmp_path / "again")[0].config) == {
        "backbone": "trained",
        "grid.encoder": "random",
        "grid.projector": "random",
    }


def test_by_default_attention_and_feed_forward_are_adapted(base: Path) -> None:
    model, _ = load(base)
    names = linear_layers(model)
    assert len(names) == 2 * (4 + 3)
    assert {name.rpartition(".")[2] for name in names} == {
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    }
    assert linear_layers(model, ["backbone"]) == names
    layer = "slots.backbone.model.model.layers.1."
    one = linear_layers(model, [f"{layer}*"])
    assert len(one) == 7
    assert linear_layers(model, [f"{layer}*.weight", "*.layers.1.mlp.*"]) == one
    chosen = Trained(model, Recipe.parse(MINIMAL | {"lora": {"r": 3}}))
    expected = sum(3 * sum(model.backbone.model.get_submodule(n).weight.shape) for n in names)
    assert sum(p.numel() for p in chosen.parameters.values()) == expected


MINIMAL = {
    "name": "minimal",
    "mixture": {"text": {"kind": "text", "path": "absent.txt"}},
    "max_steps": 4,
    "learning_rate": 0.1,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {"targets": ["*.q_prj"]}}, r"'\*\.q_prj' matches no linear layer.*q_proj"),
        (
            {"lora": {"targets": ["slots.backbone.model.model.layers.0.self_attn.q_prj"]}},
            r"Did you mean 'slots.backbone.model.model.layers.0.self_attn.q_proj'",
        ),
        ({"lora": {"targets": ["*.embed_tokens"]}}, "matches no linear layer"),
        ({"lora": {"targets": ["*.lm_head"]}}, "matches no linear layer"),
        ({"lora": {}, "train": ["backbone"]}, "train names 14 layers that lora adapts"),
        ({"lora": {}, "train": ["*.projector.layers.bias"]}, "train: .* matches no slot"),
        (
            {"lora": {}, "train": ["*grid__projector.layers.bias"]},
            r"selects 1 of the 2 parameters of slot 'grid.projector'",
        ),
    ],
)
def test_what_cannot_be_trained_is_said(base: Path, changes: dict[str, Any], message: str) -> None:
    model, _ = load(base)
    with pytest.raises(ConfigError, match=message):
        Trained(model, Recipe.parse(MINIMAL | changes))


def test_an_adapter_is_refused_on_another_base_and_if_damaged(
    base: Path, lora_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    train(lora_recipe(), tmp_path / "run", model=base, quiet=True)
    adapter = tmp_path / "run/adapter"
    model, _ = load(base)
    with pytest.raises(UsageError, match=r"trained together with the adapter.*load_adapter"):
        xoron_core.load_delta(model, adapter)
    with torch.no_grad():
        model.backbone.model.lm_head.weight[0, 0] += 1
    with pytest.raises(FolderError, match="another base: slot 'backbone' is sha256"):
        load_adapter(model, adapter)
    file = adapter / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(FolderError, match="was changed or is damaged"):
        load_adapter(load(base)[0], adapter)


def test_detaching_is_for_a_while_and_removing_for_good(base: Path) -> None:
    model, _ = load(base)
    plain = logits(model)
    config = peft.LoraConfig(r=2, target_modules=["model.layers.0.self_attn.q_proj"])
    adapter = Adapter(model, config)
    for name, tensor in adapter.tensors().items():
        if "lora_B" in name:
            tensor.normal_()
    adapted = logits(model)
    assert (adapted - plain).abs().max() > 1e-3
    with adapter.detached():
        assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model), adapted)
    adapter.remove(merge=False)
    assert torch.equal(logits(model), plain)
    assert not any(isinstance(m, peft.tuners.lora.LoraLayer) for m in model.modules())


def test_a_tied_head_is_neither_adapted_nor_untied(tmp_path: Path) -> None:
    model, processor = compose(composition(tied=True))
    record(model.config, ["backbone"], "trained")
    names = linear_layers(model)
    assert len(names) == 14
    adapter = Adapter(model, peft.LoraConfig(r=2, target_modules=names))
    adapter.save(tmp_path / "adapter")
    adapter.remove(merge=True)
    save(model, processor, tmp_path / "m")
    again, _ = load(tmp_path / "m")
    wrapped = again.backbone.model
    assert wrapped.lm_head.weight is wrapped.model.embed_tokens.weight
    # A tied tensor counts once, in memory as in the folder.
    stored = identities(folder_weights(tmp_path / "m", ["backbone"]))
    assert identities(model_weights(again))["backbone"] == stored["backbone"]
