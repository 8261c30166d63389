"""One thread for each test process: the models are tiny, and tests that start processes share the cores. Fixtures for
more than one test file."""

import os
import warnings

import pytest
import torch

torch.set_num_threads(1)


def pytest_configure(config):
    """Tests are of the CPU, with any number of processes, also where there is a GPU; `-m cuda` are of a GPU."""
    if config.getoption("markexpr") != "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


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
