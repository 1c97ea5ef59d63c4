"""Proves Track B at its published size, planned without network: every media id is a new row behind
the text's, and the backbone has exactly those rows more than the checkpoint's text needs. The
published layout itself, id for id, is proven in xoron-llm (`test_published_layout.py`)."""

from xoron_core.composer.composition import read_composition
from xoron_core.composer.planner import plan
from xoron_core.plugins import registry

TEXT, IMAGE, AUDIO = 151_669, 8_192, 4 * 1_024


def planned(plugins, *overrides):
    chosen = registry().select(plugins)
    return plan(read_composition(chosen, preset="qwen3-uti", overrides=overrides), chosen)


def test_media_are_new_rows_of_a_text_model(offline):
    found = planned("llm,vision,audio")
    space = found.space
    specials = sum(one.size for one in space.ranges if one.kind == "special")
    assert specials <= 64
    assert space.size == TEXT + specials + IMAGE + AUDIO
    assert space.new_rows(151_936).tolist() == list(range(TEXT, space.size))
    D, F, L = 4096, 12_288, 36
    layer = 2 * D * D + 2 * D * 1024 + 3 * D * F + 2 * D + 2 * 128
    parameters = {row.slot: row.parameters for row in found.rows}
    assert parameters["backbone"] == L * layer + 2 * space.size * D + D
    assert parameters["image.codec"] == 329_509_208


def test_each_codec_comes_with_its_package(offline):
    kinds = {
        plugins: sum(one.size for one in planned(plugins).space.ranges if one.kind == "codec")
        for plugins in ("llm,vision", "llm,audio")
    }
    assert kinds == {"llm,vision": IMAGE, "llm,audio": AUDIO}
