"""Checkpoints to resume from.

`checkpoint-N/` is the run after N steps:
- the trained weights and the optimiser's state, sharded (torch.distributed.checkpoint), for any number of ranks;
- `state.json`: the number of steps, the loader's position, the best held-out accuracy, the config, and digests of the
  data files, so that a run never goes on with other records under the old numbers;
- `SHA256SUMS`, written last, in the format of `sha256sum -c`.

Nothing else is needed to go on exactly. Learning rate and KL weight follow from the step's number, random numbers from
(seed, step, sample), and a checkpoint is taken between steps, when no rollout waits for an update: a run that is killed
between two iterations on the same rollouts samples them again, the same ones, from the weights that it had then.

The loop waits for a copy in memory only; a thread writes it, to another name, and rank 0 renames it as soon as every
rank's files are complete: that thread needs nothing from the loop, so that a long step doesn't delay it. Only resume
from checkpoints you trust: torch keeps their table of contents (`.metadata`) as a pickle.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from hov2.config import TrainConfig
from hov2.data.formats import files_of
from hov2.data.loader import StepLoader
from hov2.distributed import PATIENCE, barrier, gather_objects, print0, rank, world_size

UNFINISHED = ".unfinished"  # ending of what is being written
SUMS = "SHA256SUMS"
PARQUET_END = 2**20  # bytes
TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)


class CheckpointError(ValueError):
    """Checkpoints that can't be written or taken up; the message names the folder and says why."""


