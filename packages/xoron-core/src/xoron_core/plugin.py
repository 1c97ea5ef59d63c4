"""What xoron-core itself contributes: its groups of special tokens and its commands."""

from __future__ import annotations

from xoron_core.descriptors import Command, TokenGroup
from xoron_core.hookspecs import hookimpl

xoron_api = 1


@hookimpl
def xoron_token_groups() -> list[TokenGroup]:
    from xoron_core.tokens.special_tokens import core_groups

    return core_groups()


@hookimpl
def xoron_commands() -> list[Command]:
    return [
        Command("compose", "xoron_core.cli.compose:compose", "Compose a model from plug-ins."),
        Command("inspect", "xoron_core.cli.inspect:inspect", "Show what a model folder holds."),
        Command("doctor", "xoron_core.cli.doctor:doctor", "Examine plug-ins, machine and model."),
        Command("schema", "xoron_core.cli.schema:schema", "Print a component's config schema."),
        Command("delta", "xoron_core.cli.delta:app", "Save, apply or show trained slots."),
        Command("tokens", "xoron_core.cli.tokens:app", "Show or verify a token space."),
        Command("generate", "xoron_core.cli.generate:generate", "Generate from a prompt."),
        Command("chat", "xoron_core.cli.chat:chat", "Talk to a model in the terminal."),
        Command("encode", "xoron_core.cli.encode:encode", "Encode files to features."),
    ]
