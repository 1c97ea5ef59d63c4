"""What xoron-train contributes: the `train` command and its recipes. Imports nothing heavy."""

from __future__ import annotations

from types import ModuleType

from xoron_core.descriptors import Command
from xoron_core.hookspecs import hookimpl
from xoron_train import hookspecs
from xoron_train.hookspecs import Dataset, EvaluationType, RecipeFile

xoron_api = 1


@hookimpl
def xoron_hookspecs() -> list[ModuleType]:
    return [hookspecs]


@hookimpl
def xoron_commands() -> list[Command]:
    return [Command("train", "xoron_train.cli:train", "Train a model folder with a recipe.")]


@hookimpl
def xoron_recipes() -> list[RecipeFile]:
    return [
        RecipeFile(
            "text-tiny",
            "xoron_train:presets/text-tiny.yaml",
            "Byte-level text from the Python standard library's own sources; minutes on two cores.",
        ),
        RecipeFile(
            "align",
            "xoron_train:presets/align.yaml",
            "Stage 1 of seeing: the image connector alone, on your conversations about images.",
        ),
        RecipeFile(
            "sft",
            "xoron_train:presets/sft.yaml",
            "Stage 2 of seeing: the connector and LoRA on the backbone.",
        ),
        RecipeFile(
            "vision-digits-labels",
            "xoron_train:presets/vision-digits-labels.yaml",
            "Stage 1 of vision-digits: what lies where, from random weights.",
        ),
        RecipeFile(
            "vision-digits",
            "xoron_train:presets/vision-digits.yaml",
            "Stage 2 of vision-digits: questions about scanned digits and shapes.",
        ),
    ]


@hookimpl
def xoron_datasets() -> list[Dataset]:
    return [
        Dataset(
            "vision-digits",
            "xoron_train.tasks.digits.dataset:digits",
            ("train", "held-out", "unseen"),
            "Scenes of scanned digits and shapes, with questions; made on the spot.",
        )
    ]


@hookimpl
def xoron_evaluations() -> list[EvaluationType]:
    return [
        EvaluationType(
            "seeing",
            "xoron_train.evaluations.seeing:Seeing",
            "xoron_train.evaluations.config:SeeingConfig",
            "The loss with the correct media, and with them shuffled, zeroed and noised.",
        ),
        EvaluationType(
            "answers",
            "xoron_train.evaluations.answers:Answers",
            "xoron_train.evaluations.config:AnswersConfig",
            "Greedy answers against expected ones, beside chance and control.",
        ),
    ]
