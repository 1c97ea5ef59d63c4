"""Which attention kernel a forward pass takes, under transformers' names.

| `attn_implementation` | what runs | masks |
|---|---|---|
| `sdpa` | torch's fused kernels, never the math one; the default | any |
| `eager` | two matrix products and a softmax: the readable reference | any |
| `blockwise` | `nn.blockwise`: memory linear in the length | none |
| `flex_attention` | torch's FlexAttention, compiled on CUDA | blocks |
| `flash_attention_2`, `_3`, `_4` | transformers' interface to flash-attn | lengths |
| any other | what is registered with transformers' `AttentionInterface` | dense |

The name decides training and prefill. Over cached positions, and over a static cache, which is
longer than what it holds, everything goes through SDPA with a dense mask whatever the name (`eager`
stays eager): a step of decoding has no N x N mask that could be saved.

Under the name `sdpa`, packed documents on CUDA go through FlexAttention if it can be compiled (it
needs triton): the fused kernels would read a dense N x N mask and compute what it hides,
FlexAttention skips blocks that are empty. This is reasoned, not measured. Padding alone keeps the
dense mask.

Footguns:
- A ready-made mask of four dimensions is dense already and goes through SDPA (or `eager`).
- transformers' `generate` fails over a static cache under `flex_attention`, with any model: it
  calls a method that block masks do not have.

Shapes: B rows, N queries, S keys, H heads, G key-value heads (H a multiple), d per head.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from xoron_core.errors import SequenceError
from xoron_core.nn import masks
from xoron_core.nn.kernels import HALF, Kernel, blockwise, eager, flex, flex_is_fused, sdpa


class Choice(NamedTuple):
    """What the layers of one forward pass attend with."""

    kernel: Kernel
    mask: Any


def choose(
    name: str,
    *,
    length: int,
    device: torch.device,
    past: int = 0,
    keys: int | None = None,
    attention_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    config: Any = None,
) -> Choice:
    """The kernel of a name, and the mask of N new positions in the form that it takes.

    Args:
        name: an `attn_implementation`, see the table above.
        length: N.
        device: of the queries.
        past: number of cached positions.
        keys: S, if the cache is longer than past + N.
        attention_mask: (B, past + N), nonzero where valid; or a ready-made dense mask (B or 1, 1,
            N, S), which goes through SDPA (or `eager`). None is all valid.
        document_ids: (B, past + N), 1.. per document and 0 for padding, or None.
        config: what transformers' own functions read, such as the quantised type.

    Raises:
        SequenceError: if a tensor does not have past + N columns, or the kernel cannot keep apart
            what it has to.
    """
    dense: Kernel = eager if name == "eager" else sdpa
    if attention_mask is not None and attention_mask.ndim == 4:
        return Choice(dense, attention_mask)
    columns = {"attention_mask": attention_mask, "document_ids": document_ids}
    cached = past or keys not in (None, length)
    skips = document_ids is not None and device.type == "cuda" and flex_is_fused()
    if cached or name == "eager" or (name == "sdpa" and not skips):
        mask = masks.causal_mask(length, past=past, keys=keys, device=device, **columns)
        return Choice(dense, mask)
    # Reading values is a synchronisation on CUDA; the dense mask reads them itself.
    told: dict[str, Any] = dict(zip(columns, masks.telling(**columns), strict=True))
    if name == "blockwise":
        _refuse_columns(**told)
        return Choice(blockwise, None)
    if name == "flex_attention" or (name == "sdpa" and told["document_ids"] is not None):
        return Choice(flex, masks.block_mask(length, device=device, **told))
    if "flash" in name:
        return Choice(Interface(name, config), _lengths(**told))
    kernel: Kernel = sdpa if name == "sdpa" else Interface(name, config)
    return Choice(kernel, masks.causal_mask(length, device=device, **told))


@dataclass(frozen=True)
class Interface:
    """A function of transformers' `AttentionInterface` as a `Kernel`.

    Its mask is a dense one, `masks.Segments`, or (B, N) validity, by what the function takes.

    Attributes:
        name: under which it is registered.
        config: what it reads, such as the implementation's own name.
    """

    name: str
    config: Any

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Any = None,
        causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        """Attends; see `Kernel`."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        if "flash" in self.name:
            q, k, v = self._half(q, k, v)
        extra: dict[str, Any] = {}
        if isinstance(mask, masks.Segments):
            starts, longest = mask
            extra = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts}
            extra |= {"max_length_q": longest, "max_length_k": longest}
            mask = None
        # What these functions read of the attention module that calls them.
        module = SimpleNamespace(
            config=self.config,
            is_causal=causal,
            num_key_value_groups=q.shape[1] // k.shape[1],
            training=q.requires_grad,
        )
        scaling = q.shape[-1] ** -0.5 if scale is None else scale
        function = ALL_ATTENTION_FUNCTIONS[self.name]
        out, _ = function(
            module, q, k, v, mask, dropout=0.0, scaling=scaling, is_causal=causal, **extra
        )
        return cast(Tensor, out).transpose(1, 2)

    def _half(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors as autocast would cast them: flash attention has kernels for nothing else."""
        device = tensors[0].device.type
        if torch.is_autocast_enabled(device):
            tensors = tuple(t.to(torch.get_autocast_dtype(device)) for t in tensors)
        if tensors[0].dtype not in HALF:
            raise SequenceError(
                f"attn_implementation={self.name!r} attends in float16 or bfloat16, got"
                f" {str(tensors[0].dtype).removeprefix('torch.')}; load the model with"
                " dtype=torch.bfloat16, run it under autocast, or use attn_implementation='sdpa'"
            )
        return tensors


def register() -> None:
    """Makes `attn_implementation="blockwise"` known to transformers, for all of its models."""
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register("blockwise", _blockwise_for_transformers)
    AttentionMaskInterface.register("blockwise", sdpa_mask)


def _blockwise_for_transformers(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`blockwise` with the signature of transformers' attention functions; (B, N, H, d).

    Where queries and keys are not the same positions (over a cache, across sequences) SDPA runs.
    """
    extras = {"dropout": dropout or None}
    extras |= {name: kwargs.get(name) for name in ("softcap", "s_aux", "position_bias")}
    if names := [name for name, value in extras.items() if value is not None]:
        raise SequenceError(
            f"blockwise attention has no {' or '.join(names)}, which this model's layers use; use"
            " attn_implementation='eager'"
        )
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    length, width = query.shape[2], value.shape[-1]
    wider = max(width, query.shape[-1])
    query, key, value = (F.pad(t, (0, wider - t.shape[-1])) for t in (query, key, value))
    if attention_mask is None and causal and length > 1:
        # A static cache is longer than what it holds.
        key, value = key[:, :, :length], value[:, :, :length]
    kernel: Kernel = sdpa
    if 1 < length == key.shape[2]:
        _refuse_columns(attention_mask, None)
        kernel = blockwise
    out = kernel(query, key, value, mask=attention_mask, causal=causal, scale=scaling)
    return out[..., :width].transpose(1, 2).contiguous(), None


def _lengths(
    attention_mask: Tensor | None, document_ids: Tensor | None
) -> Tensor | masks.Segments | None:
    """What transformers' flash attention takes: validity (B, N), or where documents begin."""
    if document_ids is None:
        return attention_mask
    return masks.segments(document_ids, attention_mask)


def _refuse_columns(attention_mask: Tensor | None, document_ids: Tensor | None) -> None:
    if attention_mask is None and document_ids is None:
        return
    what = "padding or a mask" if document_ids is None else "packed documents"
    raise SequenceError(
        f"blockwise attention keeps nothing apart, but this batch has {what}; run rows of equal"
        " length, or use attn_implementation='sdpa' (or 'flex_attention' on CUDA)"
    )
