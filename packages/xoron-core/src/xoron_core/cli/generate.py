"""`xoron generate`."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from xoron_core.cli.session import (
    Deltas,
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
    from xoron_core.cli.made_media import MadeMedia
    from xoron_core.events import Finished
    from xoron_core.sampling import Choice

logger = logging.getLogger("xoron")


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
    deltas: Deltas = None,
    make: Annotated[
        list[str] | None,
        typer.Option("--make", help="TYPE of media that the answer may hold; again for more."),
    ] = None,
    sampling: Annotated[
        list[str] | None,
        typer.Option("--sampling", help="TYPE.KEY=VALUE: of made media, e.g. image.temperature=1."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="The safetensors file to write made media to."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, with the answer's confidence.")
    ] = False,
) -> None:
    """Generate an answer, or with --raw a continuation.

    Example: xoron generate out/ "what is this?" --image cat.png --max-new-tokens 64
    """
    from xoron_core.cli.made_media import MadeMedia
    from xoron_core.events import Finished, MediaOut, TextDelta
    from xoron_core.sampling import Sampling

    check_limit(max_new_tokens)
    settings = Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        modalities=modality_choices(sampling or ()),
    )
    parts = media_parts(image, media)
    if raw and parts:
        raise UsageError(
            "--raw continues a bare text, in which media have no place; leave out --raw, so that"
            " they stand in a message"
        )
    if output is not None and not make:
        raise UsageError("-o writes the media of an answer; say which it may hold: --make TYPE")
    session = open_session(folder, draft, parts=parts, deltas=deltas or ())
    text = sys.stdin.read() if prompt == "-" else prompt
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    said = [*parts, {"type": "text", "text": text}] if parts else text
    messages.append({"role": "user", "content": said})
    events = session.stream(
        text if raw else messages,
        max_new_tokens=max_new_tokens,
        sampling=settings,
        makes=make or (),
        stop=stop or (),
        details=as_json,
    )
    pieces, made = [], MadeMedia()
    for event in events:
        if isinstance(event, MediaOut):
            made.add(event)
        elif isinstance(event, TextDelta):
            pieces.append(event.text)
            if not as_json:
                print(event.text, end="", flush=True)
        elif isinstance(event, Finished):
            if as_json:
                answer = _answer("".join(pieces), event, parts, made)
                print(json.dumps(answer, ensure_ascii=False))
            else:
                print()
    _tell(made, output)


def modality_choices(items: Sequence[str]) -> dict[str, Choice]:
    """What `--sampling TYPE.KEY=VALUE` says, by modality.

    Raises:
        UsageError: for an item of another form.
        ConfigError: for a wrong key or value.
    """
    from xoron_core.config import Source
    from xoron_core.sampling import Choice

    found: dict[str, dict[str, Any]] = {}
    for item in items:
        name, _, value = item.partition("=")
        modality, _, key = name.partition(".")
        if not (modality and key and value):
            raise UsageError(f"--sampling {item!r}: expected TYPE.KEY=VALUE, e.g. image.top_k=50")
        try:
            found.setdefault(modality, {})[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UsageError(f"--sampling {item!r}: {value!r} is not a YAML value") from None
    return {name: Choice.parse(data, Source(f"--sampling {name}")) for name, data in found.items()}


def _tell(made: MadeMedia, output: Path | None) -> None:
    shown = ", ".join(f"{one['name']} {tuple(one['shape'])}" for one in made.data())
    if output is not None and made.tensors:
        made.write(output)
        logger.info("wrote %s: %s", output, shown)
    elif output is not None:
        logger.warning("the answer holds no media, so %s was not written", output)
    elif made.tensors:
        logger.info("made %s; -o FILE keeps it", shown)


def _answer(
    text: str, end: Finished, media: list[dict[str, str]], made: MadeMedia
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "text": text,
        "reason": end.reason,
        "tokens": end.tokens,
        "confidence": end.confidence,
    }
    if media:
        found["media"] = media
    if made.tensors:
        found["made"] = made.data()
    if end.usage.drafted:
        found |= {"drafted": end.usage.drafted, "accepted": end.usage.accepted}
    return found
