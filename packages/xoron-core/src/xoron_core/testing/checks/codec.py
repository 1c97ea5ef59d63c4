"""Codecs: ids stay in their ranges, and any ids in range decode to media."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xoron_core.descriptors import resolve
from xoron_core.testing.catalogue import check
from xoron_core.testing.drivers import driver
from xoron_core.testing.outcome import CheckFailed
from xoron_core.testing.subject import Subject
from xoron_core.testing.tensors import named, not_finite, rng

CODEC = ("codec",)
ITEMS = ((1, 1), (2, 2), (3, 3))


def _sizes(subject: Subject) -> list[int]:
    ranges = sorted(subject.cls.ranges(subject.config), key=lambda r: r.codebook)
    return [r.size for r in ranges]


@check(
    "codes-in-range",
    CODEC,
    since=1,
    summary="codes are int64 and lie in 0 .. size - 1 of their codebook",
    needs=("runs", "declared-widths"),
)
def codes_in_range(subject: Subject) -> None:
    feed, part = driver(subject), subject.build()
    where = f"{subject.component.factory}.encode"
    for factor in (1.0, 1e3, -1e3):
        batch = {
            key: value * factor if value.is_floating_point() else value
            for key, value in feed.batch(ITEMS).items()
        }
        with torch.no_grad():
            codes = part.encode(**batch)
        if codes.ids.dtype != torch.int64:
            raise CheckFailed(f"{where}: ids are {codes.ids.dtype}, expected torch.int64")
        if len(codes.metadata) != len(codes.ids):
            raise CheckFailed(
                f"{where}: {len(codes.metadata)} metadata for {len(codes.ids)} items; give one"
                " mapping per item"
            )
        for q, size in enumerate(_sizes(subject)):
            ids = codes.ids[..., q][codes.mask]
            if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < size:
                raise CheckFailed(
                    f"{where}: codebook {q} has {size} codes, but ids go from {int(ids.min())} to"
                    f" {int(ids.max())}; clamp before rounding. Out of range they would be ids of"
                    " another medium"
                )


@check(
    "codec-limits",
    CODEC,
    since=1,
    summary="any ids within frame_limits decode to finite media, without metadata",
    needs=("runs", "declared-widths"),
)
def codec_limits(subject: Subject) -> None:
    part = subject.build()
    where = f"{subject.component.factory}"
    least, most = part.frame_limits(subject.config)
    if not 1 <= least <= most:
        raise CheckFailed(f"{where}.frame_limits: expected 1 <= fewest <= most, got {least, most}")
    for steps in dict.fromkeys((least, min(most, least + 7))):
        ids = torch.stack(
            [torch.randint(n, (2, steps), generator=rng("cpu", n)) for n in _sizes(subject)], -1
        )
        with torch.no_grad():
            media = part.decode(ids, [{}, {}])
        values = named(media, "decoded")
        if not values or len(media) != 2:
            raise CheckFailed(
                f"{where}.decode: {steps} generated steps of 2 items give"
                f" {type(media).__name__} of length {len(media)}; expected tensors or arrays, one"
                " medium per item"
            )
        if off := not_finite(values):
            raise CheckFailed(f"{where}.decode: for ids within their ranges {off}")


@check(
    "codec-round-trip",
    CODEC,
    since=1,
    summary="decode(encode(media)) is a medium that takes as many codes again",
    needs=("runs", "codes-in-range", "codec-limits", "token-counts"),
)
def codec_round_trip(subject: Subject) -> None:
    subject.need_samples()
    part, processor = subject.build(), subject.processor
    assert subject.modality is not None
    assert processor is not None
    load = resolve(subject.modality.load)
    with torch.no_grad():
        for item in ITEMS:
            codes = part.encode(**processor.collate([subject.item(item)]))
            steps = int(codes.mask.sum())
            (medium,) = part.decode(codes.ids[:, :steps], codes.metadata)
            again = processor.num_positions(processor.load(load(_plain(medium))))
            if again != steps:
                raise CheckFailed(
                    f"{subject.component.factory}.decode: a medium of {steps} codes decodes to one"
                    f" of {again}; decode must undo the length that encode gives"
                )


def _plain(medium: Any) -> Any:
    return medium.detach().cpu().numpy() if isinstance(medium, Tensor) else medium
