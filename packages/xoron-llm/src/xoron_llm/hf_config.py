"""What a composition says about the `hf` backbone. Imports no torch: plans read it."""

from __future__ import annotations

from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import model_validator

from xoron_core.config import Config, read_json
from xoron_core.errors import ConfigError

_PUBLISHED = {"Qwen/Qwen3-8B": "qwen3-8b.json"}


class HfConfig(Config):
    """Any transformers causal language model.

    Attributes:
        path: a folder as `save_pretrained` writes it, or a name on the Hugging Face Hub; its
            weights are loaded when the model is composed. None with `hf_config` starts from random
            weights.
        hf_config: the model's own `config.json` as data. Read from `path` where it is not given,
            so that a saved model needs neither the folder nor the network again.
        dtype: of the weights; None is that of the checkpoint, or fp32.
    """

    path: str | None = None
    hf_config: dict[str, Any] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None

    @model_validator(mode="after")
    def _has_a_source(self) -> Self:
        if self.path is None and self.hf_config is None:
            raise ValueError(
                "the hf backbone needs path (a model folder or a Hub name) or hf_config (the data"
                " of a config.json)"
            )
        if self.hf_config is not None and "model_type" not in self.hf_config:
            raise ValueError("hf_config has no model_type, e.g. 'qwen3'")
        return self

    def resolved(self) -> Self:
        """The same with `hf_config` filled in from `path`.

        Raises:
            ConfigError: if there is no readable config.json there.
        """
        if self.hf_config is not None:
            return self
        assert self.path is not None
        data = {"path": self.path, "hf_config": read_hf_config(self.path), "dtype": self.dtype}
        return type(self).parse(data)


def read_hf_config(path: str) -> dict[str, Any]:
    """Reads the config.json of a model folder, or of a name on the Hub.

    Raises:
        ConfigError: if it cannot be found, fetched or read.
    """
    folder = Path(path)
    file: Path | Traversable
    if folder.is_dir():
        file = folder / "config.json"
    else:
        file = _published(path) or _fetch(path, "config.json")
    expected = "path must be a folder that save_pretrained wrote, or a Hub name"
    data = read_json(file, what="hf backbone", expected=expected)
    if "model_type" not in data:
        raise ConfigError(
            f"hf backbone: {file}: has no model_type; expected a transformers config.json"
        )
    return data


def _published(name: str) -> Traversable | None:
    """The config.json of a checkpoint that a preset names, so that its plan needs no network."""
    file = _PUBLISHED.get(name)
    return None if file is None else resources.files("xoron_llm").joinpath("presets", file)


def _fetch(name: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(name, file))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"hf backbone: {name!r} is no folder here and {file} cannot be fetched from the Hub"
            f" ({reason}); check the spelling, or download the model and give its folder as path"
        ) from None
