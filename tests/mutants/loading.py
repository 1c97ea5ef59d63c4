"""Faults of a plug-in as a whole, in the module of its entry point or in its descriptors."""

from tests.mutants.base import Mutant

_HOOK = "@hookimpl\ndef xoron_components():"
_ENCODER = '"encoder": "Patches of a signal to features.",'


def _plugin(name, old, new, caught_by, *says, more=()):
    return Mutant(name, "plugin.py", old, new, caught_by, says, more)


LOADING = [
    _plugin(
        "raises-on-import", "xoron_api = 1", "raise RuntimeError('boom')", "plugin/loads", "boom"
    ),
    _plugin(
        "exits-on-import",
        "xoron_api = 1",
        "import sys; sys.exit(3)",
        "plugin/loads",
        "exit code 3",
        "xoron-toy",
    ),
    _plugin(
        "hangs-on-import",
        "xoron_api = 1",
        "import time; time.sleep(600)",
        "plugin/loads",
        "did not end within 8 s",
    ),
    _plugin(
        "api-of-the-future",
        "xoron_api = 1",
        "xoron_api = 99",
        "plugin/loads",
        "pip install --upgrade xoron-core",
    ),
    _plugin(
        "registers-twice",
        "for kind, summary in _PARTS.items()\n",
        "for kind, summary in [*_PARTS.items()] * 2\n",
        "plugin/loads",
        "returns 'encoder/signal-encoder' twice",
    ),
    _plugin(
        "unknown-kind",
        "            kind=kind,",
        "            kind=kind.replace('ncoder', 'ncodr'),",
        "plugin/loads",
        "unknown kind 'encodr'",
        "Did you mean 'encoder'",
    ),
    _plugin(
        "overlapping-token",
        "tokens = {",
        "tokens = {'mine': '<|user|>'} | {",
        "plugin/loads",
        "special token '<|user|>'",
        "xoron-core",
    ),
    _plugin(
        "heavy-import",
        "xoron_api = 1",
        "import torch\n\nxoron_api = 1",
        "plugin/light-import",
        "numpy, torch",
        "`factory`",
    ),
    _plugin(
        "prints-on-import",
        "xoron_api = 1",
        "print('hello')\nxoron_api = 1",
        "plugin/light-import",
        "prints 'hello'",
    ),
    _plugin(
        "changes-the-environment",
        "xoron_api = 1",
        "import os\n\nos.environ['CUDA_VISIBLE_DEVICES'] = ''\nxoron_api = 1",
        "plugin/light-import",
        "changes the environment",
    ),
    Mutant(
        "heavy-config",
        "config.py",
        "from pathlib import Path",
        "import torch  # noqa\nfrom pathlib import Path",
        "plugin/light-config",
        ("torch", "keep configs in a module of their own"),
    ),
    _plugin(
        "hook-with-state",
        _HOOK,
        "@hookimpl\ndef xoron_components():\n    _PARTS['encoder'] += ' Again.'",
        "plugin/idempotent-hooks",
        "xoron_components returns something else on its second call",
    ),
    _plugin(
        "undeclared-token",
        '"gen_signal", "/gen_signal", "signal_pad")',
        '"gen_signal", "/gen_signal")',
        "plugin/modalities",
        "placeholder is '<|signal_pad|>', which is in no token group",
    ),
    _plugin(
        "missing-loader",
        'load="xoron_toy.config:load_signal"',
        'load="xoron_toy.config:load_sinal"',
        "plugin/modalities",
        "load is",
        "cannot be imported",
    ),
    _plugin(
        "unknown-modality",
        '            modality="signal",\n            factory',
        '            modality="sginal",\n            factory',
        "plugin/modalities",
        "no installed plug-in declares",
    ),
    _plugin(
        "misspelt-preset",
        "@hookimpl\ndef xoron_modalities",
        "@hookimpl\ndef xoron_presets():\n    from xoron_core.descriptors import Preset\n\n"
        "    own = 'encoder/signal-encoder'\n"
        "    return [Preset('wide', 'xoron_toy:wide.yaml', component=own)]\n\n\n"
        "@hookimpl\ndef xoron_modalities",
        "plugin/presets",
        "'widht'",
        "Did you mean 'width'",
        more=(("wide.yaml", "widht: 32\n"),),
    ),
    _plugin(
        "one-string-twice",
        "tokens = {",
        "tokens = {'twin': '<|signal|>'} | {",
        "plugin/token-groups",
        "gives the string '<|signal|>' to two names",
    ),
    Mutant(
        "another-distributions-name",
        "METADATA",
        "Name: xoron-toy",
        "Name: xoron-core",
        "plugin/absent",
        ("does not name xoron-core",),
    ),
    _plugin(
        "markers-that-nothing-selects",
        '            token_groups=("xoron-toy/signal",),\n',
        "",
        "model/composes",
        "tokens.groups: xoron-toy/signal",
    ),
    Mutant(
        "undeclared-sibling",
        "parts.py",
        "from torch import nn",
        "from torch import nn\nimport xoron_llm.plugin",
        "plugin/alone",
        ("xoron_llm", "dependencies"),
    ),
]
