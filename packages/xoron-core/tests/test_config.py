"""Proves that configuration is strict and that its errors name file, line, key and suggestion."""

import pytest

from xoron_core.config import Config, apply_overrides, merge, parse_yaml, read_yaml
from xoron_core.errors import ConfigError


class Inner(Config):
    depth: int = 2
    names: tuple[str, ...] = ()


class Outer(Config):
    width: int
    rate: float = 1.0
    inner: Inner = Inner()


def parse(text):
    data, source = parse_yaml(text, "model.yaml")
    return Outer.parse(data, source)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("width: 3\ninner:\n  dept: 4\n", ["model.yaml:3", "'inner.dept'", "Did you mean 'depth'"]),
        ("width: '3'\n", ["model.yaml:1", "'width'", "integer", "'3'"]),
        ("width: 3.5\n", ["model.yaml:1", "integer", "3.5"]),
        ("rate: 2\n", ["model.yaml", "'width' is missing"]),
        ("width: 3\nwidth: 4\n", ["model.yaml:2", "twice", "line 1"]),
        ("width: [\n", ["model.yaml:", "not valid YAML"]),
        ("- 1\n", ["model.yaml:1", "mapping", "list"]),
        ("width: 3\ninner: {names: [a, 2]}\n", ["model.yaml:2", "inner.names.1", "string"]),
        ("width: 3\nzzzz: 1\n", ["model.yaml:2", "Known keys: inner, rate, width"]),
    ],
)
def test_a_wrong_key_or_value_is_named_with_its_line(text, words):
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert caught.value.exit_code == 2


def test_every_wrong_key_is_reported_at_once():
    with pytest.raises(ConfigError) as caught:
        parse("width: x\ninner: {depth: y}\n")
    assert "'width'" in str(caught.value)
    assert "'inner.depth'" in str(caught.value)


def test_data_round_trips_and_configs_are_frozen():
    config = parse("width: 3\nrate: 2\ninner: {names: [a, b]}\n")
    assert Outer.parse(config.data()) == config
    with pytest.raises(ValueError, match="frozen"):
        config.width = 4


def test_overrides_are_typed_by_yaml_and_reach_nested_keys():
    data = apply_overrides({"a": {"b": 1}}, ["a.b=2", "a.c.d=[1, x]", "e=true", "f=1e-3"])
    assert data == {"a": {"b": 2, "c": {"d": [1, "x"]}}, "e": True, "f": "1e-3"}


@pytest.mark.parametrize("override", ["novalue", "=3", "a.b.c=1"])
def test_a_malformed_override_is_refused(override):
    with pytest.raises(ConfigError, match="--set"):
        apply_overrides({"a": {"b": 1}}, [override])


def test_merge_keeps_what_is_not_overridden():
    assert merge({"a": {"b": 1, "c": [1]}}, {"a": {"c": [2]}}) == {"a": {"b": 1, "c": [2]}}


def test_a_missing_file_is_one_message(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml.*No such file"):
        read_yaml(tmp_path / "none.yaml")
