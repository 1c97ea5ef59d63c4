"""Small base tokenizers made on the spot, and spaces over them."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from xoron_core.tokens.space import TokenSpace
from xoron_core.tokens.special_tokens import core_groups
from xoron_core.tokens.template import apply_chat_template_to_tokenizer
from xoron_core.tokens.tokenizer import build_tokenizer, text_base

CORPUS = [
    "def f(x):\n    return x + 1\n",
    "The cat sat on the mat, the user asked the system and the assistant.",
    "<|user|> is not <|assistant|>, nor |> nor <| at all. <|bos|> [e~[",
    "naïve café, 猫が好き, ok?  two  spaces",
]


@pytest.fixture(scope="session")
def byte_base() -> PreTrainedTokenizerFast:
    """256 bytes, no merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.fixture(scope="session")
def bpe_base() -> PreTrainedTokenizerFast:
    """A trained byte-level BPE with added tokens of its own, special and plain ones.

    Like Qwen's: `<|fim_prefix|>` is one of ours too, `<tool_call>` is added but not special, and
    there is padding between the vocabulary and nothing.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS * 3, trainer)
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim_prefix|>"])
    backend.add_tokens([AddedToken("<tool_call>", normalized=False, special=False)])
    controls = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **controls)


@pytest.fixture(scope="session", params=["byte", "bpe"])
def base(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    """Each of the two bases."""
    chosen: PreTrainedTokenizerFast = request.getfixturevalue(f"{request.param}_base")
    return chosen


@pytest.fixture(scope="session")
def full_space(base: PreTrainedTokenizerFast) -> TokenSpace:
    """All of core's groups over `base`."""
    return TokenSpace.allocate(text=text_base(base, name="test/base"), groups=core_groups())


@pytest.fixture(scope="session")
def chat(base: PreTrainedTokenizerFast, full_space: TokenSpace) -> PreTrainedTokenizerFast:
    """The generated tokenizer with our chat template."""
    return apply_chat_template_to_tokenizer(build_tokenizer(full_space, base))


@pytest.fixture(scope="session")
def golden_template() -> str:
    """The template that the published documentation shows, literally."""
    return (
        "{% for message in messages %}\n"
        "{% if message['role'] == 'system' %}\n"
        "<|system|>\n{{ message['content'] }}\n<|/system|>\n"
        "{% elif message['role'] == 'user' %}\n"
        "<|user|>\n{{ message['content'] }}\n<|/user|>\n"
        "{% elif message['role'] == 'assistant' %}\n"
        "<|assistant|>\n{{ message['content'] }}\n<|/assistant|>\n"
        "{% endif %}\n"
        "{% endfor %}\n"
        "{% if add_generation_prompt %}\n"
        "<|assistant|>\n"
        "{% endif %}"
    )
