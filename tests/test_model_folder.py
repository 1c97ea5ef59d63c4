"""Proves the model folder: what is saved comes back bit for bit, through xoron and through
transformers alone, on every loading path that has a trap (meta, device_map, bf16, PEFT, gradient
checkpointing)."""

import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

import xoron_core
import xoron_core.hf
from xoron_core.errors import FolderError, TokenSpaceError


@pytest.fixture(scope="module")
def model_and_processor():
    return xoron_core.compose(plugins="llm", preset="tiny", overrides=["backbone.num_layers=2"])


@pytest.fixture(scope="module")
def folder(model_and_processor, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    xoron_core.save(*model_and_processor, path)
    return path


@pytest.fixture
def batch(model_and_processor):
    texts = ["def f(x):\n    return x", "class Größe: pass"]
    ids = [model_and_processor[1].encode_text(text)[:17] for text in texts]
    return {"input_ids": torch.tensor(ids)}


@torch.no_grad()
def logits(model, batch):
    return model.eval()(**batch).logits


def gradients(model, batch):
    model.zero_grad()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_the_folder_has_one_file_set_per_slot_and_the_standard_index(folder):
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert {
        "config.json",
        "token_space.json",
        "tokenizer.json",
        "chat_template.jinja",
        "model.safetensors.index.json",
        "xoron.lock.json",
        "README.md",
        "slots/backbone-00001.safetensors",
    } <= names
    assert "model.safetensors" not in names
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index.values()) == {"slots/backbone-00001.safetensors"}


def test_large_slots_are_split_and_read_back(model_and_processor, batch, tmp_path):
    model, _ = model_and_processor
    model.save_pretrained(tmp_path / "m", max_shard_bytes=1_000_000)
    assert len(list((tmp_path / "m" / "slots").iterdir())) > 2
    loaded = xoron_core.XoronModel.from_pretrained(tmp_path / "m")
    assert torch.equal(logits(loaded, batch), logits(model, batch))


@pytest.mark.parametrize("options", [{}, {"device_map": "cpu"}, {"low_cpu_mem_usage": True}])
@pytest.mark.parametrize("opener", [AutoModel, AutoModelForCausalLM, xoron_core.XoronModel])
def test_every_loading_path_gives_the_same_logits_bit_for_bit(
    folder, model_and_processor, batch, opener, options
):
    loaded = opener.from_pretrained(folder, **options)
    assert type(loaded).__name__ == "XoronModel"
    assert torch.equal(logits(loaded, batch), logits(model_and_processor[0], batch))


def test_auto_classes_open_config_and_tokenizer_without_remote_code(folder, model_and_processor):
    config = AutoConfig.from_pretrained(folder)
    assert config.composition["slots"]["backbone"]["use"] == "xoron-moe"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "naïve <|user|> text"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    talk = [{"role": "user", "content": "Hi"}]
    ours = model_and_processor[1].tokenizer.apply_chat_template(talk, tokenize=False)
    assert tokenizer.apply_chat_template(talk, tokenize=False) == ours


def test_the_config_reads_without_the_plugins(folder):
    code = f"""
import xoron_core.hf
from transformers import AutoConfig
config = AutoConfig.from_pretrained({str(folder)!r})
print(config.composition["slots"]["backbone"]["config"]["num_layers"], config.vocab_size)
"""
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"XORON_PLUGINS": "-llm", "PATH": ""},
    )
    assert out.returncode == 0, out.stderr
    layers, rows = out.stdout.split()
    assert layers == "2"
    assert int(rows) > 256


def test_it_builds_on_the_meta_device(folder):
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_bf16_is_close_to_fp32_and_saves_back_equal(folder, batch, model_and_processor, tmp_path):
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    ours, theirs = logits(model_and_processor[0], batch), logits(half, batch).float()
    assert torch.isfinite(theirs).all()
    # In norm, not per position: where two experts score alike within bf16, another one is chosen.
    assert (ours - theirs).norm() < 0.05 * ours.norm()
    half.save_pretrained(tmp_path / "half")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert torch.equal(logits(again, batch), logits(half, batch))


def test_gradient_checkpointing_changes_nothing(folder, batch):
    plain = AutoModelForCausalLM.from_pretrained(folder).train()
    expected = gradients(plain, batch)
    plain.gradient_checkpointing_enable()
    assert plain.is_gradient_checkpointing
    found = gradients(plain, batch)
    assert expected.keys() == found.keys()
    assert any(grad.abs().max() > 0 for grad in expected.values())
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-7)


