"""media.py on real clips, on clips made here with PyAV, and against its peers (tests/golden/media_peers.json)."""

import base64
import gc
import hashlib
import http.server
import json
import math
import os
import pickle
import struct
import threading
import warnings
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor

from hov2.data import video as video_module
from hov2.data.media import MediaError, read_media
from hov2.data.sound import log_mel
from hov2.data.video import VideoReader, frame_indices, patchify, smart_resize
from tests.support.mediakit import (
    BUNNY,
    DATA,
    decibels,
    every_frame,
    moving_picture,
    pixels,
    remux,
    snr,
    tone,
    write_video,
    write_wav,
)

pytestmark = pytest.mark.usefixtures("no_stray_warnings")

PEERS = json.loads((Path(__file__).parents[1] / "golden" / "media_peers.json").read_text())


# The real clips


def test_bigbuckbunny():
    clip = read_media(BUNNY)
    assert clip.frames.shape == (10, 3, 224, 420) and clip.frames.dtype == torch.uint8
    assert clip.sample_fps == pytest.approx(10 / 132 * 25)
    assert clip.audio.shape == (math.ceil(254976 * 16000 / 48000),) and clip.audio.dtype == torch.float32
    assert 0.003 < clip.audio.square().mean().sqrt() < 0.005  # FFmpeg's own 5.1 downmix would be 5 times as loud
    assert clip.audio_cut == 0


@pytest.mark.parametrize("name, length", [("lena.m4a", 196534), ("lena.opus", 196348)])
def test_voice(name, length):
    clip = read_media(DATA / name)
    assert clip.frames is None and clip.sample_fps is None and clip.audio_cut == 0
    assert clip.audio.shape == (length,)
    assert 0.03 < clip.audio.square().mean().sqrt() < 0.3


def test_frames_before_resizing_are_the_decoders_own(native):
    frames = every_frame(BUNNY)
    chosen = frame_indices(len(frames), 25.0, 2.0, 32)
    np.testing.assert_array_equal(pixels(read_media(BUNNY).frames), np.stack([frames[i] for i in chosen]))


def test_resizing_in_uint8_is_close_to_float():
    frames = every_frame(BUNNY)
    native_frames = np.stack([frames[i] for i in frame_indices(len(frames), 25.0, 2.0, 32)])
    result = read_media(BUNNY).frames
    native_frames = torch.from_numpy(native_frames).permute(0, 3, 1, 2).float()
    exact = torch.nn.functional.interpolate(native_frames, result.shape[2:], mode="bicubic", antialias=True)
    exact = exact.round().clamp(0, 255)
    assert decibels(exact, result) > 50
    assert (exact - result.float()).abs().max() <= 8


