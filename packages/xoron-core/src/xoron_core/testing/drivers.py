"""How a component of each kind is fed and what is read off it, so that one check fits all kinds.

Shapes: M items, L features of one item, E feature width, K query positions, D backbone width, B
rows, N positions of a sequence, S features that a row may read. A batch is a nested dict of tensors
whose first axis is the item.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from xoron_core.components import Autoencoder, Codec, Features
from xoron_core.testing.outcome import CheckSkipped
from xoron_core.testing.subject import FEATURES, HIDDEN, Batch, Item, Subject
from xoron_core.testing.tensors import Named, named, noise, rng, weighted

RNG_SEED = 7


class Driver(ABC):
    """Feeds one component.

    Args:
        subject: the component.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject = subject

    @property
    def varies(self) -> bool:
        """Whether items of different sizes can be made."""
        return self.subject.samples

    def batch(self, items: Sequence[Item]) -> Batch:
        """A batch of items."""
        return self.subject.media(items)

    @abstractmethod
    def outputs(self, part: Any, batch: Batch) -> Named:
        """What it makes of a batch, item by item; positions that are padding are zero."""

    def everything(self, part: Any, batch: Batch) -> Named:
        """All that can be observed, whole-batch results and seeded noise included."""
        return self.outputs(part, batch)

    @abstractmethod
    def objective(self, part: Any, batch: Batch) -> Tensor:
        """A scalar that depends on every trainable parameter."""

    def train(self, part: Any, batch: Batch) -> Tensor:
        """The objective in training mode."""
        part.train()
        return self.objective(part, batch)


class EncoderDriver(Driver):
    def outputs(self, part: Any, batch: Batch) -> Named:
        return _features(part(**batch))

    def objective(self, part: Any, batch: Batch) -> Tensor:
        return weighted(self.outputs(part, batch))


class ProjectorDriver(Driver):
    """Fed with drawn features, laid out as the encoder of its modality would."""

    @property
    def varies(self) -> bool:
        return self.subject.encoder is None or self.subject.encoder.samples

    def batch(self, items: Sequence[Item]) -> Batch:
        encoder = self.subject.encoder
        if encoder is None:
            lengths = [4 * size for _, size in items]
            mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
            shape, positions = (*mask.shape, FEATURES), None
        else:
            with torch.no_grad():
                made = encoder.build()(**encoder.media(items))
            mask, positions = made.mask, made.positions
            shape = (*mask.shape, encoder.build().feature_size)
        values = torch.zeros(shape)
        for row, (seed, _) in zip(values, items, strict=True):
            rng = torch.Generator().manual_seed(seed)
            # Row by row: the same item has the same features however much padding follows.
            for feature in row:
                feature.copy_(torch.randn(shape[-1], generator=rng))
        batch = {"values": values * mask[..., None], "mask": mask}
        return batch if positions is None else {**batch, "positions": positions}

    def outputs(self, part: Any, batch: Batch) -> Named:
        return _features(part(Features(**batch)))

    def objective(self, part: Any, batch: Batch) -> Tensor:
        return weighted(self.outputs(part, batch))


class CodecDriver(Driver):
    def outputs(self, part: Any, batch: Batch) -> Named:
        codes = part.encode(**batch)
        return {"ids": codes.ids * codes.mask[..., None], "mask": codes.mask}

    def everything(self, part: Any, batch: Batch) -> Named:
        codes = part.encode(**batch)
        media = named(part.decode(codes.ids, codes.metadata), "decoded")
        return self.outputs(part, batch) | media

    def objective(self, part: Any, batch: Batch) -> Tensor:
        return weighted(_training_path(part, batch))


class AutoencoderDriver(Driver):
    def outputs(self, part: Any, batch: Batch) -> Named:
        return {"latents": part.encode(**batch)}

    def everything(self, part: Any, batch: Batch) -> Named:
        latents = part.encode(**batch)
        return {"latents": latents} | named(part.decode(latents), "decoded")

    def objective(self, part: Any, batch: Batch) -> Tensor:
        return weighted(_training_path(part, batch))


class GeneratorDriver(Driver):
    """Its batch holds `hidden` (M, K, D) and `media`, targets in the shape of its dummy batch."""

    varies = False

    def batch(self, items: Sequence[Item]) -> Batch:
        K = self.subject.cls.num_queries(self.subject.config)
        return {
            "media": self.subject.like_dummy(items),
            "hidden": torch.stack([noise((K, HIDDEN), 1000 + seed) for seed, _ in items]),
        }

    def outputs(self, part: Any, batch: Batch) -> Named:
        return {"target": part.encode_target(**batch["media"])}

    def everything(self, part: Any, batch: Batch) -> Named:
        term = self.loss(part, batch)
        return (
            self.outputs(part, batch)
            | {"queries": part.queries(), "loss.sum": term.sum, "loss.count": term.count}
            | named(self.sample(part, batch["hidden"]), "sample")
        )

    def loss(self, part: Any, batch: Batch, seed: int = RNG_SEED) -> Any:
        """The loss of a batch under a seed."""
        with torch.no_grad():
            target = part.encode_target(**batch["media"])
        return part.loss(batch["hidden"], target, rng(target.device, seed))

    def sample(self, part: Any, hidden: Tensor, seed: int = RNG_SEED) -> Any:
        """Media for hidden states under a seed."""
        return part.sample(hidden, rng(hidden.device, seed))

    def objective(self, part: Any, batch: Batch) -> Tensor:
        M = len(batch["hidden"])
        hidden = batch["hidden"] + part.queries().expand(M, -1, -1)
        total: Tensor = self.loss(part, {**batch, "hidden": hidden}).sum
        return total