class Checkpoints:
    """A run's checkpoints in `config.output_dir`. All ranks make one, and call its methods together.

    `held_out` is the run's evaluator.HeldOut: its `best` is a part of the run's state.
    """

    def __init__(
        self,
        config: TrainConfig,
        policy: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        loader: StepLoader,
        held_out: Any,
    ) -> None:
        self.config = config
        self.folder = Path(config.output_dir)
        self.policy = policy
        self.optimizer = optimizer
        self.loader = loader
        self.held_out = held_out
        # the writing thread's own: the default group is the loop's, and it may be nccl, which has no CPU side
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE)
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.writing = None  # the future of what the thread writes: why that failed, or None
        trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        weight_bytes = sum(parameter.numel() * parameter.element_size() for parameter in trained)
        self.size = 3 * weight_bytes  # with AdamW's two moments
        self.data = gather_objects(digests_of_data(config) if rank() == 0 else {})[0]

    def resume(self) -> int:
        """Take up a checkpoint, as `config.resume` says, and return the number of steps done.

        With "auto" it is the newest one that is whole; newer ones that aren't are named and moved to `earlier-N`. With
        "never", or where there is no checkpoint, the run begins anew, and all that an earlier one left there is moved.
        Raises CheckpointError where none of the checkpoints is whole, and for one that doesn't fit the model or whose
        data files have changed since.
        """
        if rank() == 0:
            self._warn_if_full()
            for left in self.folder.glob(f"checkpoint-*{UNFINISHED}"):
                shutil.rmtree(left)
        found = []
        if self.config.resume == "auto":
            found = gather_objects(finished_checkpoints(self.folder))[0]
        for number, folder in enumerate(found):
            problem = find_problem(folder)
            if problem is None:
                self._check_data(folder)
                return self._load(folder, damaged=found[:number])
            print0(f"warning: {folder} is passed over: {problem}")
        if found:
            raise CheckpointError(f"{self.folder}: none of its checkpoints is whole; resume=never begins anew")
        if rank() == 0:
            set_aside(self.folder)
        barrier()
        return 0

    def save_if_due(self, steps_done: int, steps: int, stopping: bool = False) -> None:
        """Begin a checkpoint after every `save_steps` steps, after the last one, and where the run stops early."""
        at_an_end = stopping or steps_done == steps
        at_an_interval = self.config.save_steps and steps_done % self.config.save_steps == 0
        if at_an_end or at_an_interval:
            self.save(steps_done)

    def save(self, steps_done: int) -> None:
        """Copy the run's state to memory and have it written to `checkpoint-{steps_done}`, while the loop goes on.

        Waits for the checkpoint before, if it is still being written.
        """
        self.wait()
        state = {
            "step": steps_done,
            "loader": self.loader.state_dict(),
            "best": self.held_out.best,
            "config": dataclasses.asdict(self.config),
            "data": self.data,
        }
        model, optim = get_state_dict(self.policy, self.optimizer, options=TRAINED)
        unfinished = self.folder / f"checkpoint-{steps_done}{UNFINISHED}"
        writer = dcp.FileSystemWriter(unfinished)  # copies to memory at once; its thread then leaves the GPUs alone
        files = dcp.async_save({"model": model, "optim": optim}, storage_writer=writer, process_group=self.group)
        self.writing = self.thread.submit(self._finish, files, unfinished, state)

    def wait(self) -> str | None:
        """Wait until nothing is being written; return why the last checkpoint failed, or None, on all ranks alike."""
        return self.writing.result() if self.writing else None

    def close(self) -> None:
        """Wait for the last checkpoint; raises CheckpointError if that one could not be written."""
        problem = self.wait()
        self.thread.shutdown()
        if problem:
            raise CheckpointError(f"{self.folder}: the last checkpoint could not be written: {problem}")

    def _warn_if_full(self) -> None:
        """Say that the disk is too full before the room is needed, so that there is time to make some."""
        free = shutil.disk_usage(self.folder).free
        if free < self.size:
            print0(
                f"warning: {self.folder} has {free / 1e9:.2f} GB left on its disk, and the next checkpoint takes about "
                f"{self.size / 1e9:.2f} GB"
            )

    def _finish(self, files: Future, unfinished: Path, state: dict) -> str | None:
        """In the thread: when all ranks' files are written, rank 0 completes the checkpoint; returns as `wait`.

        A failure is said at once and costs this checkpoint only.
        """
        own_sums, own_problem = _tried(_sums_when_written, files, unfinished)
        sums_of_ranks = []
        problem = None  # the first rank's that has one
        for sums, problem_of_rank in gather_objects((own_sums, own_problem), self.group):
            sums_of_ranks.append(sums)
            problem = problem or problem_of_rank
        if rank() == 0 and not problem:
            _, problem = _tried(self._complete, unfinished, state, sums_of_ranks)
        if rank() == 0 and problem:
            free = shutil.disk_usage(self.folder).free / 1e9
            print(
                f"warning: {unfinished.with_suffix('')} could not be written ({free:.2f} GB free): {problem}; the "
                "run goes on, with the checkpoints before, and tries again when the next is due",
                flush=True,
            )
            shutil.rmtree(unfinished, ignore_errors=True)
        return gather_objects(problem, self.group)[0]  # also keeps the ranks from beginning another before the rename

    def _complete(self, unfinished: Path, state: dict, sums_of_ranks: list[dict[str, str]]) -> None:
        """Write what is left, give the checkpoint its name, and remove the ones that are surplus now."""
        (unfinished / "state.json").write_text(json.dumps(state))
        state_sum = {"state.json": sha256(unfinished / "state.json")}
        lines = []
        for sums in [*sums_of_ranks, state_sum]:  # the state's is last: a list cut off lacks it
            for name, value in sums.items():
                lines.append(f"{value}  {name}\n")
        (unfinished / SUMS).write_text("".join(lines))
        unfinished.rename(unfinished.with_suffix(""))
        for folder in surplus(finished_checkpoints(self.folder), self.config.keep_last, self.config.keep_every):
            removed = folder.rename(folder.with_name(folder.name + UNFINISHED))  # half of one is never taken for one
            shutil.rmtree(removed, ignore_errors=True)
        self._warn_if_full()

    def _check_data(self, folder: Path) -> None:
        """Raise CheckpointError for a data file that the config still names, and that isn't what the run began with."""
        then = json.loads((folder / "state.json").read_text()).get("data", {})
        changed = []
        for path, digest in self.data.items():
            if then.get(path, digest) != digest:
                changed.append(path)
        if changed:
            raise CheckpointError(
                f"{', '.join(changed)}: changed since {folder} was written, so that its records aren't the ones that "
                "the run has begun with. Put the file back, begin anew with resume=never, or, to go on with other data "
                "all the same, give the file another name"
            )

    def _load(self, folder: Path, damaged: list[Path]) -> int:
        """Load weights and optimiser state in place, on any number of ranks; returns the number of steps done."""
        model, optim = get_state_dict(self.policy, self.optimizer, options=TRAINED)  # makes the state to load into
        _, problem = _tried(dcp.load, {"model": model, "optim": optim}, checkpoint_id=folder)
        if problem:
            raise CheckpointError(f"{folder}: doesn't fit the config's model: {problem}")
        set_state_dict(self.policy, self.optimizer, model_state_dict=model, optim_state_dict=optim, options=TRAINED)
        state = json.loads((folder / "state.json").read_text())
        self.loader.load_state_dict(state["loader"])
        self.held_out.best = state["best"]
        if rank() == 0:
            set_aside(self.folder, [path.name for path in damaged])
        changed = []
        for key, value in dataclasses.asdict(self.config).items():
            if value != state["config"].get(key) and key != "resume":
                changed.append(key)
        print0(f"resumed from {folder}; changed in the config: {', '.join(changed) or 'nothing'}")
        return state["step"]


