"""Proves `xoron doctor`: a sound installation and model pass, and each fault that it looks for, put
there on purpose, is found, named with its fix and makes the command fail."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import xoron_core
from tests.distributions import install, toy_installed
from xoron_core import plugins
from xoron_core.cli import run
from xoron_core.components import Features
from xoron_core.doctor import folder as folder_checks
from xoron_core.doctor import kernels
from xoron_core.doctor.finding import Finding
from xoron_core.doctor.installed import examine_plugins, examine_versions
from xoron_core.doctor.live import examine_model

TOY = Path(__file__).parent / "toy"
SIGNAL = {
    name: {"use": f"signal-{name}"}
    for name in ("encoder", "projector", "codec", "autoencoder", "generator")
}
COMPOSITION = {
    "name": "toy",
    "tokenizer": {"use": "byte"},
    "backbone": {"use": "xoron-moe", "preset": "tiny", "num_layers": 2},
    "signal": SIGNAL,
}


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder of the path for made-up distributions."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    plugins.registry.cache_clear()
    yield folder
    monkeypatch.undo()
    plugins.registry.cache_clear()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model folder with a toy modality, written once."""
    with toy_installed():
        path = tmp_path_factory.mktemp("doctor") / "m"
        xoron_core.save(*xoron_core.compose(COMPOSITION), path)
    return path


@pytest.fixture
def folder(saved, tmp_path, toy):
    return Path(shutil.copytree(saved, tmp_path / "m"))


def doctor(capsys, *arguments, code=0):
    """Runs the command; returns the wrong findings and the error lines."""
    assert run(["doctor", *map(str, arguments), "--json"]) == code
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is (code == 0)
    return [found for found in report["findings"] if found["state"] == "wrong"]


def state(found, name):
    return next(f for f in found if f.name == name).state


def wrong(found):
    return {f.name: f for f in found if f.state == "wrong"}


