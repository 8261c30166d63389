"""What a run writes down: metrics.jsonl, rollouts.jsonl, one console line a step, and TensorBoard or W&B if asked for.

Every line is one JSON object with a `step`. NaN and infinities become null, so that any JSON reader takes the files.
"""

import itertools
import json
import math
import os
import time
from collections import Counter
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from tqdm import tqdm

from hov2.config import REWARDS, ConfigError
from hov2.engine import guard

# What the console line shows, in this order, of the metrics that a step has: (metric, heading, format).
CONSOLE = [("loss", "loss", "8.4f"), ("reward", "reward", "6.3f"),
           *((f"rewards/{name}/mean", name, "5.2f") for name in REWARDS), ("kl", "kl", "8.5f"),
           ("completions/mean_length", "length", "6.1f"), ("grad_norm", "grad", "7.3f"),
           ("learning_rate", "lr", "8.2e"), ("eval/accuracy", "eval", "6.3f")]


class MetricsLog:
    """One line a step in `output_dir/metrics.jsonl`, on the console and in the trackers of `report_to`; rank 0 only.

    A run that starts at `start_step` keeps the earlier steps' lines and cuts off the rest (0: all of them), so that a
    resumed run's file equals an uninterrupted one's; `history` has the metrics of all its steps. Raises ConfigError for
    a tracker that isn't installed.
    """

    def __init__(self, output_dir, rank, report_to, total_steps, start_step=0):
        self.total_steps, self.writes = total_steps, rank == 0
        self.bar = tqdm(total=total_steps, initial=start_step, unit="step", disable=None if self.writes else True)
        self.trackers, self.history = [], []
        if self.writes:
            path = Path(output_dir) / "metrics.jsonl"
            self._file = _open_from(path, start_step)
            self.history += map(json.loads, path.read_text(encoding="utf-8").splitlines())
            self.trackers = [_tracker(name, output_dir) for name in report_to]

    def write(self, step, metrics):
        """Appends `{"step": step, **metrics}`; values are numbers, one-element tensors or arrays, None or text."""
        if not self.writes:
            return
        metrics = _plain(metrics)
        self._file.write(_line({"step": step, **metrics}))
        self.history.append(metrics)
        numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
        for tracker in self.trackers:
            tracker(step, numbers)
        tqdm.write(console_line(step, self.total_steps, numbers))
        self.bar.update(step + 1 - self.bar.n)

    def close(self):
        """Ends the progress bar."""
        self.bar.close()


class RolloutDump:
    """Appends records, one JSON line each, to `output_dir/rollouts.jsonl`; only rank 0 writes.

    A record needs a `step`; the loop gathers those of the other ranks. Lines of `start_step` and later are cut off as
    in MetricsLog.
    """

    def __init__(self, output_dir, rank, start_step=0):
        self._file = _open_from(Path(output_dir) / "rollouts.jsonl", start_step) if rank == 0 else None

    def write(self, records):
        """Writes `records`, a list of dicts (tensors in them become lists)."""
        if self._file is not None:
            self._file.writelines(_line(_plain(record)) for record in records)  # each is flushed


class Timer:
    """Adds up the seconds of named parts of a step: `with timer("rollout"): ...`, then `timer.pop()`.

    Wall time of this process; work that a GPU still has queued counts where it is waited for. The watch (guard.py)
    knows these parts as the run's phases.
    """

    def __init__(self):
        self._seconds = Counter()

    @contextmanager
    def __call__(self, name):
        """Times one block under `name`, added to earlier blocks of that name."""
        start = time.perf_counter()
        guard.heartbeat(name)
        try:
            with torch.profiler.record_function(name):
                yield
        finally:
            self._seconds[name] += time.perf_counter() - start
            guard.heartbeat(f"after {name}")

    def pop(self):
        """`{"time/<name>": seconds}` since the last pop."""
        seconds, self._seconds = self._seconds, Counter()
        return {f"time/{name}": value for name, value in seconds.items()}


def traced(steps, config, rank):
    """Yields `steps`; those named in `config.profile_steps` run under torch.profiler.

    Each leaves `output_dir/trace-STEP-rankRANK.json`, with the timer's parts as named stretches, for chrome://tracing
    or Perfetto.
    """
    for step in steps:
        path = f"{config.output_dir}/trace-{step}-rank{rank}.json"
        with (torch.profiler.profile(on_trace_ready=lambda profiler, path=path: profiler.export_chrome_trace(path))
              if step in config.profile_steps else nullcontext()):
            yield step


def console_line(step, total_steps, metrics):
    """`step 12/300 | reward  1.250 | ...`: the same columns for every step of a run, of equal width."""
    cells = [f"{heading} {metrics[name]:{form}}" for name, heading, form in CONSOLE if name in metrics]
    return " | ".join([f"step {step:>{len(str(total_steps))}}/{total_steps}", *cells])


def _open_from(path, start_step):
    """`path` opened for appending (flushed at each line), cut off at the first line of `start_step` or later.

    A line that is no JSON is the end of a write that was cut off; it goes too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    with path.open("rb") as old:
        kept = itertools.takewhile(lambda line: _step(line) < start_step, old)
        os.truncate(path, sum(map(len, kept)))
    return path.open("a", encoding="utf-8", buffering=1)


def _step(line):
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf


def _line(record):
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value):
    """`value` as JSON takes it: tensors and arrays to numbers or lists, NaN and infinities to None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _tracker(name, output_dir):
    """What passes a step's number and metrics on to TensorBoard or W&B, a function of both."""
    try:
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(Path(output_dir) / "tensorboard"))
            return lambda step, metrics: [writer.add_scalar(*metric, step) for metric in metrics.items()]
        import wandb
    except ImportError:
        raise ConfigError(f"report_to: {name} is not installed (pip install {name})") from None
    run = wandb.init(project="hov2", name=Path(output_dir).name, dir=str(output_dir))
    return lambda step, metrics: run.log(metrics, step=step)
