"""A small world to be evaluated in: a tiny model, clips, and questions about them."""

import json
from types import SimpleNamespace

import pytest
import torch

from hov2.config import MediaConfig, Source
from hov2.data.inputs import InputMaker
from hov2.data.samples import read_samples
from hov2.evaluation import evaluator as evaluation
from hov2.evaluation.evaluator import Evaluator
from hov2.model.encoder import Encoder
from hov2.prompts import load_prompts
from tests.support.helpers import synth_clip, tiny_thinker, tiny_tokenizer
from tests.support.modelkit import policy_of

KINDS = {"multiple choice": "B", "judge": "yes", "numerical": "3", "free-form": "a man smiles", "emer_ov_mc": "A,C"}
QUESTIONS = 24


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a tiny model, six clips and QUESTIONS questions about them; one clip can't be read."""
    world = tmp_path_factory.mktemp("world")
    tiny_thinker().save_pretrained(world / "model")
    tiny_tokenizer().save_pretrained(world / "model")
    (world / "qwen_model").mkdir()
    tiny_tokenizer().save_pretrained(world / "qwen_model")
    (world / "broken.mp4").write_bytes(b"no clip")
    for i in range(6):
        synth_clip(world / f"{i}.mp4", seconds=1 + i % 3, sound=i % 2 == 0, seed=i)
    records = []
    for i in range(QUESTIONS):
        kind = list(KINDS)[i % len(KINDS)]
        records.append(
            {
                "id": f"q{i}",
                "problem": f"What is it, number {i}?",
                "problem_type": kind,
                "options": ["A. one", "B. two", "C. three"],
                "data_type": "video" if i % 4 else "text",
                "solution": f"<answer>{KINDS[kind]}</answer>",
                "topic": i % 3,
                **({"path": "broken.mp4" if i == 7 else f"{i % 6}.mp4"} if i % 4 else {}),
            }
        )
    (world / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return world


@pytest.fixture(scope="module")
def samples(world):
    return read_samples([Source(str(world / "data.jsonl"))])


@pytest.fixture
def evaluator(monkeypatch):
    """Makes an Evaluator of the tiny thinker, without processes and without a judge."""
    monkeypatch.setattr(evaluation, "unsharded", lambda policy: torch.no_grad())
    policy, device = policy_of(tiny_thinker()), torch.device("cpu")
    make = InputMaker(tiny_tokenizer(), load_prompts(), MediaConfig(fps=4, max_frames=4))
    run = SimpleNamespace(
        config=SimpleNamespace(seed=0),
        device=device,
        policy=policy,
        tokenizer=tiny_tokenizer(),
        make=make,
        encoder=Encoder(policy.thinker, device),
        judge=None,
    )
    return lambda **settings: Evaluator(run, **{"max_completion_length": 8, "batch_size": 3} | settings)
