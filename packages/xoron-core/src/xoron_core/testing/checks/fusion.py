"""Fusions: the identity at the start, and then a function of what each position may look at."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xoron_core.testing.catalogue import check
from xoron_core.testing.checks.learning import perturb
from xoron_core.testing.drivers import FusionDriver
from xoron_core.testing.outcome import CheckFailed
from xoron_core.testing.subject import FUSION_LAYERS, Subject
from xoron_core.testing.tensors import difference, noise

FUSION = ("fusion",)
ITEMS = ((1, 3), (2, 3))
SEEN_FROM = 3  # the position from which on feature 2 may be looked at


@check(
    "fusion-identity",
    FUSION,
    since=1,
    summary="at initialisation hidden states come out bit for bit as they went in",
)
def fusion_identity(subject: Subject) -> None:
    feed, part = FusionDriver(subject), subject.build()
    batch = feed.batch(ITEMS)
    if wrong := set(part.layers) - set(FUSION_LAYERS):
        raise CheckFailed(
            f"{subject.component.factory}.layers holds {sorted(wrong)}, but context.fusion_layers"
            f" allows {list(FUSION_LAYERS)}"
        )
    with torch.no_grad():
        found = feed.outputs(part, batch)
    if off := difference({"hidden": batch["hidden"]}, found):
        raise CheckFailed(
            f"{subject.component.factory}: at initialisation it is not the identity: {off}; start"
            " its output projection at zero, or a pretrained backbone is no longer what it was"
        )


@check(
    "fusion-visibility",
    FUSION,
    since=1,
    summary="a position depends on the features that it may look at, and on no other",
    needs=("runs", "fusion-identity"),
)
def fusion_visibility(subject: Subject) -> None:
    feed, part = FusionDriver(subject), subject.build()
    perturb(part)
    batch = feed.batch(ITEMS)
    features = batch["features"].clone()
    features[:, SEEN_FROM - 1] = noise(features[:, 0].shape, 77)
    where = subject.component.factory
    first, other = (
        _run(feed, part, {**batch, "features": f}) for f in (batch["features"], features)
    )
    if off := difference({"hidden": batch["hidden"][:, :1]}, {"hidden": first[:, :1]}):
        raise CheckFailed(
            f"{where}: a position that may look at no feature is changed: {off}; leave it bit for"
            " bit as it is, also behind a softmax over nothing"
        )
    before, after = ({"hidden": h[:, :SEEN_FROM]} for h in (first, other))
    if off := difference(before, after):
        raise CheckFailed(
            f"{where}: a feature changes positions that may not look at it: {off}; mask by"
            " `visible`"
        )
    if torch.equal(first[:, SEEN_FROM:], other[:, SEEN_FROM:]):
        raise CheckFailed(f"{where}: another feature changes no position that may look at it")


def _run(feed: FusionDriver, part: Any, batch: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return feed.outputs(part, batch)["hidden"]
