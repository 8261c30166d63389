"""What watches over a run: signals and deadlines, hung or failed ranks, losses that are not finite, signs of collapse.

A thread on each rank looks every second whether another rank has failed, and whether this one hangs. It reaches the
others through the process group's store, which answers while the main thread waits in a collective. Whether a step
counts, and whether it is the last, all ranks decide together in the main thread.
"""

import atexit
import contextlib
import functools
import itertools
import json
import math
import os
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from types import FrameType
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from hov2.config import AlarmConfig, TrainConfig
from hov2.distributed import gather_objects, print0, rank, store, world_size

BEGAN = time.monotonic()  # this process did, or nearly so
GRACE = 3.0  # seconds after which a rank follows one that failed: torchrun has seen that one first, and names it
WINDOW = 20  # steps that a sign of collapse is a mean of
REPORTED_RANKS = 8  # of those that hang, the ones that have been where they are for longest
# keys in the store
FAILED = "hov2/failed"  # which rank failed first
PLACE = "hov2/place/"  # + rank: its Place, and its number


class Place(NamedTuple):
    """Where a rank is in its run, and since when; replaced as a whole, as two threads use it."""

    since: float  # time.time()
    step: int
    phase: str


_asked: list[str] = []  # why this rank wants the run to end
_over = threading.Event()  # this rank has ended, or says by itself why it fails
_place = Place(time.time(), 0, "start")


# --- ranks that hang, ranks that fail ---------------------------------------------------------------------------------


def heartbeat(phase: str, step: int | None = None) -> None:
    """Record this rank's current phase, and its step (None: the same as before).

    Whoever waits for something that may rightly take longer than `hang_minutes` calls this again and again.
    """
    global _place
    if step is None:
        step = _place.step
    _place = Place(time.time(), step, phase)


@functools.cache
def watch(hang_minutes: float) -> None:
    """Start this rank's watch, once in a process; needs the process group. With `hang_minutes` 0, hangs aren't said."""
    own_connection = store().clone()
    thread = threading.Thread(target=_watch, args=(own_connection, hang_minutes), daemon=True)
    thread.start()
    atexit.register(thread.join, GRACE)  # a thread inside the store's code would take the process down as Python ends
    atexit.register(_over.set)  # runs first


def _watch(others: dist.Store, hang_minutes: float) -> None:
    """Tell the others where this rank is, report a hang, and end this process soon after another rank has failed."""
    known = None  # the last Place that the others were told
    reported = None  # the last Place that was reported as a hang
    with contextlib.suppress(RuntimeError):  # the store is gone, and with it the node of rank 0
        while not _over.wait(1.0) and not others.check([FAILED]):
            if known is not _place:
                known = _place
                others.set(f"{PLACE}{rank()}", json.dumps([*known, rank()]))
            too_long = time.time() - known.since > 60 * hang_minutes
            if hang_minutes and too_long and reported is not known:
                reported = known
                _report_hang(others)
    if not _over.wait(GRACE):
        os._exit(1)  # quietly: the rank that failed says why, and a collective without it never ends


def _report_hang(others: dist.Store) -> None:
    """Print where the ranks are, the longest there first.

    That rank prints it, with its stack, and so does rank 0, in case that rank is dead.
    """
    places = []
    for number in range(world_size()):
        key = f"{PLACE}{number}"
        if others.check([key]):
            places.append(json.loads(others.get(key)))
    longest = sorted(places)[:REPORTED_RANKS]
    lines = []
    for since, step, phase, number in longest:
        minutes = (time.time() - since) / 60
        lines.append(f"rank {number} has been in '{phase}' for {minutes:.0f} min (step {step})")
    first_stuck = longest[0][-1]
    if rank() == first_stuck:
        main_frame = sys._current_frames()[threading.main_thread().ident]
        lines.append("".join(traceback.format_stack(main_frame)).rstrip())
    if rank() in (0, first_stuck):
        print("\n".join(lines), file=sys.stderr, flush=True)


def first_to_fail(error: BaseException) -> bool:
    """Whether this rank is the first that fails, and should say so; the watches of the others then end them quietly.

    The first one's error is also written to where torchrun looks for it: its summary then ends with it.
    """
    _over.set()
    first = True
    joined = dist.is_initialized()
    if joined:
        own_number = str(rank())
        with contextlib.suppress(RuntimeError):  # the store is gone
            first = store().compare_set(FAILED, "", own_number) == own_number.encode()
    said_by_rank_0 = not joined and rank() != 0  # before there is a group, rank 0 most likely says the same
    if not first or said_by_rank_0:
        time.sleep(GRACE)  # torchrun ends this process meanwhile
    if first:
        get_error_handler().record_exception(error.with_traceback(None))
    return first


# --- where a run ends, updates that don't count -----------------------------------------------------------------------


def out_of_time(elapsed: float, longest_step: float, max_hours: float | None) -> bool:
    """Whether another step may end after the deadline of `max_hours` (None: there is none); the rest in seconds."""
    return max_hours is not None and elapsed + longest_step > 3600 * max_hours


def ask_to_stop(reason: str) -> None:
    """Have the loop save and end after the current step, as a signal to this rank would."""
    _asked.append(reason)


