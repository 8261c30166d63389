"""What the benchmarks share: a clock of CPU seconds, memory, a process for each way, tables."""

import itertools
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # hov2 isn't installed, it is used from where it stands

import torch

# ---- Measuring -------------------------------------------------------------------------------------------------------


class Clock:
    """CPU and wall seconds of named phases; an inner phase's time isn't the outer's.

    `with clock("decode"): ...`; results in `clock.cpu` and `clock.wall`, {name: seconds}. CPU seconds are the whole
    process's, all threads.
    """

    def __init__(self):
        self.cpu, self.wall, self.phases = defaultdict(float), defaultdict(float), []

    @contextmanager
    def __call__(self, name):
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def enter(self, name):
        """Begins a phase, within the present one if there is one."""
        self._charge()
        self.phases.append(name)

    def leave(self, *_):
        """Ends the innermost phase."""
        self._charge()
        self.phases.pop()

    def _charge(self):
        now = time.process_time(), time.perf_counter()
        if self.phases:
            self.cpu[self.phases[-1]] += now[0] - self._last[0]
            self.wall[self.phases[-1]] += now[1] - self._last[1]
        self._last = now


class Memory:
    """Resident memory of this process, in MiB; None where the system isn't Linux."""

    def __init__(self):
        self.known = os.path.exists("/proc/self/clear_refs")
        self.start = self._read("VmRSS")

    def reset_peak(self):
        """Forgets the highest value so far."""
        if self.known:
            Path("/proc/self/clear_refs").write_text("5")

    def growth(self):
        """How far the peak since `reset_peak` lies above the memory when this object was made."""
        return self._read("VmHWM") - self.start if self.known else None

    def _read(self, name):
        if not self.known:
            return None
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
        return int(line.split()[1]) / 1024


class Workers:
    """One process for each way, alive for the whole run, so that no way inherits another's memory.

    `setup(*args)` is called once in each; `call(way, function, *args)` runs a function there and waits for it.
    """

    def __init__(self, ways, threads, setup, *args):
        self.pools = {
            way: ProcessPoolExecutor(1, get_context("spawn"), _start, (threads, setup, way, *args)) for way in ways
        }

    def call(self, way, function, *args):
        """The function's result; its arguments and result are pickled."""
        return self.pools[way].submit(function, *args).result()

    def close(self):
        """Ends the processes."""
        for pool in self.pools.values():
            pool.shutdown()


def _start(threads, setup, *args):
    torch.set_num_threads(threads)
    setup(*args)


def interleaved(ways, repeats):
    """(repetition, way) in an order that spreads a slow minute of the machine over all ways."""
    return itertools.product(range(repeats), ways)


def median(values):
    """The median of the values; None if one is None (not measured)."""
    return None if None in values else statistics.median(values)


# ---- Printing --------------------------------------------------------------------------------------------------------


def print_table(header, rows):
    """A Markdown table; numbers get three significant digits, None a dash."""
    cells = [header, *[[_text(value) for value in row] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))] for row in cells
    ]
    lines.insert(1, ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)])
    print("\n".join("| " + " | ".join(line) + " |" for line in lines), flush=True)


def _text(value):
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def write_json(path, result):
    """Writes the result to a file; nothing without a path."""
    if path:
        Path(path).write_text(json.dumps(result, indent=1), encoding="utf-8")


def machine():
    """One line on what the figures were measured on."""
    return (
        f"torch {torch.__version__}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end (1 minute's mean)"
    )


def parse(parser, argv=None):
    """The command line, with the options that scripts have in common."""
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args(argv)
