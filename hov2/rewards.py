"""Rewards by rule: text in, a float out (method.md, "The completion" and "Samples").

`format_reward` judges the shape of a completion, `accuracy_reward` its answer against the reference, by problem type
(answers.py).
"""

import re
from typing import Protocol

from hov2.answers import (
    PROBLEM_TYPES,
    TAG,
    answer_text,
    check_reference,
    mean_relative_accuracy,
    parse_answer,
)

_STRICT = re.compile(r"<context>(.*?)</context>\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>", re.DOTALL)
# The released pattern; atomic groups, because the first place where each part can end is as good as any later one.
_RELEASED = re.compile(r"<context>(?>.*?</context>\s*<think>)(?>.*?</think>\s*<answer>).*?</answer>", re.DOTALL)
_ONE_OF_EACH = sorted(["<context>", "</context>", "<think>", "</think>", "<answer>", "</answer>"])


class AnswerJudge(Protocol):
    """Whoever scores the answers that no rule can: `judge.AccuracyJudge`. None where it failed to say."""

    def consistency(self, answer: str, reference: str) -> float | None:
        """Return how well two free-form answers agree, in [0, 1]."""

    def synonyms(self, answer: set[str], reference: set[str]) -> float | None:
        """Return F1 between two sets of emotion words with synonyms counted as one."""


def format_reward(text: str, rule: str = "strict") -> float:
    """Return 1.0 if `text` is a context, a think and an answer block, else 0.0.

    "strict": each once, in that order, none blank, nothing but white space between and around. "released": the text
    starts with the three in that order; they may be blank or hold tags, and anything may follow.
    """
    if rule == "released":
        return float(_RELEASED.match(text) is not None)
    if sorted(TAG.findall(text)) != _ONE_OF_EACH:
        return 0.0
    match = _STRICT.fullmatch(text.strip())
    if match is None:
        return 0.0
    return float(all(inner.strip() for inner in match.groups()))


def accuracy_reward(
    text: str, solution: str, problem_type: str, judge: AnswerJudge | None = None, *, evaluation: bool = False
) -> float | None:
    """Return how right the answer of the completion `text` is, in [0, 1]; None if the judge failed to say.

    `solution`: the reference, with or without tags. `judge`, if there is one, scores free-form answers and pairs
    synonyms of emotion words; without one, free-form is ROUGE-L and words have to be the same. Without an answer the
    reward is 0.0; in `evaluation` the whole text is scored instead, and regression is mean relative accuracy.
    Raises ValueError as `check_reference` does.
    """
    reference = check_reference(solution, problem_type)
    answer = answer_text(text)
    if answer is None and evaluation:
        answer = TAG.sub("\n", text).strip()
    parsed = parse_answer(answer, problem_type)
    if not parsed:
        return 0.0
    if judge is not None and problem_type == "free-form":
        return judge.consistency(parsed, reference)
    if judge is not None and problem_type == "emer_ov":
        return judge.synonyms(parsed, reference)
    if evaluation and problem_type == "regression":
        return float(mean_relative_accuracy(parsed, reference))
    return float(PROBLEM_TYPES[problem_type].score(parsed, reference))
