"""Proves gates end to end on a model made by hand: a suite from a YAML file passes and fails, its
report is bound to the weights, and a recipe starts only from a model that carries a passed one.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from xoron_core.api import load, save
from xoron_core.cli import run as xoron
from xoron_core.errors import ConfigError, FolderError
from xoron_core.storage import read_tensors, write_tensors
from xoron_train.conversation import Conversation
from xoron_train.evaluations import AnswersConfig, EvaluationConfig
from xoron_train.evaluations.answers import Answers
from xoron_train.evaluations.base import Check, Evaluation
from xoron_train.evaluations.comparison import share_interval
from xoron_train.evaluations.config import MakingConfig, PromptingConfig, TextUnchangedConfig
from xoron_train.gates.report import read_report, report_path
from xoron_train.gates.requirement import require_passed
from xoron_train.gates.suite import load_suite

NUMBER = 20


@pytest.fixture(scope="module")
def suite(tmp_path_factory, shows, makes):
    """A suite of four gates on words that are shown and words that are made."""
    folder = tmp_path_factory.mktemp("suite")
    letters = "BCDEFGHIJKLMNOPQRSTU"
    talks = {"shown": map(shows, letters), "made": (makes(x.lower(), x) for x in letters)}
    for name, found in talks.items():
        lines = [json.dumps({"messages": list(talk.messages)}) for talk in found]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    table = {"kind": "conversations"}
    data = {
        "name": "words",
        "mixture": {
            "texts": {"kind": "jsonl", "path": str(folder / "texts.jsonl")},
            "all": {**table, "path": str(folder / "*.jsonl")},
            "made": {**table, "path": str(folder / "made.jsonl")},
        },
        "gates": {
            "text-unchanged": {"use": "text-unchanged", "source": "texts", "samples": 2},
            "making": {
                "use": "making",
                "source": "all",
                "samples": 2 * NUMBER,
                "max_new_tokens": 6,
            },
            "media-ablation": {"use": "seeing", "source": "all", "samples": NUMBER},
            "prompt-ablation": {"use": "prompting", "source": "made", "samples": NUMBER},
        },
    }
    data["mixture"]["all"]["path"] = str(folder / "[ms]*.jsonl")
    texts = [json.dumps({"text": text}) for text in ("some text", "", "more of it")]
    (folder / "texts.jsonl").write_text("\n".join(texts), encoding="utf-8")
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def seeing_folder(coder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("coder") / "model"
    save(*coder(), folder)
    return folder


@pytest.fixture
def folder(seeing_folder, tmp_path):
    return Path(shutil.copytree(seeing_folder, tmp_path / "model"))


def call(capsys, *arguments, code=0):
    capsys.readouterr()
    assert xoron([str(argument) for argument in arguments]) == code
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return out, err


def gate(capsys, folder, suite, *options, code=0):
    return call(capsys, "gate", folder, suite, "--base", folder, *options, code=code)


def test_a_model_that_listens_and_sees_passes_and_may_be_trained_on(folder, suite, capsys):
    with pytest.raises(FolderError, match=r"carries no report of it.*run: xoron gate"):
        require_passed(folder, [str(suite)])
    out, _ = gate(capsys, folder, suite)
    lines = {tuple(line.split()[:2]): line for line in out.splitlines()}
    assert "<= 0" in lines["text-unchanged", "largest"]
    assert "0 .. 0.0876" in lines["making", "out"]  # Wilson, 0 of 40
    assert ">= 0.8" in lines["media-ablation", "shuffled"] or ">= 0.1" in out
    assert all(line.endswith("passed") for (_, what), line in lines.items() if what == "shuffled")
    assert "note: media-ablation was asked on 20 samples, fewer than 256" in out
    assert out.splitlines()[-1] == "words: passed"
    report = read_report(report_path(folder, "words"))
    assert report.passed
    assert report.few() == list(report.gates)
    assert report.gates["making"].record["made"] == {"word": NUMBER, "text": NUMBER}
    assert report.model.token_space_hash == load(folder)[0].space.hash
    assert set(report.model.slots) == {"backbone", "word.codec"}
    require_passed(folder, [str(suite)])


def test_a_report_of_other_weights_is_refused(folder, suite, capsys):
    gate(capsys, folder, suite, "--json")
    file = next((folder / "slots").glob("backbone*.safetensors"))
    tensors = {name: tensor.clone() for name, tensor in read_tensors(file).items()}
    next(iter(tensors.values()))[0, 0] += 1e-3
    write_tensors(file, tensors)
    with pytest.raises(FolderError, match=r"is about other weights \(slots backbone; .* sha256:"):
        require_passed(folder, [str(suite)])


def test_a_blind_model_fails_with_figures_and_exit_code_1(coder, suite, capsys, tmp_path):
    folder = tmp_path / "blind"
    save(*coder(reads=0.0, asked=0.0), folder)
    out, _ = gate(capsys, folder, suite, "-o", tmp_path / "elsewhere.json", code=1)
    failed = {line.split()[0] for line in out.splitlines() if line.endswith("FAILED")}
    assert failed == {"media-ablation", "prompt-ablation", "words:"}
    assert not report_path(folder, "words").exists()
    shown = json.loads((tmp_path / "elsewhere.json").read_text())
    assert shown["passed"] is False
    assert shown["gates"]["making"]["passed"] is True
    assert shown["gates"]["media-ablation"]["checks"][0]["value"] == 0.5


def test_looser_thresholds_do_not_help(coder, suite, capsys, tmp_path):
    """What is required is judged by the suite itself, from the report's figures."""
    folder = tmp_path / "blind"
    save(*coder(reads=0.0), folder)
    loose = ["--set", "gates.media-ablation.shuffled={delta: -1, wins: 0}"]
    gate(capsys, folder, suite, *loose)
    with pytest.raises(FolderError, match=r"media-ablation: shuffled wins is 0.5, required >= 0.8"):
        require_passed(folder, [str(suite)])
    fewer = ["--set", "gates.making.samples=3", "--set", "gates.media-ablation=null"]
    gate(capsys, folder, suite, *fewer)
    with pytest.raises(
        FolderError, match="asked on 3 samples, required 40; media-ablation: was not asked"
    ):
        require_passed(folder, [str(suite)])