class LossDriver(Driver):
    """Reads what the codecs and autoencoders of its modality give, as in a model's forward.

    Its batch holds `outputs` and `media`, both by slot.
    """

    @property
    def varies(self) -> bool:
        return any(part.samples for part in self.read)

    @property
    def read(self) -> list[Subject]:
        """The components whose outputs it is offered: those that have a training path."""
        beside = [*self.subject.siblings("codec"), *self.subject.siblings("autoencoder")]
        untrained = (Codec.forward, Autoencoder.forward)
        return [part for part in beside if part.cls.forward not in untrained]

    def batch(self, items: Sequence[Item]) -> Batch:
        media = {part.slot: part.media(items) for part in self.read}
        with torch.no_grad():
            outputs = {part.slot: part.build()(**media[part.slot]) for part in self.read}
        return {"outputs": outputs, "media": media}

    def term(self, part: Any, batch: Batch) -> Any:
        """The loss of a batch.

        Raises:
            CheckSkipped: if it finds nothing to read in what the kit offers.
        """
        term = part(batch["outputs"], self.fields(batch))
        if float(term.count) == 0:
            offered = ", ".join(batch["outputs"]) or "nothing"
            raise CheckSkipped(
                f"the loss counts 0 in what the kit offers it (outputs of {offered}); ship a preset"
                " `tiny` that reads one of these slots"
            )
        return term

    def fields(self, batch: Batch) -> Batch:
        """The batch as a model hands it to a loss."""
        return {"input_ids": None, "labels": None, "media": batch["media"]}

    def outputs(self, part: Any, batch: Batch) -> Named:
        term = self.term(part, batch)
        return {"sum": term.sum, "count": term.count} | named(term.metrics, "metrics")

    def objective(self, part: Any, batch: Batch) -> Tensor:
        total: Tensor = self.term(part, batch).sum
        return total


class BackboneDriver(Driver):
    """Its batch holds `input_ids` and `attention_mask`, padded on the right."""

    varies = True

    def batch(self, items: Sequence[Item]) -> Batch:
        lengths = [4 + 4 * size for _, size in items]
        ids = torch.zeros(len(items), max(lengths), dtype=torch.int64)
        for row, (seed, _), length in zip(ids, items, lengths, strict=True):
            row[:length] = torch.randint(1, 256, (length,), generator=rng("cpu", seed))
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        return {"input_ids": ids, "attention_mask": mask.long()}

    def outputs(self, part: Any, batch: Batch) -> Named:
        mask = batch["attention_mask"]
        hidden = part(part.embed(batch["input_ids"]), attention_mask=mask).hidden
        valid = mask.bool()[..., None]
        return {"hidden": hidden * valid, "logits": part.logits(hidden) * valid}

    def objective(self, part: Any, batch: Batch) -> Tensor:
        return weighted(self.outputs(part, batch))


class FusionDriver(Driver):
    """Its batch holds `hidden` (B, N, D), `features` (B, S, D) and `visible` (B, N, S), where later
    positions see more features and the first sees none; all its layers run one after another."""

    varies = True
    length = 6

    def batch(self, items: Sequence[Item]) -> Batch:
        N, most = self.length, 2 * max(size for _, size in items)
        hidden = torch.stack([noise((N, HIDDEN), seed) for seed, _ in items])
        features = torch.zeros(len(items), most, HIDDEN)
        visible = torch.zeros(len(items), N, most, dtype=torch.bool)
        for b, (seed, size) in enumerate(items):
            features[b, : 2 * size] = noise((2 * size, HIDDEN), 500 + seed)
            visible[b, :, : 2 * size] = torch.ones(N, 2 * size).tril(-1).bool()
        return {"hidden": hidden, "features": features, "visible": visible}

    def outputs(self, part: Any, batch: Batch) -> Named:
        hidden, memory = batch["hidden"], part.remember(batch["features"])
        for layer in part.layers:
            hidden = part(hidden, memory, visible=batch["visible"], layer=layer)
        return {"hidden": hidden}

    def objective(self, part: Any, batch: Batch) -> Tensor:
        return weighted(self.outputs(part, batch))


DRIVERS: dict[str, type[Driver]] = {
    "encoder": EncoderDriver,
    "projector": ProjectorDriver,
    "codec": CodecDriver,
    "autoencoder": AutoencoderDriver,
    "generator": GeneratorDriver,
    "loss": LossDriver,
    "backbone": BackboneDriver,
    "fusion": FusionDriver,
}


def driver(subject: Subject) -> Any:
    """The driver of a component's kind."""
    return DRIVERS[subject.kind](subject)


def _features(features: Any) -> Named:
    found = {"values": features.values * features.mask[..., None], "mask": features.mask}
    if features.positions is not None:
        found["positions"] = features.positions * features.mask[..., None]
    return found


def _training_path(part: Any, batch: Batch) -> Named:
    try:
        return named(part(**batch))
    except NotImplementedError as error:
        raise CheckSkipped(f"it has no training path: {error}") from None
