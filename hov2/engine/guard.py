"""What watches over a run: signals and the deadline, ranks that fail or hang, losses that are no number, collapse.

A thread on each rank looks every second whether another rank has failed, and whether this one hangs. It reaches the
others through the process group's store, which answers while the main thread waits in a collective. What decides
whether a step counts, or is the last, all ranks decide together in the main thread.
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

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from hov2.distributed import gather_objects, print0, rank, store, world_size

BEGAN = time.monotonic()  # this process did, or nearly so
GRACE = 3.0  # seconds after which a rank follows one that failed: torchrun has seen that one first, and names it
WINDOW = 20  # steps that a sign of collapse is a mean of
FAILED, PLACE = "hov2/failed", "hov2/place/"  # keys in the store: who failed first; where each rank is

_over = threading.Event()  # this rank has ended, or says by itself why it fails
_place = (time.time(), 0, "start")  # since when (seconds), step, phase; replaced as a whole


# --- ranks that hang, ranks that fail ---------------------------------------------------------------------------------


def heartbeat(phase, step=None):
    """Notes what this rank does from now on, in step number `step` (None: still the same).

    Whoever waits for something that may rightly take longer than `hang_minutes` calls this again and again.
    """
    global _place
    _place = (time.time(), _place[1] if step is None else step, phase)


@functools.cache
def watch(hang_minutes):
    """Starts this rank's watch, once in a process; needs the process group. `hang_minutes` 0: hangs aren't said."""
    thread = threading.Thread(target=_watch, args=(store().clone(), hang_minutes), daemon=True)  # own connection
    thread.start()
    atexit.register(thread.join, GRACE)  # a thread inside the store's code would take the process down as Python ends
    atexit.register(_over.set)  # runs first


def _watch(others, hang_minutes):
    known = reported = None
    with contextlib.suppress(RuntimeError):  # the store is gone, and with it the node of rank 0
        while not _over.wait(1.0) and not others.check([FAILED]):
            if known is not _place:
                known = _place
                others.set(f"{PLACE}{rank()}", json.dumps([*known, rank()]))
            if hang_minutes and reported is not known and time.time() - known[0] > 60 * hang_minutes:
                reported = known
                _report_hang(others)
    if not _over.wait(GRACE):
        os._exit(1)  # quietly: the rank that failed says why, and a collective without it never ends


def _report_hang(others):
    """Says who is where, the longest first: on that rank, with its stack, and on rank 0, as that one may be dead."""
    keys = [key for key in (f"{PLACE}{r}" for r in range(world_size())) if others.check([key])]
    places = sorted(json.loads(others.get(key)) for key in keys)[:8]
    lines = [f"rank {r} has been in '{phase}' for {(time.time() - since) / 60:.0f} min (step {step})"
             for since, step, phase, r in places]
    if rank() == places[0][-1]:
        lines += "".join(traceback.format_stack(sys._current_frames()[threading.main_thread().ident])).splitlines()
    if rank() in (0, places[0][-1]):
        print("\n".join(lines), file=sys.stderr, flush=True)


def first_to_fail(error):
    """Whether this rank is the first that fails, and should say so; the watches of the others then end them quietly.

    The first one's error is also written to where torchrun looks for it: its summary then ends with it.
    """
    _over.set()
    first, joined, me = True, dist.is_initialized(), str(rank())
    if joined:
        with contextlib.suppress(RuntimeError):  # the store is gone
            first = store().compare_set(FAILED, "", me) == me.encode()
    if not first or (not joined and rank()):  # before there is a group, rank 0 most likely says the same
        time.sleep(GRACE)  # torchrun ends this process meanwhile
    if first:
        get_error_handler().record_exception(error.with_traceback(None))
    return first


# --- where a run ends, updates that don't count -----------------------------------------------------------------------


def out_of_time(elapsed, longest_step, max_hours):
    """Whether another step may end after the deadline; seconds, and hours (None: no deadline)."""
    return max_hours is not None and elapsed + longest_step > 3600 * max_hours


class Guard:
    """A training loop's guard. SIGTERM and SIGUSR1 end the process no more; the next step's boundary heeds them.

    `history`, a list of the steps' metrics, grows with the log; it is empty on all ranks but 0, who speaks for all.
    """

    def __init__(self, config, first_step, history):
        self.config, self.history, self._losses, self._said = config, history, [], set()
        self.bad_steps = gather_objects(history[-1].get("guard/bad_steps", 0) if history else 0)[0]
        self._signal, self._longest, self._boundary = None, 0.0, time.monotonic()
        heartbeat("start", first_step)
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._heed)

    def _heed(self, number, frame):
        self._signal = signal.Signals(number).name

    def stop_due(self, steps_done, steps):
        """Whether to save and end after `steps_done` of `steps`: a signal to any rank, or the deadline is near.

        All ranks call it at a step's end, and get the same answer.
        """
        now = time.monotonic()
        self._longest, self._boundary = max(self._longest, now - self._boundary), now
        late = out_of_time(now - BEGAN, self._longest, self.config.max_hours) and "max_hours"
        reasons = [*filter(None, gather_objects(self._signal or late))] if steps_done < steps else []
        print0(reasons and f"{reasons[0]}: stops after {steps_done} of {steps} steps; resume=auto goes on from there")
        heartbeat("checkpoint", steps_done)
        return bool(reasons)

    def backward(self, loss):
        """`loss.backward()`; a loss that is not finite makes all gradients NaN, and their norm, on every rank.

        No rank asks another for it or waits for its own device: the reduction of the gradients carries the NaN.
        """
        loss.backward((1 + 0 * loss).detach())
        self._losses.append(loss.detach())

    def check_update(self, step, norm, ids):
        """After `optim.update`: counts an update that was skipped and names its samples; all ranks call it.

        `norm` is the gradient's; `ids` has a list of samples for each of this rank's backward passes. Raises
        FloatingPointError for more than `max_bad_steps` skipped updates.
        """
        losses, self._losses = self._losses, []
        if math.isfinite(norm):
            return
        self.bad_steps += 1
        mine = [name for loss, batch in zip(losses, ids) if not loss.isfinite() for name in batch]
        bad, drawn = (dict.fromkeys(itertools.chain(*gather_objects(of))) for of in (mine, [*itertools.chain(*ids)]))
        print0(f"step {step}: the {'loss' if bad else 'gradient'} of {', '.join(bad or drawn)} is not finite; no update")
        if self.bad_steps > self.config.max_bad_steps:
            raise FloatingPointError(f"step {step}: {self.bad_steps} updates skipped for a loss or gradient that is "
                                     f"not finite, more than max_bad_steps={self.config.max_bad_steps}")

    def look_for_collapse(self):
        """Says each sign of collapse once, in words."""
        found = signs_of_collapse(self.history, self.config.alarms)
        print0("\n".join(f"warning: {found[metric]}" for metric in found if metric not in self._said))
        self._said |= set(found)


# --- signs of collapse ------------------------------------------------------------------------------------------------

SIGNS = {  # metric: (its limit in AlarmConfig, what it usually means and what to look at)
    "rewards/format/mean": ("format_drop", "completions lose their blocks: too high a learning_rate, or cut off?"),
    "frac_reward_zero_std": ("zero_std", "equal rewards teach nothing: data too easy, too hard, completions alike?"),
    "kl": ("kl", "the policy is far from the stage's first model: learning_rate too high, beta too low?"),
    "completions/clipped_ratio": ("clipped", "completions are cut off: repetitions, or max_completion_length too low?"),
}


def signs_of_collapse(history, alarms):
    """{metric: sentence} for each sign that the mean of the last WINDOW steps shows; a pure function.

    history: the steps' metrics, [{name: number or None}]; steps that don't have a metric are left out of its means.
    """
    found = {}
    for metric, (alarm, meaning) in SIGNS.items():
        values, limit = [line[metric] for line in history if line.get(metric) is not None], getattr(alarms, alarm)
        means = [sum(values[i:i + WINDOW]) / WINDOW for i in range(len(values) - WINDOW + 1)]
        if limit is not None and means:
            before, now = max(means) if alarm == "format_drop" else means[0], means[-1]
            if (before - now if alarm == "format_drop" else now) > limit:
                found[metric] = (f"{metric} went from {before:.3g} to {now:.3g} (means of {WINDOW} steps, "
                                 f"alarms.{alarm}={limit:g}); {meaning} See rollouts.jsonl")
    return found
