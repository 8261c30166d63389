"""The rewards: what each scores, and which tokens of a completion it reaches (docs/method.md, "5. Which reward").

`REWARDS`, at the end, is the one table of them: config, scoring, advantages, masks and metrics read it. To add a
reward, write a function from a `Completion` to a number in [0, 1] and give it a row.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from hov2.answers import (
    PROBLEM_TYPES,
    TAG,
    answer_text,
    block_text,
    check_reference,
    mean_relative_accuracy,
    parse_answer,
    untagged_answer,
)

_STRICT = re.compile(r"<context>(.*?)</context>\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>", re.DOTALL)
# The released pattern; atomic groups, because the first place where each part can end is as good as any later one.
_RELEASED = re.compile(r"<context>(?>.*?</context>\s*<think>)(?>.*?</think>\s*<answer>).*?</answer>", re.DOTALL)
_ONE_OF_EACH = sorted(["<context>", "</context>", "<think>", "</think>", "<answer>", "</answer>"])


class AnyJudge(Protocol):
    """Whoever scores what no rule can: `judge.CompletionJudge`. None where it failed to say."""

    def ask(self, kind: str, **fields: Any) -> float | None:
        """Return the score in [0, 1] of the rubric `kind` of prompts.json, filled with `fields`."""

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
    text: str,
    solution: str,
    problem_type: str,
    judge: AnyJudge | None = None,
    *,
    evaluation: bool = False,
    options: Sequence[str] | None = None,
) -> float | None:
    """Return how right the answer of the completion `text` is, in [0, 1]; None if the judge failed to say.

    `solution`: the reference, with or without tags. `judge`, if there is one, scores free-form answers and pairs
    synonyms of emotion words; without one, free-form is ROUGE-L and words have to be the same. Without an answer the
    reward is 0.0; in `evaluation` what stands outside the blocks is scored instead, and regression is mean relative
    accuracy. `options`: the question's, if it has any. Raises ValueError as `check_reference` does.
    """
    reference = check_reference(solution, problem_type, options)
    answer = answer_text(text)
    if answer is None and evaluation:
        answer = untagged_answer(text)
    parsed = parse_answer(answer, problem_type, options)
    if not parsed:
        return 0.0
    if judge is not None and problem_type == "free-form":
        return judge.consistency(parsed, reference)
    if judge is not None and problem_type == "emer_ov":
        return judge.synonyms(parsed, reference)
    if evaluation and problem_type == "regression":
        return float(mean_relative_accuracy(parsed, reference))
    return float(PROBLEM_TYPES[problem_type].score(parsed, reference))


@dataclass
class Completion:
    """What a reward is computed from: what the policy wrote, for which sample, and whom to ask."""

    text: str
    sample: Any  # data.samples.Sample
    judge: AnyJudge | None = None
    format_rule: str = "strict"
    evaluation: bool = False


@dataclass(frozen=True)
class Reward:
    """A row of REWARDS."""

    score: Callable[[Completion], float | None]  # in [0, 1]; None where it doesn't apply, or where the judge failed
    span: str  # the tokens that it reaches: all of the "completion", or up to the end of its "context" or "think" block
    needs_judge: bool = False  # it can't do without


def _format(completion: Completion) -> float:
    return format_reward(completion.text, completion.format_rule)


def _accuracy(completion: Completion) -> float | None:
    sample = completion.sample
    return accuracy_reward(
        completion.text,
        sample.solution,
        sample.problem_type,
        completion.judge,
        evaluation=completion.evaluation,
        options=sample.options,
    )


def context_reward(completion: Completion) -> float | None:
    """Return how far the completion's context covers the solution's, by the judge.

    0 without a request if the completion has no context; None if the solution has none.
    """
    reference = block_text(completion.sample.solution, "context")
    candidate = block_text(completion.text, "context")
    if not reference:
        return None
    if not candidate:
        return 0.0
    return completion.judge.ask("context", reference=reference, candidate=candidate)


def logic_reward(completion: Completion) -> float | None:
    """Return how well the reasoning rests on the context, by the judge; 0 without a request if either is absent."""
    context = block_text(completion.text, "context")
    think = block_text(completion.text, "think")
    if not context or not think:
        return 0.0
    return completion.judge.ask("logic", context=context, think=think)


REWARDS = {
    "format": Reward(_format, span="completion"),
    "accuracy": Reward(_accuracy, span="completion"),
    "context": Reward(context_reward, span="context", needs_judge=True),
    "logic": Reward(logic_reward, span="think", needs_judge=True),
}
