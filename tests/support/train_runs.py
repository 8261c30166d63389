"""Runs the training scripts on a tiny model, several configs in one process (or torchrun) to save start-up time.

    python tests/support/train_runs.py RUNS.json        RUNS.json: [[script, config file, [override, ...]], ...]

A random model earns no reward by rule, so that GRPO would have nothing to learn; the scores come from a stand-in that
depends on the text alone.
"""

import json
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

import evaluate
import train_grpo
import train_sft
from hov2 import distributed
from hov2.config import EvalConfig, GRPOConfig, SFTConfig
from hov2.config_io import load_config
from hov2.engine import setup
from hov2.model import prefix, rollout
from hov2.model.encoder import Encoder
from hov2.scoring import Score


class HashScorer:
    """Scores by a checksum of the text; every 16th text has a missing score."""

    def __init__(self, judge, format_rule, heartbeat):
        pass

    def submit(self, name, text, sample):
        number = zlib.crc32(f"{name} {text}".encode())
        missing = number % 16 == 0
        score = Score(None if missing else (number % 5) / 4, missing)
        return SimpleNamespace(result=lambda: score)

    def wait_for_scores(self, scores):
        pass

    def log_stats(self, means):
        pass

    def note(self, samples):
        return ""


def count_work(counts):
    """Adds to `counts`, a list, what the towers, the decoder and the log-probs are asked for, in order."""

    def counted(module, name, what):
        function = getattr(module, name)

        def wrapper(*args, **kwargs):
            counts.append([name, what(*args)])
            return function(*args, **kwargs)

        setattr(module, name, wrapper)

    counted(Encoder, "_visual", lambda _, inputs: int(inputs.pixel_values is not None))
    counted(Encoder, "_audio", lambda _, inputs: int(inputs.input_features is not None))
    counted(prefix, "decode", lambda thinker, embeds, *_: embeds.shape[1])
    counted(rollout, "_prefill", lambda thinker, prompts, *_: sum(len(prompt.ids) for prompt in prompts))
    counted(prefix, "chunked_token_logps", lambda hidden, *_: len(hidden))
    counted(train_grpo, "load_reference", lambda config, *_: bool(config.beta))
    counted(
        train_grpo,
        "items_of_step",
        lambda groups, _: [[len(group.prompt.ids), group.rollout.completion_ids.numel()] for group in groups],
    )
    counted(HashScorer, "submit", lambda *_: 1)
    counted(HashScorer, "wait_for_scores", lambda *_: 1)


def stand_in_judge(config, prompts):
    """A judge that is never asked."""
    return SimpleNamespace(check=lambda: None, config=config)


if __name__ == "__main__":
    torch.set_num_threads(1)
    train_grpo.Scorer, setup.Judge = HashScorer, stand_in_judge
    device = distributed.setup()  # once: a process can't reliably join a torchrun group twice
    distributed.setup, distributed.cleanup = lambda _: device, lambda: None
    for script, config, overrides in json.loads(Path(sys.argv[1]).read_text()):
        module, kind = {
            "sft": (train_sft, SFTConfig),
            "grpo": (train_grpo, GRPOConfig),
            "eval": (evaluate, EvalConfig),
        }[script]
        config, counts = load_config(kind, config, overrides), []
        if config.output_dir.endswith("counted"):  # the last runs: the counting is not undone
            count_work(counts)
        module.main(config)
        (Path(config.output_dir) / "counts.json").write_text(json.dumps(counts))
