"""The samples of each step: which they are, for any number of ranks (`PromptOrder`), and a rank's share of them, loaded
(`StepLoader`).
"""

import math
import multiprocessing.connection
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from hov2.data.formats import DataError
from hov2.data.inputs import InputMaker, Inputs, media_key
from hov2.data.samples import ORDER_STREAM, SPARE_STREAM, Sample, permutation, tried
from hov2.distributed import gather_objects, print0

THREADS = 4  # that read a step's clips where no processes do


class PromptOrder:
    """Which samples belong to which step: a pure function of (seed, step), the same for any number of ranks.

    Each epoch is one permutation, and the permutations are laid end to end: a step that an epoch can't fill goes on
    with the next epoch's samples, so that none is left out.
    """

    def __init__(self, num_samples: int, prompts_per_step: int, seed: int) -> None:
        self.num_samples = num_samples
        self.prompts_per_step = prompts_per_step
        self.seed = seed

    def step(self, step: int) -> list[int]:
        """The sample indices of `step` (from 0), prompts_per_step of them."""
        first = step * self.prompts_per_step
        return [self._at(ORDER_STREAM, position) for position in range(first, first + self.prompts_per_step)]

    def spare(self, position: int) -> int:
        """The sample index at `position` of the one endless list that replacements come from."""
        return self._at(SPARE_STREAM, position)

    def total_steps(self, num_train_epochs: float, max_steps: int | None = None) -> int:
        """The number of steps that cover the epochs (the last may reach into the next one), at most `max_steps`."""
        steps = max(1, math.ceil(num_train_epochs * self.num_samples / self.prompts_per_step - 1e-9))
        return steps if max_steps is None else min(steps, max_steps)

    def _at(self, stream: int, position: int) -> int:
        round_, offset = divmod(position, self.num_samples)
        return int(permutation(self.num_samples, self.seed, stream, round_)[offset])


@dataclass(order=True)
class Failure:
    """A slot of a step whose sample could not be loaded, and why."""

    slot: int
    reason: str
    fatal: bool  # a DataError: the run can't go on


