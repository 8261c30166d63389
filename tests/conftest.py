"""One thread for each test process: the models are tiny, and tests that start processes share the cores. Fixtures for
more than one test file."""

import os
import re
import warnings
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

ON_REQUEST = {"slow", "cuda"}  # markers of tests that only run if -m names them
DOCS = Path(__file__).parent.parent / "docs"


def pytest_configure(config):
    """Tests are of the CPU, with any number of processes, also where there is a GPU; `-m cuda` are of a GPU."""
    if config.getoption("markexpr") != "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.hookimpl(tryfirst=True)  # before pytest itself selects by -m
def pytest_collection_modifyitems(config, items):
    """Mark the examples in docs/ as docs, and leave out what takes minutes or a GPU unless -m names it.

    So `-m "not docs"` leaves out the slow tests too, as a run without -m does.
    """
    named = ON_REQUEST & set(re.findall(r"\w+", config.getoption("markexpr")))
    kept, left_out = [], []
    for item in items:
        if DOCS in item.path.parents:
            item.add_marker("docs")
        markers = ON_REQUEST & {marker.name for marker in item.iter_markers()}
        if markers and not markers & named:
            left_out.append(item)
        else:
            kept.append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


@pytest.fixture
def no_stray_warnings():
    """Any warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def native(monkeypatch):
    """Frames at the size they have in the file."""
    from hov2.data import video  # not above: the tests of CUDA run without PyAV

    monkeypatch.setattr(video, "_resize", lambda picture, size: picture.contiguous())
