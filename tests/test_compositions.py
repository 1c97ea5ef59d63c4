"""Proves composing: presets, published keys, pretrained bases and real tokenizers end in models
whose ids, rows and templates are what the documents say."""

import json

import pytest
import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

import xoron_core
import xoron_core.hf
from xoron_core.errors import CompositionError, ConfigError
from xoron_core.session import Session

FLAT = {
    "hidden_size": 1024,
    "num_layers": 12,
    "num_heads": 16,
    "intermediate_size": 2048,
    "max_position_embeddings": 131072,
    "use_moe": True,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_layer_freq": 2,
    "use_shared_expert": True,
}


@pytest.fixture(scope="module")
def qwen_base(tmp_path_factory):
    """A tiny random Qwen3 with the real Qwen vocabulary, its 22 special tokens and padding rows."""
    from xoron_core.components import Context
    from xoron_llm.tokenizers.config import QwenConfig
    from xoron_llm.tokenizers.qwen import QwenTokenizer

    folder = tmp_path_factory.mktemp("qwen3")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=151_936, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True,
        max_position_embeddings=512,
    )  # fmt: skip
    Qwen3ForCausalLM(config).eval().save_pretrained(folder)
    part = QwenTokenizer(QwenConfig(base_specials="keep"), Context(slot="tokenizer"))
    tokenizer = part.base()
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.save_pretrained(folder)
    return folder


def compose_on(base, **tokens):
    return xoron_core.compose(
        {
            "name": "on-qwen",
            "tokenizer": {"use": "qwen2.5", "source": str(base), "base_specials": "keep"},
            "backbone": {"use": "hf", "path": str(base)},
            "tokens": {
                "groups": ["control", "conversation", "fim", "files", "reasoning"],
                **tokens,
            },
        }
    )


def test_the_default_config_is_the_published_one():
    config = xoron_core.XoronConfig()
    assert {key: getattr(config, key) for key in FLAT} == FLAT
    assert config.model_name == "Xoron-Dev-MultiMoE"
    assert config.composition["slots"]["tokenizer"]["use"] == "qwen2.5"


def test_published_flat_keys_are_aliases_and_survive_a_round_trip():
    config = xoron_core.XoronConfig(hidden_size=2048, num_layers=24, num_experts=16)
    assert (config.hidden_size, config.num_layers, config.num_experts) == (2048, 24, 16)
    again = xoron_core.XoronConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()
    assert json.loads(config.to_json_string())["composition"] == config.composition


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"hiden_size": 1}, "Did you mean 'hidden_size'"),
        ({"hidden_size": "wide"}, r"hidden_size.*integer.*'wide'"),
        ({"vocab_size": 151_643}, "cannot be chosen"),
        ({"num_heads": 0}, "num_heads"),
    ],
)
def test_wrong_published_keys_are_refused(keys, words):
    with pytest.raises(ConfigError, match=words):
        xoron_core.XoronConfig(**keys)


def test_print_config_prints_the_composition(capsys):
    xoron_core.XoronConfig().print_config()
    assert "use: xoron-moe" in capsys.readouterr().out


def test_the_published_quick_start_runs():
    model = xoron_core.XoronMultimodalModel(
        xoron_core.XoronConfig(hidden_size=64, num_layers=2, num_heads=4, intermediate_size=64)
    )
    ids = torch.arange(5)[None]
    out = model.generate_text(input_ids=ids, max_new_tokens=4)
    assert out.shape[0] == 1
    assert 5 < out.shape[1] <= 9
    assert torch.equal(out[:, :5], ids)


