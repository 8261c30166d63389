"""Which device a process takes, and what it says where there are too few; means and sums over ranks."""

import math

import pytest
import torch

from hov2 import distributed
from hov2.config import ConfigError
from hov2.distributed import Means, device_of


@pytest.mark.parametrize(
    "name, gpus, processes, expected",
    [
        ("auto", 0, 2, "cpu"),
        ("cpu", 8, 2, "cpu"),
        ("auto", 2, 2, "cuda:1"),
        ("cuda", 8, 2, "cuda:1"),
        ("cpu", 1, 2, "cpu"),
        ("auto", 1, 2, None),
        ("cuda", 1, 2, None),
        ("cuda", 0, 1, None),
    ],
)
def test_a_gpu_for_each_process_or_the_cpu(monkeypatch, name, gpus, processes, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setenv("LOCAL_RANK", str(processes - 1))
    if expected:
        assert device_of(name) == torch.device(expected)
    else:
        with pytest.raises(ConfigError, match=f"has {gpus} for {processes}; start as many processes .* device=cpu"):
            device_of(name)


def test_sums_add_over_ranks_and_means_do_not(monkeypatch):
    step = Means()
    step.add("length", [2.0, float("nan"), 4.0])
    step.add("nothing", [])
    step.add_sum("faults", 2)
    step.add_sum("faults", 1)
    step.add_sum("none", 0)

    monkeypatch.setattr(distributed, "gather_objects", lambda value: [value, value])  # two ranks that saw the same
    reduced = step.reduce()
    assert reduced.pop("length") == 3.0 and math.isnan(reduced.pop("nothing"))
    assert reduced == {"faults": 6.0, "none": 0.0} and isinstance(reduced["none"], float)
    assert step.reduce() == {}  # each step starts anew
