"""Odd clips, sounds and images, each with what hov2/data/media.py says of it; then good clips damaged at random."""

import base64
import json
import os
import re
import struct
import subprocess
import sys
import warnings
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from hov2.data.media import MediaError, read_media
from hov2.data.video import VideoReader, frame_indices
from tests.support.mediakit import DATA, decibels, every_frame, moving_picture, pixels, tone, write_video, write_wav

pytestmark = pytest.mark.usefixtures("no_stray_warnings")

TESTS = Path(__file__).parents[1]
PICTURES = {
    case["name"]: base64.b64decode(case["file"])
    for case in json.loads((TESTS / "golden" / "media_peers.json").read_text())["pictures"]
}


@pytest.fixture
def no_second_try(monkeypatch):
    """Frames have to be found from the packets alone."""
    monkeypatch.delattr(VideoReader, "_decode_through")


def assert_frames(path, rate, total, max_frames=16):
    """The frames chosen out of `total` at `rate` are those that decoding everything gives."""
    frames, clip = every_frame(path), read_media(path, max_frames=max_frames)
    chosen = frame_indices(total, rate, 2.0, max_frames)
    assert len(frames) == total
    assert clip.sample_fps == pytest.approx(len(chosen) / total * rate, rel=1e-3)
    np.testing.assert_array_equal(pixels(clip.frames), np.stack([frames[i] for i in chosen]))
    return clip


# Time: rates, gaps, offsets, lengths


def test_variable_rate_is_frames_over_the_length(tmp_path, native, no_second_try):
    """20 frames at 20 a second, then 20 at 5 (the last for a twentieth): 40 in 4.85 s, chosen by number."""
    path = write_video(tmp_path / "a.mp4", rate=20, times=[*range(20), *range(20, 100, 4)], options={"bf": "0"})
    assert_frames(path, 40 / 4.85, 40)


def test_avi_with_repeated_frames(tmp_path, native, no_second_try):
    """A chunk without bytes says "show the last frame again": no frame of its own, but its time passes."""
    path = write_video(tmp_path / "a.avi", "mpeg4", times=[*range(10), *range(15, 45)], options={"g": "10"})
    assert path.read_bytes().count(b"00dc\0\0\0\0") >= 5
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 45
    assert_frames(path, 39 / 4.4, 40)


def test_avi_whose_header_counts_one_frame_more(tmp_path, native):
    """As some recorders write it: neither a warning nor a frame that isn't there."""
    path = write_video(tmp_path / "a.avi", "mpeg4")
    content = bytearray(path.read_bytes())
    at = content.index(b"strh") + 8 + 32
    assert struct.unpack_from("<I", content, at) == (40,)
    struct.pack_into("<I", content, at, 41)
    path.write_bytes(content)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 41
    assert_frames(path, 10.0, 40)


def test_a_thousand_frames_a_second(tmp_path, native, no_second_try):
    path = write_video(tmp_path / "a.mp4", rate=1000, count=60)
    assert len(assert_frames(path, 1000.0, 60).frames) == 4


def test_a_duration_beyond_all_bounds_is_not_believed(tmp_path):
    path = write_video(tmp_path / "a.mp4", sound=("aac", 48000, "mono", tone(440, 48000, 4)[None]))
    before = read_media(path)
    content = bytearray(path.read_bytes())
    for box, offset in ((b"mvhd", 20), (b"tkhd", 24), (b"mdhd", 20)):
        struct.pack_into(">I", content, content.index(box) + offset, 2**31 - 1)
    path.write_bytes(content)
    after = read_media(path)
    assert after.frames.equal(before.frames) and after.audio.equal(before.audio)
    assert after.sample_fps == before.sample_fps


