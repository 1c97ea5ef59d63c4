"""Reads the folder of a diffusers `AutoencoderKL` into ours, without diffusers.

Published folders come in two spellings of the attention's weights: that of today (`to_q`) and that
of before 2023 (`query`), which `sd-vae-ft-mse` still has.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from xoron_core.errors import FolderError
from xoron_core.storage import read_tensors

WEIGHTS = "diffusion_pytorch_model.safetensors"
_NAMES = (
    (r"(down|up)_blocks\.(\d+)\.resnets\.(\d+)", r"levels.\2.blocks.\3"),
    (r"(down|up)_blocks\.(\d+)\.(down|up)samplers\.0", r"levels.\2.resample"),
    (r"mid_block\.resnets\.0", "mid.0"),
    (r"mid_block\.attentions\.0", "mid.1"),
    (r"\.group_norm\.", ".norm."),
    (r"\.(to_)?(q|k|v)(uery|ey|alue)?\.", r".\2_proj."),
    (r"\.(to_out\.0|proj_attn)\.", ".o_proj."),
    (r"conv_shortcut", "shortcut"),
    (r"conv_norm_out", "norm_out"),
)


def kl_name(theirs: str, *, mid_attention: bool) -> str:
    """The name of a weight in `KlImage`, from its name in diffusers' `AutoencoderKL`."""
    ours = theirs.replace("mid_block.resnets.1", "mid.2" if mid_attention else "mid.1")
    for pattern, replacement in _NAMES:
        ours = re.sub(pattern, replacement, ours)
    return ours


def load_kl_weights(part: nn.Module, path: str, *, mid_attention: bool) -> None:
    """Copies a folder's weights into a `KlImage`; its scale stays as its config has it.

    Raises:
        FolderError: if they are missing, damaged, or not all of them and nothing else.
    """
    file = Path(path) / WEIGHTS
    weights = read_tensors(file).items()
    found = {kl_name(name, mid_attention=mid_attention): tensor for name, tensor in weights}
    scales = {n: t for n, t in part.state_dict().items() if n.startswith("latent_scale.")}
    check_fit(part, found | scales, str(file))
    part.load_state_dict(found | scales)


def check_fit(part: nn.Module, found: Mapping[str, Tensor], file: str) -> None:
    """Compares names and shapes with a module's.

    Raises:
        FolderError: naming what is missing, unknown or of another shape.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in part.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in found.items()}
    if given == wanted:
        return
    name = sorted(set(wanted.items()) ^ set(given.items()))[0][0]
    raise FolderError(
        f"{file}: weights do not fit its config.json, e.g. {name!r}: expected"
        f" {wanted.get(name, 'none')}, got {given.get(name, 'none')}; copy the folder again, whole"
    )
