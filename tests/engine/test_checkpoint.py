"""A run goes on from the newest checkpoint that is whole; what can't be written is said and costs no more than itself."""

import resource
import signal
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp

from hov2 import distributed
from hov2.config import SFTConfig, Source
from hov2.engine.checkpoint import (
    CheckpointError,
    Checkpoints,
    digests_of_data,
    finished_checkpoints,
    set_aside,
    surplus,
)


def test_an_earlier_run_is_set_aside(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "metrics.jsonl").write_text("old")
    set_aside(tmp_path)
    assert (tmp_path / "earlier-1" / "metrics.jsonl").read_text() == "old" and not finished_checkpoints(tmp_path)
    set_aside(tmp_path)
    assert not (tmp_path / "earlier-2").exists()


def test_a_number_that_is_free_again_is_not_taken_twice(tmp_path):
    for number in (1, 3, "my-own"):  # somebody has removed earlier-2
        (tmp_path / f"earlier-{number}").mkdir()
    (tmp_path / "metrics.jsonl").write_text("old")
    set_aside(tmp_path)
    assert (tmp_path / "earlier-4" / "metrics.jsonl").read_text() == "old"


def test_an_unfinished_checkpoint_is_not_taken(tmp_path):
    for name in ("checkpoint-2", "checkpoint-10", "checkpoint-20.unfinished"):
        (tmp_path / name).mkdir()
    assert [path.name for path in finished_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-2"]
    assert finished_checkpoints(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    "keep_last, keep_every, kept",
    [
        (0, 0, [10, 8, 6, 4, 2]),
        (2, 0, [10, 8]),
        (1, 4, [10, 8, 4]),
        (9, 0, [10, 8, 6, 4, 2]),
    ],
)
def test_which_checkpoints_stay(tmp_path, keep_last, keep_every, kept):
    folders = [tmp_path / f"checkpoint-{steps}" for steps in (10, 8, 6, 4, 2)]
    gone = surplus(folders, keep_last, keep_every)
    assert [f for f in folders if f not in gone] == [tmp_path / f"checkpoint-{steps}" for steps in kept]


# ---- A run's checkpoints, on one process ----


@pytest.fixture(scope="module", autouse=True)
def process_group():
    yield distributed.setup()
    distributed.cleanup()


class Run:
    """A run of 8 weights, whose steps add 1 to each: `begin` is what a script does before its loop."""

    def __init__(self, folder, **config):
        config = {"data": [], "save_steps": 1} | config
        self.config = SFTConfig(model="none", output_dir=str(folder), **config)

    def begin(self, weights=8, **changes):
        self.policy = torch.nn.Linear(weights, 1, bias=False)
        torch.nn.init.zeros_(self.policy.weight)
        self.loader = SimpleNamespace(drawn=0)
        self.loader.state_dict = lambda: {"drawn": self.loader.drawn}
        self.loader.load_state_dict = lambda state: vars(self.loader).update(state)
        optimizer = torch.optim.AdamW(self.policy.parameters(), lr=0.1)
        vars(self.config).update(changes)
        self.checkpoints = Checkpoints(self.config, self.policy, optimizer, self.loader, SimpleNamespace(best=None))
        return self.checkpoints.resume()

    def train(self, first, last):
        for step in range(first, last):
            self.loader.drawn += 1
            with torch.no_grad():
                self.policy.weight += 1
            self.checkpoints.save_if_due(step + 1, last)
        return self

    def names(self):
        return sorted(path.name for path in self.checkpoints.folder.iterdir())


@pytest.fixture
def run(tmp_path):
    """A run of three steps and its three checkpoints."""
    run = Run(tmp_path, resume="auto")
    assert run.begin() == 0
    run.train(0, 3).checkpoints.close()
    assert run.names() == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    return run


def test_a_run_goes_on_from_its_newest_checkpoint(run, capsys):
    assert run.begin(learning_rate=0.5) == 3
    assert (run.policy.weight == 3).all() and run.loader.drawn == 3
    assert (
        f"resumed from {run.checkpoints.folder / 'checkpoint-3'}; changed in the config: learning_rate\n"
        in capsys.readouterr().out
    )


def test_data_that_has_changed_is_named(tmp_path, capsys):
    data, held_out = tmp_path / "train.json", tmp_path / "eval.json"
    data.write_text("[1]")
    held_out.write_text("[2]")
    run = Run(tmp_path / "run", resume="auto", eval_data=[Source(str(held_out))], eval_steps=9)
    (tmp_path / "run").mkdir()
    run.begin(data=[Source(str(data))])
    run.train(0, 1).checkpoints.close()
    assert run.begin() == 1
    data.write_text("[3]")
    for _ in range(2):  # nor the next time
        with pytest.raises(CheckpointError, match=rf"^{data}: changed since .*checkpoint-1 was written"):
            run.begin()
    held_out.write_text("[4]")
    with pytest.raises(CheckpointError, match=f"^{data}, {held_out}: changed since"):
        run.begin()
    held_out.write_text("[2]")
    other = tmp_path / "other.json"
    data.rename(other)
    capsys.readouterr()
    assert run.begin(data=[Source(str(other))]) == 1  # on purpose
    assert "changed in the config: data\n" in capsys.readouterr().out


def test_a_large_parquet_file_is_told_apart_by_its_end(tmp_path):
    path = tmp_path / "x.parquet"
    path.write_bytes(b"media" * 2**20 + b"contents 1")
    config = SFTConfig(model="m", output_dir="o", data=[Source(str(path), format="omniinstruct")])
    before = digests_of_data(config)
    path.write_bytes(b"media" * 2**20 + b"contents 2")
    assert before.keys() == digests_of_data(config).keys() == {str(path)} and before != digests_of_data(config)


def test_the_loop_may_change_weights_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    run, go_on, write = Run(tmp_path, resume="auto"), threading.Event(), dcp.FileSystemWriter.write_data
    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", lambda *args: go_on.wait(60) and write(*args))
    run.begin()
    run.train(0, 1)
    assert not run.checkpoints.writing.done() and not finished_checkpoints(tmp_path)
    with torch.no_grad():
        run.policy.weight += 100
    go_on.set()
    run.checkpoints.close()
    assert run.begin() == 1 and (run.policy.weight == 1).all()


def test_a_run_without_resume_sets_the_earlier_one_aside(run):
    assert run.begin(resume="never") == 0 and run.names() == ["earlier-1"]


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "no sums", "sums cut", "sums garbled", "state"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(run, capsys, damage):
    folder = run.checkpoints.folder / "checkpoint-3"
    data, sums = folder / "__0_0.distcp", folder / "SHA256SUMS"
    content = data.read_bytes()
    if damage == "flipped":
        data.write_bytes(content[:500] + bytes([content[500] ^ 1]) + content[501:])
    elif damage == "cut":
        data.write_bytes(content[:-1])
    elif damage == "gone":
        (folder / ".metadata").unlink()
    elif damage == "no sums":
        sums.unlink()
    elif damage == "sums cut":
        sums.write_text("".join(sums.read_text().splitlines(keepends=True)[:-1]))
    elif damage == "sums garbled":
        sums.write_bytes(b"\xff\x00" * 99)
    else:
        (folder / "state.json").write_text((folder / "state.json").read_text().replace('"step": 3', '"step": 2'))
    assert run.begin() == 2 and (run.policy.weight == 2).all()
    out = capsys.readouterr().out
    assert f"warning: {folder} is passed over: " in out and "resumed from" in out
    assert run.names() == ["checkpoint-1", "checkpoint-2", "earlier-1"]
    run.train(2, 3).checkpoints.close()
    assert run.begin() == 3


def test_a_run_of_which_no_checkpoint_is_whole_does_not_begin_anew(run):
    for folder in run.checkpoints.folder.iterdir():
        (folder / "SHA256SUMS").unlink()
    for _ in range(2):  # nor the next time
        with pytest.raises(CheckpointError, match="none of its checkpoints is whole"):
            run.begin()


def test_a_checkpoint_of_another_model_is_one_clear_error(run):
    with pytest.raises(CheckpointError, match=r"checkpoint-3: doesn't fit the config's model: .*[sS]ize"):
        run.begin(weights=9)


def test_only_the_last_checkpoints_and_those_to_keep_stay(tmp_path):
    run = Run(tmp_path, keep_last=2, keep_every=3)
    run.begin()
    run.train(0, 7).checkpoints.close()
    assert run.names() == ["checkpoint-3", "checkpoint-6", "checkpoint-7"]


def test_a_checkpoint_that_cannot_be_written_is_said_and_the_run_goes_on(tmp_path, capsys):
    run = Run(tmp_path)
    run.begin(weights=50_000)
    run.train(0, 1)
    assert run.checkpoints.wait() is None
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # writes fail as on a full disk
    try:
        run.train(1, 2)
        assert run.checkpoints.wait() and run.names() == ["checkpoint-1"]
        out = capsys.readouterr().out
        assert out.count("\n") == 1 and f"warning: {tmp_path / 'checkpoint-2'} could not be written" in out
        with pytest.raises(CheckpointError, match="the last checkpoint could not be written: "):
            run.checkpoints.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert run.begin(weights=50_000, resume="auto") == 1
    run.train(1, 3).checkpoints.close()
    assert run.names() == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path, capsys):
    run = Run(tmp_path / "run")
    (tmp_path / "run").mkdir()
    run.begin()
    (tmp_path / "run" / "checkpoint-1.unfinished").write_text("a file is in the way")
    run.train(0, 1)
    assert "FileExistsError" in run.checkpoints.wait() and "could not be written" in capsys.readouterr().out


def test_too_small_a_disk_is_said_before_the_first_step(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=90_000_000))
    Run(tmp_path).begin(weights=10_000_000)
    assert "has 0.09 GB left on its disk, and the next checkpoint takes about 0.12 GB" in capsys.readouterr().out
    Run(tmp_path).begin(weights=1000)
    assert capsys.readouterr().out == ""
