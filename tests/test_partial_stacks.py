"""Proves that every subset of the packages works: it composes, takes a training step and generates
what it can, with the others absent; and a plug-in built for an earlier version keeps working."""

import itertools
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.partial_stack import MEDIA_LIBRARIES, OFFERED, PACKAGES

HERE = Path(__file__).parent
ROOT = HERE.parent
# The toy plug-in stands in for a modality package and lies beside the tests.
THERE = [name for name in PACKAGES if name == "toy" or (ROOT / f"packages/xoron-{name}").is_dir()]
STACKS = [
    subset for count in range(len(THERE) + 1) for subset in itertools.combinations(THERE, count)
]


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """Empty media libraries: whoever imports one is seen to have done so."""
    site = tmp_path_factory.mktemp("libraries")
    for name in set(MEDIA_LIBRARIES) - OFFERED:
        (site / name).mkdir()
        (site / name / "__init__.py").write_text("")
    return site


def use(site, *stack):
    """Runs the stack in a process of its own."""
    path = [str(HERE / "toy"), str(site)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, HERE / "partial_stack.py", *stack],
        capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip


@pytest.mark.parametrize("stack", STACKS, ids=lambda stack: "+".join(("core", *stack)))
def test_every_subset_of_the_packages_works(libraries, stack):
    done = use(libraries, *stack)
    assert done.returncode == 0, done.stderr[-3000:]
    pulled = done.stdout.split("pulled:", 1)[1].split()
    assert pulled == [], "a stack without these modalities imports their libraries"


def test_every_package_of_the_workspace_is_in_the_subsets(members):
    assert {f"xoron-{name}" for name in PACKAGES} >= set(members) - {"xoron-core"}


def test_what_is_hidden_is_seen_to_be_missing(libraries):
    """The check itself can fail: a stack that names a package which is not there."""
    done = use(libraries, "llm", "smell")
    assert done.returncode != 0
    assert "unknown packages ['smell']" in done.stderr


OLD = {
    "xoron_oldmod/__init__.py": "",
    "xoron_oldmod/config.py": """
from xoron_core.config import Config

class Settings(Config):
    width: int = 8
""",
    "xoron_oldmod/parts.py": """
import torch
from torch import nn
from xoron_core.components import Encoder, Features

class OldEncoder(Encoder):
    def __init__(self, config, context):
        super().__init__(config, context)
        self.feature_size = config.width
        self.embed = nn.Linear(4, config.width)

    def dummy_batch(self):
        return {"values": torch.zeros(1, 2, 4)}

    def forward(self, values):
        return Features(self.embed(values), torch.ones(values.shape[:2], dtype=torch.bool))
""",
    "xoron_oldmod/plugin.py": """
from xoron_core.descriptors import Component, Modality, TokenGroup
from xoron_core.hookspecs import hookimpl

xoron_api = API

@hookimpl
def xoron_components():
    return [Component(kind="encoder", name="old", modality="old", summary="Made for API 1.",
                      factory="xoron_oldmod.parts:OldEncoder",
                      config="xoron_oldmod.config:Settings")]

@hookimpl
def xoron_modalities():
    marks = ("<|old|>", "<|/old|>", "<|gen_old|>", "<|/gen_old|>", "<|old_pad|>")
    return [Modality("old", ("old",), *marks, load="builtins:list")]

@hookimpl
def xoron_token_groups():
    return [TokenGroup("xoron-oldmod/old", {"old": "<|old|>"})]
""",
}


def old_wheel(folder, api):
    """The wheel that the plug-in's author published when the API had this version.

    Its source stands here and is not to follow the code: it uses what API 1 has.
    """
    info = "xoron_oldmod-0.3.dist-info"
    path = folder / "xoron_oldmod-0.3-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, source in OLD.items():
            wheel.writestr(name, source.replace("API", str(api)) if "plugin" in name else source)
        named = "Metadata-Version: 2.1\nName: xoron-oldmod\nVersion: 0.3\n"
        wheel.writestr(f"{info}/METADATA", named)
        wheel.writestr(f"{info}/entry_points.txt", "[xoron]\noldmod = xoron_oldmod.plugin\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


def python(code, wheel):
    environment = {**os.environ, "PYTHONPATH": str(wheel), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )


def test_a_wheel_built_for_the_first_api_still_composes_and_runs(tmp_path):
    code = (
        "import torch, xoron_core\n"
        "model, processor = xoron_core.compose({'old': {'encoder': {'use': 'old', 'width': 6}}})\n"
        "features = model.part('old.encoder')(torch.ones(2, 3, 4))\n"
        "assert features.values.shape == (2, 3, 6)\n"
        "xoron_core.save(model, processor, 'out')\n"
        "again, _ = xoron_core.load('out')\n"
        "same = again.part('old.encoder')(torch.ones(2, 3, 4)).values\n"
        "assert torch.equal(same, features.values)\n"
    )
    done = python(f"import os; os.chdir({str(tmp_path)!r})\n{code}", old_wheel(tmp_path, 1))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("api", "upgrade"), [(2, "pip install --upgrade xoron-core"), (0, "xoron-oldmod")]
)
def test_a_wheel_for_another_api_is_refused_with_what_to_upgrade(tmp_path, api, upgrade):
    code = (
        "from xoron_core.cli import run\nimport sys\n"
        "assert run(['plugins', 'list']) == 0\n"
        "sys.exit(run(['compose', '--set', 'old.encoder.use=old', '--dry-run']))\n"
    )
    done = python(code, old_wheel(tmp_path, api))
    assert done.returncode == 2, done.stderr
    assert "incompatible" in done.stdout
    assert upgrade in done.stdout
    assert upgrade in done.stderr
    assert "Traceback" not in done.stderr
