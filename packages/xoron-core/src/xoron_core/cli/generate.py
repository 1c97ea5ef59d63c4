"""`xoron generate`."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xoron_core.cli.session import (
    Draft,
    Folder,
    Image,
    Media,
    MinP,
    RepetitionPenalty,
    Seed,
    System,
    Temperature,
    TopK,
    TopP,
    check_limit,
    media_parts,
    open_session,
)
from xoron_core.errors import UsageError

if TYPE_CHECKING:
    from xoron_core.events import Finished


def generate(
    folder: Folder,
    prompt: Annotated[str, typer.Argument(help="What the user says; - reads standard input.")],
    image: Image = None,
    media: Media = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Limit.")] = 256,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = None,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="A string that ends it.")] = None,
    system: System = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as text, without the chat template.")
    ] = False,
    draft: Draft = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, with the answer's confidence.")
    ] = False,
) -> None:
    """Generate an answer, or with --raw a continuation.

    Example: xoron generate out/ "what is this?" --image cat.png --max-new-tokens 64
    """
    from xoron_core.events import Finished, TextDelta
    from xoron_core.sampling import Sampling

    check_limit(max_new_tokens)
    sampling = Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    parts = media_parts(image, media)
    if raw and parts:
        raise UsageError(
            "--raw continues a bare text, in which media have no place; leave out --raw, so that"
            " they stand in a message"
        )
    session = open_session(folder, draft, parts=parts)
    text = sys.stdin.read() if prompt == "-" else prompt
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    said = [*parts, {"type": "text", "text": text}] if parts else text
    messages.append({"role": "user", "content": said})
    events = session.stream(
        text if raw else messages,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop=stop or (),
        details=as_json,
    )
    pieces = []
    for event in events:
        if isinstance(event, TextDelta):
            pieces.append(event.text)
            if not as_json:
                print(event.text, end="", flush=True)
        elif isinstance(event, Finished):
            if as_json:
                answer = _answer("".join(pieces), event, parts)
                print(json.dumps(answer, ensure_ascii=False))
            else:
                print()


def _answer(text: str, end: Finished, media: list[dict[str, str]]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "text": text,
        "reason": end.reason,
        "tokens": end.tokens,
        "confidence": end.confidence,
    }
    if media:
        found["media"] = media
    if end.usage.drafted:
        found |= {"drafted": end.usage.drafted, "accepted": end.usage.accepted}
    return found
