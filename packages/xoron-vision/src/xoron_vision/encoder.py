"""The encoder `xoron-vision`: tower, 1-D compression to K latents, dual-stream attention.

    pixels -> SigLIP tower -> (M, L, E) patches
           -> projected to D, in one sequence with K learned latents, through pre-norm blocks
              ("TiTok": Yu et al. 2024, "An Image is Worth 32 Tokens"); patches have 2-D rotary
              positions, latents stand at the origin, where the rotation is none
           -> joint attention of the two streams, latents and patches, with weights of their own
           -> (M, K, D) latents

There is no quantiser here: these features are continuous, a projector reads them.

Shapes: M images, L patches (padded to the longest), E tower width, K latents, D width.
"""

from __future__ import annotations

import torch
from einops import repeat
from torch import Tensor, nn

from xoron_core.components import Context, Encoder, Features
from xoron_core.nn.joint_attention import JointBlock
from xoron_core.nn.rope_axes import axial_tables
from xoron_vision.config import XoronVisionConfig
from xoron_vision.processing import FixedSize, NativeAspect, processor_of
from xoron_vision.siglip import SiglipEncoder

QK_NORM_EPS = 1e-6


class XoronVisionEncoder(Encoder):
    """Images to K features each, whatever their size.

    Raises:
        ConfigError: if the tower's config is not usable.
    """

    config: XoronVisionConfig

    def __init__(self, config: XoronVisionConfig, context: Context) -> None:
        super().__init__(config, context)
        self.tower = SiglipEncoder(config.tower, context)
        if config.freeze_tower:
            self.tower.requires_grad_(False)
        D, heads = config.hidden_size, config.num_heads
        self.feature_size = D
        self.head_dim = D // heads
        self.input_proj = nn.Linear(self.tower.feature_size, D)
        self.latents = nn.Parameter(torch.randn(config.num_latents, D) * D**-0.5)
        self.compression = nn.ModuleList(
            JointBlock(D, heads, num_streams=1) for _ in range(config.num_layers)
        )
        last = config.dual_stream_layers - 1
        self.dual_stream = nn.ModuleList(
            # Nobody reads the patches behind the last block.
            JointBlock(D, heads, num_written=1 if index == last else 2, qk_norm_eps=QK_NORM_EPS)
            for index in range(config.dual_stream_layers)
        )
        self.norm = nn.LayerNorm(D)

    @classmethod
    def processor(cls, config: XoronVisionConfig) -> FixedSize | NativeAspect:
        """The tower's, with K features per image."""
        return processor_of(config.tower, config.num_latents)

    def forward(self, **media: Tensor) -> Features:
        """The tower's tensors (see `SiglipEncoder.forward`) to features (M, K, D)."""
        seen: Features = self.tower(**media)
        assert seen.positions is not None
        patches = self.input_proj(seen.values)
        M, L = patches.shape[:2]
        latents = repeat(self.latents, "K D -> M K D", M=M)
        valid = seen.mask.new_ones(M, latents.shape[1])
        cos, sin = axial_tables(seen.positions, self.head_dim, theta=self.config.rope_theta)
        origin = seen.positions.new_zeros(M, latents.shape[1], 2)
        unturned = axial_tables(origin, self.head_dim, theta=self.config.rope_theta)
        tables = [torch.cat(pair, dim=1) for pair in zip((cos, sin), unturned, strict=True)]
        mask = torch.cat((seen.mask, valid), dim=1)
        sequence = torch.cat((patches, latents), dim=1)
        for block in self.compression:
            (sequence,) = block(sequence, ropes=[(tables[0], tables[1])], mask=mask)
        streams = (sequence[:, L:], sequence[:, :L])
        mask = torch.cat((valid, seen.mask), dim=1)
        for block in self.dual_stream:
            streams = block(*streams, ropes=[None, (cos, sin)], mask=mask)
        return Features(self.norm(streams[0]), valid)

    def dummy_batch(self) -> dict[str, Tensor]:
        """The tower's."""
        return self.tower.dummy_batch()

    @classmethod
    def find_source(cls, config: XoronVisionConfig) -> None:
        """The tower's."""
        SiglipEncoder.find_source(config.tower)

    def load_source_weights(self, generator: torch.Generator) -> None:
        """Loads the tower's weights, if its config has a path."""
        self.tower.load_source_weights(generator)

    def reset_buffers(self) -> None:
        """The tower's."""
        self.tower.reset_buffers()
