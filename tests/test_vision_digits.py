"""Proves that the vision demo runs from composition to its verdict, and that the verdict follows
the figures. What a whole run reaches is printed by the demo itself; docs/log.md has the figures."""

import pytest
import torch

from examples import vision_digits
from xoron_core.api import compose, load
from xoron_train import load_recipe
from xoron_train.tasks.digits.dataset import digits

pytest.importorskip("sklearn")


def test_it_runs_from_composition_to_verdict(tmp_path, capsys):
    assert vision_digits.demo(tmp_path, steps=None, smoke=True) == 0
    said = capsys.readouterr().out
    for word in ("held-out", "unseen", "zeroed", "chance", *vision_digits._KINDS):
        assert word in said
    before, _ = load(tmp_path / "untrained")
    after, _ = load(tmp_path / "run/model")
    assert (tmp_path / "labels/model/config.json").is_file()
    weights = dict(before.named_parameters())
    moved = {name for name, new in after.named_parameters() if not torch.equal(new, weights[name])}
    # All slots learn; an expert that nothing was routed to may stay.
    for slot in ("backbone", "image__encoder", "image__projector"):
        assert any(name.startswith(f"slots.{slot}") for name in moved)


def test_the_verdict_follows_the_figures():
    fine = {"model": 0.9, "zeroed": 0.33, "chance": 0.3, "text": 0.3}
    assert vision_digits._missed("held-out", fine, 0.9) == []
    assert len(vision_digits._missed("held-out", fine | {"model": 0.89}, 0.9)) == 1
    assert len(vision_digits._missed("held-out", fine | {"zeroed": 0.5}, 0.9)) == 1


def test_every_training_conversation_fits_a_row_with_a_label_per_position(tmp_path):
    recipe = load_recipe("vision-digits")
    options = recipe.mixture["digits"].options
    source = vision_digits._learn_tokenizer(tmp_path, options)
    overrides = (*vision_digits.OVERRIDES, f"tokenizer.source={source}")
    _, processor = compose(preset="tiny", plugins="llm,vision", overrides=overrides)
    split = digits("train", **options)
    assert len(processor.plan(split[0].messages, train=True).labels) == options["labelled"]
    lengths = [len(processor.plan(split[i].messages, train=True).input_ids) for i in range(200)]
    assert max(lengths) <= recipe.sequence_length
