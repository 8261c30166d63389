"""Running the toy: its steps with the three scripts, what each step is told, and the scores that come out."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import urlsplit

from hov2.config import EvalConfig, GRPOConfig, SFTConfig
from hov2.distributed import world_size
from hov2.engine.checkpoint import set_aside
from hov2.engine.setup import check_shares
from hov2.evaluation.results import mean
from hov2.toy.rule_judge import RuleJudge
from hov2.toy.world import CONFIGS, MAIN_TYPES, QUESTIONS, ROOT, WORLD, build_world

STEPS = ("stage1", "filter_stage2", "stage2", "filter_stage3", "stage3", "eval")  # each a config in configs/toy
# Of the steps that train; the rest are evaluate.py's.
SCRIPTS = {"stage1": "train_sft.py", "stage2": "train_grpo.py", "stage3": "train_grpo.py"}
FILTERED = {"stage2": ROOT / "filter_stage2/kept.jsonl", "stage3": ROOT / "filter_stage3/kept.jsonl"}
SUMMARY = ROOT / "summary.json"
# Patterns of what `python -m hov2.toy` writes in ROOT, and of what configs/toy/eval*.json write there about its model.
# All else there is somebody's own.
WRITTEN = (WORLD.name, *STEPS[:-1], "eval", "eval_*", SUMMARY.name)
PROCESSES = 2
SCORES = ("accuracy", "format", "context")

QUICK_WORLD = {"train_clips": 128, "rl_clips": 32, "eval_clips": 32}
QUICK_STEPS = {"stage1": 60, "stage2": 4, "stage3": 3}
QUICK_NOTE = (
    "--quick: these figures show that everything runs, and nothing else; so short a training learns next to nothing"
)
CPU_NOTE = "(figures differ a little from one CPU to another)"

Settings = dict[str, Any]  # {a config's option: its value}


# ---------------------------------------------------------------------------------------------- what must be there


def prepare(config: SFTConfig | GRPOConfig | EvalConfig) -> None:
    """Make what a config of the toy's needs and doesn't find; do nothing for other configs. The scripts call it first.

    That is the world, the judge (in this process), and the model of an earlier stage or the questions that the
    difficulty filter left, by running that stage or that filter.
    """
    read = [Path(source.path) for source in config.data]
    benchmark_root = getattr(config, "benchmark_root", None)
    if benchmark_root:
        read.append(Path(benchmark_root))
    if not any(path.is_relative_to(ROOT) for path in read):
        return
    check_shares(config, world_size())  # before minutes go into an earlier stage

    if not (WORLD / "world.json").exists():
        print(f"the toy's world is not there: building it in {WORLD}", flush=True)
        build_world()

    if config.judge is not None and not _answers(config.judge.url):
        RuleJudge(urlsplit(config.judge.url).port)
        print(f"rule-based toy judge at {config.judge.url}", flush=True)

    made_by = {ROOT / stage / "model": stage for stage in SCRIPTS}
    for stage, path in FILTERED.items():
        made_by[path] = f"filter_{stage}"
    needed = [Path(config.model), *read]
    for path, step in made_by.items():
        if path in needed and not path.exists():
            print(f"{path} is not there: running {step} first", flush=True)
            run_script(step)


def _answers(url: str) -> bool:
    """Whether a server listens at the URL."""
    parts = urlsplit(url)
    with socket.socket() as probe:
        return probe.connect_ex((parts.hostname, parts.port)) == 0


def set_earlier_run_aside() -> None:
    """Move what an earlier `python -m hov2.toy` wrote, and evaluations of its model, to ROOT/earlier-N.

    All else in ROOT stays where it is.
    """
    set_aside(ROOT, WRITTEN)


# ---------------------------------------------------------------------------------------------- steps


def run_script(
    step: str, settings: Settings | None = None, processes: int = PROCESSES, output: TextIO | None = None
) -> None:
    """Run the script of a step with configs/toy/{step}.json and the settings; CalledProcessError if it fails.

    It runs on that many processes of one thread each; several run under torchrun. What is printed goes to the file
    `output`, if there is one. The step "senses" is "eval" with either sense alone as well.
    """
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    if step == "senses":
        command += ["evaluate.py", "--senses", str(CONFIGS / "eval.json")]
    else:
        command += [SCRIPTS.get(step, "evaluate.py"), str(CONFIGS / f"{step}.json")]
    for name, value in (settings or {}).items():
        command.append(f"{name}={json.dumps(value)}")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, stdout=output, stderr=output)


def settings_of(step: str, variant: dict[str, Settings], seed: int, quick: bool, judge_url: str) -> Settings:
    """Return the settings of a step in a run with `seed`; the `variant`, {step: settings}, has the last word."""
    settings: Settings = {"seed": seed}
    if step != "stage1":
        settings["judge.url"] = judge_url
    if quick and step in QUICK_STEPS:
        settings["max_steps"] = QUICK_STEPS[step]
    return settings | variant.get(step, {})


# ---------------------------------------------------------------------------------------------- scores


def read_predictions(path: Path) -> list[dict]:
    """Return the predictions of an evaluation."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def scores_of(predictions: list[dict]) -> dict[str, Any]:
    """Return accuracy, format and context score over the main types, and the accuracy of each problem type."""
    main = [prediction for prediction in predictions if prediction["problem_type"] in MAIN_TYPES]
    scores: dict[str, Any] = {"questions": len(main)}
    for name in SCORES:
        scores[name] = mean(prediction[name] for prediction in main)
    by_type = {}
    for kind in QUESTIONS:
        by_type[kind] = mean(p["accuracy"] for p in predictions if p["problem_type"] == kind)
    return scores | {"by_problem_type": by_type}


def notes_on_figures(quick: bool) -> list[str]:
    """Return the lines to print below a table of scores."""
    if quick:
        return [QUICK_NOTE, CPU_NOTE]
    return [CPU_NOTE]
