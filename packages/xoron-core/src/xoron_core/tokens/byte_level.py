"""The byte-level alphabet: each of the 256 bytes as one printable character.

Vocabularies written in it cover any text and name any sequence of bytes in JSON (GPT-2, Radford et
al., 2019).
"""

from __future__ import annotations

from functools import cache


@cache
def byte_alphabet() -> dict[int, str]:
    """Byte value to its character: printable ones stand for themselves, the rest moves up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [value for value in range(256) if value not in printable]
    return {value: chr(value) for value in printable} | {
        value: chr(256 + index) for index, value in enumerate(rest)
    }