def test_lora_on_one_slot_starts_equal_and_trains_only_its_adapters(folder, batch):
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = logits(model, batch)
    frozen = {name: p.clone() for name, p in model.named_parameters()}
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=r"slots\.backbone\..*q_proj"))
    assert torch.equal(logits(wrapped, batch), before)
    found = gradients(wrapped.train(), batch)
    assert found
    assert all("lora_" in name for name in found)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=1.0)
    for _ in range(2):  # B starts at zero, so A moves with the second step
        gradients(wrapped, batch)
        optimizer.step()
    assert not torch.equal(logits(wrapped, batch), before)
    for name, parameter in wrapped.base_model.model.named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, frozen[name.replace(".base_layer", "")]), name


def test_ties_and_module_lists_are_collected_per_instance(folder):
    tied = AutoModelForCausalLM.from_pretrained(folder)
    embedding, head = tied.get_input_embeddings(), tied.get_output_embeddings()
    assert embedding.weight is head.weight
    assert tied.all_tied_weights_keys
    assert tied._no_split_modules >= set(tied.backbone.model._no_split_modules)
    untied, _ = xoron_core.compose(
        preset="tiny", overrides=["backbone.num_layers=2", "backbone.tie_word_embeddings=false"]
    )
    assert untied.get_input_embeddings().weight is not untied.get_output_embeddings().weight
    assert not untied.all_tied_weights_keys
    assert tied.all_tied_weights_keys


def test_the_backbone_is_the_class_that_opens_for_it_alone(folder, tmp_path, batch):
    import xoron_llm.hf  # noqa: F401 - registers the backbone's own classes

    model = AutoModelForCausalLM.from_pretrained(folder)
    model.backbone.model.save_pretrained(tmp_path / "alone")
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "alone")
    assert type(alone) is type(model.backbone.model)
    assert torch.equal(alone.eval()(**batch).logits, logits(model, batch))
    slot = xoron_core.load_slot(folder, "backbone")
    assert torch.equal(slot.model.eval()(**batch).logits, logits(model, batch))


def test_row_counts_come_from_the_token_space(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.get_input_embeddings().weight.shape[0] == model.space.size
    assert model.resize_token_embeddings(model.space.size) is model.get_input_embeddings()
    with pytest.raises(TokenSpaceError, match=str(model.space.size)):
        model.resize_token_embeddings(10)


def test_adding_a_slot_does_not_change_how_another_starts():
    base = xoron_core.compose(preset="tiny", overrides=["backbone.num_layers=2"], seed=4)[0]
    same = xoron_core.compose(preset="tiny", overrides=["backbone.num_layers=2"], seed=4)[0]
    other = xoron_core.compose(preset="tiny", overrides=["backbone.num_layers=2"], seed=5)[0]
    for (name, ours), theirs in zip(base.named_parameters(), same.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert not torch.equal(base.get_input_embeddings().weight, other.get_input_embeddings().weight)


def copy_of(folder, tmp_path):
    import shutil

    return shutil.copytree(folder, tmp_path / "copy")


def test_a_truncated_weight_file_is_named(folder, tmp_path):
    copy = copy_of(folder, tmp_path)
    file = copy / "slots" / "backbone-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(FolderError, match=r"backbone-00001\.safetensors.*truncated"):
        xoron_core.load(copy)


def test_missing_and_unexpected_weights_are_errors(folder, tmp_path):
    from xoron_core.storage import read_tensors, write_tensors

    copy = copy_of(folder, tmp_path)
    file = copy / "slots" / "backbone-00001.safetensors"
    tensors = read_tensors(file)
    gone = next(name for name in tensors if "q_proj" in name)
    tensors["slots.backbone.model.extra"] = tensors.pop(gone)
    write_tensors(file, tensors)
    index_path = copy / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    index["weight_map"] = dict.fromkeys(tensors, "slots/backbone-00001.safetensors")
    index_path.write_text(json.dumps(index))
    with pytest.raises(FolderError, match=r"missing.*q_proj.*unexpected.*extra"):
        xoron_core.load(copy)


def test_a_token_space_of_another_model_is_refused(folder, tmp_path):
    copy = copy_of(folder, tmp_path)
    other = xoron_core.compose(
        preset="tiny", overrides=["backbone.num_layers=2", "tokens.groups=[control]"]
    )[0]
    other.space.save(copy / "token_space.json")
    with pytest.raises(TokenSpaceError, match=f"{other.space.hash}.*does not match"):
        xoron_core.load(copy)


def test_a_failed_save_leaves_the_old_folder(model_and_processor, folder, tmp_path, monkeypatch):
    copy = copy_of(folder, tmp_path)
    before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}

    def no_space(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("xoron_core.folder.write_tensors", no_space)
    for save in (
        lambda: model_and_processor[0].save_pretrained(copy),
        lambda: xoron_core.save(*model_and_processor, copy),
    ):
        with pytest.raises(FolderError, match=r"No space left.*intact"):
            save()
    assert {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]
