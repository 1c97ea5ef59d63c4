"""Proves the conformance kit: each of these faulty plug-ins fails the one check meant for it.

Every mutant is a correct plug-in with one place changed; no other check of the same component, and
none of the plug-in as a whole, may fail with it, and the message names what to mend. The unchanged
plug-ins pass everything.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutants.base import Mutant
from tests.mutants.encoder import ENCODER
from tests.mutants.loading import LOADING
from tests.mutants.media import OTHERS
from tests.mutants.text import TEXT
from xoron_core.testing import checks_for
from xoron_core.testing.catalogue import checks
from xoron_core.testing.run import results_of

TOY = Path(__file__).parent / "toy"
WORDS = Path(__file__).parent / "mutants" / "words"
# Each starts a process that imports torch: run where they are meant, not 60 times.
SLOW = {"plugin/alone", "plugin/absent", "plugin/light-config"}
SECONDS = 3.0


def failures(folder: Path, mutant: Mutant) -> dict[str, str]:
    """Messages of the checks that fail, of the mutated component and of the plug-in."""
    slow = mutant.caught_by in SLOW
    component = mutant.caught_by.rpartition("/")[0]
    seconds = SECONDS if mutant.name in ("never-ending", "hangs-on-import") else 60.0
    bound = [
        check
        for check in checks_for(str(folder), time_limit=seconds)
        if check.id.rpartition("/")[0] in ("plugin", component) and (check.id not in SLOW or slow)
    ]
    return {r.id: r.message for r in results_of(bound) if r.status == "failed"}


def check_one(mutant: Mutant, base: Path, package: str, folder: Path) -> None:
    found = failures(mutant.write(base, package, folder), mutant)
    assert list(found) == [mutant.caught_by], found
    for words in mutant.says:
        assert words in found[mutant.caught_by], found[mutant.caught_by]


@pytest.mark.parametrize("mutant", [*LOADING, *ENCODER, *OTHERS], ids=lambda m: m.name)
def test_a_fault_fails_its_check_alone(mutant, tmp_path):
    check_one(mutant, TOY, "xoron_toy", tmp_path)


@pytest.mark.parametrize("mutant", TEXT, ids=lambda m: m.name)
def test_a_fault_of_text_fails_its_check_alone(mutant, tmp_path):
    check_one(mutant, WORDS, "xoron_words", tmp_path)


def test_a_codec_without_a_training_path_fails_nothing_of_the_loss_beside_it(tmp_path):
    encodes_only = Mutant(
        name="encodes-only",
        file="parts.py",
        old="    def forward(self, patches, mask):\n        soft = self._codes(patches)",
        new="    def train_alone(self, patches, mask):\n        soft = self._codes(patches)",
        caught_by="loss/signal-loss/runs",
        says=(),
    )
    assert failures(encodes_only.write(TOY, "xoron_toy", tmp_path), encodes_only) == {}


def test_every_check_is_proved_by_a_mutant():
    caught = {
        mutant.caught_by.rpartition("/")[2] for mutant in (*LOADING, *ENCODER, *OTHERS, *TEXT)
    }
    assert caught == set(checks())


@pytest.mark.parametrize("base", [TOY, WORDS], ids=["toy", "words"])
def test_what_the_mutants_derive_from_passes_everything(base):
    results = list(results_of(checks_for(str(base))))
    assert [r for r in results if r.status == "failed"] == []
    assert len([r for r in results if r.status == "passed"]) > 60