def test_a_published_size_is_exact_on_the_meta_device():
    from xoron_core.composer.composition import read_composition
    from xoron_core.composer.planner import plan
    from xoron_core.plugins import registry

    text = registry().select("llm")
    planned = plan(read_composition(text, preset="xoron-dev"), text)
    D, V, F, L, E = 1024, planned.space.size, 2048, 12, 8
    rank, rotary, heads, head = 512, 32, 16, 64
    ffn = 3 * D * F
    # Queries and output; latent with the shared rotary key, and its norm; keys and values.
    attention = 2 * D * heads * head + D * (rank + rotary) + rank
    attention += rank * heads * (head - rotary + head)
    dense = L * (attention + 2 * D) + (L // 2) * ffn
    experts = (L // 2) * ((E + 1) * ffn + E * D)
    fusion = 4 * (4 * D * D + 2 * D)  # four projections and two norms at four layers
    assert planned.parameters == 2 * V * D + dense + experts + D + fusion
    assert planned.rows[0].active == planned.parameters - fusion - (L // 2) * (E - 2) * ffn


def test_over_pretrained_weights_old_rows_and_text_logits_stay(qwen_base):
    base = Qwen3ForCausalLM.from_pretrained(qwen_base)
    model, processor = compose_on(qwen_base)
    ours = model.get_input_embeddings().weight
    theirs = base.get_input_embeddings().weight
    space = model.space
    assert torch.equal(ours[: space.text_size], theirs[: space.text_size])
    new = ours[space.text_size : space.size]
    assert not torch.equal(new[:2], theirs[space.text_size : space.text_size + 2])
    assert 0.015 < float(new.detach().std()) < 0.025
    assert len(torch.unique(new.detach(), dim=0)) == len(new)
    ids = torch.tensor([processor.encode_text("Nothing moves: naïve 数字 123")])
    with torch.no_grad():
        ours, theirs = model(input_ids=ids).logits, base(ids).logits
    assert torch.equal(ours[..., : space.text_size], theirs[..., : space.text_size])


def test_strings_the_base_owns_are_aliased_and_its_template_is_the_default(qwen_base):
    _, processor = compose_on(qwen_base)
    space = processor.space
    aliased = {special.string for special in space if special.alias}
    assert aliased == {
        "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|file_sep|>",
    }  # fmt: skip
    plain = AutoTokenizer.from_pretrained(qwen_base)
    talk = [{"role": "user", "content": "Hi"}]
    expected = plain.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    got = processor.tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert got == expected
    assert processor.tokenizer.eos_token == plain.eos_token
    text = "int main() { return 0; } // 数"
    assert processor.encode_text(text) == plain(text).input_ids


def test_dropping_the_special_tokens_of_pretrained_weights_is_refused(qwen_base):
    source = {"use": "qwen2.5", "source": str(qwen_base), "base_specials": "drop"}
    with pytest.raises(CompositionError, match="base_specials: keep"):
        xoron_core.compose({"tokenizer": source, "backbone": {"use": "hf", "path": str(qwen_base)}})


def test_our_template_is_a_choice_over_a_pretrained_base(qwen_base):
    _, processor = compose_on(qwen_base, template="xoron")
    text = processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False
    )
    assert text == "<|user|>\nHi\n<|/user|>\n"
    assert processor.tokenizer.eos_token == "<|eos|>"


def test_the_saved_folder_needs_the_base_no_more(qwen_base, tmp_path):
    import shutil

    base = shutil.copytree(qwen_base, tmp_path / "base")
    model, processor = compose_on(base)
    xoron_core.save(model, processor, tmp_path / "m")
    shutil.rmtree(base)
    loaded, again = xoron_core.load(tmp_path / "m")
    ids = torch.tensor([again.encode_text("still here")])
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    talk = [[{"role": "user", "content": "Hi"}], [{"role": "user", "content": "a longer one"}]]
    together = Session(loaded, again).generate(talk, max_new_tokens=6)
    alone = [Session(model, processor).generate([t], max_new_tokens=6)[0] for t in talk]
    assert [r.text for r in together] == [r.text for r in alone]


def test_left_padding_means_nothing_to_a_pretrained_backbone(qwen_base):
    model, processor = compose_on(qwen_base)
    ids = torch.tensor([processor.encode_text("one two three four")])
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    with torch.no_grad():
        alone = model(input_ids=ids).logits
        left = model(input_ids=padded, attention_mask=mask).logits[:, 3:]
    torch.testing.assert_close(left, alone, rtol=1e-4, atol=1e-5)


def test_slots_that_do_not_fit_are_refused():
    with pytest.raises(CompositionError, match="tokenizer"):
        xoron_core.compose({"backbone": {"use": "xoron-moe", "preset": "tiny"}})
    with pytest.raises(CompositionError, match="no slot is filled"):
        xoron_core.compose({"name": "empty"})
    with pytest.raises(ConfigError, match=r"'backbon' holds 'xoron-moe'.*Did you mean 'backbone'"):
        xoron_core.compose({"backbon": "xoron-moe"})
