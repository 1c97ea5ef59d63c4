"""Proves `xoron plugins new`: what it writes for every kind builds to a wheel, is found as plug-in,
passes its own tests and the conformance kit as it stands, and mistakes leave nothing behind.

The wheels are unpacked onto the path of a fresh process, which is what installing one does; nothing
comes from a network and this environment stays as it is.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.distributions import toy_installed
from xoron_core import scaffold
from xoron_core.cli import run
from xoron_core.descriptors import KINDS
from xoron_core.errors import FolderError, UsageError
from xoron_core.plugins import registry

TOY = Path(__file__).parent / "toy"
TEXT_KINDS = ("tokenizer", "backbone", "fusion")
IN_AND_OUT = """
import numpy as np
import xoron_core
from xoron_core.session import Session

small = ["backbone.num_layers=1", "backbone.use_moe=false"]
plugins = ["llm", "ecg-plugin"]
model, processor = xoron_core.compose(preset="tiny", plugins=plugins, overrides=small)
wave = [{"type": "ecg", "ecg": np.sin(np.arange(60))}]
talk = [{"role": "user", "content": wave}, {"role": "assistant", "content": wave}]
model.train()
model(**processor(talk, train=True)).loss.backward()
for slot in ("ecg.encoder", "ecg.projector", "ecg.generator", "backbone"):
    assert all(p.grad is not None and p.grad.any() for p in model.part(slot).parameters()), slot
session = Session(model.eval(), processor)
reply = session.generate(talk[:1], begin_with="ecg", max_new_tokens=40)[0]
print(*reply.media[0][1].shape)
session = Session(model.bfloat16(), processor)
print(*session.generate(talk[:1], begin_with="ecg", max_new_tokens=40)[0].media[0][1].shape)
"""


def write(name: str, kinds: list[str], parent: Path, modality: str | None = None) -> Path:
    plan = scaffold.design(name, kinds, modality=modality, registry=registry())
    return scaffold.write(plan, parent)


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> dict[str, Path]:
    """One package per kind, each with a modality of its own, and two with several kinds."""
    parent = tmp_path_factory.mktemp("packages")
    made = {
        kind: write(
            f"xoron-new-{kind}", [kind], parent, None if kind in TEXT_KINDS else f"m_{kind}"
        )
        for kind in KINDS
    }
    media = [kind for kind in KINDS if kind not in TEXT_KINDS]
    made["media"] = write("ecg-plugin", media, parent, "ecg")
    made["text"] = write("xoron-own-text", list(TEXT_KINDS), parent)
    return made


@pytest.fixture(scope="module")
def site(packages, tmp_path_factory) -> Path:
    """The packages' wheels, unpacked side by side."""
    folder = tmp_path_factory.mktemp("site")
    for package in packages.values():
        install(package, folder)
    return folder


