"""One component under test: how the kit builds it, between which neighbours, and what it feeds it.

A component is built from its preset `tiny`, or else from its default config, in slot
`<modality>.<kind>`. Around it stand a backbone of width `HIDDEN`, which takes fusions after
`FUSION_LAYERS`, and features of width `FEATURES` (or of the encoder of its modality, where one is
installed). Parts that it reads from `context.parts` are built on demand, from the same plug-in or
another installed one.

An item is written `(seed, size)`: the same pair is always the same medium, whatever stands beside
it in the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from xoron_core.components import Context, MediaProcessor, Part
from xoron_core.composer.composition import component_config, load_factory
from xoron_core.config import Config, Source
from xoron_core.descriptors import Component, Modality, resolve
from xoron_core.testing.outcome import CheckFailed, CheckSkipped
from xoron_core.testing.target import Target
from xoron_core.tokens.space import CodecRange, TextBase, TokenSpace

HIDDEN = 64
FEATURES = 48
FUSION_LAYERS = (0, 1, 2, 3)
TEXT = TextBase("xoron-core/conformance", 256, "sha256:conformance")

Item = tuple[int, int]
Batch = dict[str, Any]


class Subject:
    """A component of a plug-in under test.

    Args:
        target: its plug-in.
        component: the component.
    """

    def __init__(self, target: Target, component: Component) -> None:
        self.target = target
        self.component = component
        self.registry = target.registry
        self.kind = component.kind
        self.key = component.key

    @cached_property
    def cls(self) -> Any:
        """Its class."""
        return load_factory(self.registry, self.component)

    @cached_property
    def config(self) -> Config:
        """Its config from the preset `tiny`, or the default one."""
        tiny = self.registry.presets("tiny", self.key)
        body = {"preset": "tiny"} if tiny else {}
        return component_config(self.registry, self.component, body, Source(self.key))

    @property
    def slot(self) -> str:
        """The slot that the kit fills with it."""
        if self.kind in ("backbone", "fusion", "tokenizer"):
            return self.kind
        return f"{self.component.modality}.{self.kind}"

    @cached_property
    def space(self) -> TokenSpace:
        """256 text ids, the token groups that it names, and the codecs of its plug-in."""
        groups = self.registry.token_groups()
        ranges: list[CodecRange] = []
        for other in self.siblings("codec"):
            ranges += other.cls.ranges(other.config)
        wanted = [groups[name] for name in self.component.token_groups if name in groups]
        return TokenSpace.allocate(text=TEXT, groups=wanted, codecs=ranges)

    @property
    def feature_size(self) -> int:
        """The feature width that a projector is built for."""
        return self.encoder.build().feature_size if self.encoder else FEATURES

    @cached_property
    def encoder(self) -> Subject | None:
        """The encoder of the same modality."""
        return next(iter(self.siblings("encoder")), None) if self.kind == "projector" else None

    def siblings(self, kind: str) -> list[Subject]:
        """Components of a kind and this modality, those of the same plug-in first."""
        own = self.target.plugin.contribution.components
        every = [*own, *self.registry.components().values()]
        keys = dict.fromkeys(
            c.key for c in every if c.kind == kind and c.modality == self.component.modality
        )
        return [Subject(self.target, self.registry.component(*key.split("/", 1))) for key in keys]

    def build(
        self, seed: int = 0, *, config: Config | None = None, dtype: torch.dtype | None = None
    ) -> Any:
        """A new instance in evaluation mode, on whatever device is current.

        Args:
            seed: of its initialisation.
            config: another config than the kit's.
            dtype: casts it and what it reads, apart from what `keep_fp32` names.
        """
        neighbours = Neighbours(self, dtype)
        context = Context(
            slot=self.slot,
            hidden_size=None if self.kind in ("backbone", "tokenizer") else HIDDEN,
            feature_size=self.feature_size if self.kind == "projector" else None,
            space=self.space,
            parts=neighbours,
            fusion_layers=FUSION_LAYERS if self.kind == "fusion" else (),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            part = self.cls(config or self.config, context)
        if not isinstance(part, Part):
            return part
        if dtype is not None:
            part.to(dtype)
            for name, module in part.named_modules():
                if any(kept in name for kept in part.keep_fp32):
                    module.float()
        return part.eval()

    @cached_property
    def base_tokenizer(self) -> Any:
        """A tokenizer component's base; large vocabularies take seconds to make."""
        return self.build().base()

    # media

    @cached_property
    def processor(self) -> MediaProcessor | None:
        """What turns media into its tensors, or None if it takes none."""
        found: MediaProcessor | None = self.cls.processor(self.config)
        return found

    @cached_property
    def modality(self) -> Modality | None:
        """Its modality, or None if no installed plug-in declares it."""
        return self.registry.modalities().get(self.component.modality)

    @property
    def samples(self) -> bool:
        """Whether media of its modality can be made up."""
        return bool(self.processor and self.modality and self.modality.sample)

    def need_samples(self) -> None:
        """Skips the check where media cannot be made up.

        Raises:
            CheckSkipped: saying how to have it run.
        """
        if not self.samples:
            raise CheckSkipped(
                f"modality {self.component.modality!r} declares no `sample`, so there are no media"
                " of different sizes; give its Modality sample='pkg.module:function'"
            )

    def item(self, item: Item) -> dict[str, Any]:
        """One made-up medium, loaded and processed."""
        if self.modality is None or self.processor is None:
            raise CheckFailed(f"{self.key}: there is no processor, or no modality to load media")
        medium = resolve(self.modality.sample)(*item)
        return self.processor.load(resolve(self.modality.load)(medium))

    def media(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """A batch of media; where none can be made up, as `like_dummy`."""
        if self.samples and self.processor is not None:
            return self.processor.collate([self.item(item) for item in items])
        return self.like_dummy(items)

    def like_dummy(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """A batch in the shape of the dummy batch, with noise of each item's seed."""
        dummy = self.build().dummy_batch()
        batches = [
            {key: _with_noise(value[:1], seed) for key, value in dummy.items()} for seed, _ in items
        ]
        return {key: torch.cat([batch[key] for batch in batches]) for key in dummy}


class Neighbours(Mapping[str, Any]):
    """The parts of a composition, each built when it is asked for."""

    def __init__(self, subject: Subject, dtype: torch.dtype | None) -> None:
        self._subject = subject
        self._dtype = dtype
        self._built: dict[str, Any] = {}

    def __getitem__(self, slot: str) -> Any:
        if slot not in self._built:
            kind = slot.rpartition(".")[2]
            found = self._subject.siblings(kind)
            if not found or found[0].slot != slot:
                offered = ", ".join(self) or "none"
                raise KeyError(f"{slot!r} in context.parts; installed components fill: {offered}")
            self._built[slot] = found[0].build(dtype=self._dtype)
        return self._built[slot]

    def __iter__(self) -> Iterator[str]:
        kinds = ("encoder", "projector", "codec", "autoencoder")
        return (found[0].slot for kind in kinds if (found := self._subject.siblings(kind)))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _with_noise(value: Tensor, seed: int) -> Tensor:
    if not value.is_floating_point():
        return value
    rng = torch.Generator().manual_seed(seed)
    return value + 0.1 * torch.randn(value.shape, generator=rng, dtype=value.dtype)
