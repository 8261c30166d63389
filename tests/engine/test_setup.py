"""Before a run begins: what can't be shared is said before anything is loaded, and errors of writing are one line."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from hov2.config import ConfigError, EvalConfig, GRPOConfig, SFTConfig
from hov2.distributed import WriteError, atomic_write, writing
from hov2.engine import setup

MINIMAL = {"model": "m", "output_dir": "o", "data": [{"path": "train.json"}]}


def test_a_step_that_the_processes_cannot_share_is_refused():
    grpo, sft = GRPOConfig(**MINIMAL, prompts_per_step=8), SFTConfig(**MINIMAL, samples_per_step=32)
    for processes in (1, 2, 8):
        setup.check_shares(grpo, processes)
        setup.check_shares(sft, processes)
    setup.check_shares(EvalConfig(**MINIMAL), 3)
    with pytest.raises(ConfigError, match="^prompts_per_step: 8 can't be shared evenly by 3 processes"):
        setup.check_shares(grpo, 3)
    with pytest.raises(ConfigError, match="^samples_per_step: 32 can't be shared evenly by 64 processes"):
        setup.check_shares(sft, 64)


def test_nothing_is_loaded_before_that(monkeypatch):
    monkeypatch.setattr("hov2.distributed.world_size", lambda: 3)
    monkeypatch.setattr(setup, "load_prompts", lambda _: pytest.fail("loaded something"))
    with pytest.raises(ConfigError, match="^prompts_per_step: 8 can't be shared"):
        setup.start(GRPOConfig(**MINIMAL), torch.device("cpu"))


def test_a_full_disk_ends_with_one_line(tmp_path, monkeypatch, capsys):
    def main(config):
        raise WriteError("runs/x/metrics.jsonl: can't be written: No space left on device")

    def end(code):
        raise SystemExit(code)

    (tmp_path / "grpo.json").write_text(json.dumps(MINIMAL))
    monkeypatch.setattr(sys, "argv", ["train_grpo.py", str(tmp_path / "grpo.json")])
    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(SystemExit, match="1"):
        setup.command(main, GRPOConfig, None)
    assert capsys.readouterr().err == "error: runs/x/metrics.jsonl: can't be written: No space left on device\n"


def test_a_file_that_cannot_be_written_is_named_and_leaves_nothing_behind(tmp_path):
    with (
        pytest.raises(WriteError, match="^/dev/full: can't be written: No space left on device$"),
        writing("/dev/full"),
    ):
        Path("/dev/full").write_text("x")
    (tmp_path / "results.json").mkdir()  # in the way
    with pytest.raises(WriteError, match=r"results\.json: can't be written: "):
        atomic_write(tmp_path / "results.json", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
