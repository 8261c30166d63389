"""The guard: deadlines and signs of collapse as pure functions; signals, failing and hanging ranks in real processes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.run import get_args_parser

from hov2.config import AlarmConfig, ConfigError, SFTConfig
from hov2.engine.guard import WINDOW, Guard, out_of_time, signs_of_collapse
from tests.support.helpers import tiny_thinker, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
FORMAT, ZERO_STD, CLIPPED = "rewards/format/mean", "frac_reward_zero_std", "completions/clipped_ratio"


def test_out_of_time_takes_the_longest_step_into_account():
    assert not out_of_time(1e9, 1e9, None)
    assert not out_of_time(3000, 600, 1.0) and out_of_time(3001, 600, 1.0) and out_of_time(3700, 0, 1.0)


def test_the_format_rewards_fall_is_measured_from_its_highest_window():
    rising, falling = [0.3] * WINDOW + [0.9] * WINDOW, [0.6] * WINDOW
    assert not signs_of_collapse([{FORMAT: v} for v in rising], AlarmConfig())
    history = [{FORMAT: v} for v in rising + falling]
    sentence = signs_of_collapse(history, AlarmConfig())[FORMAT]
    assert "from 0.9 to 0.6" in sentence and "format_drop=0.2" in sentence and "learning_rate" in sentence
    assert not signs_of_collapse(history, AlarmConfig(format_drop=None))
    assert not signs_of_collapse(history, AlarmConfig(format_drop=0.31))


@pytest.mark.parametrize("metric, alarm", [(ZERO_STD, "zero_std"), ("kl", "kl"), (CLIPPED, "clipped")])
def test_what_rises_past_its_limit_is_said_after_a_whole_window(metric, alarm):
    high = [{metric: 0.9}] * WINDOW
    assert list(signs_of_collapse(high, AlarmConfig())) == [metric]
    assert not signs_of_collapse(high[1:], AlarmConfig()) and not signs_of_collapse([], AlarmConfig())
    assert not signs_of_collapse(high, AlarmConfig(**{alarm: None}))
    assert not signs_of_collapse(high + [{metric: 0.1}] * WINDOW, AlarmConfig())  # of now, not of once


def test_steps_without_a_metric_are_no_zeros():
    history = [{ZERO_STD: 0.9}, {ZERO_STD: None}, {}] * WINDOW
    assert "to 0.9" in signs_of_collapse(history, AlarmConfig())[ZERO_STD]


def test_each_sign_is_said_once(capsys):
    guard = SimpleNamespace(history=[{"kl": 9.0}] * WINDOW, config=SimpleNamespace(alarms=AlarmConfig()), _said=set())
    Guard.look_for_collapse(guard)
    assert capsys.readouterr().out.startswith("warning: kl went from 9 to 9")
    guard.history += [{"kl": 9.0, ZERO_STD: 1.0}] * WINDOW
    Guard.look_for_collapse(guard)
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == [ZERO_STD]


@pytest.mark.parametrize("loss, finite", [(2.0, True), (float("inf"), False), (float("nan"), False)])
def test_a_loss_that_is_not_finite_shows_in_the_gradient(loss, finite):
    weight = torch.ones(3, requires_grad=True)
    noted = Guard.note_loss(SimpleNamespace(_losses=[]), weight.sum() + loss)  # whose gradient alone would be finite
    noted.backward()
    assert weight.grad.tolist() == [1.0] * 3 if finite else weight.grad.isnan().all()


@pytest.mark.parametrize("name", ["max_hours", "hang_minutes", "max_bad_steps"])
def test_negative_limits_are_refused(name):
    with pytest.raises(ConfigError, match=name):
        SFTConfig(model="", output_dir="", data=[], **{name: -1})


def torchrun(processes, *arguments, **popen):
    """Starts them; after a signal torchrun waits for long, where it can, so that a slow machine changes nothing."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", processes]
    if "shutdown_timeout" in vars(get_args_parser().parse_args(["script"])):  # not in torch 2.11
        launcher[2:2] = ["--shutdown-timeout", "600"]
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, [*launcher, *arguments])],
        cwd=ROOT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        **popen,
    )


def output(process):
    """(exit code, stdout, stderr) of a process that must end."""
    try:
        out, err = process.communicate(timeout=240)
    finally:
        process.kill()
    return process.returncode, out, err


def assert_rank_1_hung_and_failed(code, err):
    """stderr names rank 1 and where the others wait, then has its error, and torchrun's summary that ends with it."""
    hang, _, failure = err.partition("rank 1 has been in 'rollout' for 0 min (step 7)\n")[2].partition("Traceback")
    assert "in stuck_here" in hang and "rank 0 has been in 'logps' for 0 min (step 7)\n" in hang, err
    own, _, summary = failure.partition("torch/distributed/elastic")
    assert own.count("\nRuntimeError: sample s7 burst") == 1 and "Traceback" not in own  # of one rank alone
    assert own.count("Error:") == 1
    cause = [line.strip() for line in summary.split("Root Cause (first observed failure)")[1].splitlines()]
    assert code == 1 and "rank      : 1 (local_rank: 1)" in cause
    assert "exitcode  : -" not in summary  # the others ended by themselves; torchrun kills after 30 seconds
    assert [line for line in cause if line.strip("=")][-1] == "traceback : RuntimeError: sample s7 burst"


