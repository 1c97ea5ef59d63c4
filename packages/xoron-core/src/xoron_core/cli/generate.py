"""`xoron generate`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from xoron_core.cli.progress import working
from xoron_core.errors import UsageError


def generate(
    folder: Annotated[Path, typer.Argument(help="A model folder.")],
    prompt: Annotated[str, typer.Argument(help="What the user says; - reads standard input.")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Limit.")] = 256,
    temperature: Annotated[float, typer.Option("--temperature", help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option("--top-k", help="Keep the k best; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option("--top-p", help="Keep this probability mass.")] = 1.0,
    seed: Annotated[int | None, typer.Option("--seed", help="For sampling.")] = None,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="A string that ends it.")] = None,
    system: Annotated[str | None, typer.Option("--system", help="A system message.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as text, without the chat template.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Generate an answer, or with --raw a continuation.

    Example: xoron generate out/ "def main(" --raw --max-new-tokens 64
    """
    from xoron_core.api import load
    from xoron_core.events import Finished, TextDelta
    from xoron_core.sampling import Sampling
    from xoron_core.session import Session

    if max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens {max_new_tokens}: expected 1 or more")
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    with working(f"loading {folder}"):
        model, processor = load(folder)
    text = sys.stdin.read() if prompt == "-" else prompt
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    events = Session(model, processor).stream(
        text if raw else messages,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop=stop or (),
    )
    pieces = []
    for event in events:
        if isinstance(event, TextDelta):
            pieces.append(event.text)
            if not as_json:
                print(event.text, end="", flush=True)
        elif isinstance(event, Finished):
            if as_json:
                answer = {"text": "".join(pieces), "reason": event.reason, "tokens": event.tokens}
                print(json.dumps(answer, ensure_ascii=False))
            else:
                print()
