"""`XoronModel`: the composed model, one transformers model over whatever parts there are.

Everything trains through `forward`, because distribution, offload and compilation wrap only that:
encoders, projectors, the backbone, generators' losses and backbone-less codecs all run inside it.
What a component may be asked from outside (`encode`, `decode`, `sample`) goes through `call`.

Footguns:
- Slot modules live under `slots`, dots in slot names written as double underscores.

Shapes: B rows, N positions, D backbone width, V rows of the token space.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from xoron_core import advice, backbone_pass, fill, losses
from xoron_core.components import (
    Backbone,
    Features,
    Fusion,
    Generator,
    Loss,
    LossTerm,
)
from xoron_core.composer.composition import Composition
from xoron_core.composer.parts import build_parts
from xoron_core.composer.space import allocate_space, used_modalities
from xoron_core.configuration import XoronConfig
from xoron_core.encode import encode
from xoron_core.errors import CompositionError, PluginError, TokenSpaceError
from xoron_core.media import alone, embed, generator_losses, train_alone
from xoron_core.modality_groups import group_names
from xoron_core.nn import context_parallel
from xoron_core.outputs import XoronOutput
from xoron_core.placeholders import with_images
from xoron_core.plugins import Registry
from xoron_core.plugins import registry as installed
from xoron_core.tokens.space import TokenSpace
from xoron_core.transformers_model import TransformersModel

Batch = Mapping[str, Any]


class Slots(nn.Module):
    """The container of all parts; a dotted slot name becomes a module name with `__`."""

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for slot, part in parts.items():
            name = slot.replace(".", "__")
            if hasattr(self, name):
                raise CompositionError(
                    f"slot {slot!r} cannot be named so (torch modules have an attribute {name!r});"
                    f" put it under a modality, e.g. {slot}.encoder"
                )
            self.add_module(name, part)

    def get(self, slot: str) -> Any:
        """The part in a slot, or None."""
        return self._modules.get(slot.replace(".", "__"))


class XoronModel(TransformersModel):
    """A composed model.

    Args:
        config: carries the composition.
        space: the token space of a saved model; None allocates it from the composition.
        registry: the plug-ins to build from; None takes the installed ones.
        seed: for the parts' initialisation.

    Raises:
        PluginError: if a component's plug-in is missing.
        CompositionError, TokenSpaceError: if the parts do not fit.
    """

    def __init__(
        self,
        config: XoronConfig,
        space: TokenSpace | None = None,
        *,
        registry: Registry | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(config)
        registry = registry or installed()
        composition = Composition.parse(config.composition)
        space = space if space is not None else allocate_space(composition, registry)
        if space is not None and config.token_space_hash not in (None, space.hash):
            raise TokenSpaceError(
                f"this model's config expects token space {config.token_space_hash}, got"
                f" {space.hash}; load it with the token_space.json of its own folder"
            )
        parts, composition = build_parts(registry, composition, space, seed)
        own = {name: part for name, part in parts.items() if composition.slots[name].ref is None}
        self.space = space
        self.composition = composition
        self.modalities = used_modalities(composition, registry)
        self.slots = Slots(own)
        self._aliases = {n: s.ref for n, s in composition.slots.items() if s.ref is not None}
        config.composition = composition.data()
        if space is not None:
            config.token_space_hash = space.hash
            config.vocab_size = space.size
        if self.backbone is not None:
            for key, value in self.backbone.hf_fields().items():
                setattr(config, key, value)
            if self.backbone.group_names:
                self.backbone.group_names = group_names(composition)
        self.post_init()

    # parts

    @property
    def backbone(self) -> Backbone | None:
        """The backbone, or None in a composition without one."""
        return self._first(Backbone)

    @property
    def fusion(self) -> Fusion | None:
        """The fusion of media into the backbone's layers, or None."""
        return self._first(Fusion)

    def part(self, slot: str) -> Any:
        """The component in a slot.

        Raises:
            PluginError: if the slot is empty, naming the package that usually fills it.
        """
        found = self.slots.get(self._aliases.get(slot, slot))
        if found is None:
            raise PluginError(advice.empty_slot(slot, self.composition.slots))
        return found

    def parts(self, kind: type | tuple[type, ...]) -> dict[str, Any]:
        """Parts of one interface class or of several, by slot, references left out."""
        return {
            name: self.slots.get(name)
            for name, slot in self.composition.slots.items()
            if slot.ref is None and isinstance(self.slots.get(name), kind)
        }

    def call(self, slot: str, method: str, *args: Any, **kwargs: Any) -> Any:
        """Calls an entry method that the component in `slot` declares, e.g. `encode`."""
        part = self.part(slot)
        if method not in part.entry_methods:
            allowed = ", ".join(part.entry_methods) or "none"
            raise CompositionError(
                f"slot {slot!r} declares no method {method!r}; it has: {allowed}"
            )
        return getattr(part, method)(*args, **kwargs)

    def encode(
        self, media: Any, *, slot: str = "image.encoder", project: bool = True, batch_size: int = 8
    ) -> Features:
        """Media to what the model sees of them; see `xoron_core.encode.encode`."""
        return encode(self, media, slot=slot, project=project, batch_size=batch_size)

    # forward

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        document_ids: Tensor | None = None,
        loss_weights: Tensor | None = None,
        media_labels: Tensor | None = None,
        media: Mapping[str, Mapping[str, Tensor]] | None = None,
        images: Any = None,
        legal: bool = False,
        seed: int | None = None,
        return_dict: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> XoronOutput:
        """Runs whatever the batch holds.

        Args:
            input_ids: (B, N), or None for a batch of media alone.
            attention_mask: (B, past + N), 1 valid.
            position_ids: (B, N) or (3, B, N).
            past_key_values: cache of the positions before these.
            inputs_embeds: (B, N, D) instead of `input_ids`.
            labels: (B, N), aligned with the inputs, -100 ignored; with them the result has losses
                and no logits.
            use_cache: whether to return a cache; off while training.
            logits_to_keep: logits of the last positions only; 0 for all.
            document_ids: (B, N), 1.. per packed document, 0 padding.
            loss_weights: (B, N), weight of each label.
            media_labels: (B, N), for rows that media fill the id of a word, else -100; see
                `losses.label_loss`.
            media: slot to its tensors and `spans` (see `xoron_core.fill`).
            images: the published form: (M, 3, H, W) pixel values, or a list of files or arrays, for
                `image.encoder`, at the placeholders of `input_ids` (`xoron_core.placeholders`).
            legal: whether a codec's id among the labels competes with the ids of its codebook alone
                (see `xoron_core.losses`).
            seed: for the generators' noise; None draws one from torch's global generator.

        Raises:
            SequenceError: if spans and media do not agree.
        """
        media = with_images(self, media, images=images, input_ids=input_ids)
        terms: dict[str, LossTerm] = {}
        outputs = train_alone(self, media)
        # What parts that train alone observed, under their outputs' name for it.
        statistics = {
            slot: output["statistics"]
            for slot, output in outputs.items()
            if isinstance(output, Mapping) and output.get("statistics")
        }
        hidden = cache = None
        if input_ids is not None or inputs_embeds is not None:
            backbone = self.need_backbone()
            embedded = embed(
                self, media, input_ids=input_ids, inputs_embeds=inputs_embeds, labels=labels
            )
            labels = embedded.labels
            output, shared = backbone_pass.run(
                self,
                embedded,
                {
                    "attention_mask": attention_mask,
                    "position_ids": position_ids,
                    "document_ids": document_ids,
                },
                cache=past_key_values,
                use_cache=bool(use_cache) if use_cache is not None else not self.training,
                input_ids=input_ids,
                loss_weights=loss_weights,
                media=media,
            )
            hidden, cache = output.hidden, output.cache
            if output.statistics:
                statistics[backbone.slot] = output.statistics
            if labels is not None and shared is not None:
                terms["text"] = context_parallel.text_loss(
                    hidden,
                    shared,
                    backbone.logits,
                    head=backbone.linear_head(),
                    legal=self._ranges(legal),
                )
            elif labels is not None:
                terms["text"] = losses.text_loss(
                    hidden,
                    labels,
                    backbone.logits,
                    head=backbone.linear_head(),
                    document_ids=document_ids,
                    loss_weights=loss_weights,
                    legal=self._ranges(legal),
                )
            if media_labels is not None:
                terms["labels"] = losses.label_loss(
                    embedded.embeds, media_labels, backbone.logits, head=backbone.linear_head()
                )
            if self._wants_losses(labels, media):
                terms.update(generator_losses(self, hidden, media, seed))
                terms.update({f"{backbone.slot}/{k}": v for k, v in output.losses.items()})
        batch = {"input_ids": input_ids, "labels": labels, "media": media}
        if outputs or self._wants_losses(labels, media):
            terms.update(self._slot_losses(outputs, batch))
        return XoronOutput(
            loss=_mean(terms),
            logits=None
            if hidden is None or labels is not None
            else self._head(hidden, logits_to_keep),
            past_key_values=cache,
            hidden=hidden,
            losses=terms or None,
            outputs=outputs or None,
            statistics=statistics or None,
        )

    def after_optimizer_step(self, statistics: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Hands each part the statistics of a step, summed over its micro-batches and processes."""
        for slot, stats in statistics.items():
            self.part(slot).after_optimizer_step(stats)

    @torch.no_grad()
    def loss_counts(self, batch: Batch) -> dict[str, Tensor]:
        """The counts that `forward(**batch)` will return with its losses, before it runs.

        A trainer sums them over micro-batches and ranks and divides each loss's sum by the total,
        so that accumulation, packing and world size do not change the gradient.
        """
        counts: dict[str, Tensor] = {}
        media = batch.get("media") or {}
        group = None if self.backbone is None else context_parallel.group_of(self.backbone)
        if group is not None:
            batch = {**batch, **backbone_pass.text_share(batch, group)}
            if "shift_labels" in batch:
                counts["text"] = context_parallel.text_count(batch)
        elif batch.get("labels") is not None:
            counts["text"] = losses.text_count(
                batch["labels"], batch.get("document_ids"), batch.get("loss_weights")
            )
        if batch.get("media_labels") is not None:
            counts["labels"] = losses.label_count(batch["media_labels"])
        runs = self.backbone is not None and ("input_ids" in batch or "inputs_embeds" in batch)
        if runs and self._wants_losses(batch.get("labels"), media):
            backbone = self.need_backbone()
            slot, own = backbone.slot, backbone.loss_counts(batch)
            counts |= {f"{slot}/{name}": count for name, count in own.items()}
        for slot, generator in self.parts(Generator).items():
            if slot in media:
                _, tensors = fill.split_spans(media[slot])
                counts[slot] = generator.target_count(**tensors)
        for slot, loss in self.parts(Loss).items():
            counts[slot] = loss.count(batch)
        for slot, (part, tensors) in alone(self, media).items():
            counts |= {f"{slot}/{k}": count for k, count in part.aux_counts(tensors).items()}
        return counts

    def _wants_losses(self, labels: Tensor | None, media: Mapping[str, Any]) -> bool:
        return labels is not None or (self.training and bool(media))

    def _ranges(self, legal: bool) -> losses.Ranges:
        if legal and self.space is None:
            raise TokenSpaceError("legal: this model has no token space, so no id is a codec's")
        return losses.codec_ranges(self.space) if legal and self.space is not None else ()

    def _slot_losses(self, outputs: Mapping[str, Any], batch: Batch) -> dict[str, LossTerm]:
        terms = {slot: loss(outputs, batch) for slot, loss in self.parts(Loss).items()}
        for slot, output in outputs.items():
            _, tensors = fill.split_spans(batch["media"][slot])
            own = self.part(slot).aux_losses(output, tensors)
            terms |= {f"{slot}/{name}": term for name, term in own.items()}
        return terms

    def _head(self, hidden: Tensor, keep: int) -> Tensor:
        return self.need_backbone().logits(hidden[:, -keep:] if keep else hidden)

    def need_backbone(self) -> Backbone:
        """The backbone.

        Raises:
            PluginError: if there is none, naming what to install.
        """
        return self.backbone or cast(Backbone, self.part("backbone"))

    def _first(self, kind: type) -> Any:
        return next(iter(self.parts(kind).values()), None)


class XoronMultimodalModel(XoronModel):
    """The published name of `XoronModel`."""


def _mean(terms: Mapping[str, LossTerm]) -> Tensor | None:
    if not terms:
        return None
    return cast(Tensor, sum(term.sum / term.count.clamp(min=1) for term in terms.values()))
