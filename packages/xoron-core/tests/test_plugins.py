"""Proves discovery: each plug-in is loaded under its own guard, every state is reached by a real
distribution on the path, and conflicts, selections and absences name what to do."""

import importlib
import importlib.metadata
import sys
import textwrap

import pytest

from xoron_core import discovery, plugins
from xoron_core.errors import PluginError

GOOD = """
    from xoron_core.descriptors import Component
    from xoron_core.hookspecs import hookimpl
    xoron_api = 1
    @hookimpl
    def xoron_components():
        return [Component(kind="encoder", name="ecg", modality="ecg", factory="x:X", config="x:C",
                          summary="An encoder.")]
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Returns a function that puts a distribution with one entry point on the path."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def add(name, source, *, version="1.2"):
        module = f"fake_{name.replace('-', '_')}"
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(source))
        info = tmp_path / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: xoron-{name}\nVersion: {version}\n"
        )
        (info / "entry_points.txt").write_text(f"[xoron]\n{name} = {module}\n")
        sys.modules.pop(module, None)

    importlib.invalidate_caches()
    return add


def found():
    return discovery.discover(importlib.metadata.entry_points(group="xoron"))


def test_a_good_plugin_is_available_with_its_origin(install):
    install("heart", GOOD)
    plugin = found().plugin("heart")
    assert plugin.state == "available"
    assert (plugin.origin.distribution, plugin.origin.version) == ("xoron-heart", "1.2")
    assert found().component("encoder", "ecg").summary == "An encoder."


@pytest.mark.parametrize(
    ("source", "state", "words"),
    [
        ("raise RuntimeError('boom')", "broken", ["RuntimeError", "boom"]),
        ("import sys; sys.exit(3)", "broken", ["SystemExit"]),
        ("import no_such_module_here", "broken", ["no_such_module_here"]),
        ("x = 1", "incompatible", ["xoron_api = 1"]),
        ("xoron_api = 99", "incompatible", ["pip install --upgrade xoron-core", "99"]),
        ("xoron_api = 0", "incompatible", ["pip install --upgrade xoron-bad"]),
        (GOOD.replace("xoron_components", "xoron_componets"), "broken", ["'xoron_components'"]),
        (GOOD.replace("return [", "return ['no', "), "broken", ["'no'", "Component"]),
        (GOOD.replace("return [", "1 / 0; return ["), "broken", ["ZeroDivisionError"]),
        (GOOD.replace("return [", "raise SystemExit; return ["), "broken", ["SystemExit"]),
        (GOOD.replace('"encoder"', '"encodr"'), "broken", ["'encodr'", "Did you mean 'encoder'"]),
        (GOOD.replace("return [", "return 2 * ["), "broken", ["'encoder/ecg' twice"]),
        (
            GOOD.replace("xoron_components", "xoron_token_groups")
            .replace("import Component", "import TokenGroup")
            .replace("return [", "return [TokenGroup('x/y', {'user': '<|user|>'})]; ["),
            "conflict",
            ["special token '<|user|>'", "xoron-core (core)", "xoron-bad (bad)"],
        ),
    ],
)
def test_a_bad_plugin_is_isolated_and_its_problem_named(install, source, state, words):
    install("bad", source)
    install("heart", GOOD)
    registry = found()
    plugin = registry.plugin("bad")
    assert plugin.state == state
    assert all(word in plugin.problem for word in words), plugin.problem
    assert registry.plugin("heart").state == "available"
    assert registry.plugin("core").state == "available"


def test_two_plugins_offering_one_component_conflict_until_one_is_chosen(install):
    install("heart", GOOD)
    install("pulse", GOOD)
    registry = found()
    for name in ("heart", "pulse"):
        problem = registry.plugin(name).problem
        assert registry.plugin(name).state == "conflict"
        assert "xoron-heart" in problem
        assert "xoron-pulse" in problem
        assert "--plugins -" in problem
    with pytest.raises(PluginError, match=r"conflict.*--plugins -pulse"):
        registry.component("encoder", "ecg")
    chosen = registry.select("-pulse")
    assert chosen.provider(chosen.component("encoder", "ecg")).name == "heart"


def test_selection_keeps_core_and_disables_the_rest(install):
    install("heart", GOOD)
    install("pulse", GOOD.replace("ecg", "ppg"))
    registry = found().select("heart")
    states = {plugin.name: plugin.state for plugin in registry.plugins}
    assert states["core"] == states["heart"] == "available"
    assert states["pulse"] == "disabled"
    assert [name for name, state in states.items() if state == "available"] == ["core", "heart"]
    assert registry.select(None) is registry


@pytest.mark.parametrize(
    ("name", "words"),
    [("herat", "Did you mean 'heart'"), ("video", "pip install xoron-video")],
)
def test_an_unknown_plugin_is_answered_with_the_fix(install, name, words):
    install("heart", GOOD)
    with pytest.raises(PluginError, match=words):
        found().select(name)


def test_selecting_a_broken_plugin_says_why_it_cannot_be_used(install):
    install("bad", "raise RuntimeError('boom')")
    with pytest.raises(PluginError, match=r"xoron-bad.*broken.*boom"):
        found().select("bad")


def test_an_absent_component_names_its_package_or_the_nearest_name(install):
    install("heart", GOOD)
    registry = found()
    with pytest.raises(PluginError, match="pip install xoron-video"):
        registry.component("autoencoder", "vidtok")
    with pytest.raises(PluginError, match="Did you mean 'encoder/ecg'"):
        registry.component("encoder", "ecgg")


def test_a_plugin_may_bring_hook_specifications_for_others(install):
    install(
        "host",
        """
        import types, pluggy
        from xoron_core.hookspecs import hookimpl, hookspec
        xoron_api = 1
        specs = types.ModuleType("specs")
        def xoron_remedies(): "Remedies."
        specs.xoron_remedies = hookspec(xoron_remedies)
        @hookimpl
        def xoron_hookspecs():
            return [specs]
        """,
    )
    install(
        "guest",
        """
        from xoron_core.hookspecs import hookimpl
        xoron_api = 1
        @hookimpl
        def xoron_remedies():
            return ["rest"]
        """,
    )
    assert found().extra("xoron_remedies") == [("guest", "rest")]


def test_the_variable_restricts_what_is_loaded(install, monkeypatch):
    install("heart", GOOD)
    monkeypatch.setenv("XORON_PLUGINS", "-heart")
    plugins.registry.cache_clear()
    try:
        assert plugins.registry().plugin("heart").state == "disabled"
    finally:
        monkeypatch.undo()
        plugins.registry.cache_clear()
