"""Codecs: ids stay in their ranges, stand in a sequence and come back, and any decode to media."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from xoron_core.descriptors import resolve
from xoron_core.errors import XoronError
from xoron_core.pieces import CodedPiece, SpanGrammar
from xoron_core.testing.catalogue import check
from xoron_core.testing.drivers import driver
from xoron_core.testing.outcome import CheckFailed
from xoron_core.testing.subject import TEXT, Subject
from xoron_core.testing.tensors import named, not_finite, rng
from xoron_core.tokens.space import TokenSpace

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
    "codec-ranges",
    CODEC,
    since=1,
    summary="its ranges are one codec's, of its modality, and codes come back from a sequence",
    needs=("runs", "declared-widths", "codes-in-range"),
)
def codec_ranges(subject: Subject) -> None:
    where = f"{subject.component.factory}.ranges"
    ranges = subject.cls.ranges(subject.config)
    modality = subject.component.modality
    if len({r.name for r in ranges}) != 1 or {r.modality for r in ranges} != {modality}:
        got = ", ".join(f"{r.full_name} ({r.modality})" for r in ranges)
        raise CheckFailed(
            f"{where}: expected one name for all codebooks and the modality {modality!r}, got"
            f" {got}; spans of a sequence would not know whose codes they carry"
        )
    if subject.modality is None:
        return
    found, names = subject.modality, set(subject.component.token_groups)
    markers = {found.begin, found.end, found.gen_begin, found.gen_end, found.placeholder}
    groups = [
        group
        for group in subject.registry.token_groups().values()
        if group.name in names or markers & set(group.tokens.values())
    ]
    space = TokenSpace.allocate(text=TEXT, groups=groups, codecs=ranges)
    grammar = SpanGrammar(space, {found.name: found})
    with torch.no_grad():
        codes = subject.build().encode(**driver(subject).batch(ITEMS))
    rows = [ids[valid].cpu() for ids, valid in zip(codes.ids, codes.mask, strict=True)]
    pieces = [CodedPiece(ranges[0].name, row) for row in rows]
    if grammar.parse(grammar.build(pieces)) != pieces:
        raise CheckFailed(f"{where}: codes do not come back from a sequence as they were")


@check(
    "codec-metadata",
    CODEC,
    since=1,
    summary="decode metadata is one mapping per item that JSON keeps as it is",
    needs=("runs", "codes-in-range"),
)
def codec_metadata(subject: Subject) -> None:
    with torch.no_grad():
        codes = subject.build().encode(**driver(subject).batch(ITEMS))
    for entry in codes.metadata:
        try:
            same = isinstance(entry, Mapping) and json.loads(json.dumps(dict(entry))) == entry
        except (TypeError, ValueError):
            same = False
        if not same:
            raise CheckFailed(
                f"{subject.component.factory}.encode: the metadata {entry!r} do not survive JSON,"
                " in which tokenised data keep them; give a mapping from strings to plain numbers,"
                " strings, lists and mappings"
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
        if part.needs_metadata(subject.config):
            _refuses(where, part, ids)
            continue
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


def _refuses(where: str, part: Any, ids: Tensor) -> None:
    try:
        with torch.no_grad():
            part.decode(ids, [{}, {}])
    except XoronError:
        return
    raise CheckFailed(
        f"{where}: needs_metadata is true, but decode takes ids without any; refuse them with a"
        " DataError, or return False"
    )


def _plain(medium: Any) -> Any:
    return medium.detach().cpu() if isinstance(medium, Tensor) else medium
