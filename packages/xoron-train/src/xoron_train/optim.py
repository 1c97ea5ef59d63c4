"""AdamW's parameter groups, the learning rate as a pure function of the step, and the optimizer's
state by parameter name.

Frozen parameters are in no group at all: decoupled weight decay would move them even where their
gradient is zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from xoron_core.errors import FolderError
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


def build_optimizer(
    model: nn.Module, trained: Mapping[str, nn.Parameter], recipe: Recipe
) -> torch.optim.AdamW:
    """Builds AdamW (Loshchilov & Hutter 2019) over `trained` in two groups, with and without decay.

    Args:
        model: names what is an embedding or a norm.
        trained: parameter by name; the only ones in the optimizer.
        recipe: its rates.
    """
    decayed = decayed_names(model)
    with_decay = [parameter for name, parameter in trained.items() if name in decayed]
    without = [parameter for name, parameter in trained.items() if name not in decayed]
    groups = [
        {"params": with_decay, "weight_decay": recipe.weight_decay},
        {"params": without, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=recipe.learning_rate,
        betas=recipe.betas,
        eps=recipe.epsilon,
    )


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
