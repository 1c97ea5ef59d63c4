"""Installs the plug-in of words for these tests; models of it that see, are blind, or see wrong."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from xoron_core.api import compose
from xoron_core.plugins import registry
from xoron_train.conversation import Conversation

LETTERS = Path(__file__).parent / "letters"


@pytest.fixture(autouse=True, scope="module")
def letters(standin: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Puts the plug-in on the path, beside the stand-in, and takes it off again."""
    site = tmp_path_factory.mktemp("site")
    info = site / "xoron_letters-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: xoron-letters\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[xoron]\nletters = letters_plugin\n")
    added = [str(site), str(LETTERS)]
    sys.path[:0] = added
    registry.cache_clear()
    yield
    for path in added:
        sys.path.remove(path)
    registry.cache_clear()


@pytest.fixture(scope="module")
def speller(letters: None) -> Callable[..., tuple[Any, Any]]:
    """Builds the model made by hand and its processor; `gain` 8 sees, 0 is blind, -8 sees wrong."""

    def make(gain: float = 8.0) -> tuple[Any, Any]:
        return compose(
            {
                "name": "speller",
                "tokenizer": {"use": "standin-byte"},
                "backbone": {"use": "speller"},
                "word": {
                    "encoder": {"use": "letters"},
                    "projector": {"use": "letters", "gain": gain},
                },
                "tokens": {"groups": ["control", "conversation", "multimodal"]},
            }
        )

    return make


@pytest.fixture(scope="module")
def coder(letters: None) -> Callable[..., tuple[Any, Any]]:
    """Builds the same with a codec instead of the encoder; keys are of the backbone's config."""

    def make(**config: float) -> tuple[Any, Any]:
        return compose(
            {
                "name": "coder",
                "tokenizer": {"use": "standin-byte"},
                "backbone": {"use": "speller", **config},
                "word": {"codec": {"use": "letters"}},
                "tokens": {"groups": ["control", "conversation", "multimodal"]},
            }
        )

    return make


@pytest.fixture(scope="session")
def makes() -> Callable[[str, str], Conversation]:
    """A conversation in which a user writes something and the assistant makes a word."""

    def make(prompt: str, word: str) -> Conversation:
        made = [{"type": "word", "word": word}]
        return Conversation(
            f"{prompt}-{word}",
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": made}],
        )

    return make


@pytest.fixture(scope="session")
def shows() -> Callable[..., Conversation]:
    """A conversation that shows words and expects an answer."""

    def make(words: str | Sequence[str], answer: str = "", kind: str = "", **last: Any):
        words = [words] if isinstance(words, str) else list(words)
        answer = answer or "".join(words)[:1] or "X"
        content = [{"type": "text", "text": "which? "}]
        content += [{"type": "word", "word": word} for word in words]
        return Conversation(
            name="-".join(words) or "none",
            messages=[
                {"role": "user", "content": content},
                {"role": "assistant", "content": answer, **last},
            ],
            kind=kind,
        )

    return make