def test_options_reach_the_frames():
    clip = read_media(BUNNY, fps=1.0, max_frames=4, max_pixels=32 * 28 * 28, sample_rate=8000)
    assert clip.frames.shape == (4, 3, *smart_resize(720, 1280, min_pixels=4 * 28 * 28, max_pixels=32 * 28 * 28))
    assert clip.sample_fps == pytest.approx(4 / 132 * 25)
    assert clip.audio.shape == (254976 // 6,)


# Frame choice in all kinds of files: the frames chosen must be those that decoding everything gives

CLIPS = {
    "b_frames.mp4": {"options": {"g": "12", "bf": "3"}},
    "open_groups.mp4": {"count": 120, "options": {"x264-params": "open-gop=1:keyint=16:bframes=3:b-adapt=0"}},
    "pyramid.mp4": {"count": 120, "options": {"x264-params": "bframes=7:b-adapt=0:b-pyramid=normal:ref=4:keyint=60"}},
    "weighted.mp4": {
        "count": 120,
        "options": {"x264-params": "bframes=3:open-gop=1:keyint=30:weightp=2:b-pyramid=strict"},
    },
    "one_keyframe.mkv": {"options": {"g": "1000"}},
    "all_keyframes.mp4": {"options": {"g": "1"}},
    "fragments.mp4": {"container_options": {"movflags": "frag_keyframe+empty_moov"}, "options": {"g": "10"}},
    "transport.ts": {"options": {"g": "15"}},
    "bare.h264": {"options": {"bf": "2"}},
    "vp8.webm": {"codec": "libvpx", "options": {"auto-alt-ref": "1", "lag-in-frames": "12", "g": "15"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"g": "15"}},
    "hevc.mp4": {"codec": "libx265", "options": {"x265-params": "log-level=none:keyint=12"}},
    "ten_bit.mkv": {"codec": "libx265", "pix_fmt": "yuv420p10le", "options": {"x265-params": "log-level=none"}},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"bf": "2", "g": "12"}},
    "mpeg2.mpg": {"codec": "mpeg2video", "rate": 25, "options": {"bf": "2"}},
    "odd_size.mkv": {"codec": "ffv1", "width": 333, "height": 187, "pix_fmt": "yuv444p"},
    "odd_height.mp4": {"width": 96, "height": 65, "pix_fmt": "yuv444p"},
    "variable_rate.mp4": {"rate": 50, "times": [i + i * i % 7 + 3 * (i // 5) for i in range(0, 200, 5)]},
    "time_gap.webm": {"codec": "libvpx", "times": [*range(20), *range(200, 220)]},
    "late_start.mkv": {"times": range(1000, 1040)},
}


NO_STAMPS = ("bare.h264", "mpeg4.avi")  # all of these has to be decoded, as nothing says when a frame is shown
RATES = {"bare.h264": 10, "time_gap.webm": 39 / 21.9}  # of others, the declared one is right


@pytest.mark.parametrize("name", CLIPS)
def test_chosen_frames_are_exact(name, tmp_path, native, monkeypatch):
    if name not in NO_STAMPS:
        monkeypatch.delattr(VideoReader, "_decode_through")
    path = write_video(tmp_path / name, **CLIPS[name])
    frames = every_frame(path)
    with av.open(str(path)) as container:
        rate = RATES.get(name, float(container.streams.video[0].average_rate))
    clip = read_media(path, max_frames=16)
    chosen = frame_indices(len(frames), rate, 2.0, 16)
    assert clip.sample_fps == pytest.approx(len(chosen) / len(frames) * rate)
    np.testing.assert_array_equal(pixels(clip.frames), np.stack([frames[i] for i in chosen]))


@pytest.mark.parametrize(
    "options, packets, frames",
    [
        ({"g": "10", "bf": "0"}, 8 * 10, 8 * 10),
        ({"g": "400", "x264-params": "bframes=3:b-adapt=0:b-pyramid=none:scenecut=0"}, 400, 8 + 400 // 4 + 1),
    ],
)
def test_only_what_is_needed_is_decoded(options, packets, frames, tmp_path, monkeypatch):
    """Groups of pictures without a chosen frame aren't, nor are frames that no other leans on: 3 of 4 in the second."""
    path = write_video(tmp_path / "long.mp4", count=400, options=options)
    fed, came = [], []
    decode = video_module._decode

    def counted(codec, given, errors):
        for frame in decode(codec, (fed.append(packet.pts) or packet for packet in given), errors):
            came.append(frame.pts)
            yield frame

    monkeypatch.setattr(video_module, "_decode", counted)
    assert len(read_media(path, max_frames=8).frames) == 8
    assert len(fed) <= packets and len(came) <= frames


def test_frames_hidden_by_an_edit_list_are_not_counted(tmp_path, native, monkeypatch):
    monkeypatch.delattr(VideoReader, "_decode_through")
    whole = write_video(tmp_path / "whole.mp4", count=40, options={"bf": "0", "g": "40"})
    with av.open(str(whole)) as old, av.open(str(tmp_path / "cut.mp4"), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        shift = round(1 / old.streams.video[0].time_base)  # the first second gets negative times
        for packet in old.demux():
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
                new.mux(packet)
    frames = every_frame(tmp_path / "cut.mp4")
    assert len(frames) == 30
    chosen = frame_indices(30, 10.0, 2.0, 16)
    clip = read_media(tmp_path / "cut.mp4")
    np.testing.assert_array_equal(pixels(clip.frames), np.stack([frames[i] for i in chosen]))


@pytest.mark.parametrize("name, codec", [("one.mp4", "libx264"), ("one.webm", "libvpx")])
def test_a_video_of_one_frame_is_shown_twice(name, codec, tmp_path):
    clip = read_media(write_video(tmp_path / name, codec, count=1))
    assert clip.frames.shape[0] == 2 and torch.equal(clip.frames[0], clip.frames[1])
    assert clip.sample_fps == pytest.approx(20)  # two frames in the tenth of a second it lasts


@pytest.mark.parametrize(
    "degrees, matrix",
    [
        (90, (0, 1, -1, 0)),
        (180, (-1, 0, 0, -1)),
        (270, (0, -1, 1, 0)),  # clockwise, as a phone held upright writes 90
    ],
)
def test_rotation(degrees, matrix, tmp_path, native):
    path = write_video(tmp_path / "turned.mp4", count=4, width=112, height=56)
    frames = every_frame(path)
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 44
    a, b, c, d = (v << 16 for v in matrix)
    content[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    # the matrix sends the x axis to (a, b), y downwards, so that 90 sends the top left corner to the top right
    expected = np.stack([np.rot90(f, -degrees // 90) for f in frames])
    np.testing.assert_array_equal(pixels(read_media(path).frames), expected)


def test_size_is_that_of_the_turned_frame(tmp_path):
    path = write_video(tmp_path / "turned.mp4", count=4, width=560, height=112)
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 44
    content[at : at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    assert read_media(path).frames.shape == (4, 3, 560, 112)


# Sound


def test_video_with_sound(tmp_path):
    sound = np.stack([tone(440, 48000, 4)] * 2)
    for name, video, audio in (("a.mp4", "libx264", "aac"), ("a.webm", "libvpx-vp9", "libopus")):
        clip = read_media(write_video(tmp_path / name, video, sound=(audio, 48000, "stereo", sound)))
        assert len(clip.frames) == 8
        assert abs(len(clip.audio) - 64000) <= 1024  # encoders work in whole frames
        spectrum = np.abs(np.fft.rfft(clip.audio[8000:24000].numpy()))
        assert spectrum.argmax() == 440
        assert clip.audio[8000:24000].square().mean().sqrt() == pytest.approx(0.5 / 2**0.5, rel=0.05)


def test_channels_that_change_on_the_way(tmp_path):
    """Mono, then stereo with one silent channel: each is averaged as what it is."""
    for layout, channels in (("mono", 1), ("stereo", 2)):
        bare = {"write_xing": "0", "id3v2_version": "0"}
        with av.open(str(tmp_path / f"{layout}.mp3"), "w", container_options=bare) as container:
            stream = container.add_stream("libmp3lame", rate=16000, layout=layout)
            samples = np.zeros((channels, 16000), np.float32)
            samples[0] = tone(440, 16000, 1)
            frame = av.AudioFrame.from_ndarray(samples, "fltp", layout)
            frame.sample_rate = 16000
            container.mux([*stream.encode(frame), *stream.encode(None)])
    (tmp_path / "both.mp3").write_bytes(b"".join((tmp_path / f"{x}.mp3").read_bytes() for x in ("mono", "stereo")))
    audio = read_media(tmp_path / "both.mp3").audio
    assert audio[4000:12000].abs().max() == pytest.approx(0.5, abs=0.03)
    assert audio[-12000:-4000].abs().max() == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("layout, channels", [("mono", 1), ("stereo", 2), ("5.1", 6)])
def test_channels_are_averaged(layout, channels, tmp_path):
    parts = np.stack([tone(200 * (c + 1), 16000, 0.5, 0.9) for c in range(channels)], 1)
    samples = np.round(parts * 32767).astype(np.int16)
    clip = read_media(write_wav(tmp_path / "a.wav", samples, 16000, layout))
    np.testing.assert_allclose(clip.audio.numpy(), (samples / 32768).mean(1), atol=1e-6)


def test_antiphase_stereo_is_silence(tmp_path):
    samples = np.round(tone(300, 16000, 0.2) * 32767).astype(np.int16)
    path = write_wav(tmp_path / "a.wav", np.stack([samples, -samples], 1), 16000, "stereo")
    assert read_media(path).audio.abs().max() == 0


@pytest.mark.parametrize(
    "fmt, codec, scale, zero",
    [
        ("u8", "pcm_u8", 128, 128),
        ("s16", "pcm_s16le", 2**15, 0),
        ("s32", "pcm_s24le", 2**31, 0),
        ("flt", "pcm_f32le", 1, 0),
        ("dbl", "pcm_f64le", 1, 0),
    ],
)
def test_sample_formats(fmt, codec, scale, zero, tmp_path):
    dtype = {"u8": np.uint8, "s16": np.int16, "s32": np.int32, "flt": np.float32, "dbl": np.float64}[fmt]
    wave = tone(500, 16000, 0.25)
    samples = (wave.astype(np.float64) * scale + zero).astype(dtype)[:, None]
    audio = read_media(write_wav(tmp_path / "a.wav", samples, 16000, fmt=fmt, codec=codec)).audio.numpy()
    np.testing.assert_allclose(audio, wave, atol=1.01 / 128 if fmt == "u8" else 1.01 / 2**15)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000])
def test_resampling(rate, tmp_path):
    samples = tone(1000, rate, 1.2347)
    path = write_wav(tmp_path / "a.wav", samples[:, None], rate, fmt="flt", codec="pcm_f32le")
    audio = read_media(path).audio.numpy()
    assert len(audio) == math.ceil(len(samples) * 16000 / rate)
    inner = slice(1600, -1600)
    assert snr(tone(1000, 16000, 1.3)[: len(audio)][inner], audio[inner]) > 75


@pytest.mark.parametrize("frequency, amplitude", [(7200, 0.5), (8200, 0)])
def test_resampling_keeps_its_band_and_nothing_else(frequency, amplitude, tmp_path):
    samples = tone(frequency, 48000, 1)
    audio = read_media(write_wav(tmp_path / "a.wav", samples[:, None], 48000, fmt="flt", codec="pcm_f32le")).audio
    assert audio[1600:-1600].square().mean().mul(2).sqrt() == pytest.approx(amplitude, abs=1e-4)


@pytest.mark.parametrize("rate", [4000, 16000])
def test_long_sound_is_cut_and_the_rest_counted(rate, tmp_path):
    samples = np.zeros((rate * 312, 1), np.uint8) + 128
    samples[:: rate // 4] = 200
    clip = read_media(write_wav(tmp_path / "a.wav", samples, rate, fmt="u8", codec="pcm_u8"))
    assert clip.audio.shape == (300 * 16000,)
    assert clip.audio_cut == pytest.approx(12, abs=0.01)
    assert clip.audio[-16000:].abs().max() > 0


def test_cover_art_is_not_video(tmp_path):
    path = tmp_path / "song.mp3"
    with av.open(str(path), "w") as container:
        sound = container.add_stream("libmp3lame", rate=16000, layout="mono")
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 64, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        frame = av.AudioFrame.from_ndarray(tone(440, 16000, 1)[None], "fltp", "mono")
        frame.sample_rate = 16000
        picture = av.VideoFrame.from_ndarray(next(moving_picture(1, 64, 64)), "rgb24")
        container.mux([*cover.encode(picture), *cover.encode(None)])
        container.mux([*sound.encode(frame), *sound.encode(None)])
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 1
    clip = read_media(path)
    assert clip.frames is None and abs(len(clip.audio) - 16000) < 1200


def test_video_without_sound(tmp_path):
    clip = read_media(write_video(tmp_path / "silent.mp4"))
    assert len(clip.frames) == 8 and clip.audio is None and clip.audio_cut == 0


# Images


@pytest.mark.parametrize("case", PEERS["pictures"], ids=lambda case: case["name"])
def test_images_against_pillow(case, tmp_path, native):
    path = tmp_path / case["name"]
    path.write_bytes(base64.b64decode(case["file"]))
    clip = read_media(path)
    assert clip.sample_fps is None and clip.audio is None and clip.frames.shape[:2] == (1, 3)
    expected = np.frombuffer(zlib.decompress(base64.b64decode(case["pillow"])), np.uint8).reshape(case["shape"])
    result = pixels(clip.frames)[0]
    if path.suffix == ".jpg" or path.name.startswith("lossy"):
        assert decibels(expected, result) > 45
        assert np.abs(expected.astype(int) - result).max() <= 4
    else:
        np.testing.assert_array_equal(result, expected)


def test_image_size_and_name(tmp_path, monkeypatch):
    png = base64.b64decode(next(case["file"] for case in PEERS["pictures"] if case["name"] == "rgb.png"))
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "a%03d.png", "http:b.png", "no_extension", "wrong.jpg"):
        Path(name).write_bytes(png)
        assert read_media(name, min_pixels=16 * 28 * 28).frames.shape == (1, 3, 112, 140)


def test_animations_count_as_images(tmp_path, native):
    for name, codec, pix_fmt in (("a.gif", "gif", "rgb8"), ("a.apng", "apng", "rgb24")):
        path = write_video(tmp_path / name, codec, count=3, width=56, height=56, pix_fmt=pix_fmt)
        clip = read_media(path)
        assert clip.frames.shape == (1, 3, 56, 56) and clip.sample_fps is None
        np.testing.assert_array_equal(pixels(clip.frames)[0], every_frame(path)[0])


@pytest.mark.parametrize("name", ["rgb.png", "420.jpg"])
def test_half_an_image_is_refused(name, tmp_path):
    content = base64.b64decode(next(case["file"] for case in PEERS["pictures"] if case["name"] == name))
    (tmp_path / name).write_bytes(content[:-200])
    with pytest.raises(MediaError, match="corrupt image"):
        read_media(tmp_path / name)


# Damaged and foreign files


def test_truncated_mp4_is_used_as_far_as_it_goes(tmp_path, native):
    content = remux(BUNNY, tmp_path / "whole.mp4", {"movflags": "faststart"}).read_bytes()
    path = tmp_path / "cut.mp4"
    path.write_bytes(content[:600_000])
    with pytest.warns(UserWarning) as caught:
        clip = read_media(path)
    assert all(str(path) in str(w.message) for w in caught)
    assert "where the header counts 132" in str(caught[0].message)
    frames = every_frame(BUNNY)
    assert 2 < len(clip.audio) / 16000 < 3
    assert len(clip.frames) == 4 and 1.2 < clip.sample_fps < 2
    for picture in pixels(clip.frames)[:-1]:
        assert any(np.array_equal(picture, frame) for frame in frames[:66])
    assert min(np.abs(pixels(clip.frames)[-1].astype(int) - f).mean() for f in frames[55:66]) < 1


@pytest.mark.parametrize("name, codec", [("a.mkv", "libx264"), ("a.webm", "libvpx-vp9")])
def test_truncated_matroska(name, codec, tmp_path):
    content = write_video(tmp_path / name, codec, count=100, options={"g": "10"}).read_bytes()
    path = tmp_path / f"cut_{name}"
    path.write_bytes(content[: len(content) // 2])
    with pytest.warns(UserWarning, match="where the header says 10.0 s"):
        clip = read_media(path)
    assert len(clip.frames) >= 4


def damage(path, content, *ranges):
    content = bytearray(content)
    for start, stop in ranges:
        content[start:stop] = b"\xff" * (stop - start)
    path.write_bytes(content)
    return path


def packet_ranges(path, kind):
    with av.open(str(path)) as container:
        return [(p.pos, p.pos + p.size) for p in container.demux(container.streams.get(**{kind: 0})) if p.size]


def test_a_lost_frame_is_left_out_with_a_warning(tmp_path, native):
    whole = write_video(tmp_path / "whole.mp4", count=120, options={"g": "1"})
    frames = every_frame(whole)
    path = damage(tmp_path / "damaged.mp4", whole.read_bytes(), packet_ranges(whole, "video")[-1])
    with pytest.warns(UserWarning, match=f"{path}: 1 of 120 video packets can't be decoded"):
        clip = read_media(path)
    chosen = frame_indices(119, 10.0, 2.0, 32)
    assert clip.sample_fps == pytest.approx(len(chosen) / 119 * 10)
    np.testing.assert_array_equal(pixels(clip.frames), np.stack([frames[i] for i in chosen]))


def test_corrupt_video_is_refused(tmp_path):
    whole = write_video(tmp_path / "whole.mp4", count=100)
    ranges = packet_ranges(whole, "video")
    path = damage(tmp_path / "corrupt.mp4", whole.read_bytes(), *ranges[50:])
    with pytest.raises(MediaError, match=r"corrupt: \d+ of 100 video packets can't be decoded") as caught:
        read_media(path)
    assert caught.value.path == str(path)


def test_corrupt_sound_is_used_as_far_as_it_goes(tmp_path):
    whole = DATA / "lena.m4a"
    ranges = packet_ranges(whole, "audio")
    path = damage(tmp_path / "corrupt.m4a", whole.read_bytes(), ranges[200], ranges[300])
    with pytest.warns(UserWarning, match=f"{path}: .* of 530 sound packets can't be decoded"):
        clip = read_media(path)
    assert 196534 - 3000 < len(clip.audio) < 196534


BAD_FILES = {
    "empty.mp4": (b"", "is empty"),
    "text.mp4": (b"not a clip\n" * 100, "not a media file"),
    "text.txt": (b"not a clip\n" * 100, "a text file"),
    "noise.mp4": (np.random.default_rng(0).bytes(5000), "not a media file"),
    "words.srt": (b"1\n00:00:00,000 --> 00:00:02,000\nhello\n\n", "no video, sound or image"),
    "no_index.mp4": (BUNNY.read_bytes()[:300_000], "not a media file"),  # its index comes last
    "list.ffconcat": (b"ffconcat version 1.0\nfile clip.ts\n", "a playlist"),
    "list.m3u8": (b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nclip.ts\n#EXT-X-ENDLIST\n", "a playlist"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_unusable_files(name, tmp_path):
    content, reason = BAD_FILES[name]
    write_video(tmp_path / "clip.ts")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MediaError, match=reason) as caught:
        read_media(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name}: ")


def test_unusable_paths(tmp_path):
    for path, reason in (
        (tmp_path / "missing.mp4", "no such file"),
        (tmp_path, "is a directory"),
        ("/dev/null", "not a regular file"),
        ("concat:a|b", "no such file"),
        ("a\0b", "can't be opened"),
        ("http://127.0.0.1:9/a.mp4", "a URL; only local files are read"),
    ):
        with pytest.raises(MediaError) as caught:
            read_media(path)
        assert caught.value.reason.startswith(reason)


def test_too_wide(tmp_path):
    with pytest.raises(MediaError, match="more than 200 times"):
        read_media(write_video(tmp_path / "wide.mp4", count=2, width=3600, height=16))


def test_error_survives_a_worker_process():
    error = pickle.loads(pickle.dumps(MediaError("a.mp4", "is empty")))
    assert (error.path, error.reason, str(error)) == ("a.mp4", "is empty", "a.mp4: is empty")


def test_nothing_is_fetched(tmp_path, monkeypatch):
    """Files that refer to other places reach nothing but local files."""
    requests, options, av_open = [], [], av.open
    monkeypatch.setattr(av, "open", lambda *a, **kwargs: options.append(kwargs["options"]) or av_open(*a, **kwargs))

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            self.send_error(404)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/clip.ts"
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{url}\n#EXT-X-ENDLIST\n"
    files = {"a.m3u8": playlist, "a.mp4": playlist, "a.ffconcat": f"ffconcat version 1.0\nfile '{url}'\n"}
    try:
        for name, text in files.items():
            (tmp_path / name).write_text(text)
            with pytest.raises(MediaError):
                read_media(tmp_path / name)
        with pytest.raises(MediaError, match="URL"):
            read_media(url)
        assert requests == [] and options == [{"protocol_whitelist": "file"}] * len(files)
        with pytest.raises(av.FFmpegError):  # the server and the playlist would work: without the whitelist it's asked
            av.open(str(tmp_path / "a.m3u8"), options={"protocol_whitelist": "file,http,tcp"})
        assert requests
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts /proc/self/fd")
def test_files_are_closed(tmp_path):
    corrupt = damage(tmp_path / "corrupt.mp4", BUNNY.read_bytes(), (400_000, 1_000_000))
    text = tmp_path / "text.txt"
    text.write_bytes(b"not a clip\n" * 100)
    small = write_video(tmp_path / "small.mp4")
    gc.disable()  # closing must not wait for the collector
    try:
        before = len(os.listdir("/proc/self/fd"))
        for path in [small, text, DATA / "lena.opus", tmp_path / "missing"] * 5 + [corrupt]:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    read_media(path)
                except MediaError:
                    pass
        assert len(os.listdir("/proc/self/fd")) == before
    finally:
        gc.enable()


# Sizes, frame choice, patches and mels against the peers


def test_smart_resize_is_the_references():
    for height, width, least, most, expected in PEERS["sizes"]:
        assert smart_resize(height, width, min_pixels=least, max_pixels=most) == tuple(expected)
    with pytest.raises(ValueError, match="200"):
        smart_resize(10, 2001, min_pixels=3136, max_pixels=100352)
    assert smart_resize(28, 5000, min_pixels=3136, max_pixels=100352) == (28, 4228)  # the reference: 0


def test_frame_indices_are_the_references():
    for total, video_fps, fps, most, expected in PEERS["indices"]:
        assert frame_indices(total, video_fps, fps, most) == expected
    assert frame_indices(1, 25.0, 2.0, 32) == [0, 0]
    for total, most in ((0, 32), (10, 1)):
        with pytest.raises(ValueError):
            frame_indices(total, 25.0, 2.0, most)


def golden_frames(count):
    t, c, h, w = np.ogrid[:count, :3, :56, :84]
    return torch.from_numpy(((t * 37 + c * 71 + h * 13 + w * 29 + h * w * (c + 1)) % 256).astype(np.uint8))


@pytest.mark.parametrize("case", PEERS["patches"], ids=lambda case: f"{case['frames']}_frames")
def test_patches_are_transformers_own(case):
    patches, grid = patchify(golden_frames(case["frames"]))
    assert grid.tolist() == case["grid_thw"] and grid.dtype == torch.int64
    assert patches[0, ::97].tolist() == case["first_row"]
    assert patches[-1, ::97].tolist() == case["last_row"]
    assert hashlib.sha256(patches.contiguous().numpy().tobytes()).hexdigest() == case["sha256"]


def test_patches_one_by_one():
    frames = golden_frames(3)
    patches, grid = patchify(frames)
    assert grid.tolist() == [[2, 4, 6]] and patches.shape == (48, 1176)
    frames = torch.cat([frames, frames[-1:]]).double()
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073], dtype=torch.float64).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711], dtype=torch.float64).view(3, 1, 1)
    values = (frames / 255 - mean) / std
    row = 0
    for t in range(2):
        for block_y in range(2):
            for block_x in range(3):
                for y, x in ((0, 0), (0, 1), (1, 0), (1, 1)):
                    top, left = (block_y * 2 + y) * 14, (block_x * 2 + x) * 14
                    patch = values[2 * t : 2 * t + 2, :, top : top + 14, left : left + 14]
                    expected = patch.transpose(0, 1).reshape(-1).float()
                    torch.testing.assert_close(patches[row], expected, atol=1e-5, rtol=0)
                    row += 1
    with pytest.raises(ValueError, match="multiples of 28"):
        patchify(torch.zeros(2, 3, 28, 42, dtype=torch.uint8))


@pytest.mark.parametrize("length", [4000, 32000, 16001, 160 * 73 - 1, 400, 100])
def test_log_mel_is_that_of_the_padded_extractor(length):
    extractor = WhisperFeatureExtractor(
        feature_size=128, sampling_rate=16000, hop_length=160, n_fft=400, chunk_length=300, dither=0.0
    )
    audio = read_media(DATA / "lena.m4a").audio[20000 : 20000 + length]
    full = extractor(audio.numpy(), sampling_rate=16000, padding="max_length", return_tensors="pt")["input_features"]
    assert full.shape == (1, 128, 30000)
    result = log_mel(audio)
    assert result.shape == (128, math.ceil(length / 160)) and result.dtype == torch.float32
    assert torch.equal(result, full[0, :, : result.shape[1]])
