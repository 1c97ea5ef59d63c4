"""`XoronConfig`: the transformers config of a composed model, readable without its plug-ins.

It carries the resolved composition as plain data, the hash of the token space, and mirrors of the
fields that transformers' generation and other engines read at the top level. There is no nested
`text_config`, `decoder` or `generator`: `get_text_config()` must find exactly one place.

`XoronConfig()` is the `xoron-dev` preset of the installed plug-ins; the published flat keys
(`hidden_size=2048`) are aliases of fields of its slots.
"""

from __future__ import annotations

from typing import Any, Self

from transformers import AutoConfig, PretrainedConfig

from xoron_core.errors import ConfigError, did_you_mean

# published flat key -> (slot, field of the component's config)
FLAT_KEYS: dict[str, tuple[str, str]] = {
    "hidden_size": ("backbone", "hidden_size"),
    "num_layers": ("backbone", "num_layers"),
    "num_heads": ("backbone", "num_heads"),
    "intermediate_size": ("backbone", "intermediate_size"),
    "max_position_embeddings": ("backbone", "max_position_embeddings"),
    "use_moe": ("backbone", "use_moe"),
    "num_experts": ("backbone", "num_experts"),
    "num_experts_per_tok": ("backbone", "num_experts_per_tok"),
    "moe_layer_freq": ("backbone", "moe_layer_freq"),
    "use_shared_expert": ("backbone", "use_shared_expert"),
    "tokenizer_name": ("tokenizer", "source"),
}
_STANDARD = {
    "architectures",
    "attn_implementation",
    "auto_map",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "experts_implementation",
    "name_or_path",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "return_dict",
    "torch_dtype",
    "transformers_version",
}


class XoronConfig(PretrainedConfig):
    """Configuration of a `XoronModel`.

    Args:
        composition: a resolved composition as `Composition.data()` gives it; None takes the
            `xoron-dev` preset of the installed plug-ins.
        token_space_hash: hash of the token space that belongs to it, once planned.
        vocab_size: rows of the embedding, once planned. It follows from the token space and can
            not be chosen.
        **kwargs: published flat keys (`FLAT_KEYS`, `model_name`) where no composition is given,
            and what every transformers config takes.

    Raises:
        ConfigError: for an unknown key, or one whose value does not fit.
    """

    model_type = "xoron"
    has_no_defaults_at_init = True

    def __init__(
        self,
        composition: dict[str, Any] | None = None,
        token_space_hash: str | None = None,
        vocab_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        if composition is None:
            if vocab_size is not None:
                raise ConfigError(
                    f"XoronConfig: vocab_size={vocab_size} cannot be chosen; it follows from the"
                    " tokenizer, the special-token groups and the codecs of the composition"
                )
            composition = _from_flat_keys(kwargs)
        self.composition = composition
        self.token_space_hash = token_space_hash
        self.vocab_size = vocab_size
        slots = composition.get("slots", {})
        for key, (slot, name) in FLAT_KEYS.items():
            value = slots.get(slot, {}).get("config", {}).get(name)
            if value is not None:
                kwargs[key] = value
        kwargs["model_name"] = composition.get("name")
        super().__init__(**kwargs)

    def print_config(self) -> None:
        """Prints the composition as YAML on standard output."""
        import yaml

        print(yaml.safe_dump(self.composition, sort_keys=False, allow_unicode=True).rstrip())

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Self | tuple[Self, dict]:
        """Reads what `to_dict` gave; flat published keys are accepted too."""
        return super().from_dict(config_dict, **kwargs)


def _from_flat_keys(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Takes the published keys out of `kwargs` and composes the `xoron-dev` preset with them."""
    from xoron_core.composer.composition import read_composition
    from xoron_core.plugins import registry

    nested: dict[str, Any] = {}
    for key in list(kwargs):
        if key in FLAT_KEYS:
            slot, name = FLAT_KEYS[key]
            nested.setdefault(slot, {})[name] = kwargs.pop(key)
        elif key == "model_name":
            nested["name"] = kwargs.pop(key)
        elif key not in _STANDARD:
            options = [*FLAT_KEYS, "model_name"]
            raise ConfigError(
                f"XoronConfig: unknown key {key!r}.{did_you_mean(key, options)}"
                f" Known: {', '.join(options)}."
            )
    return read_composition(registry(), preset="xoron-dev", data=nested).data()


# AutoTokenizer looks a folder's model type up, too; the model classes are registered in `hf`.
AutoConfig.register(XoronConfig.model_type, XoronConfig)
