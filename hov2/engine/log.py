"""What a run writes down: metrics.jsonl, rollouts.jsonl, one console line a step, and TensorBoard or W&B if asked for.

Every line is one JSON object with a `step`. NaN and infinities become null, so that any JSON reader takes the files.
"""

import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from tqdm import tqdm

from hov2.config import ConfigError, TrainConfig
from hov2.distributed import WriteError, writing
from hov2.engine import guard
from hov2.rewards import REWARDS

# What the console line shows, in this order, of the metrics that a step has: (metric, heading, format).
CONSOLE = [
    ("loss", "loss", "8.4f"),
    ("reward", "reward", "6.3f"),
    *((f"rewards/{name}/mean", name, "5.2f") for name in REWARDS),
    ("kl", "kl", "8.5f"),
    ("completions/mean_length", "length", "6.1f"),
    ("grad_norm", "grad", "7.3f"),
    ("learning_rate", "lr", "8.2e"),
    ("eval/accuracy", "eval", "6.3f"),
]


class MetricsLog:
    """One line a step in `output_dir/metrics.jsonl`, on the console and in the trackers of `report_to`; rank 0 only.

    A run that starts at `start_step` keeps the earlier steps' lines and cuts off the rest (0: all of them), so that a
    resumed run's file equals an uninterrupted one's; `history` has the metrics of all its steps. Raises ConfigError for
    a tracker that isn't installed.
    """

    def __init__(
        self, output_dir: str | Path, rank: int, report_to: list[str], total_steps: int, start_step: int = 0
    ) -> None:
        self.total_steps = total_steps
        self.writes = rank == 0
        hidden = None if self.writes else True  # None: shown where there is a terminal
        self.bar = tqdm(total=total_steps, initial=start_step, unit="step", disable=hidden)
        self.history = []
        self.trackers = {}
        if self.writes:
            path = Path(output_dir) / "metrics.jsonl"
            self._file = _Lines(path, start_step)
            for line in path.read_text(encoding="utf-8").splitlines():
                self.history.append(json.loads(line))
            self.trackers = {name: _tracker(name, output_dir) for name in report_to}

    def write(self, step: int, metrics: dict) -> None:
        """Append `{"step": step, **metrics}`; values are numbers, one-element tensors or arrays, None or text."""
        if not self.writes:
            return
        metrics = _plain(metrics)
        self._file.write([{"step": step, **metrics}])
        self.history.append(metrics)
        numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
        self._track(step, numbers)
        tqdm.write(console_line(step, self.total_steps, numbers))
        self.bar.update(step + 1 - self.bar.n)

    def _track(self, step: int, numbers: dict[str, float]) -> None:
        """Pass the numbers on to the trackers. One that can't write, for a full disk, is done without from then on."""
        for name, tracker in list(self.trackers.items()):
            try:
                tracker(step, numbers)
            except OSError as error:
                tqdm.write(f"warning: report_to: {name} can't be written ({error}); the run goes on without it")
                del self.trackers[name]

    def close(self) -> None:
        """End the progress bar; raises WriteError for lines that could not be written."""
        self.bar.close()
        if self.writes:
            self._file.close()


class RolloutDump:
    """The file of rollouts: records, one JSON line each, in `output_dir/rollouts.jsonl`; only rank 0 writes.

    A record needs a `step`; the loop gathers those of the other ranks. Lines of `start_step` and later are cut off as
    in MetricsLog.
    """

    def __init__(self, output_dir: str | Path, rank: int, start_step: int = 0) -> None:
        self._file = None
        if rank == 0:
            self._file = _Lines(Path(output_dir) / "rollouts.jsonl", start_step)

    def write(self, records: list[dict]) -> None:
        """Append `records` (tensors in them become lists)."""
        if self._file is not None:
            self._file.write([_plain(record) for record in records])

    def close(self) -> None:
        """Raise WriteError for records that could not be written."""
        if self._file is not None:
            self._file.close()


