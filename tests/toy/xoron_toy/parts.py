"""The toy components. Shapes: M signals, L patches of PATCH samples, Z latent width, D backbone."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from xoron_core import components as c
from xoron_core.tokens.space import CodecRange
from xoron_toy.config import PATCH, SignalProcessor


class Signal(c.Part):
    @classmethod
    def processor(cls, config):
        return SignalProcessor()

    def dummy_batch(self):
        return {"patches": torch.zeros(1, 4, PATCH), "mask": torch.ones(1, 4, dtype=torch.bool)}


class SignalEncoder(Signal, c.Encoder):
    def __init__(self, config, context):
        super().__init__(config, context)
        self.feature_size = config.width
        self.embed = nn.Linear(PATCH, config.width)

    def forward(self, patches, mask):
        return c.Features(F.gelu(self.embed(patches)), mask)


class SignalProjector(c.Projector):
    def __init__(self, config, context):
        super().__init__(config, context)
        self.project = nn.Linear(context.feature_size, context.hidden_size or 32)

    def forward(self, features):
        return features._replace(values=self.project(features.values))

    @classmethod
    def num_positions(cls, config, num_features):
        return num_features


class SignalCodec(Signal, c.Codec):
    def __init__(self, config, context):
        super().__init__(config, context)
        self.down, self.up = nn.Linear(PATCH, 2), nn.Linear(2, PATCH)

    @classmethod
    def ranges(cls, config):
        name, levels, rate = "xoron-toy/signal-codec", config.levels, 1 / PATCH
        identity = f"signal-codec/{levels}"
        return [
            CodecRange(name, q, levels, identity, rate, "signal", delay=q * config.delay)
            for q in range(2)
        ]

    @classmethod
    def frame_limits(cls, config):
        return 1, 6

    def _codes(self, patches):
        """(M, L, PATCH) to numbers in 0 .. levels - 1, before rounding: (M, L, 2)."""
        return self.down(patches).float().sigmoid() * (self.config.levels - 1)

    def encode(self, patches, mask):
        ids = self._codes(patches).round().long()
        return c.Codes(ids, mask, [{"patches": int(n)} for n in mask.sum(-1)])

    def decode(self, ids, metadata):
        values = ids.to(self.up.weight.dtype) / (self.config.levels - 1)
        return rearrange(self.up(values), "m l p -> m (l p)")

    def forward(self, patches, mask):
        soft = self._codes(patches)
        rounded = soft + (soft.round() - soft).detach()  # straight through
        return {"reconstruction": self.up(rounded / (self.config.levels - 1))}


class SignalAutoencoder(Signal, c.Autoencoder):
    def __init__(self, config, context):
        super().__init__(config, context)
        self.down, self.up = nn.Linear(PATCH, config.latent), nn.Linear(config.latent, PATCH)

    def encode(self, patches, mask):
        return self.down(patches)

    def decode(self, latents):
        return rearrange(self.up(latents), "m l p -> m (l p)")

    def forward(self, patches, mask):
        return {"reconstruction": self.up(self.down(patches))}


class SignalGenerator(Signal, c.Generator):
    """Flow matching (Lipman et al. 2023): x_t = (1 - t) x0 + t noise, the network gives v."""

    def __init__(self, config, context):
        super().__init__(config, context)
        self.autoencoder = [context.parts[config.autoencoder]]  # a list: referenced, not owned
        self.latent = self.autoencoder[0].config.latent
        self.query = nn.Parameter(torch.randn(config.num_patches, context.hidden_size) * 0.02)
        self.net = nn.Sequential(
            nn.Linear(context.hidden_size + self.latent + 1, 64),
            nn.GELU(),
            nn.Linear(64, self.latent),
        )

    @classmethod
    def num_queries(cls, config):
        return config.num_patches

    def queries(self):
        return self.query

    def encode_target(self, patches, mask):
        return self.autoencoder[0].encode(patches, mask)

    def target_count(self, patches, mask):
        return torch.tensor(float(patches.shape[0] * patches.shape[1] * self.latent))

    def velocity(self, hidden, x, t):
        return self.net(torch.cat([hidden, x, t.expand(*x.shape[:2], 1)], dim=-1))

    def loss(self, hidden, target, rng):
        like = {"dtype": target.dtype, "device": target.device, "generator": rng}
        noise = torch.randn(target.shape, **like)
        t = torch.rand(len(target), 1, 1, **like)
        error = self.velocity(hidden, (1 - t) * target + t * noise, t) - (noise - target)
        return c.LossTerm((error**2).sum(), torch.tensor(float(error.numel())))

    def sample(self, hidden, rng, steps=8):
        like = {"dtype": hidden.dtype, "device": hidden.device}
        x = torch.randn(*hidden.shape[:2], self.latent, generator=rng, **like)
        for i in range(steps, 0, -1):
            x = x - self.velocity(hidden, x, torch.full((1, 1, 1), i / steps, **like)) / steps
        return self.autoencoder[0].decode(x)


class SignalLoss(c.Loss):
    def forward(self, outputs, batch):
        if self.config.of not in outputs:
            zero = torch.zeros(())
            return c.LossTerm(zero, zero)
        media = batch["media"][self.config.of]
        error = (outputs[self.config.of]["reconstruction"] - media["patches"]) ** 2
        return c.LossTerm((error * media["mask"][..., None]).sum(), self.count(batch))

    def count(self, batch):
        media = (batch.get("media") or {}).get(self.config.of)
        return media["mask"].sum().float() * PATCH if media else torch.zeros(())
