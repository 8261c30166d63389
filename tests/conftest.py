"""One thread for each test process: the models are tiny, and tests that start processes share the cores. Fixtures for
more than one test file."""

import warnings

import pytest
import torch

from hov2 import media

torch.set_num_threads(1)


@pytest.fixture
def no_stray_warnings():
    """Any warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def native(monkeypatch):
    """Frames at the size they have in the file."""
    monkeypatch.setattr(media, "_resize", lambda picture, size: picture.contiguous())