class StepLoader:
    """This rank's share of each step, loaded; what can't be loaded is replaced, in the same way on every rank.

    `make(sample)` gives the sample's Inputs. The slots of a step are dealt to the ranks in order, as whole runs. A
    slot whose sample raises MediaError or SkipSample takes the next sample of the order's spare list, in slot order
    over all ranks, until every slot is filled; `replaced` names each case. `gather(value)` returns every rank's value,
    in rank order. The run stops with a DataError when more than `max_bad_samples` (a share) of the samples drawn were
    bad; as long as fewer have been drawn than there are samples, the share is of the latter.

    With `workers`, so many processes read the next step's clips while this one is trained on; else threads read them
    when they are needed. What is loaded is the same.
    """

    def __init__(
        self,
        samples: list[Sample],
        make: InputMaker,
        order: PromptOrder,
        rank: int = 0,
        world_size: int = 1,
        gather: Callable[[Any], list] = gather_objects,
        max_bad_samples: float = 0.01,
        workers: int = 0,
    ) -> None:
        if order.prompts_per_step % world_size:
            raise DataError(f"{order.prompts_per_step} samples a step can't be shared evenly by {world_size} processes")
        self.samples = samples
        self.make = make
        self.order = order
        self.gather = gather
        self.max_bad_samples = max_bad_samples
        self.readers = None
        if workers:
            spawn = multiprocessing.get_context("spawn")
            self.readers = ProcessPoolExecutor(workers, spawn, _begin_reading, (make,))
        self.threads = ThreadPoolExecutor(THREADS)
        self.ahead = {}  # sample index -> future, of the next step
        share = order.prompts_per_step // world_size
        self.slots = range(rank * share, (rank + 1) * share)
        self.drawn = 0  # samples, of all ranks and steps
        self.spares_used = 0
        self.replaced = []

    def next_step(self, step: int) -> list[tuple[int, Sample, Inputs]]:
        """Load this rank's share: (sample index, sample, inputs) for each of its slots.

        A DataError on one rank is raised on every rank.
        """
        indices = self.order.step(step)  # of the samples in all ranks' slots
        self.drawn += len(indices)
        spares_before = self.spares_used
        loaded = {}  # slot -> Inputs, or the exception that says why there are none
        to_load = list(self.slots)
        while True:
            futures = {slot: self._future_of(indices[slot]) for slot in to_load}
            for slot, future in futures.items():
                loaded[slot] = future.result()
            failures = self._failures_of_ranks(to_load, loaded)
            if not failures:
                break
            for failure in failures:
                if failure.fatal:
                    raise DataError(failure.reason)
                self._replace(step, failure, indices)
            self.drawn += len(failures)
            self._check_share(self.spares_used - spares_before)
            to_load = [failure.slot for failure in failures if failure.slot in self.slots]
        self._read_ahead(step + 1)
        return [(indices[slot], self.samples[indices[slot]], loaded[slot]) for slot in self.slots]

    def state_dict(self) -> dict:
        """What a resumed run needs to go on identically; the same on every rank."""
        return {"drawn": self.drawn, "spares_used": self.spares_used, "replaced": list(self.replaced)}

    def load_state_dict(self, state: dict) -> None:
        """Take up what state_dict() returned."""
        self.drawn = state["drawn"]
        self.spares_used = state["spares_used"]
        self.replaced = list(state["replaced"])

    def close(self) -> None:
        """End the reading of what won't be needed."""
        self.threads.shutdown(cancel_futures=True)
        if self.readers is not None:
            self.readers.shutdown(cancel_futures=True)

    def _future_of(self, index: int) -> Future:
        """The sample's future: begun in the step before, or now."""
        begun = self.ahead.pop(index, None)
        return begun if begun is not None else self._begin(index)

    def _begin(self, index: int) -> Future:
        """A future of the sample's Inputs, or of the exception that says why there are none."""
        sample = self.samples[index]
        if self.readers and media_key(sample, self.make.media_config, self.make.senses) not in self.make.known:
            return self.readers.submit(_read_here, sample)
        return self.threads.submit(tried, self.make, sample)

    def _read_ahead(self, step: int) -> None:
        """Begin to load this rank's share of `step`, if there are processes for it."""
        self.ahead = {}
        if self.readers is None:
            return
        indices = self.order.step(step)
        for slot in self.slots:
            self.ahead[indices[slot]] = self._begin(indices[slot])

    def _failures_of_ranks(self, slots: list[int], loaded: dict[int, Any]) -> list[Failure]:
        """All ranks' failures among what they have just loaded, in slot order; this rank loaded `slots`."""
        own_failures = []
        for slot in slots:
            error = loaded[slot]
            if isinstance(error, Exception):
                own_failures.append(Failure(slot, str(error), fatal=isinstance(error, DataError)))
        failures = []
        for of_rank in self.gather(own_failures):
            failures.extend(of_rank)
        return sorted(failures)

    def _replace(self, step: int, failure: Failure, indices: list[int]) -> None:
        """Put the next spare sample into the slot of a failure, in `indices`, and say so."""
        bad = self.samples[indices[failure.slot]].id
        indices[failure.slot] = self.order.spare(self.spares_used)
        self.spares_used += 1
        spare = self.samples[indices[failure.slot]].id
        self.replaced.append({"step": step, "id": bad, "reason": failure.reason, "by": spare})
        print0(f"step {step}: sample {bad} replaced by {spare}: {failure.reason}")

    def _check_share(self, in_this_step: int) -> None:
        """Raise DataError if too many samples are bad, or all of them in this step."""
        bad = len(self.replaced)
        seen = max(self.drawn, len(self.samples))
        if bad <= self.max_bad_samples * seen and in_this_step <= len(self.samples):
            return
        first = "".join(f"\n  {entry['id']}: {entry['reason']}" for entry in self.replaced[:5])
        raise DataError(
            f"{bad} of {self.drawn} samples drawn can't be used, more than max_bad_samples = "
            f"{self.max_bad_samples} allows; the first ones:{first}"
        )


# --- in a process that reads ------------------------------------------------------------------------------------------


def _begin_reading(make: InputMaker) -> None:
    """Keep the process's InputMaker, take one thread, and end when the process that trains has ended."""
    global _make
    _make = make
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(0)


def _read_here(sample: Sample) -> Inputs | Exception:
    return tried(_make, sample)
