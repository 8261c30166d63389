"""Which samples belong to which step, for any number of ranks (`PromptOrder`), and a rank's share of them, loaded
(`StepLoader`).
"""

import math
import multiprocessing.connection
import os
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import torch

from hov2.data.formats import DataError
from hov2.data.inputs import media_key
from hov2.data.samples import ORDER_STREAM, SPARE_STREAM, permutation, tried
from hov2.distributed import gather_objects, print0

THREADS = 4  # that read a step's clips where no processes do


class PromptOrder:
    """Which samples belong to which step: a pure function of (seed, step), the same for any number of ranks.

    Each epoch is one permutation, and the permutations are laid end to end: a step that an epoch can't fill goes on
    with the next epoch's samples, so that none is left out.
    """

    def __init__(self, num_samples, prompts_per_step, seed):
        self.num_samples, self.prompts_per_step, self.seed = num_samples, prompts_per_step, seed

    def step(self, step):
        """The sample indices of `step` (from 0), prompts_per_step of them."""
        first = step * self.prompts_per_step
        return [self._at(ORDER_STREAM, position) for position in range(first, first + self.prompts_per_step)]

    def spare(self, position):
        """The sample index at `position` of the one endless list that replacements come from."""
        return self._at(SPARE_STREAM, position)

    def total_steps(self, num_train_epochs, max_steps=None):
        """Steps that cover the epochs (the last one may reach into the next), at most `max_steps`."""
        steps = max(1, math.ceil(num_train_epochs * self.num_samples / self.prompts_per_step - 1e-9))
        return steps if max_steps is None else min(steps, max_steps)

    def _at(self, stream, position):
        round_, offset = divmod(position, self.num_samples)
        return int(permutation(self.num_samples, self.seed, stream, round_)[offset])


class StepLoader:
    """Loads this rank's share of each step, and replaces what can't be loaded, in the same way on every rank.

    `make(sample) -> Inputs` is an InputMaker. The slots of a step are dealt to the ranks in order, as whole runs. A
    slot whose sample raises MediaError or SkipSample takes the next sample of the order's spare list, in slot order
    over all ranks, until every slot is filled; `replaced` names each case. `gather(value)` returns every rank's value,
    in rank order. The run stops with a DataError when more than `max_bad_samples` (a share) of the samples drawn were
    bad; as long as fewer have been drawn than there are samples, the share is of the latter.

    With `workers`, so many processes read the next step's clips while this one is trained on; else threads read them
    when they are needed. What is loaded is the same.
    """

    def __init__(self, samples, make, order, rank=0, world_size=1, gather=gather_objects, max_bad_samples=0.01,
                 workers=0):
        if order.prompts_per_step % world_size:
            raise DataError(f"{order.prompts_per_step} samples a step can't be shared evenly by {world_size} processes")
        self.samples, self.make, self.order, self.gather = samples, make, order, gather
        self.max_bad_samples = max_bad_samples
        spawn = multiprocessing.get_context("spawn")
        self.readers = ProcessPoolExecutor(workers, spawn, _begin_reading, (make,)) if workers else None
        self.threads = ThreadPoolExecutor(THREADS)
        self.ahead = {}  # sample index -> future, of the next step
        share = order.prompts_per_step // world_size
        self.slots = range(rank * share, (rank + 1) * share)
        self.drawn, self.spares_used, self.replaced = 0, 0, []

    def next_step(self, step):
        """[(sample index, sample, inputs)] of this rank's slots. A DataError on one rank is raised on every rank."""
        indices, loaded, spares_before = self.order.step(step), {}, self.spares_used
        self.drawn += len(indices)
        todo = list(self.slots)
        while True:
            futures = {slot: self.ahead.pop(indices[slot], None) or self._begin(indices[slot]) for slot in todo}
            loaded |= {slot: future.result() for slot, future in futures.items()}
            failures = [(slot, indices[slot], str(loaded[slot]), isinstance(loaded[slot], DataError))
                        for slot in todo if isinstance(loaded[slot], Exception)]
            failures = sorted(failure for of_rank in self.gather(failures) for failure in of_rank)
            if not failures:
                following = self.order.step(step + 1)
                self.ahead = {following[slot]: self._begin(following[slot]) for slot in self.slots if self.readers}
                return [(indices[slot], self.samples[indices[slot]], loaded[slot]) for slot in self.slots]
            for slot, index, reason, fatal in failures:
                if fatal:
                    raise DataError(reason)
                indices[slot] = self.order.spare(self.spares_used)
                self.spares_used += 1
                bad, spare = self.samples[index].id, self.samples[indices[slot]].id
                self.replaced.append({"step": step, "id": bad, "reason": reason, "by": spare})
                print0(f"step {step}: sample {bad} replaced by {spare}: {reason}")
            self.drawn += len(failures)
            self._check_share(self.spares_used - spares_before)
            todo = [slot for slot, *_ in failures if slot in self.slots]

    def state_dict(self):
        """What a resumed run needs to go on identically; the same on every rank."""
        return {"drawn": self.drawn, "spares_used": self.spares_used, "replaced": list(self.replaced)}

    def load_state_dict(self, state):
        """Takes up what state_dict() returned."""
        self.drawn, self.spares_used, self.replaced = state["drawn"], state["spares_used"], list(state["replaced"])

    def close(self):
        """Ends the reading of what won't be needed."""
        for pool in filter(None, (self.threads, self.readers)):
            pool.shutdown(cancel_futures=True)

    def _begin(self, index):
        """A future of the sample's Inputs, or of the exception that says why there are none."""
        sample = self.samples[index]
        if self.readers and media_key(sample, self.make.media_config) not in self.make.known:
            return self.readers.submit(_read_here, sample)
        return self.threads.submit(tried, self.make, sample)

    def _check_share(self, in_this_step):
        bad, seen = len(self.replaced), max(self.drawn, len(self.samples))
        if bad <= self.max_bad_samples * seen and in_this_step <= len(self.samples):
            return
        first = "".join(f"\n  {entry['id']}: {entry['reason']}" for entry in self.replaced[:5])
        raise DataError(f"{bad} of {self.drawn} samples drawn can't be used, more than max_bad_samples = "
                        f"{self.max_bad_samples} allows; the first ones:{first}")


def _begin_reading(make):
    """In a process that reads: takes its InputMaker, one thread, and an end when the process that trains has ended."""
    global _make
    _make = make
    torch.set_num_threads(1)
    trains = multiprocessing.parent_process().sentinel
    threading.Thread(target=lambda: (multiprocessing.connection.wait([trains]), os._exit(0)), daemon=True).start()


def _read_here(sample):
    return tried(_make, sample)
