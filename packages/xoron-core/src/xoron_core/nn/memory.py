"""Where weights lie in memory."""

from __future__ import annotations

import torch
from torch import nn

ALIGNMENT = 64


@torch.no_grad()
def align_weights(module: nn.Module) -> None:
    """Moves CPU weights that do not start at a multiple of 64 bytes to ones that do.

    safetensors maps a file into memory at whatever offset its header leaves. Matrix kernels choose
    their path by alignment, so that a loaded model would differ from the saved one in the last
    bits now and then, with equal weights. One tensor is copied at a time.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        plain = tensor.device.type == "cpu" and tensor.layout == torch.strided
        if plain and tensor.numel() and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()
