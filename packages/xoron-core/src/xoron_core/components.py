"""The interface of every component kind; what they hand to each other is in `values`.

Legend of shapes: B batch rows, N positions of a sequence, D backbone width, M media items,
L features of one item, E feature width, K positions that one item takes, T frames or steps,
Q codebooks.

A component's class is called as `Class(config, context)`; it must build on the meta device and
must not read files or the network in its constructor. `forward` never changes persistent state:
under activation recomputation, accumulation and dummy batches it would be counted wrongly.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from xoron_core.config import Config
from xoron_core.tokens.space import CodecRange, TextBase
from xoron_core.values import BackboneOutput as BackboneOutput
from xoron_core.values import Codes as Codes
from xoron_core.values import Context as Context
from xoron_core.values import Cost as Cost
from xoron_core.values import Features as Features
from xoron_core.values import LossTerm as LossTerm

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MediaTensors = dict[str, Tensor]
AfterLayer = Callable[[Tensor, int], Tensor]


class MediaProcessor(Protocol):
    """Media to tensors, in data workers: picklable and weight-free."""

    def load(self, media: Any) -> dict[str, Any]:
        """One medium (as the modality's `load` returns it) to one item."""

    def collate(self, items: Sequence[dict[str, Any]]) -> MediaTensors:
        """Items to the tensors that the component's methods take; first axis M."""

    def num_positions(self, item: Mapping[str, Any]) -> int:
        """The exact number of features (encoder) or ids per stream (codec) of an item."""


class Part(nn.Module):
    """What every neural component has, and what it may declare.

    Attributes:
        keep_fp32: names of sub-modules that stay in fp32 when the model is cast down.
        entry_methods: methods other than `forward` that core may call from outside.
    """

    keep_fp32: tuple[str, ...] = ()
    entry_methods: tuple[str, ...] = ()

    def __init__(self, config: Config, context: Context) -> None:
        super().__init__()
        self.config = config
        self.slot = context.slot

    @classmethod
    def processor(cls, config: Any) -> MediaProcessor | None:
        """The processor for this component's media, or None if it takes none."""
        return None

    def dummy_batch(self) -> MediaTensors:
        """A smallest valid batch, without randomness, for ranks that lack this modality."""
        raise NotImplementedError(f"{type(self).__name__} declares no dummy_batch")

    @classmethod
    def find_source(cls, config: Any) -> None:
        """Makes sure that what `load_source_weights` will read is there.

        Compose calls it before any weights are allocated, so that a missing checkpoint is told at
        once.

        Raises:
            FolderError: if it is not.
        """

    def load_source_weights(self, generator: torch.Generator) -> None:
        """Loads pretrained weights that the config names; called once, by compose.

        Args:
            generator: for whatever the source does not have, such as new vocabulary rows.
        """

    def active_parameters(self) -> int:
        """Parameters that one position uses; fewer than all where experts are routed."""
        return sum(parameter.numel() for parameter in self.parameters())

    def reset_buffers(self) -> None:
        """Recomputes non-persistent buffers after a load."""

    def cost(self, shapes: Mapping[str, torch.Size]) -> Cost:
        """The cost of a forward pass on media of these shapes."""
        raise NotImplementedError(f"{type(self).__name__} declares no cost")

    def init_state(self) -> Any:
        """The state before the first chunk of a stream; explicit, so streams can interleave."""
        raise NotImplementedError(f"{type(self).__name__} does not stream")

    def step(self, chunk: Any, state: Any) -> tuple[Any, Any]:
        """One chunk of a stream and the state before it to what is ready and the state after."""
        raise NotImplementedError(f"{type(self).__name__} does not stream")

    def finish(self, state: Any) -> Any:
        """What is left when the stream ends; all pieces joined equal the whole at once."""
        raise NotImplementedError(f"{type(self).__name__} does not stream")

    def aux_losses(self, output: Any, media: Mapping[str, Tensor]) -> dict[str, LossTerm]:
        """A codec's or autoencoder's own losses while it trains alone or is judged.

        Args:
            output: what its `forward` gave for these media, in training mode or not.
            media: collated tensors.
        """
        return {}

    def aux_counts(self, media: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The counts that `aux_losses` will return for these media, before any forward."""
        return {}

    def after_optimizer_step(self, stats: Mapping[str, Tensor]) -> None:
        """Updates what is learned outside the gradient from all-reduced statistics."""

    def metrics(self, stats: Mapping[str, Tensor]) -> dict[str, float]:
        """Numbers to log from the same statistics, by name."""
        return {}


class Tokenizer(ABC):
    """Text to ids and back. Not a module: it is saved as `tokenizer.json`."""

    def __init__(self, config: Config, context: Context) -> None:
        self.config = config

    @abstractmethod
    def text_base(self) -> TextBase:
        """Size, identity and owned special strings of the base vocabulary."""

    @abstractmethod
    def base(self) -> PreTrainedTokenizerFast:
        """The base tokenizer, whose ids are `0 .. text_base().size - 1`."""


class Backbone(Part):
    """Embeddings to hidden states; owns the input embedding and the head.

    Attributes:
        hidden_size: D.
        position_kind: `1d` for (B, N) positions, `mrope` for (3, B, N).
        honours_documents: whether `document_ids` keep packed documents apart.
        fusion_layers: indices, from 0, of the layers after which it calls `after_layer`; none if it
            takes no fusion.
        group_names: none, or `("text",)` if its `forward` takes `position_groups` (B, N) int64 in
            training, to observe modalities apart; the model then sets `text` and its modalities,
            which are what the groups number.
        model: the transformers causal language model that is wrapped.
    """

    hidden_size: int
    position_kind: str = "1d"
    honours_documents: bool = True
    fusion_layers: tuple[int, ...] = ()
    group_names: tuple[str, ...] = ()
    model: Any

    @abstractmethod
    def embed(self, input_ids: Tensor) -> Tensor:
        """(B, N) ids to (B, N, D)."""

    @abstractmethod
    def forward(
        self,
        embeddings: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: Any = None,
        use_cache: bool = False,
        after_layer: AfterLayer | None = None,
    ) -> BackboneOutput:
        """Runs the layers.

        Args:
            embeddings: (B, N, D).
            attention_mask: (B, past + N), 1 valid and 0 padding, or None.
            position_ids: (B, N) or (3, B, N), or None for counting from the mask.
            document_ids: (B, N), 1.. per document and 0 for padding, or None. Positions of
                different documents never see each other.
            cache: a transformers `Cache`, or None.
            use_cache: whether to make a cache when none is given.
            after_layer: called with (B, N, D) and the index of each layer that has just run, its
                result goes on; outside what activation recomputation repeats. Only a backbone that
                declares `fusion_layers` is given one.
        """

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) to (..., rows)."""

    @abstractmethod
    def resize_rows(self, rows: int, new_rows: Tensor, generator: torch.Generator) -> None:
        """Gives embedding and head `rows` rows. Those listed in `new_rows` (int64) are drawn
        from N(0, 0.02); every other row keeps its value bit for bit."""

    def linear_head(self) -> nn.Module | None:
        """The head, if `logits` is exactly that module; the loss then makes no full logits."""
        return None

    def hf_fields(self) -> dict[str, Any]:
        """Fields that transformers reads from a model's config (num_hidden_layers, ...)."""
        return {}

    def cache_width(self) -> int:
        """How many numbers one cached position takes over all layers."""
        fields = self.hf_fields()
        heads = fields.get("num_key_value_heads") or fields["num_attention_heads"]
        width = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
        return int(2 * fields["num_hidden_layers"] * heads * width)

    def loss_counts(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The counts that `forward` will return with its own losses for this batch."""
        return {}


class Encoder(Part):
    """Media batch to features. Attribute `feature_size`: E."""

    feature_size: int

    @abstractmethod
    def forward(self, **media: Tensor) -> Features:
        """Collated tensors to features (M, L, E)."""


class Projector(Part):
    """Features (M, L, E) to backbone space (M, K, D).

    Attributes:
        budgeted: whether `forward` also takes `counts`, (M,) int64: how many positions each item is
            to take, which may be fewer than `num_positions` (`XoronProcessor.budgets`).
    """

    budgeted: bool = False

    @abstractmethod
    def forward(self, features: Features) -> Features:
        """The result's mask tells which of the K positions an item really takes."""

    @classmethod
    @abstractmethod
    def num_positions(cls, config: Any, num_features: int) -> int:
        """The exact number of positions for an item with `num_features` features."""


class Codec(Part):
    """Media to discrete ids and back."""

    entry_methods = ("encode", "decode")

    @classmethod
    @abstractmethod
    def ranges(cls, config: Any) -> list[CodecRange]:
        """The id ranges it needs, one per codebook, with its identity, rate and delays."""

    @classmethod
    def frame_limits(cls, config: Any) -> tuple[int, int]:
        """The fewest and the most steps T that a generated item may have."""
        return 1, 4096

    @classmethod
    def needs_metadata(cls, config: Any) -> bool:
        """Whether ids alone do not decode (EnCodec's scales): such a codec reads and makes none."""
        return False

    @abstractmethod
    def encode(self, **media: Tensor) -> Codes:
        """Collated tensors to codes, without gradient; metadata that JSON keeps as it is."""

    @abstractmethod
    def decode(self, ids: Tensor, metadata: Sequence[Mapping[str, Any]]) -> Any:
        """(M, T, Q) local ids and metadata to media; generated ids come with empty metadata.

        Raises:
            DataError: if it needs metadata and one item has none.
        """

    def forward(self, **media: Tensor) -> dict[str, Tensor]:
        """The training path: `reconstruction`, and what this codec's losses need."""
        raise NotImplementedError(f"{type(self).__name__} is not trainable")


class Autoencoder(Part):
    """Media to continuous latents and back."""

    entry_methods: tuple[str, ...] = ("encode", "decode")

    @abstractmethod
    def encode(self, **media: Tensor) -> Tensor:
        """Collated tensors to latents, first axis M."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents to media."""

    def forward(self, **media: Tensor) -> dict[str, Tensor]:
        """The training path: `reconstruction`, and what this autoencoder's losses need."""
        raise NotImplementedError(f"{type(self).__name__} is not trainable")


class Generator(Part):
    """Backbone hidden states at its own query positions to media."""

    entry_methods = ("sample",)

    @abstractmethod
    def queries(self) -> Tensor:
        """(K, D) learned inputs for the K positions it reads."""

    @classmethod
    @abstractmethod
    def num_queries(cls, config: Any) -> int:
        """K."""

    @abstractmethod
    def encode_target(self, **media: Tensor) -> Tensor:
        """Collated target media to training targets, without gradient; cacheable."""

    @abstractmethod
    def loss(self, hidden: Tensor, target: Tensor, rng: torch.Generator) -> LossTerm:
        """Hidden states (M, K, D) and targets to a loss."""

    @abstractmethod
    def target_count(self, **media: Tensor) -> Tensor:
        """The count that `loss` will return for these media, before any forward."""

    @abstractmethod
    def sample(self, hidden: Tensor, rng: torch.Generator, **options: Any) -> Any:
        """Hidden states (M, K, D) to media."""


class Fusion(Part):
    """Cross-attention of a sequence on media features, after declared backbone layers.

    Legend: S features of a row, media of all modalities one after another, rows padded alike.
    """

    entry_methods = ("remember",)

    @property
    @abstractmethod
    def layers(self) -> tuple[int, ...]:
        """Backbone layers after which it is applied, among the backbone's `fusion_layers`."""

    @abstractmethod
    def remember(self, features: Tensor) -> tuple[Tensor, ...]:
        """What all its layers need of (B, S, D) projector outputs, each (B, S, ...).

        It is made once per medium and kept beside the cache while text is generated.
        """

    @abstractmethod
    def forward(
        self, hidden: Tensor, memory: tuple[Tensor, ...], *, visible: Tensor, layer: int
    ) -> Tensor:
        """(B, N, D) to (B, N, D); exactly the identity at initialisation.

        Args:
            hidden: (B, N, D), what the backbone layer gave.
            memory: as `remember` gave it.
            visible: (B, N, S) bool, which features a position may look at. A position that may look
                at none is not changed at all.
            layer: index of that layer.
        """


class Loss(Part):
    """Model outputs and batch to a sum and a count; its own parameters are training-only."""

    @abstractmethod
    def forward(self, outputs: Mapping[str, Any], batch: Mapping[str, Any]) -> LossTerm:
        """`outputs` holds each trained slot's `forward` result by slot."""

    @abstractmethod
    def count(self, batch: Mapping[str, Any]) -> Tensor:
        """The count that `forward` will return for this batch, before any forward."""
