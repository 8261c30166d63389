"""A small run on disk for the report's tests: metrics, rollouts with known credits and a real clip, an evaluation.

The records are made by train_grpo.dump_record from grpo's own math, so that the report can't drift from what is dumped.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import torch

from hov2.data.samples import Sample
from hov2.engine.records import dump_record
from hov2.evaluation.results import format_summary, summarize
from hov2.grpo import span_advantages, span_rewards, token_advantages
from hov2.model.rollout import Rollout
from hov2.scoring import Score
from hov2.spans import token_bytes_of
from tests.support.helpers import tiny_tokenizer
from train_grpo import Group, completion_masks

DATA = Path(__file__).parents[1] / "assets"
EVIL = "</script><script>document.title = 'broken'</script><img src=x onerror=\"document.title = 'broken'\">"
TEXTS = [
    "<context>A man smiles.</context><think>He is joking.</think><answer>B</answer>",
    "<context>A red face.</context><think>A threat.</think><answer>A</answer>",
    f"<context>{EVIL}</context><think>é is two tokens, 😀 four.</think><answer>A</answer>",
    "No blocks at all.",
]
SCORES = {
    "format": [1.0, 1.0, 1.0, 0.0],
    "accuracy": [1.0, 0.4, 0.0, 0.0],
    "context": [1.0, 0.2, None, 0.0],
    "logic": [0.6, 1.0, 0.2, 0.0],
}
MEDIA = {"fps": 2.0, "max_frames": 4, "min_pixels": 3136, "max_pixels": 100352, "interleave_audio": False}


def make_record(step, video, texts=TEXTS, name="clip/1"):
    """One group as train_grpo.py dumps it; the third completion's context score is missing, its third token clipped."""
    tokenizer = tiny_tokenizer()
    ids = [tokenizer(text + "<|im_end|>")["input_ids"] for text in texts]
    width = max(map(len, ids))
    padded = torch.tensor([row + [0] * (width - len(row)) for row in ids])
    mask = torch.tensor([[t < len(row) for t in range(width)] for row in ids])
    sample = Sample(
        name,
        "What does <b>he</b> mean?",
        "multiple choice",
        ("A. threat", "B. joke"),
        f"<context>{EVIL}</context><think>A joke.</think><answer>B</answer>",
        "video",
        {"video": str(video)},
    )
    rollout = Rollout(padded, mask, torch.tensor([False] * len(ids)), None)
    group = Group(0, 7, sample, SimpleNamespace(ids=[0] * 90), rollout)
    group.token_bytes, group.mask = [token_bytes_of(tokenizer, row) for row in ids], mask
    group.scores = {
        name: [Score(value, value is None, EVIL if name == "logic" else None) for value in values]
        for name, values in SCORES.items()
    }
    rewards = {name: torch.tensor([[score.number for score in scores]]) for name, scores in group.scores.items()}
    advantages = span_advantages(span_rewards(rewards, dict.fromkeys(SCORES, 1.0)))
    group.span_masks = completion_masks(group, "seen")
    group.span_advantages = {span: of_groups[0] for span, of_groups in advantages.items()}
    group.advantages = token_advantages(group.span_advantages, group.span_masks)
    group.old_logps = torch.full(mask.shape, -0.5)
    group.logps, group.ref_logps = group.old_logps.clone(), group.old_logps - 0.1
    group.logps[2, 2] = -1.5  # its advantage is negative and its ratio below 1 - epsilon
    return dump_record(step, group, SimpleNamespace(epsilon=0.2, epsilon_high=None))


def write_run(folder, steps=2, video=DATA / "bigbuckbunny.mp4", accuracy=0.0):
    """Writes a run of `steps` steps and an evaluation of one question of `accuracy` into `folder`; returns `folder`."""
    (folder / "eval").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"media": MEDIA}))
    with open(folder / "metrics.jsonl", "w") as metrics, open(folder / "rollouts.jsonl", "w") as rollouts:
        for step in range(steps):
            values = {"step": step, "reward": step / 10, "rewards/context/mean": None if step == 1 else 0.5}
            metrics.write(json.dumps(values) + "\n")
            rollouts.writelines(json.dumps(make_record(step, video, name=f"clip/{n}")) + "\n" for n in range(2))
    record = {
        "id": "eval/1",
        "problem": "Who speaks?",
        "solution": "<answer>A</answer>",
        "problem_type": "multiple choice",
        "completion": EVIL,
        "answer": EVIL,
        "parsed": EVIL[:30],
        "accuracy": accuracy,
        "format": 0.0,
        "context": None,
        "no_answer": False,
        "truncated": False,
        "error": None,
    }
    results = {"protocol": {"model": str(folder)}, **summarize([record])}
    (folder / "eval" / "predictions.jsonl").write_text(json.dumps(record) + "\n")
    (folder / "eval" / "results.json").write_text(json.dumps(results))
    (folder / "eval" / "results.txt").write_text(f"{format_summary(results)}\nnot asked: {EVIL}\n")
    return folder
