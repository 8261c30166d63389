"""LoRA on the toy: stage 2 with adapters alone repairs what full training repairs."""

import os
from pathlib import Path

import pytest

from hov2 import toy

ROOT = Path(__file__).resolve().parents[2]


def stage(world, folder, model, stage, judge, **settings):
    """Trains a stage of the toy's and returns its model's accuracy on held-out questions of the main types."""
    data = [
        {
            "path": str(world / ("train_sft.json" if stage == "stage1" else "train_rl.json")),
            "slice": "all" if stage == "stage1" else "first:50%",
        }
    ]
    judged = {} if stage == "stage1" else {"judge.url": judge.url}
    toy.run_script(stage, {"model": str(model), "output_dir": str(folder), "data": data} | judged | settings)
    toy.run_script(
        "eval",
        {
            "model": str(folder / "model"),
            "output_dir": str(folder / "eval"),
            "data": [{"path": str(world / "eval.json")}],
            "judge.url": judge.url,
        },
    )
    return toy.scores_of(toy.read_predictions(folder / "eval" / "predictions.jsonl"))["accuracy"]


@pytest.mark.slow
def test_accuracy_rises_as_with_full_training(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    toy.build_world(tmp_path / "world")
    with toy.RuleJudge() as judge:
        start = stage(tmp_path / "world", tmp_path / "start", tmp_path / "world" / "model", "stage1", judge)
        model = tmp_path / "start" / "model"
        full = stage(tmp_path / "world", tmp_path / "full", model, "stage2", judge)
        lora = stage(
            tmp_path / "world",
            tmp_path / "lora",
            model,
            "stage2",
            judge,
            lora={"rank": 8, "alpha": 16},
            learning_rate=0.001,
        )  # few weights take larger steps
    print(f"accuracy: {start} at first, {full} after full training, {lora} with adapters")
    assert full - start > 0.15 and abs(lora - full) <= 0.1
