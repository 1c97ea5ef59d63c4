"""`xoron chat`: a conversation in the terminal, or line by line through a pipe.

On a terminal, Ctrl-C stops the answer (what was said stays) and Ctrl-D ends. In a pipe there are no
prompts and no greetings: a line in is a turn, the answer goes to standard output, and everything
else to standard error. Exit code 1 if a line of a pipe failed.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

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
from xoron_core.errors import UsageError, XoronError, did_you_mean

if TYPE_CHECKING:
    from xoron_core.chat import Chat

logger = logging.getLogger("xoron")

COMMANDS = {
    "/help": "show this list",
    "/reset": "forget what was said; the system message stays",
    "/system": "/system TEXT sets the system message; alone it shows it",
    "/image": "/image PATH shows an image with the next message; again for more",
    "/media": "/media TYPE PATH does so with any type of medium",
    "/save": "/save FILE writes the conversation as JSON",
    "/quit": "end; so does Ctrl-D",
}


def chat(
    folder: Folder,
    image: Image = None,
    media: Media = None,
    system: System = None,
    show_reasoning: Annotated[
        bool, typer.Option("--show-reasoning", help="Show reasoning blocks, too.")
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", help="Limit per answer.")
    ] = 512,
    temperature: Temperature = 0.7,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="A string that ends an answer.")
    ] = None,
    draft: Draft = None,
    deltas: Deltas = None,
) -> None:
    """Talk to a model; /help lists what can be typed beside messages.

    Media given as options go with the first message.

    Example: xoron chat out/ --system "Answer in one line." --temperature 0
    """
    from xoron_core.chat import Chat
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
    session = open_session(folder, draft, parts=parts, deltas=deltas or ())
    talk = Chat(
        session,
        system=system,
        sampling=sampling,
        show_reasoning=show_reasoning,
        max_new_tokens=max_new_tokens,
        stop=stop or (),
    )
    talk.attached += parts
    interactive = sys.stdin.isatty()
    if interactive:
        logger.info("Type a message; /help lists commands, Ctrl-D ends.")
    if not converse(talk, interactive=interactive) and not interactive:
        raise typer.Exit(1)


def converse(talk: Chat, *, interactive: bool) -> bool:
    """Takes lines until they end; returns whether every one of them worked."""
    good = True
    for line in _lines(interactive):
        if not line.strip():
            continue
        if line.strip() == "/quit":
            break
        try:
            if line.startswith("/"):
                command(talk, line.strip())
            else:
                answer(talk, line, interactive=interactive)
        except XoronError as error:
            print(f"error: {error}", file=sys.stderr)
            good = False
    return good


def command(talk: Chat, line: str) -> None:
    """Obeys one /command.

    Raises:
        UsageError: if there is no such command, or it lacks its argument.
    """
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name not in COMMANDS:
        known = ", ".join(COMMANDS)
        raise UsageError(
            f"unknown command {name}.{did_you_mean(name, COMMANDS)} There are: {known}"
        )
    if name == "/help":
        for key, text in COMMANDS.items():
            print(f"{key:8} {text}", file=sys.stderr)
        print("A message that starts with / is sent with a space before it.", file=sys.stderr)
    elif name == "/reset":
        talk.reset()
        logger.info("forgotten")
    elif name == "/system":
        if rest:
            talk.system = rest
        logger.info("system: %s", talk.system or "(none)")
    elif name in ("/image", "/media"):
        _attach(talk, name, rest)
    elif name == "/save":
        if not rest:
            raise UsageError("/save needs a file: /save talk.json")
        talk.save(Path(rest).expanduser())
        logger.info("wrote %s", rest)


def _attach(talk: Chat, name: str, rest: str) -> None:
    """Obeys /image and /media."""
    kind, _, path = ("image", "", rest) if name == "/image" else rest.partition(" ")
    path = path.strip()
    if not path:
        example = "/image cat.png" if name == "/image" else "/media image cat.png"
        raise UsageError(f"{name} lacks something: {example}")
    talk.attach({"type": kind, "path": str(Path(path).expanduser())})
    logger.info("%s goes with the next message", path)


def answer(talk: Chat, line: str, *, interactive: bool) -> None:
    """Prints an answer as it comes; on a terminal, Ctrl-C ends it there."""
    from xoron_core.events import TextDelta

    events = talk.say(line)
    was_hidden, last = False, ""
    try:
        for event in events:
            if not isinstance(event, TextDelta):
                continue
            if was_hidden and not event.hidden and not last.endswith("\n"):
                print()
            dim = event.hidden and sys.stdout.isatty()
            print(typer.style(event.text, dim=True) if dim else event.text, end="", flush=True)
            was_hidden, last = event.hidden, event.text
    except KeyboardInterrupt:
        if not interactive:
            raise
        events.close()  # type: ignore[attr-defined]
        last = ""
    if not last.endswith("\n"):
        print(flush=True)
    _warn_of_length(talk)


def _warn_of_length(talk: Chat) -> None:
    limit = getattr(talk.session.model.config, "max_position_embeddings", None)
    if limit and len(talk.prefix) > limit:
        logger.warning(
            "the conversation has %d positions, more than the %d that this model is made for;"
            " /reset begins anew",
            len(talk.prefix),
            limit,
        )


def _lines(interactive: bool) -> Iterator[str]:
    """Lines of standard input, without their ends; on a terminal behind a prompt."""
    if not interactive:
        try:
            for line in sys.stdin:
                yield line.rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UsageError(
                f"standard input is not {error.encoding} text: {error.reason}"
            ) from None
        return
    try:
        import readline  # noqa: F401 - gives input() its line editing and history
    except ImportError:  # not on every platform; typing works without
        logger.debug("no line editing: this Python has no readline")
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /quit ends)", file=sys.stderr)