def test_a_recipe_starts_only_from_a_model_that_has_passed(folder, suite, capsys, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    data = {
        "name": "next",
        "requires": [str(suite)],
        "mixture": {"words": {"kind": "conversations", "path": str(suite.parent / "shown.jsonl")}},
        "train": ["backbone"],
        "eval_fraction": 0,
        "sequence_length": 64,
        "batch_size": 2,
        "max_steps": 1,
        "learning_rate": 1e-9,
        "tensorboard": False,
    }
    recipe.write_text(yaml.safe_dump(data))
    train = ["train", recipe, "--model", folder]
    _, err = call(capsys, *train, "-o", tmp_path / "first", code=1)
    assert "it carries no report of it (words.json in gates/); run: xoron gate" in err
    assert not (tmp_path / "first").exists()
    gate(capsys, folder, suite)
    call(capsys, *train, "-o", tmp_path / "second")


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (
            ["--set", "gates.making.samples=41"],
            1,
            "40 of 40 conversations of mixture.all suit making, expected 41",
        ),
        (["--set", "gates.making.required=true"], 2, "every gate is asked once and required"),
        (["--set", "gates.making.split=train"], 2, "is judged whole; leave the key out"),
        (["--set", "gates.making.source=alle"], 2, "Did you mean 'all'"),
        (["--set", "gates.making.smples=3"], 2, "Did you mean 'samples'"),
        (["--set", "gates.making.use=makin"], 2, "Did you mean 'making'"),
        (["--set", "gates.media-ablation.shuffled=null"], 2, "has no threshold, so it is no gate"),
        (["--set", "mixture.made.path=null"], 2, "mixture.made.path is not set"),
        (["--base", "nowhere"], 1, "is no model folder"),
        (["--device", "abacus"], 2, "device 'abacus' cannot be used"),
    ],
)
def test_a_mistake_is_one_message(folder, suite, capsys, options, code, words):
    every = ["--set", "gates.text-unchanged=null"] if "--base" not in options else []
    _, err = call(capsys, "gate", folder, suite, *every, *options, code=code)
    assert words in err


