"""What the processes that share a folder of clips do; apart from the tests, so that they start fast."""

import warnings

import torch

from hov2.data import media_cache
from hov2.data.media import read_media
from hov2.data.media_cache import MediaCache

SMALL = {"fps": 4.0, "max_frames": 8, "min_pixels": 56 * 56, "max_pixels": 56 * 56}


def same(one, other):
    """Equal to the bit, and in memory in the same way."""
    for a, b in ((one.frames, other.frames), (one.audio, other.audio)):
        if a is None or b is None:
            assert a is b
        else:
            assert a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)
    assert (one.sample_fps, one.audio_cut) == (other.sample_fps, other.audio_cut)
    return True


def hammer(folder, paths, gib, seed):
    """In a process of its own: reads the clips again and again, in an order of its own; how many it decoded."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    plain, cache, decoded = [read_media(path, **SMALL) for path in paths], MediaCache(folder, gib), []
    media_cache.read_media = lambda path, **options: decoded.append(path) or read_media(path, **options)
    for i in torch.randint(len(paths), (60,), generator=torch.Generator().manual_seed(seed)).tolist():
        same(cache.read(paths[i], **SMALL), plain[i])
    return len(decoded)
