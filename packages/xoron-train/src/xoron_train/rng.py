"""The state of every random generator of this process as tensors, and back."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor


def capture() -> dict[str, Tensor]:
    """Returns the states of Python's, NumPy's and torch's global generators, CUDA's included."""
    _, python, gauss = random.getstate()
    generator = np.random.get_state(legacy=False)
    keys, position = generator["state"]["key"], generator["state"]["pos"]
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(python, dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(keys.astype(np.int64)),
        "numpy_position": torch.tensor([int(position), generator["has_gauss"]], dtype=torch.int64),
        "numpy_gauss": torch.tensor([generator["gauss"]], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore(state: dict[str, Tensor]) -> None:
    """Restores what `capture` gave; CUDA's only where both sides have it."""
    gauss = state["python_gauss"].tolist()
    version = random.getstate()[0]
    random.setstate((version, tuple(state["python"].tolist()), gauss[0] if gauss else None))
    position, has_gauss = state["numpy_position"].tolist()
    keys = state["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, state["numpy_gauss"].item()))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def seed_all(seed: int) -> None:
    """Seeds the three libraries' global generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
