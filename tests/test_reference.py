"""Proves that the generated reference is whole and current: every hook, kind, method, component and
config key of the code is on its page, and a page that differs from the code is found."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from xoron_core import components, hookspecs
from xoron_core.descriptors import KINDS, resolve
from xoron_core.plugins import registry
from xoron_train.recipe import Recipe

DOCS = Path(__file__).parents[1] / "docs"


def page(name):
    return (DOCS / "reference" / name).read_text(encoding="utf-8")


def section(text, title):
    """What stands under a heading of the second or third level."""
    return re.split(r"^##+ ", text.split(f"# {title}\n", 1)[1], maxsplit=1, flags=re.M)[0]


def test_every_hook_is_described():
    hooks = [name for name in vars(hookspecs) if name.startswith("xoron_")]
    assert len(hooks) >= 6
    for name in [*hooks, "xoron_recipes"]:
        assert f"def {name}() -> list[" in section(page("hooks.md"), name)


def test_every_kind_shows_what_it_has_to_implement():
    text = page("kinds.md")
    for kind in KINDS:
        after = text.split(f"\n## {kind}\n", 1)[1].split("\n## ", 1)[0]
        needed = after.split("### Implements", 1)[1].split("### May override")[0]
        cls = getattr(components, kind.capitalize())
        abstract = [n for n, v in vars(cls).items() if getattr(v, "__isabstractmethod__", False)]
        assert abstract
        assert re.findall(r"^def (\w+)\(", needed, flags=re.M) == abstract


def test_every_config_key_of_every_component_is_described():
    text = page("configs.md")
    for name in ("core", "llm", "train"):
        for component in registry().plugin(name).contribution.components:
            assert f"\n## {component.key}\n" in text
            config = resolve(component.config)
            for key in config.model_fields:
                row = re.search(rf"^\| `{key}` .*$", section(text, config.__name__), flags=re.M)
                assert row, f"{component.key}: {key}"
                assert row[0].rstrip(" |").count("|") >= 3, f"{component.key}: {key} says nothing"
    assert "| `num_layers` | `int`, >= 1 | `12` |" in section(text, "MoeConfig")
    assert all(f"| `{key}` |" in section(text, "Recipe") for key in Recipe.model_fields)


@pytest.mark.parametrize("name", ["cli.md", "reference/kinds.md"])
def test_a_page_that_differs_from_the_code_is_found(tmp_path, name):
    docs = Path(shutil.copytree(DOCS, tmp_path / "docs"))
    script = [sys.executable, docs / "generate.py"]
    subprocess.run(script, check=True)
    fresh = (docs / name).read_text()
    (docs / name).write_text(fresh.replace("Written by", "Written for", 1))
    found = subprocess.run([*script, "--check"], capture_output=True, text=True)
    assert found.returncode == 1
    assert f"{name} is stale; run: hatch run docs" in found.stderr
    subprocess.run(script, check=True)
    assert (docs / name).read_text() == fresh
    assert subprocess.run([*script, "--check"]).returncode == 0


def test_the_pages_in_the_repository_are_current():
    script = [sys.executable, DOCS / "generate.py", "--check"]
    found = subprocess.run(script, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
