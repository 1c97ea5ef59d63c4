"""The checks, by what they look at; they run in this order."""

ORDER = (
    "plugin",
    "space",
    "model",
    "config",
    "build",
    "devices",
    "state",
    "learning",
    "repeat",
    "media",
    "batch",
    "codec",
    "generator",
    "loss",
    "fusion",
    "backbone",
    "tokenizer",
)
