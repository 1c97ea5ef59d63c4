"""`xoron train`: the command line of `run.train`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def train(
    recipe: Annotated[str, typer.Argument(help="A recipe's name, or the path of a YAML file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run.")],
    model: Annotated[
        Path | None, typer.Option("--model", help="Model folder to train, as compose writes it.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key: max_steps=100.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest complete checkpoint.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train a model folder with a recipe.

    The run's folder gets the resolved recipe, metrics.jsonl, checkpoints and, in the end, the
    trained model. Run the same line with --resume to go on after an interruption, exactly where
    the last checkpoint stands. For several processes: accelerate launch -m xoron_core.cli train ...

    Example: xoron train text-tiny --model out -o run --set max_steps=200
    """
    import logging

    from xoron_train.metrics import shown_evaluation
    from xoron_train.recipe import load_recipe
    from xoron_train.run import train as run_training

    quiet = logging.getLogger("xoron").getEffectiveLevel() > logging.INFO
    result = run_training(
        load_recipe(recipe, overrides or ()), output, model=model, resume=resume, quiet=quiet
    )
    if not result.is_main:
        return
    evaluation = result.evaluation
    if as_json:
        shown = {
            "model": str(result.model_folder),
            "steps": result.steps,
            "seconds": round(result.seconds, 1),
            "evaluation": evaluation,
        }
        typer.echo(json.dumps(shown))
        return
    typer.echo(f"model: {result.model_folder}")
    typer.echo(f"steps: {result.steps} ({result.seconds:.0f} s)")
    for line in shown_evaluation(evaluation):
        typer.echo(line)
