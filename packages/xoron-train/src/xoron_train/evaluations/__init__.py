"""Evaluations beside the held-out loss: what is asked of a model on conversations.

A recipe names them; without a trainer they are functions of a model, its processor and samples:

    from xoron_train.evaluations import evaluate_answers, evaluate_seeing

    record = evaluate_seeing(model, processor, samples)

Importing this package imports nothing heavy; each name below is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xoron_train.conversation import Conversation
    from xoron_train.evaluations.answers import evaluate_answers
    from xoron_train.evaluations.base import Evaluation, EvaluationConfig
    from xoron_train.evaluations.config import AnswersConfig, Gate, SeeingConfig
    from xoron_train.evaluations.making import evaluate_making
    from xoron_train.evaluations.prompting import evaluate_prompting
    from xoron_train.evaluations.seeing import evaluate_seeing
    from xoron_train.evaluations.text_unchanged import evaluate_text_unchanged
    from xoron_train.evaluations.vqa import vqa_accuracy

_LAZY = {
    "AnswersConfig": "xoron_train.evaluations.config",
    "Conversation": "xoron_train.conversation",
    "Evaluation": "xoron_train.evaluations.base",
    "EvaluationConfig": "xoron_train.evaluations.base",
    "Gate": "xoron_train.evaluations.config",
    "SeeingConfig": "xoron_train.evaluations.config",
    "evaluate_answers": "xoron_train.evaluations.answers",
    "evaluate_making": "xoron_train.evaluations.making",
    "evaluate_prompting": "xoron_train.evaluations.prompting",
    "evaluate_seeing": "xoron_train.evaluations.seeing",
    "evaluate_text_unchanged": "xoron_train.evaluations.text_unchanged",
    "vqa_accuracy": "xoron_train.evaluations.vqa",
}

__all__ = [
    "AnswersConfig",
    "Conversation",
    "Evaluation",
    "EvaluationConfig",
    "Gate",
    "SeeingConfig",
    "evaluate_answers",
    "evaluate_making",
    "evaluate_prompting",
    "evaluate_seeing",
    "evaluate_text_unchanged",
    "vqa_accuracy",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'xoron_train.evaluations' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