@pytest.mark.slow
def test_of_three_ranks_one_hangs_and_fails_and_all_end(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps({"model": "", "output_dir": str(tmp_path), "data": []}))
    code, _, err = output(
        torchrun(
            3,
            "tests/support/guard_runs.py",
            "fail",
            tmp_path / "c.json",
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    )
    assert_rank_1_hung_and_failed(code, err)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_through_torchrun(tmp_path, number):
    """torchrun hands SIGTERM on, and fails by itself; as Slurm signals all processes, it must ignore SIGUSR1."""
    (tmp_path / "c.json").write_text(json.dumps({"model": "", "output_dir": str(tmp_path), "data": []}))
    process = torchrun(
        2,
        "tests/support/guard_runs.py",
        "loop",
        tmp_path / "c.json",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGUSR1, signal.SIG_IGN),
    )
    while process.poll() is None and not (tmp_path / "ready").exists():
        time.sleep(0.1)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in [process.pid, *workers] if number == signal.SIGUSR1 else [process.pid]:
        os.kill(int(pid), number)
    code, out, err = output(process)
    assert out.count(f"{number.name}: stops after ") == 1, err
    assert code == (0 if number == signal.SIGUSR1 else 1) and "exitcode" not in err  # no worker failed


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A folder with a tiny model, questions without clips, and a config of each kind."""
    lab = tmp_path_factory.mktemp("lab")
    tiny_thinker(layers=2).save_pretrained(lab / "model")
    tiny_tokenizer().save_pretrained(lab / "model")
    solution = "<context>A man smiles.</context><think>He is joking.</think><answer>A</answer>"
    (lab / "data.jsonl").write_text(
        "".join(
            json.dumps(
                {
                    "id": f"s{i}",
                    "problem": "What does the speaker intend?" + " Well?" * i,
                    "problem_type": "multiple choice",
                    "options": ["A. joke", "B. threat"],
                    "data_type": "text",
                    "solution": solution,
                }
            )
            + "\n"
            for i in range(8)
        )
    )
    base = {
        "model": str(lab / "model"),
        "data": [{"path": str(lab / "data.jsonl")}],
        "output_dir": str(lab / "out"),
        "max_steps": 4,
        "num_train_epochs": 1000,
        "learning_rate": 1e-3,
    }
    (lab / "sft.json").write_text(json.dumps(base | {"samples_per_step": 4}))
    (lab / "grpo.json").write_text(
        json.dumps(
            base
            | {
                "prompts_per_step": 2,
                "num_generations": 2,
                "num_iterations": 2,
                "max_completion_length": 6,
                "top_k": 0,
                "reward_weights": {"format": 1.0, "accuracy": 1.0, "context": 1.0},
                "judge": {"url": "http://stand-in"},
            }
        )
    )
    return lab


@pytest.fixture(scope="module")
def trained(lab):
    """What guard_runs.train leaves, and its (exit code, stdout, stderr)."""
    (lab / "c.json").write_text(json.dumps({"model": "", "output_dir": str(lab), "data": []}))
    return output(
        torchrun(
            2,
            "tests/support/guard_runs.py",
            "train",
            *(lab / f"{name}.json" for name in ("c", "sft", "grpo")),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    )


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


@pytest.mark.slow
def test_a_loss_that_is_nan_on_one_rank_skips_the_update_on_all(lab, trained):
    _, out, err = trained
    lines = metrics(lab / "plain")
    assert [line["guard/bad_steps"] for line in lines] == [0, 1, 1, 1], err[-3000:]
    assert [line["grad_norm"] is None for line in lines] == [False, True, False, False]
    assert all(tensor.isfinite().all() for tensor in load_file(lab / "plain" / "model" / "model.safetensors").values())
    said = [line for line in out.splitlines() if line.startswith("step 1: the loss of s")]
    assert len(said) == 2 and said[0] == said[1], said  # plain and stopped
    assert re.fullmatch(r"step 1: the loss of s\d is not finite; no update", said[0])


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_at_the_boundary_and_resume_goes_on(lab, trained):
    assert "SIGUSR1: stops after 2 of 4 steps; resume=auto goes on from there" in trained[1]
    assert f"resumed from {lab / 'stopped' / 'checkpoint-2'}" in trained[1]
    assert trained[1].count(f"model: {lab / 'stopped' / 'model'}") == 1  # the stopped run exports none
    assert metrics(lab / "stopped") == metrics(lab / "plain")
    a, b = (load_file(lab / name / "model" / "model.safetensors") for name in ("plain", "stopped"))
    assert all((a[key] == b[key]).all() for key in a)


@pytest.mark.slow
def test_more_bad_steps_than_allowed_end_the_run(lab, trained):
    assert trained[1].count("step 0: the loss of ") == 2  # both iterations of the first step
    for rank in (0, 1):
        assert f"rank {rank}: step 0: 2 updates skipped for a loss or gradient that is not finite" in trained[1]


@pytest.mark.slow
def test_of_two_ranks_one_hangs_and_fails_and_all_end(trained):
    assert_rank_1_hung_and_failed(trained[0], trained[2])


def test_max_hours_ends_a_single_process_with_code_0(lab):
    done = subprocess.run(
        [
            sys.executable,
            "train_sft.py",
            str(lab / "sft.json"),
            f"output_dir={lab / 'hours'}",
            "max_hours=0",
            "save_steps=3",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert done.returncode == 0 and "max_hours: stops after 1 of 4 steps" in done.stdout, done.stderr
    assert (lab / "hours" / "checkpoint-1" / "state.json").exists() and not (lab / "hours" / "model").exists()
