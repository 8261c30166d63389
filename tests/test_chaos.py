"""Killed at any moment and resumed, a run ends with the very numbers and weights of one that was left alone.

SIGKILL goes to torchrun and all that it started, during rollouts, during updates and while a checkpoint is written.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from hov2 import toy
from tests.support.helpers import tiny_thinker, tiny_tokenizer
from tests.test_training import write_data

ROOT = Path(__file__).resolve().parent.parent
MOMENTS = ("rollout", "update", "writing")
LIMIT = 600  # seconds for one launch; reached only by one that hangs

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds torchrun's workers in /proc")


@dataclass
class Lab:
    """Runs of one config in one folder, each on two processes."""

    folder: Path
    config: str
    overrides: tuple = ()

    def launch(self, name, *overrides, kill=None):
        """Starts or goes on with the run `name`; with `kill` (moment, number, delay), kills it `delay` seconds after the
        `number`th such moment of this launch. Returns whether it ended by itself, without an error."""
        phases, log = self.folder / f"{name}.phases", self.folder / f"{name}.log"
        phases.write_text("")
        command = [
            *torchrun(),
            str(ROOT / "tests" / "support" / "chaos_run.py"),
            self.config,
            f"output_dir={self.folder / name}",
            "resume=auto",
            *self.overrides,
            *overrides,
        ]
        with log.open("a") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment(HOV2_PHASES=str(phases)), stdout=output, stderr=subprocess.STDOUT
            )
        try:
            if kill and self.reaches(process, name, phases, *kill[:2]):
                time.sleep(kill[2])
            else:
                process.wait(LIMIT)
            if ended := process.poll() is not None:
                assert process.returncode == 0, log.read_text()[-6000:]
        finally:
            kill_tree(process)
        return ended

    def reaches(self, process, name, phases, moment, number):
        """Waits for the moment; False if the run ends first."""
        seen, deadline = set(), time.monotonic() + LIMIT
        while process.poll() is None and time.monotonic() < deadline:
            if moment == "writing":
                seen |= {path.name for path in (self.folder / name).glob("checkpoint-*.unfinished")}
            else:
                seen = range(phases.read_text().split().count(moment))
            if len(seen) >= number:
                return True
            time.sleep(0.002)
        return False

    def outcome(self, name):
        """What has to be the same, bit by bit: the metrics without what the clock decides, every token, all weights."""
        lines = [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]
        metrics = [
            {key: value for key, value in line.items() if not key.startswith("time/") and key != "judge/latency"}
            for line in lines
        ]
        return metrics, *(
            (self.folder / name / file).read_bytes() for file in ("rollouts.jsonl", "model/model.safetensors")
        )


def torchrun():
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def environment(**more):
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | more


def kill_tree(process):
    """SIGKILL to a process and all its descendants (torchrun's workers lead sessions of their own); waits for the end."""
    tree, parents = [process.pid], {pid: fields[1] for pid, fields in processes()}
    for pid in tree:
        tree += [child for child, parent in parents.items() if int(parent) == pid]
    for pid in tree:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.wait()
    while any(pid in tree and fields[0] != "Z" for pid, fields in processes()):
        time.sleep(0.01)


def processes():
    """(process id, [state, parent, ...]) of every process."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            yield int(stat.parent.name), stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny random model on a few clips, and its uninterrupted run of 3 steps of 2 iterations."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_thinker().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    write_data(folder)
    config = {
        "model": str(folder / "model"),
        "data": [{"path": str(folder / "data.jsonl")}],
        "output_dir": "",
        "max_steps": 3,
        "num_train_epochs": 2,
        "learning_rate": 1e-4,
        "media": {"fps": 4, "max_frames": 4},
        "prompts_per_step": 4,
        "num_generations": 4,
        "num_iterations": 2,
        "max_completion_length": 10,
        "top_k": 0,
        "reward_weights": {"format": 1.0, "accuracy": 1.0, "context": 1.0},
        "judge": {"url": "http://stand-in"},
        "save_steps": 1,
        "keep_last": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    lab = Lab(folder, str(folder / "config.json"))
    assert lab.launch("whole")
    return lab


@pytest.mark.slow  # a minute; .ci/run runs it
def test_killed_twice_and_resumed(tiny):
    metrics, *_ = whole = tiny.outcome("whole")
    assert len(metrics) == 3 and all(line["loss"] and line["grad_norm"] for line in metrics)
    assert not tiny.launch("killed", kill=("update", 2, 0.05))  # step 1
    assert not tiny.launch("killed", kill=("writing", 1, 0.0))  # after step 2
    assert list((tiny.folder / "killed").glob("checkpoint-*.unfinished")), "killed too late"
    assert tiny.launch("killed")
    assert tiny.outcome("killed") == whole
    resumed = [line for line in (tiny.folder / "killed.log").read_text().splitlines() if "resumed from" in line]
    assert len(resumed) == 2 and all("checkpoint-1;" in line for line in resumed)
    found = sorted(path.name for path in (tiny.folder / "killed").glob("checkpoint-*"))
    assert found == ["checkpoint-2", "checkpoint-3"]


@pytest.fixture(scope="module")
def toy_lab(tmp_path_factory):
    """A smaller world of the toy, a short stage 1 in it, the judge, and the uninterrupted 12 steps of stage 2."""
    folder = tmp_path_factory.mktemp("toy")
    world = folder / "world"
    toy.build_world(world, train_clips=64, rl_clips=48, eval_clips=16, sft_samples=60 * 32)
    command = [
        *torchrun(),
        "train_sft.py",
        "configs/toy/stage1.json",
        f"model={world / 'model'}",
        "max_steps=60",
        f"data={json.dumps([{'path': str(world / 'train_sft.json')}])}",
        f"output_dir={folder / 'stage1'}",
    ]
    subprocess.run(command, cwd=ROOT, env=environment(), check=True)
    with toy.RuleJudge() as judge:
        rl = json.dumps([{"path": str(world / "train_rl.json"), "slice": "first:50%"}])
        lab = Lab(
            folder,
            "configs/toy/stage2.json",
            (
                f"model={folder / 'stage1' / 'model'}",
                f"data={rl}",
                f"judge.url={judge.url}",
                "max_steps=12",
                "keep_last=2",
            ),
        )
        assert lab.launch("whole")
        yield lab


@pytest.mark.slow
def test_twenty_runs_of_the_toys_second_stage(toy_lab, capsys):
    metrics, *_ = whole = toy_lab.outcome("whole")
    lines = [json.loads(line) for line in (toy_lab.folder / "whole" / "metrics.jsonl").read_text().splitlines()]
    seconds = {moment: sum(line.get(f"time/{moment}", 0) for line in lines) / 12 for moment in MOMENTS}
    assert len(metrics) == 12 and all(line["loss"] and line["grad_norm"] for line in metrics)
    same, killed = 0, dict.fromkeys((*MOMENTS, "just after writing"), 0)
    for number in range(20):
        rng, name, launches = random.Random(number), f"run-{number}", 0
        save_steps, kills, said = 1 + number % 3, 1 + number % 2, []
        while True:
            kill = None
            if launches < kills:
                moment = MOMENTS[(number + launches) % 3]
                at = rng.randrange(1, (12 // save_steps if moment == "writing" else 12) // (1 + launches) + 1)
                kill = (moment, at, rng.uniform(0, seconds[moment] or 0.05))
            launches += 1
            if toy_lab.launch(name, f"save_steps={save_steps}", kill=kill):
                break
            wrote = any((toy_lab.folder / name).glob("checkpoint-*.unfinished"))
            killed["writing" if wrote else "just after writing" if kill[0] == "writing" else kill[0]] += 1
            said.append(f"{kill[0]} {kill[1]} + {kill[2]:.3f} s" + " (while writing)" * wrote)
        equal = toy_lab.outcome(name) == whole
        same += equal
        with capsys.disabled():
            print(
                f"\nrun {number}: save_steps {save_steps}, killed at {', '.join(said)}: "
                f"{'identical' if equal else 'DIFFERENT'}",
                end="",
                flush=True,
            )
    with capsys.disabled():
        print(f"\n{same} of 20 identical; killed {killed}", flush=True)
    assert same == 20 and min(killed[moment] for moment in MOMENTS) >= 3
