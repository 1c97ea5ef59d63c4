"""What xoron-train contributes: commands, recipes, data, evaluations. Imports nothing heavy."""

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
    return [
        Command("train", "xoron_train.cli:train", "Train a model folder with a recipe."),
        Command("gate", "xoron_train.gates.cli:gate", "Ask a model what a suite of gates asks."),
        Command("tokens build", "xoron_train.shards.cli:build", "Tokenise conversations."),
        Command("tokens audit", "xoron_train.shards.cli:audit", "Examine tokenised conversations."),
        Command(
            "tokens migrate-shards",
            "xoron_train.shards.cli:migrate_shards",
            "Move tokenised conversations to another token space.",
        ),
    ]


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
            "rows",
            "xoron_train:presets/rows.yaml",
            "Stage 1 of media as ids: the new vocabulary rows alone, on your conversations.",
        ),
        RecipeFile(
            "rows-lora",
            "xoron_train:presets/rows-lora.yaml",
            "Stage 2 of media as ids: the rows and LoRA on the backbone.",
        ),
        RecipeFile(
            "mixed",
            "xoron_train:presets/mixed.yaml",
            "Stage 3 of media as ids: everything but the codecs, on media and text.",
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
        RecipeFile(
            "token-digits-codec",
            "xoron_train:presets/token-digits-codec.yaml",
            "Stage 1 of token-digits: the image codec alone, from random weights.",
        ),
        RecipeFile(
            "token-digits",
            "xoron_train:presets/token-digits.yaml",
            "Stage 2 of token-digits: digits read from images and drawn, as ids.",
        ),
        RecipeFile(
            "token-speech-codec",
            "xoron_train:presets/token-speech-codec.yaml",
            "Stage 1 of token-speech: the audio codec alone, from random weights.",
        ),
        RecipeFile(
            "token-speech",
            "xoron_train:presets/token-speech.yaml",
            "Stage 2 of token-speech: digits heard and said, as ids.",
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
        ),
        Dataset(
            "token-digits",
            "xoron_train.tasks.token_digits.dataset:TokenDigits",
            ("train", "held-out", "made"),
            "Scanned digits to read from images and to draw; made on the spot.",
        ),
        Dataset(
            "token-speech",
            "xoron_train.tasks.token_speech.dataset:TokenSpeech",
            ("train", "held-out", "made"),
            "Spoken digits to hear and to say, in several voices; made on the spot.",
        ),
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
        EvaluationType(
            "making",
            "xoron_train.evaluations.making:Making",
            "xoron_train.evaluations.config:MakingConfig",
            "Whether what the model makes is legal and decodes.",
        ),
        EvaluationType(
            "prompting",
            "xoron_train.evaluations.prompting:Prompting",
            "xoron_train.evaluations.config:PromptingConfig",
            "The loss on made media with the right prompt and another's.",
        ),
        EvaluationType(
            "text-unchanged",
            "xoron_train.evaluations.text_unchanged:TextUnchanged",
            "xoron_train.evaluations.config:TextUnchangedConfig",
            "Text logits against those of the text model it came from.",
        ),
    ]
