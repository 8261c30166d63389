"""The embedded default: a small social world, a judge for it, and `python -m hov2.toy`, the whole method on a CPU.

    python -m hov2.toy [--seed N] [--quick] [--no-judge-rewards]
    python -m hov2.toy --ablate

A clip is a second of a drawn face with a voice-like tone; what the speaker means follows from the two together. The
cold start's solutions are flawed on purpose, so that reinforcement learning has something to mend: docs/toy.md tells
how, and what the figures mean.

`world` draws the clips and asks the questions, `rule_judge` is the judge, `run` runs the scripts, `ablation` compares
variants of the method. The scripts call `prepare`, so that the toy's configs work on an empty folder.
"""

from hov2.toy.rule_judge import JudgeHandler, RuleJudge, rule_score
from hov2.toy.run import FILTERED, QUICK_STEPS, prepare, read_predictions, run_script, scores_of
from hov2.toy.world import (
    CONFIGS,
    MAIN_TYPES,
    PLAIN_WALL,
    QUESTIONS,
    ROOT,
    SHORTCUT,
    WORLD,
    build_world,
    make_clip,
    solution,
    true_answer,
)

__all__ = [
    "CONFIGS",
    "FILTERED",
    "MAIN_TYPES",
    "PLAIN_WALL",
    "QUESTIONS",
    "QUICK_STEPS",
    "ROOT",
    "SHORTCUT",
    "WORLD",
    "JudgeHandler",
    "RuleJudge",
    "build_world",
    "make_clip",
    "prepare",
    "read_predictions",
    "rule_score",
    "run_script",
    "scores_of",
    "solution",
    "true_answer",
]
