"""`Chat`: a conversation that remembers, over a `Session`.

What was said stays in `messages`, ready for a file or a data set. The model's cache is kept between
turns, so that a turn runs only what is new. Reasoning is shown on request and never goes into the
history, as chat templates expect.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xoron_core.errors import DataError
from xoron_core.events import Event, TextDelta
from xoron_core.prefix import PrefixCache
from xoron_core.sampling import Sampling
from xoron_core.session import Session


class Chat:
    """One conversation.

    Args:
        session: with a dynamic cache.
        system: a system message, or None.
        sampling: greedy by default; with a seed, each turn takes the next one.
        show_reasoning: whether hidden blocks are given, as pieces with `hidden` set.
        **options: for `Session.stream`, e.g. `max_new_tokens` or `stop`.

    Attributes:
        messages: what was said, without the system message.
        attached: media that go before the text of the next message.
        prefix: the cache between turns, with its counts.
    """

    def __init__(
        self,
        session: Session,
        *,
        system: str | None = None,
        sampling: Sampling | None = None,
        show_reasoning: bool = False,
        **options: Any,
    ) -> None:
        self.session = session
        self.system = system
        self.sampling = sampling or Sampling()
        self.show_reasoning = show_reasoning
        self.options = options
        self.messages: list[dict[str, Any]] = []
        self.attached: list[dict[str, Any]] = []
        self.prefix = PrefixCache()

    def say(self, content: str | list[dict[str, Any]]) -> Iterator[Event]:
        """Takes what the user says; gives the answer, event by event.

        The turn enters the history when the answer ends. If the reader stops early, what was
        answered until then is the answer; if nothing was, the turn has not been, and what was
        attached waits for the next one.

        Raises:
            SequenceError, PluginError: if the model does not take this content; the history is
                then as it was.
        """
        if self.attached:
            text = [{"type": "text", "text": content}] if isinstance(content, str) else content
            content = [*self.attached, *text]
        turn: dict[str, Any] = {"role": "user", "content": content}
        said: list[str] = []
        finished = False
        events = self.session.stream(
            [*self.history(), turn],
            sampling=self._sampling(),
            show_hidden=self.show_reasoning,
            prefix=self.prefix,
            **self.options,
        )
        try:
            for event in events:
                if isinstance(event, TextDelta) and not event.hidden:
                    said.append(event.text)
                yield event
            finished = True
        finally:
            events.close()  # type: ignore[attr-defined]
            if finished or said:
                answer = "".join(said).removesuffix("\n")
                self.messages += [turn, {"role": "assistant", "content": answer}]
                self.attached = []

    def attach(self, part: dict[str, Any]) -> None:
        """Adds a medium to the next message.

        Args:
            part: as it stands in a message's content, e.g. `{"type": "image", "path": "cat.png"}`.

        Raises:
            DataError, PluginError, SequenceError: if the model cannot be shown it.
        """
        self.session.processor.plan([{"role": "user", "content": [part]}])
        self.attached.append(part)

    def history(self) -> list[dict[str, Any]]:
        """All messages, the system message first."""
        head = [{"role": "system", "content": self.system}] if self.system else []
        return [*head, *self.messages]

    def reset(self) -> None:
        """Forgets what was said and attached; the system message stays."""
        self.messages, self.attached = [], []

    def save(self, path: str | Path) -> None:
        """Writes the history as JSON: a list of Hugging Face chat messages.

        Raises:
            DataError: if the file cannot be written.
        """
        text = json.dumps(self.history(), ensure_ascii=False, indent=2)
        try:
            Path(path).write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error.strerror or error})") from None

    def _sampling(self) -> Sampling:
        if self.sampling.seed is None:
            return self.sampling
        turns = sum(message["role"] == "user" for message in self.messages)
        return self.sampling.model_copy(update={"seed": self.sampling.seed + turns})
