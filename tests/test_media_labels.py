"""Labels of media: a word for each position of an image. The loss is that of the model's own head
on the rows that the projector made, normalised; it reaches encoder and projector and no layer of
the backbone; without labels nothing changes; labels that do not fit are refused."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from xoron_core.api import compose
from xoron_core.errors import SequenceError

OVERRIDES = (
    "image.encoder.use=conv-vit",
    "image.projector.use=mlp",
    "backbone.use_moe=false",
    "backbone.num_layers=2",
)
LABELS = list("..7....c.....4..")


@pytest.fixture(scope="module")
def made():
    return compose(preset="tiny", plugins="llm,vision", overrides=OVERRIDES)


def _talk(seed, labels=None, role="user"):
    image = np.random.default_rng(seed).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    part = {"type": "image", "image": image}
    if labels is not None:
        part["labels"] = labels
    return [{"role": role, "content": [part]}, {"role": "assistant", "content": "yes"}]


def test_the_loss_is_the_heads_on_the_projected_rows(made):
    model, processor = made
    model.train()
    batch = processor([_talk(0, LABELS), _talk(1)], train=True)
    places = batch["media_labels"] != -100
    (span,) = (s for s in batch["media"]["image.encoder"]["spans"].tolist() if s[0] == 0)
    assert places.sum() == 16
    assert places[0, span[1] : span[1] + 16].all()
    assert batch["media_labels"][places].tolist() == [ord(label) for label in LABELS]
    output = model(**batch)
    pixels = batch["media"]["image.encoder"]["pixel_values"][:1]
    rows = model.part("image.projector")(model.part("image.encoder")(pixels)).values[0]
    hidden = rows / (rows.square().mean(-1, keepdim=True) + torch.finfo(rows.dtype).eps).sqrt()
    logits = model.need_backbone().logits(hidden)
    expected = F.cross_entropy(logits, torch.tensor([ord(label) for label in LABELS]))
    term = output.losses["labels"]
    assert term.count == model.loss_counts(batch)["labels"] == 16
    torch.testing.assert_close(term.sum / term.count, expected)


def test_it_teaches_what_sees_and_no_layer_of_the_backbone(made):
    model, processor = made
    model.train()
    model.zero_grad()
    model(**processor([_talk(0, LABELS)], train=True)).losses["labels"].sum.backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    seeing = {n for n, p in model.named_parameters() if n.startswith("slots.image__")}
    assert len(reached & seeing) > 0.9 * len(seeing)
    assert [n for n in reached if n.startswith("slots.backbone") and "embed" not in n] == []


def test_without_labels_nothing_changes(made):
    model, processor = made
    model.train()
    plain, labelled = (processor([_talk(0, labels)], train=True) for labels in (None, LABELS))
    assert "media_labels" not in plain
    assert set(model.loss_counts(plain)) == {"text"}
    assert torch.equal(plain["labels"], labelled["labels"])
    texts = [model(**batch).losses["text"].sum for batch in (plain, labelled)]
    assert torch.equal(*texts)
    # Labels are for learning: what is generated from never holds any.
    assert "media_labels" not in processor([_talk(0, LABELS)[:1]])


@pytest.mark.parametrize(
    ("talk", "message"),
    [
        (_talk(0, LABELS[:15]), "takes 16 positions but has 15 labels"),
        (_talk(0, ["ten", *LABELS[1:]]), "label 'ten' of a medium is 3 ids"),
        (_talk(0, LABELS, role="assistant"), "message 0: image of an assistant has labels"),
    ],
)
def test_labels_that_do_not_fit_are_refused(made, talk, message):
    with pytest.raises(SequenceError, match=message):
        made[1](talk, train=True)