def finished_checkpoints(output_dir: str | Path) -> list[Path]:
    """The folders of the finished checkpoints in `output_dir`, that with the most steps first."""
    found = []
    for path in Path(output_dir).glob("checkpoint-*"):
        if path.name.removeprefix("checkpoint-").isdigit():
            found.append(path)
    return sorted(found, key=_steps_of, reverse=True)


def surplus(folders: list[Path], keep_last: int, keep_every: int) -> list[Path]:
    """Which of the checkpoints (newest first) to remove: all but `keep_last` of them and the multiples of `keep_every`.

    0 for `keep_last` keeps all.
    """
    if not keep_last:
        return []
    older = folders[keep_last:]
    if not keep_every:
        return older
    return [folder for folder in older if _steps_of(folder) % keep_every != 0]


def find_problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None; all ranks call it, each reads its share, and all agree."""
    own_problem = None
    try:
        sums = {}
        for line in (folder / SUMS).read_text().splitlines():
            sums[line[66:]] = line[:64]
        names = sorted({*sums, "state.json"})  # a list that was cut off lacks the latter
        for name in names[rank() :: world_size()]:
            if sha256(folder / name) != sums.get(name):
                own_problem = f"{name} is not as it was written"
                break
    except (OSError, ValueError) as error:
        own_problem = str(error)
    problems = [problem for problem in gather_objects(own_problem) if problem is not None]
    return problems[0] if problems else None


def digests_of_data(config: TrainConfig) -> dict[str, str]:
    """Return {data file: digest} of all data of a config, held-out questions too; clips are not looked at."""
    digests = {}
    for source in (*config.data, *config.eval_data):
        for file in files_of(source.format, source.path):
            digests[file] = _digest(file)
    return digests


def _digest(path: str) -> str:
    """Return what tells a file's versions apart; of a parquet file, full of media, its end: the table of contents."""
    with open(path, "rb") as file:
        if path.endswith(".parquet"):
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - PARQUET_END))
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file, as hexadecimal text."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sums_when_written(files: Future, folder: Path) -> dict[str, str]:
    """{name: SHA-256} of this rank's files in `folder`, once they are written; rank 0 has the table of contents too."""
    files.result()
    names = [path.name for path in folder.glob(f"__{rank()}_*")]
    if rank() == 0:
        names.append(".metadata")
    return {name: sha256(folder / name) for name in names}


def _tried(work: Callable, *args: Any, **kwargs: Any) -> tuple[Any, str | None]:
    """(what `work` returns, None), or (None, why it failed, in a line)."""
    try:
        return work(*args, **kwargs), None
    except (CheckpointException, OSError, RuntimeError) as error:
        return None, str(error).strip().splitlines()[-1]  # of torch's stack, which it has from the rank that failed


def _steps_of(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


def set_aside(output_dir: str | Path, patterns: Sequence[str] = ("checkpoint-*", "best", "*.jsonl")) -> None:
    """Move an earlier run's checkpoints and logs to `output_dir/earlier-N`, so that two runs never mix."""
    output_dir = Path(output_dir)
    found = []
    for pattern in patterns:
        found.extend(output_dir.glob(pattern))
    if not found:
        return
    number = 1
    for path in output_dir.glob("earlier-*"):
        digits = path.name.removeprefix("earlier-")
        if digits.isdigit():
            number = max(number, int(digits) + 1)
    target = output_dir / f"earlier-{number}"
    target.mkdir()
    for path in found:
        path.rename(target / path.name)
    print(f"set aside in {target}: {', '.join(path.name for path in found)}", flush=True)