class Guard:
    """A training loop's guard.

    SIGTERM and SIGUSR1 no longer kill the process; the loop stops after the current step. `history`, a list of the
    steps' metrics, grows with the log; it is empty on all ranks but 0, who speaks for all.
    """

    def __init__(self, config: TrainConfig, first_step: int, history: list[dict]) -> None:
        self.config = config
        self.history = history
        bad_steps_before = history[-1].get("guard/bad_steps", 0) if history else 0
        self.bad_steps = gather_objects(bad_steps_before)[0]
        self._losses = []  # of the backward passes since the last update
        self._said = set()  # metrics whose sign of collapse was said
        self._signal = None  # the name of the signal that came
        self._longest_step = 0.0  # seconds
        self._step_began = time.monotonic()
        heartbeat("start", first_step)
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number).name

    def stop_due(self, steps_done: int, steps: int) -> bool:
        """Whether to save and end after `steps_done` of `steps`: a signal to any rank, or the deadline is near.

        All ranks call it at a step's end, and get the same answer.
        """
        now = time.monotonic()
        self._longest_step = max(self._longest_step, now - self._step_began)
        self._step_began = now
        own_reason = _asked[0] if _asked else self._signal
        if own_reason is None and out_of_time(now - BEGAN, self._longest_step, self.config.max_hours):
            own_reason = "max_hours"
        reasons = []
        if steps_done < steps:
            reasons = [reason for reason in gather_objects(own_reason) if reason is not None]
        if reasons:
            print0(f"{reasons[0]}: stops after {steps_done} of {steps} steps; resume=auto goes on from there")
        heartbeat("checkpoint", steps_done)
        return bool(reasons)

    def note_loss(self, loss: Tensor) -> Tensor:
        """Note the `loss` of a backward pass that comes next, and return the loss to call `backward()` on.

        That is the same one, but if it is not finite, all gradients become NaN, also where the loss's own would be
        finite, and so does their norm, on every rank: the reduction of the gradients carries the NaN, so that no rank
        asks another for it or waits for its own device. `check_update` then names the samples of such a loss.
        """
        self._losses.append(loss.detach())
        nan_if_not_finite = torch.ones_like(loss).masked_fill(~loss.isfinite(), math.nan)
        return loss * nan_if_not_finite

    def check_update(self, step: int, norm: float, ids: list[list[str]]) -> None:
        """After an update: count one that was skipped and name its samples; all ranks call it.

        `norm` is the gradient's; `ids` has a list of samples for each of this rank's backward passes. Raises
        FloatingPointError for more than `max_bad_steps` skipped updates.
        """
        losses = self._losses
        self._losses = []
        if math.isfinite(norm):
            return
        self.bad_steps += 1
        bad_samples = []
        for loss, batch_ids in zip(losses, ids):
            if not loss.isfinite():
                bad_samples.extend(batch_ids)
        bad = _of_all_ranks(bad_samples)
        drawn = _of_all_ranks(list(itertools.chain.from_iterable(ids)))
        what = "loss" if bad else "gradient"
        print0(f"step {step}: the {what} of {', '.join(bad or drawn)} is not finite; no update")
        if self.bad_steps > self.config.max_bad_steps:
            raise FloatingPointError(
                f"step {step}: {self.bad_steps} updates skipped for a loss or gradient that is "
                f"not finite, more than max_bad_steps={self.config.max_bad_steps}"
            )

    def look_for_collapse(self) -> None:
        """Say each sign of collapse once, in words."""
        for metric, sentence in signs_of_collapse(self.history, self.config.alarms).items():
            if metric not in self._said:
                print0(f"warning: {sentence}")
                self._said.add(metric)


def _of_all_ranks(names: list[str]) -> list[str]:
    """The `names` that the ranks give, in rank order, each once; the same on every rank."""
    names_of_ranks = itertools.chain.from_iterable(gather_objects(names))
    return list(dict.fromkeys(names_of_ranks))


# --- signs of collapse ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sign:
    """A metric's limit, by its key in AlarmConfig, and what it usually means to be beyond it and what to look at."""

    alarm: str
    meaning: str


SIGNS = {
    "rewards/format/mean": Sign("format_drop", "completions lose their blocks: too high a learning_rate, or cut off?"),
    "frac_reward_zero_std": Sign(
        "zero_std", "equal rewards teach nothing: data too easy, too hard, completions alike?"
    ),
    "kl": Sign("kl", "the policy is far from the stage's first model: learning_rate too high, beta too low?"),
    "completions/clipped_ratio": Sign(
        "clipped", "completions are cut off: repetitions, or max_completion_length too low?"
    ),
}


def signs_of_collapse(history: list[dict], alarms: AlarmConfig) -> dict[str, str]:
    """{metric: sentence} for each sign that the mean of the last WINDOW steps shows; a pure function.

    `history` has the steps' metrics, {name: number or None}; steps that don't have a metric are left out of its means.
    Most metrics alarm by what they are now, the format reward by how far it fell from its highest mean.
    """
    found = {}
    for metric, sign in SIGNS.items():
        limit = getattr(alarms, sign.alarm)
        values = [metrics[metric] for metrics in history if metrics.get(metric) is not None]
        if limit is None or len(values) < WINDOW:
            continue
        means = []
        for end in range(WINDOW, len(values) + 1):
            means.append(sum(values[end - WINDOW : end]) / WINDOW)
        now = means[-1]
        if sign.alarm == "format_drop":
            before = max(means)
            measured = before - now
        else:
            before = means[0]
            measured = now
        if measured > limit:
            found[metric] = (
                f"{metric} went from {before:.3g} to {now:.3g} (means of {WINDOW} steps, "
                f"alarms.{sign.alarm}={limit:g}); {sign.meaning} See rollouts.jsonl"
            )
    return found
