"""Faults of an encoder, of its config and of its processor."""

from tests.mutants.base import Mutant


def part(kind, name, old, new, check, *says, file="parts.py"):
    return Mutant(name, file, old, new, f"{kind}/signal-{kind}/{check}", says)


def _forward(name, new, check, *says):
    """A fault in the encoder's forward."""
    return part(
        "encoder", name, "return c.Features(F.gelu(self.embed(patches)), mask)", new, check, *says
    )


_EMBED = "        self.embed = nn.Linear(PATCH, config.width)\n"


def _init(name, new, check, *says):
    """A fault in the encoder's constructor."""
    return part("encoder", name, _EMBED, _EMBED + new, check, *says)


ENCODER = [
    part(
        "encoder",
        "missing-reference",
        'factory=f"xoron_toy.parts:Signal{kind.capitalize()}"',
        'factory=f"xoron_toy.parts:Signal{kind.capitalize()}".replace("Enc", "enc")',
        "references",
        "cannot be imported",
        "factory",
        file="plugin.py",
    ),
    part(
        "encoder",
        "factory-of-another-kind",
        "class SignalEncoder(Signal, c.Encoder):",
        "class SignalEncoder(Signal, c.Autoencoder):\n    encode = decode = None\n",
        "references",
        "no class derived from xoron_core.components.Encoder",
    ),
    part(
        "encoder",
        "no-default",
        "    width: int = 16",
        "    width: int",
        "config-default",
        "'width' is missing",
        "Preset('tiny'",
        file="config.py",
    ),
    part(
        "encoder",
        "config-changes-in-a-round-trip",
        "    width: int = 16\n",
        "    width: int = 16\n\n    def data(self):\n        return {'width': self.width + 1}\n",
        "config-round-trip",
        "changes width",
        file="config.py",
    ),
    part(
        "encoder",
        "config-takes-anything",
        "class EncoderConfig(Config):\n",
        "class EncoderConfig(Config, extra='ignore'):\n",
        "config-schema",
        "takes an unknown key",
        file="config.py",
    ),
    part(
        "encoder",
        "unbuildable",
        _EMBED,
        _EMBED + "        self.table = torch.zeros(config.width, context.hidden)\n",
        "build",
        "AttributeError",
        "__init__",
    ),
    _forward("raises-in-forward", "raise KeyError('patch')", "runs", "KeyError", "forward"),
    _forward("exits-in-forward", "raise SystemExit(4)", "runs", "SystemExit"),
    _init(
        "built-on-a-device",
        "        self.register_buffer('scale', torch.ones(1, device='cpu'))\n",
        "build-meta",
        "puts scale on cpu",
        "without `device`",
    ),
    _init(
        "renamed-state",
        "        SignalEncoder.made = getattr(SignalEncoder, 'made', 0) + 1\n"
        "        self.register_buffer(f'scale{SignalEncoder.made}', torch.ones(1))\n",
        "state-names",
        "name their state differently",
    ),
    _forward(
        "state-made-in-forward",
        "self.register_buffer('seen', mask); return c.Features(F.gelu(self.embed(patches)), mask)",
        "state-names",
        "adds or removes seen",
    ),
    part(
        "encoder",
        "buffer-lost-in-a-load",
        _EMBED + "\n    def forward(self, patches, mask):\n"
        "        return c.Features(F.gelu(self.embed(patches)), mask)",
        _EMBED + "        shift = torch.randn(config.width)\n"
        "        self.register_buffer('shift', shift, persistent=False)\n"
        "\n    def forward(self, patches, mask):\n"
        "        return c.Features(F.gelu(self.embed(patches) + self.shift), mask)",
        "save-load",
        "reset_buffers",
    ),
    _forward(
        "hard-coded-device",
        "return c.Features(F.gelu(self.embed(patches) + torch.ones(16, device='cpu')), mask)",
        "no-hard-coded-device",
        "another device",
        "`device=` of an input",
    ),
    _forward(
        "moves-to-an-accelerator",
        "patches = patches.cuda() if patches.is_cuda else patches\n"
        "        return c.Features(F.gelu(self.embed(patches)), mask)",
        "no-hard-coded-device",
        "patches.cuda()",
        "names a device",
    ),
    _init(
        "loose-tensor",
        "        self.scale = torch.ones(1)\n",
        "device-move",
        "scale holds a tensor",
        "register_buffer",
    ),
    _forward(
        "overflows-in-half-precision",
        "return c.Features(self.embed(patches) * 1e6 / 1e6, mask)",
        "half-precision",
        "torch.float16",
        "keep_fp32",
    ),
    part(
        "encoder",
        "buffer-moves-in-forward",
        _EMBED + "\n    def forward(self, patches, mask):\n",
        _EMBED + "        self.register_buffer('seen', torch.zeros(()))\n"
        "\n    def forward(self, patches, mask):\n        self.seen += mask.sum()\n",
        "forward-keeps-state",
        "seen",
        "after_optimizer_step",
    ),
    _forward(
        "frozen-parameter-thaws",
        "self.requires_grad_(True); return c.Features(F.gelu(self.embed(patches)), mask)",
        "frozen",
        "trainable again",
    ),
    _init(
        "unused-parameter",
        "        self.spare = nn.Linear(2, 2)\n",
        "gradients",
        "spare.weight",
    ),
    _forward(
        "detached",
        "return c.Features(F.gelu(self.embed(patches).detach()), mask)",
        "gradients",
        "embed.weight",
        "detach",
    ),
    _forward(
        "nondeterministic",
        "rng = torch.Generator(); rng.seed()\n"
        "        noise = torch.rand(16, generator=rng, dtype=patches.dtype).to(patches.device)\n"
        "        return c.Features(F.gelu(self.embed(patches)) + noise, mask)",
        "determinism",
        "two results",
    ),
    _forward(
        "nondeterministic-in-training",
        "rng = torch.Generator(); rng.seed()\n"
        "        noise = torch.rand(16, generator=rng).to(patches) * self.training\n"
        "        return c.Features(F.gelu(self.embed(patches)) + noise, mask)",
        "determinism",
        "training on the same input",
    ),
    _forward(
        "global-rng",
        "noise = torch.rand_like(patches[..., :1])\n"
        "        return c.Features(F.gelu(self.embed(patches)) + noise, mask)",
        "global-rng",
        "global generator",
    ),
    part(
        "encoder",
        "wrong-dimension",
        "self.feature_size = config.width",
        "self.feature_size = config.width + 1",
        "declared-widths",
        "feature_size is 17",
    ),
    part(
        "encoder",
        "wrong-count",
        'return len(item["patches"])',
        'return len(item["patches"]) + 1',
        "token-counts",
        "SignalProcessor.num_positions",
        "[2, 4, 3]",
        file="config.py",
    ),
    part(
        "encoder",
        "unpicklable-processor",
        '    """Signals to whole patches, zero-padded."""\n',
        "    def __init__(self):\n        self.pad = lambda x: x\n",
        "processor",
        "cannot be pickled",
        file="config.py",
    ),
    part(
        "encoder",
        "processor-with-weights",
        '    """Signals to whole patches, zero-padded."""\n',
        "    def __init__(self):\n        import torch\n        self.window = torch.ones(4)\n",
        "processor",
        "holds weights in window",
        file="config.py",
    ),
    _forward(
        "blind",
        "return c.Features(F.gelu(self.embed(torch.ones_like(patches))), mask)",
        "sees-its-input",
        "does not see its input",
    ),
    _forward(
        "batch-dependent",
        "values = F.gelu(self.embed(patches))\n"
        "        return c.Features(values - values.mean(0), mask)",
        "batch-invariance",
        "than alone",
    ),
    _forward(
        "padding-leak",
        "values = F.gelu(self.embed(patches))\n"
        "        return c.Features(values - values.mean(1, keepdim=True), mask)",
        "padding-invariance",
        "padded to the length of a longer one",
    ),
    _forward(
        "no-empty-batch",
        "patches.max(); return c.Features(F.gelu(self.embed(patches)), mask)",
        "single-and-empty",
        "a batch of no items fails",
    ),
]
