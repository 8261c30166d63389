"""media_cache.py: what comes from disk is what decoding gives, whoever else uses the folder and whatever is in it."""

import os
import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from types import SimpleNamespace

import pytest
import torch
from cachekit import SMALL, hammer, same
from helpers import synth_clip, tiny_tokenizer

from hov2.config import EvalConfig, MediaConfig, Source
from hov2.data import media_cache
from hov2.data.inputs import InputMaker
from hov2.data.media import MediaError, read_media
from hov2.data.media_cache import SUFFIX, MediaCache
from hov2.data.samples import Sample
from hov2.engine import setup
from hov2.prompts import load_prompts

pytestmark = pytest.mark.usefixtures("no_stray_warnings")


@pytest.fixture
def undecodable(monkeypatch):
    """Nothing may be decoded."""
    return lambda: monkeypatch.setattr(media_cache, "read_media", lambda *args, **kwargs: pytest.fail("decoded"))


@pytest.mark.parametrize("name, options", [("video.mp4", {"seconds": 2}), ("silent.mp4", {"sound": False}),
                                           ("image.png", {}), ("audio.wav", {})])
def test_inputs_from_the_cache_are_those_from_the_file(name, options, tmp_path, undecodable):
    kind = name.partition(".")[0].replace("silent", "video")
    sample = Sample("s", "What?", "judge", None, "<answer>a</answer>", kind,
                    {kind: str(synth_clip(tmp_path / name, **options))})
    settings = tiny_tokenizer(), load_prompts(), MediaConfig(**SMALL), None, "error", {}
    plain = InputMaker(*settings)(sample)
    maker = pickle.loads(pickle.dumps(InputMaker(*settings, MediaCache(tmp_path / "cache", 1))))
    first = maker(sample)
    undecodable()
    again = maker(sample)
    for inputs in (first, again):
        assert torch.equal(inputs.prompt_ids, plain.prompt_ids) and inputs.media_key == plain.media_key
        assert repr(inputs.shape) == repr(plain.shape)
        for a, b in ((inputs.pixel_values, plain.pixel_values), (inputs.mel, plain.mel)):
            assert (a is None and b is None) or (torch.equal(a, b) and a.stride() == b.stride())


def test_other_settings_and_changed_files_are_decoded(tmp_path):
    cache, path = MediaCache(tmp_path / "cache", 1), synth_clip(tmp_path / "a.mp4", seconds=2)
    assert len(cache.read(path, **SMALL).frames) == 8
    assert len(cache.read(path, **SMALL | {"max_frames": 4}).frames) == 4
    os.utime(path, ns=(1, 1))
    cache.read(path, **SMALL)
    assert len(kept(cache.folder)) == 3
    synth_clip(path, seconds=2, seed=1)
    os.utime(path, ns=(1, 1))
    same(cache.read(path, **SMALL), read_media(path, **SMALL))
    os.remove(path)
    with pytest.raises(MediaError, match="no such file"):
        cache.read(path, **SMALL)


def clips_of(folder, count):
    """Clips that take equal room."""
    return [synth_clip(folder / f"{i}.mp4", seed=i) for i in range(count)]


def kept(folder):
    return sorted(folder.glob("*" + SUFFIX), key=lambda file: file.stat().st_mtime_ns)


def test_the_longest_unused_are_removed_and_nothing_else(tmp_path, undecodable):
    a, b, c, d = clips_of(tmp_path, 4)
    folder = tmp_path / "cache"
    MediaCache(folder, 1).read(a, **SMALL)
    size = kept(folder)[0].stat().st_size
    (folder / "model.safetensors").write_bytes(b"0" * 10 * size)
    (folder / ("0" * 32 + SUFFIX)).write_bytes(b"0" * size)  # left by a process that was killed
    os.utime(folder / ("0" * 32 + SUFFIX), ns=(1, 1))
    cache = MediaCache(folder, 3.5 * size / 2**30)
    for path in (b, c, a, d):
        cache.read(path, **SMALL)
    assert len(kept(folder)) == 3 and (folder / "model.safetensors").exists()
    undecodable()
    for path in (c, a, d):  # b was used before these
        cache.read(path, **SMALL)
    assert sum(file.stat().st_size for file in kept(folder)) <= cache.limit


def flip(content):
    """One bit of the frames is another."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:]


@pytest.mark.parametrize("damage", [flip, lambda content: content[:-100], lambda content: b"",
                                    lambda content: b"\0" * len(content)])
def test_damaged_files_are_written_anew(damage, tmp_path, undecodable):
    cache, path = MediaCache(tmp_path / "cache", 1), synth_clip(tmp_path / "a.mp4")
    plain = cache.read(path, **SMALL)
    [file] = kept(cache.folder)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.warns(UserWarning, match=rf"{file.name}: .*; the clip is decoded and written anew"):
        same(cache.read(path, **SMALL), plain)
    undecodable()
    same(cache.read(path, **SMALL), plain)


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "cache").write_text("a file")
    path = synth_clip(tmp_path / "a.mp4")
    with pytest.warns(UserWarning, match="a clip isn't kept: .*cache"):
        same(MediaCache(tmp_path / "cache", 1).read(path, **SMALL), read_media(path, **SMALL))


def test_processes_share_a_small_folder(tmp_path):
    """Room for 3 of 6 clips: each process removes what the others want, and all get what decoding gives."""
    paths, folder = clips_of(tmp_path, 6), tmp_path / "cache"
    MediaCache(folder, 1).read(paths[0], **SMALL)
    gib = 3.5 * kept(folder)[0].stat().st_size / 2**30
    with ProcessPoolExecutor(3, get_context("spawn")) as pool:
        decoded = list(pool.map(hammer, [folder] * 3, [paths] * 3, [gib] * 3, range(3)))
    assert all(3 < count < 60 for count in decoded)
    assert len(kept(folder)) <= 3 and len(list(folder.iterdir())) == len(kept(folder))


def test_the_config_names_the_folder(tmp_path, monkeypatch):
    for name in ("load_tokenizer", "load_policy", "Encoder", "load_prompts"):
        monkeypatch.setattr(setup, name, lambda *args: SimpleNamespace(thinker=None, known={}))
    monkeypatch.setattr(setup.guard, "watch", lambda minutes: None)
    config = EvalConfig("m", str(tmp_path / "out"), [Source("a")])
    assert setup.start(config, "cpu").make.cache is None
    config.media_cache, config.media_cache_gib = str(tmp_path / "cache"), 0.5
    cache = setup.start(config, "cpu").make.cache
    assert (cache.folder, cache.limit) == (tmp_path / "cache", 2**29)
