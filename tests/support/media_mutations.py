"""Damages clips in random ways and reads them, as a program of its own: a crash or a hang ends it, not the tests.

    python tests/support/media_mutations.py FOLDER FIRST COUNT CLIP...

Mutation number i is the same in every run; its file is FOLDER/i.<ending>, kept if anything is wrong with it. Each must
end, within 10 seconds, in a Media that holds together or in a MediaError, and leave no file open. Prints one line each.
"""

import faulthandler
import gc
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hov2.data.media import MediaError, read_media
from hov2.data.sound import MAX_AUDIO_SECONDS

SECONDS = 10
KINDS = ("flips", "cut", "zeros", "flips in the header", "zeros in the header")


def mutate(content, number):
    """(kind, `content` with a damage that depends on `number` alone)."""
    rng, kind = np.random.default_rng([3, number]), KINDS[number % len(KINDS)]
    data = np.frombuffer(content, np.uint8).copy()
    reach = min(len(data), 1500) if "header" in kind else len(data)
    if kind == "cut":
        return kind, content[: int(rng.integers(1, len(content)))]
    if kind.startswith("zeros"):
        start = int(rng.integers(reach))
        data[start : start + int(rng.integers(1, reach // 4))] = 0
    else:
        for at in rng.integers(reach, size=int(rng.integers(1, 65))):
            data[at] ^= np.uint8(1 << rng.integers(8))
    return kind, data.tobytes()


def check(media):
    """What every Media promises, whatever the file was."""
    assert media.frames is not None or media.audio is not None
    if media.frames is not None:
        count, channels, height, width = media.frames.shape
        assert media.frames.dtype == torch.uint8 and channels == 3 and height % 28 == width % 28 == 0
        if media.sample_fps is None:
            assert count == 1
        else:
            assert 2 <= count <= 32 and count % 2 == 0 and 0 < media.sample_fps < float("inf"), media.sample_fps
    if media.audio is not None:
        assert media.audio.dtype == torch.float32 and 0 < len(media.audio) <= MAX_AUDIO_SECONDS * 16000
        assert media.audio.isfinite().all(), "sound that is not finite"


def open_files():
    """How many there are; 0 where that can't be told."""
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def main(folder, first, count, clips, read=read_media, seconds=SECONDS):
    """Runs the mutations `first` to `first + count - 1`; `clips` take turns."""
    faulthandler.enable()
    warnings.simplefilter("ignore")
    gc.disable()  # closing must not wait for the collector
    contents = [Path(clip).read_bytes() for clip in clips]
    read_media(clips[0])  # what is loaded once and stays open is none of a mutation's
    for number in range(first, first + count):
        which = number % len(clips)
        kind, content = mutate(contents[which], number)
        path = Path(folder) / f"{number}{Path(clips[which]).suffix}"
        path.write_bytes(content)
        before = open_files()
        print(f"{number} {path.suffix[1:]}, {kind}: ", end="", flush=True)
        faulthandler.dump_traceback_later(seconds, exit=True)  # from a thread of its own, also when C code hangs
        try:
            media = read(str(path))
        except MediaError as error:
            print(f"MediaError: {error.reason}", flush=True)
        else:
            check(media)
            print("Media", flush=True)
        faulthandler.cancel_dump_traceback_later()
        assert open_files() == before, "a file was left open"
        path.unlink()
        gc.collect()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