def install(package: Path, site: Path) -> None:
    wheels = site.with_name(f"{site.name}-wheels")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(wheels)]
    done = subprocess.run(build, cwd=package, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = wheels.glob(f"{package.name.replace('-', '_')}-*.whl")
    zipfile.ZipFile(wheel).extractall(site)


def process(site: Path, *arguments: str) -> str:
    """Runs Python in a process that sees what is unpacked there; returns what it printed."""
    path = [str(site), str(TOY), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


def run_tests(site: Path, packages: list[Path], *options: str) -> str:
    folders = [str(package / "tests") for package in packages]
    return process(site, "-m", "pytest", "-q", "--import-mode=importlib", *options, *folders)


def test_every_kind_is_found_as_a_plugin(site, packages):
    out = process(site, "-c", "from xoron_core.cli import main; main(['plugins', 'list'])")
    for kind in KINDS:
        (line,) = [line for line in out.splitlines() if line.startswith(f"new-{kind} ")]
        assert " available " in line
        assert f"{kind}/new-{kind}" in line


def test_every_package_passes_its_own_tests(site, packages):
    out = run_tests(site, list(packages.values()), "-k", "not conformance")
    assert "passed" in out
    assert "skipped" not in out


@pytest.mark.slow
def test_every_kind_passes_the_kit_as_it_stands(site, packages):
    # The checks of a plug-in as a whole start processes, so the kinds come in two packages here.
    chosen = [packages[name] for name in ("media", "text")]
    assert "passed" in run_tests(site, chosen, "-k", "conformance")


def test_what_is_written_goes_in_and_out_of_a_text_model(site):
    assert process(site, "-c", IN_AND_OUT).split() == ["1", "64"] * 2


def test_a_modality_of_another_plugin_is_used_and_not_declared_again(tmp_path):
    with toy_installed():
        package = write("xoron-other", ["encoder"], tmp_path / "src", "signal")
    source = (package / "src/xoron_other/plugin.py").read_text()
    project = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    assert "Modality(" not in source
    assert 'token_groups=("xoron-toy/signal",)' in source
    assert "xoron-toy" in project["dependencies"]
    (tmp_path / "site").mkdir()
    install(package, tmp_path / "site")
    run_tests(tmp_path / "site", [package], "-k", "not absent and not alone")


@pytest.mark.parametrize("kinds", [*([kind] for kind in KINDS), list(KINDS)], ids="-".join)
def test_what_is_written_is_clean(kinds):
    modality = None if kinds[0] in TEXT_KINDS and len(kinds) == 1 else "sonar"
    plan = scaffold.design("sonar-plugin", kinds, modality=modality, registry=registry())
    files = scaffold.render(plan)
    assert "src/sonar_plugin/py.typed" in files
    for path, text in files.items():
        assert not text or text.endswith("\n"), path
        assert not any(mark in text for mark in ("{{", "{%", " \n", "\n\n\n\n")), path
        assert max(map(len, text.split("\n"))) <= 100, path
        if path.endswith(".py"):
            compile(text, path, "exec")


def test_a_loss_of_a_new_modality_brings_something_to_judge(packages):
    assert (packages["loss"] / "src/xoron_new_loss/autoencoder.py").is_file()


@pytest.mark.parametrize(
    ("name", "kinds", "modality", "message"),
    [
        ("Xoron_ECG", ["encoder"], "ecg", "such as 'xoron-ecg'"),
        ("-", ["encoder"], "ecg", "lower-case words joined by hyphens"),
        ("1st", ["encoder"], "ecg", "begin with a letter"),
        ("json", ["encoder"], "ecg", "a module 'json' is here already"),
        ("class", ["encoder"], "ecg", "cannot be imported"),
        ("llm", ["encoder"], "ecg", "'llm' is the plug-in of xoron-llm"),
        ("xoron-ecg", ["encodr"], "ecg", "Did you mean 'encoder'"),
        ("xoron-ecg", [], "ecg", "expected some of"),
        ("xoron-ecg", ["encoder"], None, "needs one, e.g. --modality ecg"),
        ("xoron-ecg", ["encoder"], "two words", "a lower-case word"),
        ("xoron-ecg", ["encoder"], "think", "is a special token of"),
        ("xoron-ecg", ["encoder"], "image", "pip install xoron-vision"),
        ("xoron-ecg", ["backbone"], "ecg", "leave it out"),
    ],
)
def test_a_mistake_is_one_message_and_writes_nothing(tmp_path, name, kinds, modality, message):
    core = registry().select("core")
    with pytest.raises(UsageError) as error:
        scaffold.write(scaffold.design(name, kinds, modality=modality, registry=core), tmp_path)
    assert message in str(error.value)
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_refused_and_stays(tmp_path, capsys):
    mine = tmp_path / "xoron-ecg" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    arguments = ["plugins", "new", "xoron-ecg", "--kind", "encoder", "--modality", "ecg"]
    assert run([*arguments, "--path", str(tmp_path)]) == 2
    assert "exists; choose another" in capsys.readouterr().err
    assert list(tmp_path.rglob("*")) == [mine.parent, mine]


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    plan = scaffold.design("xoron-ecg", ["encoder"], modality="ecg", registry=registry())
    files = scaffold.render(plan) | {"x" * 300: "no file system takes this name"}
    monkeypatch.setattr(scaffold, "render", lambda plan: files)
    with pytest.raises(FolderError, match="could not be written"):
        scaffold.write(plan, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_command_prints_what_it_wrote(tmp_path, capsys):
    arguments = ["plugins", "new", "xoron-ecg", "--kind", "encoder", "--modality", "ecg"]
    assert run([*arguments, "--path", str(tmp_path)]) == 0
    printed = {Path(line) for line in capsys.readouterr().out.splitlines()}
    assert printed == {path for path in tmp_path.rglob("*") if path.is_file()}
