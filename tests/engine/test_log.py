"""The files a run writes: whole lines, no NaN, and a resumed run's equal to an uninterrupted one's."""

import errno
import json
import os
import sys

import pytest
import torch

from hov2.config import ConfigError
from hov2.distributed import WriteError
from hov2.engine import guard
from hov2.engine.log import MetricsLog, RolloutDump, Timer, console_line


def lines(path):
    def no_constants(name):
        raise AssertionError(f"{name} in {path}")

    return [json.loads(line, parse_constant=no_constants) for line in path.read_text().splitlines()]


def test_metrics_are_flushed_lines_without_nan(tmp_path, capsys):
    log = MetricsLog(tmp_path / "run", rank=0, report_to=[], total_steps=20)
    log.write(0, {"reward": torch.tensor(1.25), "kl": float("nan"), "lr": 1e-6, "best": None})
    assert lines(tmp_path / "run/metrics.jsonl") == [{"step": 0, "reward": 1.25, "kl": None, "lr": 1e-6, "best": None}]
    log.write(1, {"reward": float("inf"), "note": "évaluation"})
    log.close()
    assert lines(tmp_path / "run/metrics.jsonl")[1] == {"step": 1, "reward": None, "note": "évaluation"}
    assert "step  0/20 | reward  1.250" in capsys.readouterr().out


def test_other_ranks_write_nothing(tmp_path, capsys):
    log, dump = MetricsLog(tmp_path, 1, ["wandb"], 2), RolloutDump(tmp_path, 1)
    log.write(0, {"reward": 1.0})
    dump.write([{"step": 0}])
    log.close()
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out == ""


def test_resumed_files_equal_uninterrupted_ones(tmp_path):
    def run(folder, first, last):
        log, dump = MetricsLog(folder, 0, [], 4, start_step=first), RolloutDump(folder, 0, start_step=first)
        for step in range(first, last):
            log.write(step, {"reward": step / 2})
            dump.write([{"step": step, "sample": "ü", "logps": torch.tensor([0.5, float("nan")])}] * 2)
        log.close()

    run(tmp_path / "whole", 0, 4)
    run(tmp_path / "parts", 0, 3)
    with (tmp_path / "parts/rollouts.jsonl").open("a") as file:
        file.write('{"step": 3, "samp')  # killed in the middle of a line
    run(tmp_path / "parts", 2, 4)
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    assert lines(tmp_path / "whole/rollouts.jsonl")[0] == {"step": 0, "sample": "ü", "logps": [0.5, None]}
    run(tmp_path / "parts", 0, 1)  # a new run does not go on after an old one's lines
    assert [line["step"] for line in lines(tmp_path / "parts/metrics.jsonl")] == [0]


class FullDisk:
    """A file that takes so many bytes and no more, like one on a full disk."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, content):
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self.file.write(content[: self.room])
        self.room -= written
        return written

    def close(self):
        self.file.close()


@pytest.mark.parametrize("room", [0, 7])
def test_a_full_disk_costs_no_line_and_asks_the_run_to_stop(tmp_path, monkeypatch, room):
    monkeypatch.setattr(guard, "_asked", [])
    log, dump = MetricsLog(tmp_path, 0, [], 9), RolloutDump(tmp_path, 0)
    log.write(0, {"reward": 1.0})
    dump.write([{"step": 0}] * 2)
    log._file.file = full_log = FullDisk(log._file.file, room)
    dump._file.file = full_dump = FullDisk(dump._file.file, room)
    for step in (1, 2):
        log.write(step, {"reward": 2.0})
        dump.write([{"step": step}] * 2)
        assert lines(tmp_path / "metrics.jsonl") == [{"step": 0, "reward": 1.0}]
        assert lines(tmp_path / "rollouts.jsonl") == [{"step": 0}] * 2
    assert guard._asked[0] == f"{tmp_path}/metrics.jsonl: can't be written: No space left on device"
    with pytest.raises(WriteError, match=r"metrics\.jsonl: can't be written: No space"):
        log.close()
    full_log.room = full_dump.room = 10_000  # somebody has made room
    log.close()
    dump.close()
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [0, 1, 2]
    assert [line["step"] for line in lines(tmp_path / "rollouts.jsonl")] == [0, 0, 1, 1, 2, 2]


def test_console_columns_have_one_width():
    one = console_line(9, 100, {"reward": 1.5, "learning_rate": 1e-6, "grad_norm": 0.25})
    two = console_line(10, 100, {"reward": -0.25, "learning_rate": 0, "grad_norm": 12.5})
    assert one == "step   9/100 | reward  1.500 | grad   0.250 | lr 1.00e-06" and len(one) == len(two)


def test_a_tracker_that_cannot_write_is_left_out(tmp_path, monkeypatch, capsys):
    seen = []

    def tracker_called(name, output_dir):
        def track(step, metrics):
            if name == "tensorboard" and step == 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            seen.append((name, step))

        return track

    monkeypatch.setattr("hov2.engine.log._tracker", tracker_called)
    log = MetricsLog(tmp_path, rank=0, report_to=["tensorboard", "wandb"], total_steps=3)
    for step in range(3):
        log.write(step, {"loss": 0.5})
    log.close()
    assert seen == [("tensorboard", 0), ("wandb", 0), ("wandb", 1), ("wandb", 2)]
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [0, 1, 2]
    said = capsys.readouterr().out
    assert said.count("warning: report_to: tensorboard can't be written") == 1 and "No space left" in said


@pytest.mark.parametrize("name, module", [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_missing_tracker_says_how_to_install(tmp_path, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=f"pip install {name}"):
        MetricsLog(tmp_path, 0, [name], 1)


def test_timer_adds_up_and_starts_afresh():
    timer = Timer()
    for name in ("rollout", "update", "rollout"):
        with timer(name):
            pass
    seconds = timer.pop()
    assert set(seconds) == {"time/rollout", "time/update"} and all(value >= 0 for value in seconds.values())
    assert timer.pop() == {}