def test_a_sound_installation_passes_and_says_what_runs(capsys):
    assert doctor(capsys) == []
    assert run(["doctor"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for words in ("xoron-llm", "torch", "free memory", "sdpa math", "experts grouped"):
        assert words in out


def test_without_a_model_it_stays_light():
    code = (
        "import sys; from xoron_core.cli import run; assert run(['doctor']) == 0;"
        "heavy = {'transformers', 'torch._dynamo'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_wrong_finding_needs_a_fix():
    with pytest.raises(ValueError, match="needs a fix"):
        Finding("plug-in", "x", "wrong", "is broken")


def test_broken_and_stale_plug_ins_are_named_with_their_distribution(site, capsys):
    install(site, "good")
    install(site, "boom", "raise RuntimeError('boom\\nand more')")
    install(site, "gone", None)
    install(site, "future", "xoron_api = 99")
    found = {f["name"]: f for f in doctor(capsys, code=1)}
    assert set(found) == {"boom", "gone", "future"}
    assert "stale entry point" in found["gone"]["detail"]
    assert "pip install --force-reinstall xoron-gone" in found["gone"]["fix"]
    assert "RuntimeError" in found["boom"]["detail"]
    assert "pip install --upgrade xoron-core" in found["future"]["detail"]
    assert run(["doctor"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("error: plug-in ") for line in lines)


def test_editable_installations_are_compared_with_their_source(site, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name, entry in {"same": "fake_same", "edited": "fake_other"}.items():
        (source / name).mkdir()
        text = (
            f'[project]\nname = "xoron-{name}"\n[project.entry-points.xoron]\n{name} = "{entry}"\n'
        )
        (source / name / "pyproject.toml").write_text(text)
    for name in ("same", "edited", "moved"):
        url = {"url": (source / name).as_uri(), "dir_info": {"editable": True}}
        install(site, name, direct_url=url)
    install(site, "wheel", direct_url={"url": (source / "moved").as_uri(), "dir_info": {}})
    found = wrong(examine_plugins(plugins.registry()))
    assert set(found) == {"xoron-edited", "xoron-moved"}
    assert "fake_other" in found["xoron-edited"].detail
    assert f"pip install -e {source / 'edited'}" in found["xoron-edited"].fix
    assert "which is gone" in found["xoron-moved"].detail


def test_a_distribution_installed_twice_is_named(site, tmp_path, monkeypatch):
    other = tmp_path / "other"
    other.mkdir()
    install(site, "twin")
    install(other, "twin", version="0.9")
    monkeypatch.syspath_prepend(str(other))
    found = wrong(examine_plugins(plugins.registry()))
    assert list(found) == ["xoron-twin"]
    assert "1.0" in found["xoron-twin"].detail
    assert "0.9" in found["xoron-twin"].detail


def test_versions_outside_the_declared_bounds_are_wrong(site):
    assert not wrong(examine_versions())
    requires = ("torch>=99", "transformers", "no-such-thing>=1", 'other; extra == "x"')
    install(site, "picky", requires=(*requires, 'older; python_version < "3"'))
    found = wrong(examine_versions())
    assert set(found) == {"torch", "no-such-thing"}
    assert ">=99" in found["torch"].fix
    assert "xoron-picky" in found["torch"].detail
    assert "is not installed" in found["no-such-thing"].detail


def test_kernels_are_run_and_compared(monkeypatch):
    found = list(kernels.examine_kernels())
    assert state(found, "sdpa math") == state(found, "experts slices") == "ok"
    real = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: 1.1 * real(*a, **k))
    assert "wrong numbers" in wrong(kernels.examine_kernels())["sdpa math"].detail
    nan = torch.full((1, 2, 128, 16), float("nan"))
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: nan)
    assert "sdpa math" in wrong(kernels.examine_kernels())


def test_a_kernel_that_is_absent_is_a_note_and_one_that_all_need_is_wrong(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(F, "scaled_dot_product_attention", refuse)
    found = list(kernels.examine_kernels())
    assert list(wrong(found)) == ["sdpa math"]
    assert state(found, "sdpa flash") == "note"


def test_a_sound_model_passes_with_every_modality_tried(folder, capsys):
    assert run(["doctor", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["findings"]
    live = {f["name"]: f["detail"] for f in found if f["area"] == "live"}
    assert set(live) == {
        "backbone", "signal.encoder", "signal.codec", "signal.autoencoder", "signal.generator"
    }  # fmt: skip
    assert "changes the logits" in live["signal.encoder"]
    assert "signal.projector learns" in live["signal.encoder"]


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "slots/backbone-00001.safetensors").write_bytes(b"x"), "truncated"),
        (lambda f: (f / "xoron.lock.json").write_text("{"), "xoron.lock.json is damaged"),
        (lambda f: (f / "token_space.json").unlink(), "token_space.json"),
    ],
)
def test_a_damaged_folder_is_named(folder, capsys, break_it, words):
    break_it(folder)
    (found,) = doctor(capsys, folder, code=1)
    assert words in found["detail"] + found["fix"]


def test_missing_and_misshapen_tensors_are_counted(folder, capsys):
    from safetensors.torch import load_file, save_file

    file = folder / "slots/signal.encoder-00001.safetensors"
    tensors = load_file(file)
    weight = next(name for name in tensors if name.endswith("weight"))
    tensors[weight] = tensors[weight][:-1].clone()
    tensors["slots.signal__encoder.stray"] = tensors.pop(weight.replace("weight", "bias"))
    save_file(tensors, file, {"format": "pt"})
    (found,) = doctor(capsys, folder, code=1)
    assert found["name"] == "weights"
    for words in ("1 missing", "1 unexpected", "1 of another shape", "1 not in the index"):
        assert words in found["detail"]


def test_a_model_whose_plug_in_is_absent_names_the_slots(saved, capsys):
    found = doctor(capsys, saved, code=1)
    assert {f["name"] for f in found} == {f"signal.{name}" for name in SIGNAL}
    assert all("pip install xoron-toy" in f["fix"] for f in found)


def test_other_versions_in_the_lock_are_a_note(folder, capsys):
    lock = json.loads((folder / "xoron.lock.json").read_text())
    lock["plugins"]["xoron-toy"] = "0.0.9"
    (folder / "xoron.lock.json").write_text(json.dumps(lock))
    assert run(["doctor", str(folder)]) == 0
    assert "xoron-toy 0.0.9, now 0.1.0" in capsys.readouterr().out


def test_too_little_memory_is_found_before_the_model_is_loaded(folder, capsys, monkeypatch):
    monkeypatch.setattr(folder_checks, "free_memory", lambda: 10**6)
    (found,) = doctor(capsys, folder, code=1)
    assert found["name"] == "memory"
    assert "half precision" in found["fix"]


def _zero(self, features):
    return features._replace(values=0 * self.project(features.values))


def _detached(self, features):
    return features._replace(values=self.project(features.values.detach()))


def _constant(self, patches, mask):
    return Features(self.embed(torch.zeros_like(patches)), mask)


def _deaf_loss(self, hidden, target, rng):
    return type(self)._loss(self, hidden.detach(), target, rng)


@pytest.mark.parametrize(
    ("cls", "method", "fault", "slot", "words"),
    [
        ("SignalProjector", "forward", _zero, "signal.encoder", "is blind"),
        ("SignalEncoder", "forward", _constant, "signal.encoder", "is blind"),
        ("SignalProjector", "forward", _detached, "signal.encoder", "parameter of signal.encoder"),
        ("SignalGenerator", "loss", _deaf_loss, "signal.generator", "parameter of backbone"),
        ("SignalAutoencoder", "encode", lambda s, patches, mask: 0 * patches, "signal.autoencoder",
         "is blind"),
        ("SignalEncoder", "forward", lambda s, **_: 1 / 0, "signal.encoder", "ZeroDivisionError"),
    ],
)  # fmt: skip
def test_a_modality_without_effect_or_gradient_names_its_slot(
    toy, monkeypatch, cls, method, fault, slot, words
):
    model, processor = xoron_core.compose(COMPOSITION)
    assert not wrong(examine_model(model, processor))
    part = type(model.part(slot.replace("encoder", "projector") if "Proj" in cls else slot))
    assert part.__name__ == cls
    monkeypatch.setattr(part, f"_{method}", getattr(part, method), raising=False)
    monkeypatch.setattr(part, method, fault)
    found = wrong(examine_model(model, processor))
    assert slot in found
    assert words in found[slot].detail
    assert "xoron-toy" in found[slot].fix


def test_a_frozen_part_needs_no_gradient(toy):
    model, processor = xoron_core.compose(
        {**COMPOSITION, "signal": {**SIGNAL, "encoder": {"use": "signal-encoder", "freeze": True}}}
    )
    found = {f.name: f for f in examine_model(model, processor)}
    assert found["signal.encoder"].state == "ok"
    assert "signal.encoder is frozen" in found["signal.encoder"].detail


def test_a_model_without_a_backbone_is_examined_too(toy):
    parts = {name: SIGNAL[name] for name in ("encoder", "codec", "autoencoder")}
    model, processor = xoron_core.compose({"signal": parts})
    found = {f.name: f for f in examine_model(model, processor)}
    assert set(found) == {"signal.encoder", "signal.codec", "signal.autoencoder"}
    assert all(f.state == "ok" for f in found.values())