def test_wrong_folders_and_names_are_said(folder, suite, capsys):
    for arguments, code, words in [
        (["nowhere", suite], 1, "there is no such folder"),
        ([folder, "tokns"], 2, "Did you mean 'tokens'"),
        ([folder, "tokens"], 2, "--set mixture.media.path=PATH"),
        ([folder, "no.yaml"], 2, "no.yaml: cannot be read"),
        ([folder, suite], 2, "gates.text-unchanged: text-unchanged: base is not set"),
    ]:
        assert words in call(capsys, "gate", *arguments, code=code)[1]
    only = ["--set", "gates.text-unchanged=null", "--base", folder]
    assert "no gate of this suite compares" in call(capsys, "gate", folder, suite, *only, code=2)[1]


def test_the_suite_that_ships_asks_what_the_issue_asks():
    suite = load_suite("tokens", ["mixture.media.path=words"], base="base")
    assert [entry.name for entry in suite.entries()] == [
        "text-unchanged",
        "making",
        "media-ablation",
        "prompt-ablation",
    ]
    assert {entry.config.samples for entry in suite.entries()} == {256}
    assert suite.gates["text-unchanged"]["base"] == "base"
    assert suite.gates["text-unchanged"]["at_most"] == 0
    assert suite.gates["media-ablation"]["shuffled"] == {"delta": 0.1, "wins": 0.8}
    assert suite.gates["prompt-ablation"]["shuffled"]["wins"] == 0.8


class Plain(Evaluation):
    """As a plug-in writes one: its record says whether it is passed."""

    def run(self, model, processor, samples):
        return {"samples": len(samples), "passed": True}


def test_any_evaluation_that_says_passed_is_a_gate():
    plain = Plain(EvaluationConfig.parse({"source": "words"}))
    assert plain.suits(Conversation("any", []))
    for passed in (True, False):
        (check,) = plain.checks({"samples": 3, "passed": passed})
        assert (check.passed, check.samples) == (passed, 3)
    assert plain.checks({"samples": 3}) == []


@pytest.mark.parametrize(
    ("config", "gates"),
    [
        (MakingConfig, ["out_of_range_at_most", "decoded_at_least", "unguided_at_most"]),
        (PromptingConfig, ["shuffled"]),
        (TextUnchangedConfig, ["at_most"]),
    ],
)
def test_what_a_run_requires_has_a_gate(config, gates):
    config.parse({"source": "words", "required": True})
    with pytest.raises(ConfigError, match="required: true needs a gate"):
        config.parse({"source": "words", "required": True, **dict.fromkeys(gates)})


def test_answers_are_a_gate_on_score_and_controls(shows, makes):
    config = AnswersConfig.parse({"source": "words", "at_least": 0.9, "control_at_most": 0.3})
    answers = Answers(config)
    controls = {"zeroed": {"samples": 8, "score": 0.25}, "shuffled": {"samples": 6, "score": 0.5}}
    found = answers.checks({"samples": 10, "score": 0.9, "controls": controls})
    assert [(check.figure, check.samples, check.passed) for check in found] == [
        ("score", 10, True),
        ("score, zeroed", 8, True),
        ("score, shuffled", 6, False),
    ]
    assert answers.suits(shows("A"))
    assert not answers.suits(makes("a", "A"))


def test_thresholds_hold_at_their_ends_and_shares_have_wilsons_interval():
    assert Check("x", 0.8, 1, at_least=0.8, at_most=0.8).passed
    assert not Check("x", 0.8, 1, at_least=0.81).passed
    assert not Check("x", 0.8, 1, at_most=0.79).passed
    assert share_interval(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert share_interval(0.0, 256) == pytest.approx((0, 0.01478), abs=1e-5)
    assert share_interval(1.0, 256) == pytest.approx((0.98522, 1), abs=1e-5)