def write_late(path, video_start, audio_start, video, audio, seconds=3):
    """10 frames a second from `video_start` on and a tone of 48 kHz from `audio_start` on."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(video, rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        voice = container.add_stream(audio, rate=48000, layout="mono")
        packets = []
        for i, picture in enumerate(moving_picture(10 * seconds, 96, 64)):
            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            frame.pts, frame.time_base = i + 10 * video_start, Fraction(1, 10)
            packets += stream.encode(frame)
        frame = av.AudioFrame.from_ndarray(tone(440, 48000, seconds)[None], voice.format.name, "mono")
        frame.sample_rate, frame.pts, frame.time_base = 48000, 48000 * audio_start, Fraction(1, 48000)
        packets += [*stream.encode(None), *voice.encode(frame), *voice.encode(None)]
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            container.mux(packet)
    return path


@pytest.mark.parametrize("video_start, audio_start", [(0, 2), (2, 0), (100, 100)])
@pytest.mark.parametrize(
    "name, video, audio", [("a.mp4", "libx264", "aac"), ("a.mkv", "libx264", "ac3"), ("a.ts", "libx264", "aac")]
)
def test_late_starts_are_no_silence(name, video, audio, video_start, audio_start, tmp_path, native):
    """Frame 0 and sample 0 are the first in the file: no padding, whatever starts late."""
    path = write_late(tmp_path / name, video_start, audio_start, video, audio)
    with av.open(str(path)) as container:
        starts = [float(s.start_time * s.time_base) for s in (container.streams.video[0], container.streams.audio[0])]
    assert starts[1] - starts[0] == pytest.approx(audio_start - video_start, abs=0.1)
    clip = read_media(path)
    assert abs(len(clip.audio) - 3 * 16000) <= 1600
    assert clip.audio[2000:2800].abs().max() > 0.3
    assert clip.frames.shape[0] == 6 and clip.sample_fps == pytest.approx(2)
    assert decibels(next(moving_picture(1, 96, 64)), pixels(clip.frames)[0]) > 25


@pytest.mark.parametrize("seconds", [1, 9])
def test_sound_shorter_or_longer_than_the_video(seconds, tmp_path):
    sound = ("aac", 48000, "mono", tone(440, 48000, seconds)[None])
    clip = read_media(write_video(tmp_path / "a.mp4", sound=sound))
    assert len(clip.frames) == 8 and abs(len(clip.audio) - 16000 * seconds) <= 1024


# Pictures: codecs and shapes


@pytest.mark.parametrize(
    "name, codec, pix_fmt, options",
    [
        ("a.mp4", "libsvtav1", "yuv420p", {"preset": "10", "crf": "20"}),
        ("a.mkv", "libsvtav1", "yuv420p10le", {"preset": "10", "crf": "20"}),
        ("a.webm", "libvpx-vp9", "yuva420p", {"crf": "10", "b": "0"}),  # its transparency is ignored
        ("b.mp4", "libx265", "yuv420p10le", {"x265-params": "log-level=none:crf=15"}),
        ("c.mp4", "libx264", "yuv444p10le", {"crf": "10"}),
        ("a.mov", "prores_ks", "yuv422p10le", {}),
        ("b.mkv", "ffv1", "gray", {}),
    ],
)
def test_codecs_and_depths(name, codec, pix_fmt, options, tmp_path, native):
    path = write_video(tmp_path / name, codec, count=30, pix_fmt=pix_fmt, options=options)
    clip = assert_frames(path, 10.0, 30)
    pictures = list(moving_picture(30, 96, 64))
    if pix_fmt == "gray":
        assert (clip.frames.float().std(1) == 0).all()
        return
    for picture, i in zip(pixels(clip.frames), frame_indices(30, 10.0, 2.0, 16)):
        assert decibels(pictures[i], picture) > 24, "half the colour's detail is lost in 4:2:0, the picture isn't"


@pytest.mark.parametrize(
    "name, codec, width, height", [("a.mpg", "mpeg2video", 96, 65), ("a.webm", "libvpx-vp9", 97, 65)]
)
def test_odd_sizes_with_halved_colour(name, codec, width, height, tmp_path, native):
    path = write_video(tmp_path / name, codec, width=width, height=height, rate=25)
    assert assert_frames(path, 25.0, 40).frames.shape[2:] == (height, width)


def test_pixel_aspect_is_ignored(tmp_path):
    path = tmp_path / "wide.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 112, 112, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)
        for picture in moving_picture(8, 112, 112):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode(None))
    with av.open(str(path)) as container:
        assert container.streams.video[0].sample_aspect_ratio == 2
    assert read_media(path).frames.shape[2:] == (112, 112)


# Sound


@pytest.mark.parametrize(
    "name, fmt, codec, dtype, tolerance",
    [
        ("a.wav", "s16", "pcm_alaw", np.int16, 0.02),
        ("a.wav", "s16", "pcm_mulaw", np.int16, 0.02),
        ("a.aiff", "s16", "pcm_s16be", np.int16, 1e-4),
        ("a.wav", "s32", "pcm_s32le", np.int32, 1e-6),
        ("a.au", "s16", "pcm_s16be", np.int16, 1e-4),
        ("a.flac", "s16", "flac", np.int16, 1e-4),
        ("b.flac", "s32", "flac", np.int32, 1e-6),
        ("a.m4a", "s16p", "alac", np.int16, 1e-4),
        ("a.wav", "u8", "pcm_u8", np.uint8, 0.01),
    ],
)
def test_formats_at_8_khz(name, fmt, codec, dtype, tolerance, tmp_path):
    wave = tone(500, 8000, 0.5)
    scale = {np.uint8: 127, np.int16: 2**15 - 1, np.int32: 2**31 - 1}[dtype]
    samples = np.round(wave.astype(np.float64) * scale + (128 if dtype is np.uint8 else 0)).astype(dtype)
    path = write_wav(tmp_path / name, samples[:, None], 8000, fmt=fmt, codec=codec)
    audio = read_media(path, sample_rate=8000).audio.numpy()
    np.testing.assert_allclose(audio, wave, atol=tolerance)
    upsampled = read_media(path).audio.numpy()
    assert len(upsampled) == 8000
    np.testing.assert_allclose(upsampled[800:-800], tone(500, 16000, 0.5)[800:-800], atol=tolerance + 5e-3)


def test_four_channels(tmp_path):
    parts = np.stack([tone(200 * (c + 1), 16000, 0.25, 0.9) for c in range(4)], 1)
    path = write_wav(tmp_path / "a.wav", parts, 16000, "quad", "flt", "pcm_f32le")
    np.testing.assert_allclose(read_media(path).audio.numpy(), parts.mean(1), atol=1e-6)


def test_antiphase_in_planes(tmp_path):
    """Stereo that cancels is silence, also from a codec that keeps the channels apart."""
    samples = np.round(tone(300, 16000, 0.5) * 32767).astype(np.int16)
    path = tmp_path / "a.m4a"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("alac", rate=16000, layout="stereo")
        frame = av.AudioFrame.from_ndarray(np.stack([samples, -samples]), "s16p", "stereo")
        frame.sample_rate = 16000
        container.mux([*stream.encode(frame), *stream.encode(None)])
    assert len(read_media(path).audio) == 8000 and read_media(path).audio.abs().max() == 0


def test_mp3_is_as_long_as_what_was_encoded(tmp_path):
    """The encoder's delay and padding are cut off, as its header tells."""
    with av.open(str(tmp_path / "a.mp3"), "w") as container:
        stream = container.add_stream("libmp3lame", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(tone(440, 16000, 1.1)[None], "fltp", "mono")
        frame.sample_rate = 16000
        container.mux([*stream.encode(frame), *stream.encode(None)])
    assert len(read_media(tmp_path / "a.mp3").audio) == 17600


@pytest.mark.parametrize("value", [np.nan, np.inf, -1e30])
def test_sound_that_is_no_sound(value, tmp_path):
    samples = tone(440, 16000, 0.5)[:, None]
    samples[100] = value
    path = write_wav(tmp_path / "a.wav", samples, 16000, fmt="flt", codec="pcm_f32le")
    with pytest.raises(MediaError, match="samples that are infinite, no numbers or far too large"):
        read_media(path)


def test_sound_above_full_scale_is_kept(tmp_path):
    samples = 3 * tone(440, 16000, 0.5, 1.0)
    path = write_wav(tmp_path / "a.wav", samples[:, None], 16000, fmt="flt", codec="pcm_f32le")
    np.testing.assert_array_equal(read_media(path).audio.numpy(), samples)


# Images


def png(width, height, depth, colour, rows, *chunks):
    """A PNG file of these `rows` (bytes each), with extra `chunks` (name, content) before them."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    content = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [(b"IHDR", header), *chunks, (b"IDAT", content), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )


def picture_of(path, content):
    path.write_bytes(content)
    clip = read_media(path)
    assert clip.frames.shape[:2] == (1, 3) and clip.sample_fps is None and clip.audio is None
    return pixels(clip.frames)[0]


def test_sixteen_bit_images(tmp_path, native):
    """Scaled to 8 bits. (Pillow clips grey of 16 bits, which turns most of it white.)"""
    grey = np.linspace(0, 65535, 64).astype(">u2")
    picture = picture_of(tmp_path / "grey.png", png(64, 30, 16, 0, [grey.tobytes()] * 30))
    np.testing.assert_allclose(picture, np.broadcast_to((grey / 257.0)[None, :, None], (30, 64, 3)), atol=1.5)
    colour = np.stack([grey, grey[::-1], np.full(64, 30000, ">u2")], 1).astype(">u2")
    picture = picture_of(tmp_path / "colour.png", png(64, 30, 16, 2, [colour.tobytes()] * 30))
    np.testing.assert_allclose(picture, np.broadcast_to((colour / 257.0)[None], (30, 64, 3)), atol=1.5)


def test_alpha_of_a_palette_is_dropped_and_of_colours_put_on_white(tmp_path, native):
    palette = bytes([255, 0, 0, 0, 0, 255])
    content = png(32, 30, 8, 3, [bytes([0, 1] * 16)] * 30, (b"PLTE", palette), (b"tRNS", bytes([0, 128])))
    picture = picture_of(tmp_path / "palette.png", content)
    np.testing.assert_array_equal(picture[5, :2], [[255, 0, 0], [0, 0, 255]])
    content = png(32, 30, 8, 6, [bytes([255, 0, 0, 0, 0, 0, 255, 255]) * 16] * 30)
    picture = picture_of(tmp_path / "colour.png", content)
    np.testing.assert_array_equal(picture[5, :2], [[255, 255, 255], [0, 0, 255]])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_ignored(orientation, tmp_path, native):
    content = bytearray(PICTURES["exif6.jpg"])
    at = content.index(b"Exif\0\0") + 6
    order = "<" if content[at : at + 2] == b"II" else ">"
    entry = content.index(struct.pack(order + "HHI", 0x112, 3, 1), at) + 8
    assert struct.unpack_from(order + "H", content, entry) == (6,)
    plain = picture_of(tmp_path / "6.jpg", bytes(content))
    struct.pack_into(order + "H", content, entry, orientation)
    picture = picture_of(tmp_path / "turned.jpg", bytes(content))
    assert picture.shape == (32, 48, 3)
    np.testing.assert_array_equal(picture, plain)


def test_what_is_inside_counts_not_the_name(tmp_path, native):
    inside = picture_of(tmp_path / "a.gif", PICTURES["palette.gif"])
    np.testing.assert_array_equal(picture_of(tmp_path / "bus.png", PICTURES["palette.gif"]), inside)


def test_tiff(tmp_path, native):
    source = next(moving_picture(1, 48, 32))
    with av.open(str(tmp_path / "a.tiff"), "w", format="image2") as container:
        stream = container.add_stream("tiff", rate=1)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "rgb24"
        container.mux([*stream.encode(av.VideoFrame.from_ndarray(source, "rgb24")), *stream.encode(None)])
    np.testing.assert_array_equal(picture_of(tmp_path / "b.tiff", (tmp_path / "a.tiff").read_bytes()), source)


@pytest.mark.parametrize("width, height", [(6030, 30), (30, 6030)])
def test_thin_images(width, height, tmp_path):
    (tmp_path / "thin.png").write_bytes(png(width, height, 8, 0, [bytes(width)] * height))
    with pytest.raises(MediaError, match=f"{width}x{height} pixels: one side is more than 200 times"):
        read_media(tmp_path / "thin.png")


@pytest.mark.parametrize("name", ["rgb.bmp", "lossy.webp", "lossless.webp", "progressive420.jpg"])
def test_half_of_other_images_is_refused_too(name, tmp_path):
    (tmp_path / name).write_bytes(PICTURES[name][: len(PICTURES[name]) // 2])
    with pytest.raises(MediaError):
        read_media(tmp_path / name)


def test_half_a_gif_is_what_there_is_of_it(tmp_path, native):
    """FFmpeg's decoder doesn't tell that the rest is missing."""
    whole = picture_of(tmp_path / "whole.gif", PICTURES["palette.gif"])
    picture = picture_of(tmp_path / "half.gif", PICTURES["palette.gif"][: -len(PICTURES["palette.gif"]) // 4])
    assert picture.shape == whole.shape
    np.testing.assert_array_equal(picture[:8], whole[:8])


# Damaged files


@pytest.mark.parametrize("box", [b"moov", b"trak", b"mdia", b"stbl", b"stsd", b"stco", b"stsz"])
def test_broken_index(box, tmp_path):
    """An mp4 of which a box of the index is garbled."""
    content = bytearray(write_video(tmp_path / "a.mp4").read_bytes())
    at = content.index(box)
    content[at : at + 40] = b"\xa5" * 40
    (tmp_path / "a.mp4").write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(MediaError) as caught:
            read_media(tmp_path / "a.mp4")
    assert re.search("not a media file|no video, sound|no frames|corrupt", caught.value.reason)


@pytest.mark.parametrize(
    "start",
    [
        b"",
        b"\0\0\0\x20ftypisom",
        b"RIFF\xff\xff\0\0AVI LIST",
        b"\x1aE\xdf\xa3",
        b"OggS\0\2",
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff\xe0",
        b"GIF89a",
        b"RIFF\xff\xff\0\0WEBPVP8 ",
        b"RIFF\xff\xff\0\0WAVEfmt ",
        b"fLaC",
        b"ID3\4\0\0",
        b"BM",
    ],
)
@pytest.mark.parametrize("name", ["a.mp4", "a.mp3", "a.png"])
def test_noise_behind_a_good_start(start, name, tmp_path):
    (tmp_path / name).write_bytes(start + np.random.default_rng(5).bytes(20_000))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(MediaError):
            read_media(tmp_path / name)


def test_truncated_avi_is_noticed(tmp_path):
    path = write_video(tmp_path / "a.avi", "mpeg4", count=100, options={"g": "10"})
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.warns(UserWarning) as caught:
        clip = read_media(path)
    assert "video packets where the header counts 100" in str(caught[0].message)
    assert len(clip.frames) >= 4


def test_truncated_streams_are_used_without_a_word(tmp_path):
    """Transport streams and Ogg don't say how long they are."""
    path = write_video(tmp_path / "a.ts", count=100, options={"g": "10"})
    whole = read_media(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2 // 188 * 188])
    assert 4 <= len(read_media(path).frames) < len(whole.frames)
    voice = (DATA / "lena.opus").read_bytes()
    (tmp_path / "a.opus").write_bytes(voice[: len(voice) // 2])
    assert 5 * 16000 < len(read_media(tmp_path / "a.opus").audio) < 7 * 16000


def test_sound_alone_at_another_place_than_the_first(tmp_path):
    """A stream that nothing can decode comes first; what is left of the file is its sound."""
    path = write_video(tmp_path / "a.avi", "mpeg4", sound=("libmp3lame", 48000, "mono", tone(440, 48000, 2)[None]))
    content = path.read_bytes().replace(b"vids", b"vidz")
    path.write_bytes(content)
    with av.open(str(path)) as container:
        assert [s.type for s in container.streams] == ["data", "audio"]
    clip = read_media(path)
    assert clip.frames is None and abs(len(clip.audio) - 32000) < 1200


def test_the_number_of_packets_left_is_told_right(tmp_path):
    path = write_video(
        tmp_path / "a.mp4",
        container_options={"movflags": "faststart"},
        options={"g": "1"},
        sound=("aac", 48000, "mono", tone(440, 48000, 1)[None]),
    )
    with av.open(str(path)) as container:
        starts = [packet.pos for packet in container.demux(video=0) if packet.size]
    path.write_bytes(path.read_bytes()[: starts[30]])
    with pytest.warns(UserWarning, match=r"a.mp4: 30 video packets where the header counts 40; using what is there"):
        assert len(read_media(path).frames) == 6


# Mutations


@pytest.fixture(scope="module")
def good_clips(tmp_path_factory):
    """One short clip with sound in each of six containers."""
    folder = tmp_path_factory.mktemp("good")
    sound = np.stack([tone(440, 48000, 4)] * 2)
    made = [
        write_video(folder / name, video, sound=(audio, 48000, "stereo", sound), options={"g": "12"})
        for name, video, audio in (
            ("a.mp4", "libx264", "aac"),
            ("a.webm", "libvpx", "libopus"),
            ("a.mkv", "libx264", "ac3"),
            ("a.avi", "mpeg4", "libmp3lame"),
            ("a.ts", "libx264", "aac"),
        )
    ]
    return [*made, DATA / "lena.opus"]


def run_mutations(folder, first, count, clips):
    """Runs them in a process of their own; returns its lines. A crash, a hang or a wrong result fails the test."""
    done = subprocess.run(
        [
            sys.executable,
            str(TESTS / "support" / "media_mutations.py"),
            str(folder),
            str(first),
            str(count),
            *map(str, clips),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=120 + 10 * count,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"exit code {done.returncode}: {lines[-1:]}\n{done.stderr[-3000:]}"
    assert len(lines) == count and all(re.search(r": (Media$|MediaError: .)", line) for line in lines), lines
    assert not list(folder.iterdir())
    return lines


@pytest.mark.slow
def test_twenty_mutations(good_clips, tmp_path):
    lines = run_mutations(tmp_path, 0, 20, good_clips)
    assert any(line.endswith(": Media") for line in lines) and any("MediaError" in line for line in lines)


@pytest.mark.slow
def test_three_hundred_mutations(good_clips, tmp_path):
    lines = run_mutations(tmp_path, 20, 300, good_clips)
    assert sum(line.endswith(": Media") for line in lines) > 100 and sum("MediaError" in line for line in lines) > 20


@pytest.mark.parametrize(
    "reader, code, told",
    [
        ("lambda path: ctypes.string_at(0)", -11, "Segmentation fault"),
        ("lambda path: time.sleep(60)", 1, "Timeout"),
        ("lambda path: files.append(open(path))", 1, "AttributeError"),
        ("lambda path: files.append(open(path)) or hov2.data.media.read_media(path)", 1, "a file was left open"),
        ("lambda path: hov2.data.media.Media(None, None, torch.tensor([math.nan]))", 1, "not finite"),
    ],
)
@pytest.mark.slow
def test_the_watchdog_bites(reader, code, told, good_clips, tmp_path):
    """A reader that crashes, hangs, leaks or returns nonsense is seen."""
    script = (
        "import ctypes, math, sys, time, torch, hov2.data.media; files = []; sys.path.insert(0, sys.argv[1]); "
        f"from tests.support import media_mutations; media_mutations.main(sys.argv[2], 0, 1, [sys.argv[3]], {reader}, seconds=2)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(TESTS.parent), str(tmp_path), str(good_clips[0])],
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == code and told in done.stderr, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["0.mp4"], "the file that did it is kept"
