"""How xoron-moe splits over processes: transformers' tensor-parallel plan and one style of its own.

Queries, keys, values and the inner width of every feed-forward block are split by output columns,
what follows them by input rows, so that one sum per block puts the stream together again. Norms,
router and whatever all heads share (the latent of keys and values, that of queries) are whole on
every process: every process routes alike.

Footguns:
- Head counts must be multiples of the number of processes; the style of the attention checks it.
- Each expert sums its own output: K times the traffic of one sum per block.
- The absorbed form of latent attention gives no summed gradient for the cached rows. It runs while
  decoding only, where no gradient is recorded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer

from xoron_core.errors import ConfigError
from xoron_core.nn.latent_attention import LatentAttention

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from xoron_llm.moe.configuration import XoronMoeConfig

# The style of an attention block; its projections have transformers' own styles.
HEADS = "xoron_heads"

_SWIGLU = {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}


def tensor_parallel_plan(config: XoronMoeConfig) -> dict[str, str]:
    """Module name, layer numbers as `*`, to the name of its style, without the head."""
    attention = {"": HEADS, ".o_proj": "rowwise"}
    columns: tuple[str, ...] = (".q_proj", ".k_proj", ".v_proj")
    if config.attention == "latent":
        query = ".q_proj" if config.q_lora_rank is None else ".q_b_proj"
        # Its rotated key goes to all heads past kv_b_proj, so that its gradient needs a sum.
        attention[".kv_a_proj_with_mqa"] = "mla_kv_a_proj"
        columns = (query, ".kv_b_proj")
    attention |= dict.fromkeys(columns, "colwise")
    # transformers 5.17 splits embeddings by itself only where they are tied, later ones always.
    plan = {"embed_tokens": "embedding_rowwise"}
    plan |= {f"layers.*.self_attn{name}": style for name, style in attention.items()}
    layers = [config.is_moe_layer(index) for index in range(config.num_hidden_layers)]
    blocks = [] if all(layers) else ["mlp"]
    if any(layers):
        blocks += ["mlp.experts.*", "mlp.shared_expert"][: 1 + config.use_shared_expert]
    return plan | {f"layers.*.{b}.{part}": style for b in blocks for part, style in _SWIGLU.items()}


class LocalHeads(TensorParallelLayer):
    """Tells an attention block how many of its heads this process holds."""

    def install_forward(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        """Checks and divides the head counts; the block's forward stays as it is.

        Raises:
            ConfigError: if the heads cannot be divided.
        """
        size = mesh.size()
        for name, heads in _head_counts(module).items():
            if heads % size:
                raise ConfigError(
                    f"tensor parallel over {size} processes: {name} is {heads}, expected a multiple"
                    f" of {size}; run over as many processes as divide it"
                )
        if isinstance(module, LatentAttention):
            module.num_heads //= size
        return module


def _head_counts(module: Any) -> dict[str, int]:
    if isinstance(module, LatentAttention):
        return {"num_attention_heads": module.num_heads}
    return {
        "num_attention_heads": module.q_proj.out_features // module.head_dim,
        "num_key_value_heads": module.k_proj.out_features // module.head_dim,
    }


ALL_PARALLEL_STYLES.register(HEADS, LocalHeads())
