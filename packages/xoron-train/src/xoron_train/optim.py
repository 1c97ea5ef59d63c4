"""The optimizer, its learning rate as a pure function of the step, and its state by parameter name.

AdamW for everything, or Muon for the matrices inside the model and AdamW for the rest.

Frozen parameters are in no group at all: decoupled weight decay would move them even where their
gradient is zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from xoron_core.errors import ConfigError, FolderError
from xoron_core.model import XoronModel
from xoron_train.recipe import Recipe


def learning_rate(step: int, recipe: Recipe) -> float:
    """Returns the learning rate of optimizer step `step`, counted from 0.

    Linear from `peak / warmup` at the first step to the peak at the end of the warm-up, then a
    cosine (Loshchilov & Hutter 2017) that reaches `peak * min_lr_ratio` at the last step.
    """
    warmup = recipe.num_warmup_steps
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, recipe.max_steps - 1 - warmup))
    low = recipe.min_lr_ratio
    return recipe.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))


def decayed_names(model: nn.Module) -> set[str]:
    """Names of the parameters that weight decay applies to.

    That is every parameter with two or more axes, except biases, the weights of normalisations and
    those of embeddings (a head tied to an embedding included).
    """
    spared: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.Embedding) or type(module).__name__.endswith("Norm"):
            spared.update(id(parameter) for parameter in module.parameters(recurse=False))
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and id(parameter) not in spared and name.rpartition(".")[2] != "bias"
    }


def muon_names(model: nn.Module) -> set[str]:
    """Names of the parameters that Muon is for: matrices that neither read nor write token ids.

    That is every decayed parameter with exactly two axes, heads left out.
    """
    head = model.get_output_embeddings() if isinstance(model, XoronModel) else None
    heads = set() if head is None else {id(parameter) for parameter in head.parameters()}
    named = dict(model.named_parameters())
    return {n for n in decayed_names(model) if named[n].ndim == 2 and id(named[n]) not in heads}


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) and AdamW as one optimizer: their groups and states side by side.

    Args:
        muon, adamw: freshly built, over different parameters.
    """

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW) -> None:
        self.both = (muon, adamw)
        # Groups are kept as the very dictionaries that the two read their rates from.
        super().__init__([group for one in self.both for group in one.param_groups], {})
        self._share()

    def _share(self) -> None:
        muon, adamw = self.both
        number = len(muon.param_groups)
        muon.param_groups, adamw.param_groups = (
            self.param_groups[:number],
            self.param_groups[number:],
        )
        muon.state = adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of both."""
        assert closure is None
        for one in self.both:
            one.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of any optimizer; the two then read the loaded groups and state."""
        super().load_state_dict(state_dict)
        self._share()


def build_optimizer(
    model: nn.Module, trained: Mapping[str, nn.Parameter], recipe: Recipe
) -> torch.optim.Optimizer:
    """Builds the recipe's optimizer over `trained`.

    AdamW (Loshchilov & Hutter 2019) has two groups, with and without decay. With `muon` the
    matrices that `muon_names` gives are Muon's, at `muon.learning_rate` and with decay. Each group
    has its own `peak`, which `set_learning_rate` scales.

    Args:
        model: names what is an embedding, a norm or a head.
        trained: parameter by name; the only ones in the optimizer.
        recipe: its rates.

    Raises:
        ConfigError: for `muon` with nothing to train by it.
    """
    decayed = decayed_names(model)
    hidden = set() if recipe.muon is None else muon_names(model) & trained.keys()
    if recipe.muon is not None and not hidden:
        raise ConfigError(
            f"muon: none of the {len(trained)} trained parameters is a matrix inside the model, and"
            " AdamW takes embeddings, heads, norms, biases and convolutions; remove muon, or train"
            " linear layers"
        )
    rest = {name: parameter for name, parameter in trained.items() if name not in hidden}
    groups = [
        {"params": [p for n, p in rest.items() if (n in decayed) == decays], "weight_decay": decay}
        for decays, decay in ((True, recipe.weight_decay), (False, 0.0))
    ]
    groups = [{**group, "peak": recipe.learning_rate} for group in groups if group["params"]]
    if not hidden:
        return _adamw(groups, recipe)
    assert recipe.muon is not None
    matrices = [parameter for name, parameter in trained.items() if name in hidden]
    rate = recipe.muon.learning_rate
    muon = torch.optim.Muon(
        [{"params": matrices, "peak": rate}],
        lr=rate,
        weight_decay=recipe.weight_decay,
        momentum=recipe.muon.momentum,
    )
    return MuonWithAdamW(muon, _adamw(groups, recipe)) if groups else muon


def _adamw(groups: list[dict[str, Any]], recipe: Recipe) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        groups, lr=recipe.learning_rate, betas=recipe.betas, eps=recipe.epsilon
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, recipe: Recipe) -> float:
    """Sets each group's rate for optimizer step `step` and returns that of `learning_rate`."""
    rate = learning_rate(step, recipe)
    for group in optimizer.param_groups:
        group["lr"] = rate * (group["peak"] / recipe.learning_rate)
    return rate


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, trained: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Flattens the optimizer's state to `<parameter name>/<state name>`."""
    return {
        f"{name}/{key}": value.detach().cpu()
        for name, parameter in trained.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer,
    trained: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
    *,
    where: str,
) -> None:
    """Restores what `optimizer_tensors` gave.

    Args:
        optimizer: freshly built over the same parameters.
        trained: parameter by name.
        tensors: the flattened state.
        where: file name, for errors.

    Raises:
        FolderError: if names or shapes do not fit the trained parameters.
    """
    state: dict[str, dict[str, Tensor]] = {name: {} for name in trained}
    for key, value in tensors.items():
        name, _, item = key.rpartition("/")
        if name not in state:
            raise FolderError(
                f"{where}: holds optimizer state of {name!r}, which this recipe does not train;"
                " resume with the recipe and model the checkpoint was written with"
            )
        if value.ndim and value.shape != trained[name].shape:
            raise FolderError(
                f"{where}: {key} has shape {tuple(value.shape)}, the parameter"
                f" {tuple(trained[name].shape)}; resume with the model it was written with"
            )
        state[name][item] = value
    if lacking := [name for name, items in state.items() if tensors and not items]:
        raise FolderError(f"{where}: holds no optimizer state of {', '.join(lacking[:5])}")
    names = {id(parameter): name for name, parameter in trained.items()}
    ordered = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    plain = optimizer.state_dict()
    plain["state"] = {index: state[name] for index, name in enumerate(ordered) if state[name]}
    optimizer.load_state_dict(plain)