class Timer:
    """The seconds of a step's named parts, added up: `with timer("rollout"): ...`, then `timer.pop()`.

    Wall time of this process; work that a GPU still has queued counts where it is waited for. The watch (guard.py)
    knows these parts as the run's phases.
    """

    def __init__(self) -> None:
        self._seconds = Counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time one block under `name`, added to earlier blocks of that name."""
        start = time.perf_counter()
        guard.heartbeat(name)
        try:
            with torch.profiler.record_function(name):
                yield
        finally:
            self._seconds[name] += time.perf_counter() - start
            guard.heartbeat(f"after {name}")

    def pop(self) -> dict[str, float]:
        """`{"time/<name>": seconds}` since the last pop."""
        seconds = self._seconds
        self._seconds = Counter()
        return {f"time/{name}": value for name, value in seconds.items()}


def traced(steps: Iterable[int], config: TrainConfig, rank: int) -> Iterator[int]:
    """Yield `steps`; those named in `config.profile_steps` run under torch.profiler.

    Each leaves `output_dir/trace-STEP-rankRANK.json`, with the timer's parts as named stretches, for chrome://tracing
    or Perfetto.
    """
    for step in steps:
        if step in config.profile_steps:
            with _profiler(f"{config.output_dir}/trace-{step}-rank{rank}.json"):
                yield step
        else:
            yield step


def _profiler(path: str) -> torch.profiler.profile:
    """A profiler of one block that writes what it saw to `path` when the block ends."""

    def write(profiler: torch.profiler.profile) -> None:
        profiler.export_chrome_trace(path)

    return torch.profiler.profile(on_trace_ready=write)


def console_line(step: int, total_steps: int, metrics: dict[str, float]) -> str:
    """`step 12/300 | reward  1.250 | ...`: the same columns for every step of a run, of equal width."""
    width = len(str(total_steps))
    cells = [f"step {step:>{width}}/{total_steps}"]
    for name, heading, form in CONSOLE:
        if name in metrics:
            cells.append(f"{heading} {metrics[name]:{form}}")
    return " | ".join(cells)


class _Lines:
    """A file of JSON lines, appended to; lines of `start_step` and later, and what follows them, are cut off.

    A line that is no JSON is the end of a write that was cut off; it goes too. Where the disk is full, the file keeps
    its whole lines, the others are kept here and tried again with the next ones, and the run is asked to stop.
    """

    def __init__(self, path: Path, start_step: int) -> None:
        self.path = path
        self.waiting = b""  # lines that could not be written yet
        self.size = 0  # of the whole lines in the file
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing(path):
            self.file = path.open("ab", buffering=0)
            with path.open("rb") as old:
                for line in old:
                    if _step(line) >= start_step:
                        break
                    self.size += len(line)
            os.truncate(path, self.size)

    def write(self, records: list[dict]) -> None:
        """Append `records` at once."""
        lines = "".join(_line(record) for record in records)
        self.waiting += lines.encode()
        try:
            self._write_waiting()
        except WriteError as error:
            guard.ask_to_stop(str(error))

    def close(self) -> None:
        """Close the file; raises WriteError if there are lines that it lacks."""
        self._write_waiting()
        with writing(self.path):
            self.file.close()

    def _write_waiting(self) -> None:
        """Write what waits, whole or not at all."""
        rest = self.waiting
        try:
            with writing(self.path):
                while rest:
                    rest = rest[self.file.write(rest) :]
        except WriteError:
            with suppress(OSError):
                os.truncate(self.path, self.size)
            raise
        self.size += len(self.waiting)
        self.waiting = b""


def _step(line: bytes) -> float:
    """The step that a line is of; infinite for a line that is no JSON."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf


def _line(record: dict) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: object) -> object:
    """`value` as JSON takes it: tensors and arrays to numbers or lists, NaN and infinities to None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# --- trackers: what passes a step's number and metrics on, a function of both -----------------------------------------


def _tracker(name: str, output_dir: str | Path) -> Callable[[int, dict[str, float]], None]:
    """The tracker called `name`; ConfigError if it isn't installed."""
    make_tracker = {"tensorboard": _tensorboard, "wandb": _wandb}[name]
    try:
        return make_tracker(Path(output_dir))
    except ImportError:
        raise ConfigError(f"report_to: {name} is not installed (pip install {name})") from None


def _tensorboard(output_dir: Path) -> Callable[[int, dict[str, float]], None]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(output_dir / "tensorboard"))

    def track(step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)

    return track


def _wandb(output_dir: Path) -> Callable[[int, dict[str, float]], None]:
    import wandb

    run = wandb.init(project="hov2", name=output_dir.name, dir=str(output_dir))

    def track(step: int, metrics: dict[str, float]) -> None:
        run.log(metrics, step=step)

    return track
