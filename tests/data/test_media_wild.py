"""Files as the world makes them, one section a kind, each with the right value: made-up time stamps, variable and absurd
rates, very short sound, several tracks, unknown codecs, pictures in parts; and the memory that reading takes."""

import math
import struct
import subprocess
import sys
import wave
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition

from hov2.config import MediaConfig
from hov2.data.inputs import kind_of, load_media
from hov2.data.media import MediaError, read_media
from hov2.data.samples import Sample
from hov2.data.video import frame_indices
from hov2.tools.check_data import Clip, _media_of
from tests.support.heif import write_heif
from tests.support.mediakit import decibels, moving_picture, pixels, remux, tone, write_video, write_wav

pytestmark = pytest.mark.usefixtures("no_stray_warnings")

TONE = tone(440, 48000, 4)


def numbers(clip, count):
    """Which of the `count` frames that were encoded each frame of the clip is."""
    originals = np.stack(list(moving_picture(count, 96, 64))).astype(int)
    found = []
    for picture in pixels(clip.frames):
        distances = np.abs(originals - picture).mean((1, 2, 3))
        found.append(int(distances.argmin()))
    return found


# Time stamps that FFmpeg makes up


B_FRAMES = {"bf": "3", "g": "12", "crf": "10"}
PYRAMID = {"x264-params": "bframes=7:b-adapt=0:b-pyramid=normal:open-gop=1:keyint=12", "crf": "10"}
HEVC = {"x265-params": "log-level=none:bframes=3:keyint=12:crf=10"}
MPEG4 = {"bf": "2", "g": "12", "b": "4000000"}


@pytest.mark.parametrize(
    "name, codec, options",
    [
        ("a.avi", "libx264", B_FRAMES),
        ("b.avi", "libx264", PYRAMID),
        ("c.avi", "mpeg4", MPEG4),
        ("d.avi", "mpeg2video", MPEG4),
        ("a.wmv", "libx264", B_FRAMES),
        ("a.h264", "libx264", B_FRAMES),
        ("b.h264", "libx264", PYRAMID),
        ("a.hevc", "libx265", HEVC),
        ("a.m2v", "mpeg2video", MPEG4),
    ],
)
def test_containers_without_presentation_times(name, codec, options, tmp_path, native):
    """Frames by number in the order shown; the rate is what the container or the stream itself declares."""
    rate = 25 if codec == "mpeg2video" else 4
    path = write_video(tmp_path / name, codec, count=32, rate=rate, options=options)
    clip = read_media(path, fps=rate / 2)
    assert numbers(clip, 32) == frame_indices(32, rate, rate / 2, 32)
    assert clip.sample_fps == pytest.approx(len(clip.frames) / 32 * rate)


@pytest.mark.parametrize("name", ["a.mp4", "a.mov"])
def test_made_up_times_that_were_copied(name, tmp_path, native):
    """An AVI file's stream put into MP4 as it is, as `ffmpeg -c copy` does: the made-up stamps are now in the file."""
    source = write_video(tmp_path / "a.avi", count=32, rate=4, options=B_FRAMES)
    clip = read_media(remux(source, tmp_path / name))
    assert numbers(clip, 32) == frame_indices(32, 4, 2, 32) and clip.sample_fps == pytest.approx(2)


def test_times_that_start_anew(tmp_path, native):
    """Two recordings one behind the other in a transport stream, as `cat a.ts b.ts`: in the order of the file."""
    parts = []
    for shift in (0, 3):  # so that no stamp stands twice
        path = write_video(tmp_path / "part.ts", rate=10, times=range(100 + shift, 130 + shift), count=30)
        parts.append(path.read_bytes())
    (tmp_path / "both.ts").write_bytes(b"".join(parts))
    clip = read_media(tmp_path / "both.ts")
    found = numbers(clip, 30)
    assert found == [index % 30 for index in frame_indices(60, 10, 2, 32)]
    assert clip.sample_fps == pytest.approx(2)


# Rates

BURST = [*range(60), *range(89, 89 + 30 * 57, 30)]  # 60 frames at 30 a second, then 57 at 1 a second


@pytest.mark.parametrize(
    "name, codec, options",
    [
        ("a.webm", "libvpx", {}),
        ("a.mkv", "libx264", {}),
        ("a.flv", "libx264", {}),
        ("a.ts", "libx264", {}),
        ("a.avi", "mpeg4", {}),
        ("a.mp4", "libx264", {}),
        ("b.mp4", "libx264", {"movflags": "frag_keyframe+empty_moov"}),
    ],
)
def test_variable_rate(name, codec, options, tmp_path):
    """117 frames in 59 s, as of a screen that was still for long: 2 a second, whatever FFmpeg guesses."""
    fast = {"deadline": "realtime", "cpu-used": "8"} if codec == "libvpx" else {}
    path = write_video(tmp_path / name, codec, 117, rate=30, times=BURST, options=fast, container_options=options)
    clip = read_media(path)
    assert clip.sample_fps == pytest.approx(32 / 117 * 116 / ((BURST[-1] - BURST[0]) / 30), rel=0.01)
    assert len(clip.frames) == 32
    shape, _, _ = load_media({"video": str(path)}, MediaConfig())
    assert shape.second_per_grid == pytest.approx(3.69, rel=0.01)


def test_a_last_frame_that_stays(tmp_path, native):
    """MP4 declares frames over the whole length; if the last stays for half a minute, that is not how far they lie apart."""
    path = write_video(tmp_path / "a.mp4", count=40, rate=10, options={"bf": "0"})
    content = bytearray(path.read_bytes())
    at = content.index(b"stts") + 8
    assert struct.unpack_from(">III", content, at) == (1, 40, 1024)
    content[at - 12 : at - 8] = struct.pack(">I", 32)  # one more entry, made room for within moov
    content[at : at + 12] = struct.pack(">IIIII", 2, 39, 1024, 1, 300 * 1024)
    for box in (b"moov", b"trak", b"mdia", b"minf", b"stbl"):
        place = content.index(box) - 4
        struct.pack_into(">I", content, place, struct.unpack_from(">I", content, place)[0] + 8)
    path.write_bytes(content)
    with av.open(str(path)) as container:
        assert float(container.streams.video[0].average_rate) == pytest.approx(40 / 33.9)
    clip = read_media(path)
    assert numbers(clip, 40) == frame_indices(40, 10, 2, 32) and clip.sample_fps == pytest.approx(2)


def write_dv(path, count):
    with av.open(str(path), "w", format="dv") as container:
        stream = container.add_stream("dvvideo", rate=25)
        stream.width, stream.height, stream.pix_fmt = 720, 576, "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((576, 720, 3), np.uint8), "rgb24")
        for _ in range(count):
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("count, rate", [(25, 4), (1, 50)])
def test_dv(count, rate, tmp_path):
    """FFmpeg says 60,000 frames a second."""
    path = write_dv(tmp_path / "a.dv", count)
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate > 1000
    assert read_media(path).sample_fps == pytest.approx(rate)


# Very short sound


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 44100, 48000, 192000])
@pytest.mark.parametrize("count", [1, 10, 200, 300, 700])
def test_sound_of_a_few_samples(rate, count, tmp_path):
    samples = tone(rate / 40, rate, count / rate)[:, None]
    path = write_wav(tmp_path / "a.wav", samples, rate, fmt="flt", codec="pcm_f32le")
    if count / rate <= 0.02:
        with pytest.raises(MediaError, match=r"shorter than one token of the audio tower \(0.02 s\)"):
            read_media(path)
        return
    audio = read_media(path).audio.numpy()
    assert len(audio) == math.ceil(count * 16000 / rate)
    inner = slice(len(audio) // 4, -len(audio) // 4)
    np.testing.assert_allclose(audio[inner], tone(rate / 40, 16000, 1)[: len(audio)][inner], atol=0.02)
    shape, _, features = load_media({"audio": str(path)}, MediaConfig())
    assert shape.audio_tokens > 0 and features.isfinite().all()


@pytest.mark.parametrize("name, codec", [("a.aiff", "pcm_s16be"), ("a.flac", "flac"), ("a.mov", "pcm_s16le")])
def test_a_blip_in_other_files(name, codec, tmp_path):
    path = write_wav(tmp_path / name, np.zeros((200, 1), np.int16), 48000, codec=codec)
    with pytest.raises(MediaError, match="shorter than one token"):
        read_media(path)


def test_sound_without_samples(tmp_path):
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((1, 2, 48000, 0, "NONE", ""))
    with pytest.raises(MediaError, match="no sound that can be decoded|no video, sound"):
        read_media(tmp_path / "a.wav")


@pytest.mark.parametrize("name, codec", [("a.mkv", "pcm_s16le"), ("a.mov", "pcm_s16le"), ("a.avi", "pcm_s16le")])
def test_a_blip_in_a_video_is_no_sound(name, codec, tmp_path):
    path = tmp_path / name
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        voice = container.add_stream(codec, rate=48000, layout="mono")
        for picture in moving_picture(10, 96, 64):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        frame = av.AudioFrame.from_ndarray(np.full((1, 200), 9000, np.int16), "s16", "mono")
        frame.sample_rate = 48000
        container.mux([*stream.encode(None), *voice.encode(frame), *voice.encode(None)])
    clip = read_media(path)
    assert clip.audio is None and not clip.audio_lost
    assert load_media({"video": str(path)}, MediaConfig())[0].audio_tokens == 0


# What is all there is not cut short


@pytest.mark.parametrize("codec", ["pcm_s16le", "pcm_s24le", "pcm_alaw"])
def test_pcm_in_quicktime(codec, tmp_path):
    """Its header counts samples, not packets."""
    path = tmp_path / "a.mov"
    write_video(path, sound=(codec, 48000, "mono", TONE[None]))
    clip = read_media(path)
    assert abs(len(clip.audio) - 64000) < 10 and len(clip.frames) == 8
    write_video(path, sound=(codec, 48000, "mono", TONE[None]), container_options={"movflags": "faststart"})
    path.write_bytes(path.read_bytes()[: -path.stat().st_size // 4])
    with pytest.warns(UserWarning, match="packets where the header counts"):
        read_media(path)


def test_cut_by_an_edit_list(tmp_path, native):
    """The edit list of each track says to begin 2.5 s in: groups of pictures before that aren't read at all."""
    path = write_video(
        tmp_path / "a.mp4", options={"g": "10", "bf": "0"}, sound=("aac", 48000, "mono", TONE[None]), rate=10
    )
    content = bytearray(path.read_bytes())
    at = -1
    for scale in (10240, 48000):
        at = content.index(b"elst", at + 1)
        assert struct.unpack_from(">I", content, at + 8) == (1,)
        struct.pack_into(">Ii", content, at + 12, 1500, scale * 5 // 2)
    path.write_bytes(content)
    with av.open(str(path)) as container:
        video = container.streams.video[0]
        read = sum(1 for packet in container.demux(video) if packet.size)
        assert video.frames == 40 and read == 20
    clip = read_media(path)
    assert numbers(clip, 40) == [25 + index for index in frame_indices(15, 10, 2, 32)]
    assert clip.sample_fps == pytest.approx(4 / 15 * 10)
    assert abs(len(clip.audio) - 24000) < 2000


@pytest.mark.parametrize("source", ["a.mp4", "a.mkv"])
def test_avi_with_more_slots_than_frames(source, tmp_path, native):
    """An AVI file of 100 slots a second for 10 frames a second, the empty ones left out of the file at its end."""
    path = tmp_path / "a.avi"
    write_video(path, "mpeg4", rate=100, times=range(0, 400, 10))
    content = bytearray(path.read_bytes())
    at = content.index(b"strh") + 8 + 32
    struct.pack_into("<I", content, at, 400)
    path.write_bytes(content)
    clip = read_media(path)
    assert numbers(clip, 40) == frame_indices(40, 10, 2, 32) and clip.sample_fps == pytest.approx(2)


def test_matroska_whose_other_tracks_are_longer(tmp_path):
    """A second sound of 4 s, which isn't read, and a film whose last frame stays: the header's 4 s are no promise."""
    path = write_tracks(tmp_path / "a.mkv", [(TONE[:48000], Disposition.default), SILENT], frames=5)
    with av.open(str(path)) as container:
        assert container.duration > 3.9 * av.time_base
    clip = read_media(path)
    assert abs(len(clip.audio) - 16000) < 1000 and len(clip.frames) == 4
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="where the header says 4.0 s"):
        read_media(path)


# Several tracks


def write_tracks(path, sounds, still=None, frames=40):
    """A film of `frames`, 10 a second, with `sounds` (samples, disposition), and a one-frame `still` (place, flags)."""
    with av.open(str(path), "w") as container:
        picture = None
        if still and still[0] == "first":
            picture = container.add_stream("mjpeg", rate=1)
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.disposition = Disposition(0)
        if still and still[0] == "last":
            picture = container.add_stream("mjpeg", rate=1)
        if picture:
            picture.width, picture.height, picture.pix_fmt = 128, 128, "yuvj420p"
            picture.disposition = still[1]
        voices = []
        for _, disposition in sounds:
            voice = container.add_stream("pcm_s16le" if path.suffix == ".mov" else "aac", rate=48000, layout="mono")
            voice.disposition = disposition
            voices.append(voice)
        packets = []
        if picture:
            packets += picture.encode(av.VideoFrame.from_ndarray(np.zeros((128, 128, 3), np.uint8), "rgb24"))
            packets += picture.encode(None)
        for image in moving_picture(frames, 96, 64):
            packets += stream.encode(av.VideoFrame.from_ndarray(image, "rgb24"))
        packets += stream.encode(None)
        for voice, (samples, _) in zip(voices, sounds):
            frame = av.AudioFrame.from_ndarray(samples[None], "fltp", "mono")
            frame.sample_rate = 48000
            packets += [*voice.encode(frame), *voice.encode(None)]
        for packet in packets:
            container.mux(packet)
    return path


SILENT = (np.zeros_like(TONE), Disposition(0))
LOUD = (TONE, Disposition.default)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.mov"])
def test_the_sound_that_is_flagged_default(name, tmp_path):
    for sounds in ([SILENT, LOUD], [LOUD, SILENT]):
        clip = read_media(write_tracks(tmp_path / name, sounds))
        assert clip.audio[16000:32000].abs().max() > 0.4 and len(clip.frames) == 8


def test_sound_for_the_hard_of_seeing_comes_second(tmp_path):
    described = (np.zeros_like(TONE), Disposition.visual_impaired)
    clip = read_media(write_tracks(tmp_path / "a.mkv", [described, (TONE, Disposition(0))]))
    assert clip.audio[16000:32000].abs().max() > 0.4


@pytest.mark.parametrize("flags", [Disposition(0), Disposition.default, Disposition.attached_pic])
@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.mov"])
def test_a_still_is_not_the_video(name, place, flags, tmp_path, native):
    clip = read_media(write_tracks(tmp_path / name, [LOUD], still=(place, flags)))
    assert clip.frames.shape == (8, 3, 64, 96) and clip.sample_fps == pytest.approx(2)
    assert clip.audio is not None


# Codecs that FFmpeg doesn't know

UNKNOWN = {  # file: (codecs, what to change into what, the name in the warning)
    "a.mkv": ("libx264", "aac", ((b"A_AAC", b"A_XYZ"),), "A_XYZ"),
    "a.avi": ("mpeg4", "libmp3lame", ((b"\x55\0\1\0\x80\xbb", b"\x34\x12\1\0\x80\xbb"),), "0x1234"),
    "a.mov": ("mpeg4", "pcm_s16le", ((b"sowt", b"wxyz"),), "wxyz"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_sound_that_cannot_be_decoded_is_told(name, tmp_path):
    video, audio, changes, told = UNKNOWN[name]
    path = write_video(tmp_path / name, video, sound=(audio, 48000, "mono", TONE[None]))
    content = path.read_bytes()
    for old, new in changes:
        assert content.count(old) == 1
        content = content.replace(old, new)
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=f"its sound is of a codec that FFmpeg can't decode: .*{told}") as caught:
        clip = read_media(path)
    assert len(caught) == 1 and len(clip.frames) == 8 and clip.audio is None and clip.audio_lost
    with pytest.warns(UserWarning):
        shape = load_media({"video": str(path)}, MediaConfig())[0]
    sample = Sample("s", "Who?", "free-form", "", (), "", {"video": str(path)})
    assert shape.audio_lost and _media_of(sample, Clip(shape=shape)) == "video with sound that can't be decoded"


def test_sound_of_which_nothing_can_be_decoded(tmp_path):
    path = write_video(tmp_path / "a.mp4", sound=("aac", 48000, "mono", TONE[None]))
    content = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        for packet in container.demux(audio=0):
            if packet.size:
                content[packet.pos : packet.pos + packet.size] = b"\xff" * packet.size
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=r"(\d+) of \1 sound packets can't be decoded"):
        clip = read_media(path)
    assert clip.audio is None and clip.audio_lost and len(clip.frames) == 8


def test_an_unknown_codec_alone(tmp_path):
    path = tmp_path / "a.mka"
    write_wav(path, np.zeros((48000, 1), np.int16), 48000)
    path.write_bytes(path.read_bytes().replace(b"A_PCM/INT/LIT", b"A_XYZ/INT/LIT"))
    with pytest.raises(MediaError, match="its sound is of a codec that FFmpeg can't decode: A_XYZ/INT/LIT"):
        read_media(path)
    path = write_video(tmp_path / "a.mkv", "mpeg4")
    path.write_bytes(path.read_bytes().replace(b"V_MPEG4/ISO/ASP", b"V_XYZW4/ISO/ASP"))
    with pytest.raises(MediaError, match="its video is of a codec that FFmpeg can't decode: V_XYZW4/ISO/ASP"):
        read_media(path)


# Pictures

Y, X = np.mgrid[:90, :150]
PICTURE = np.stack([X * 255 // 150, Y * 255 // 90, (X + Y) * 255 // 240], -1).astype(np.uint8)
ALPHA = np.where(X < 75, 0, 255).astype(np.uint8)  # the left half can't be seen
ON_WHITE = np.where(ALPHA[..., None] == 0, 255, PICTURE)


def image_of(path):
    clip = read_media(path)
    assert kind_of(clip) == "image" and len(clip.frames) == 1
    return pixels(clip.frames)[0]


@pytest.mark.parametrize("tile", [None, (64, 64)])
@pytest.mark.parametrize("brand", ["heic", "avif"])
def test_heic_and_avif(brand, tile, tmp_path, native):
    """Whole, whether in one piece or in tiles, and on white."""
    plain = image_of(write_heif(tmp_path / f"a.{brand}", brand, PICTURE, tile))
    assert plain.shape == PICTURE.shape and decibels(PICTURE, plain) > 35
    clear = image_of(write_heif(tmp_path / f"b.{brand}", brand, PICTURE, tile, ALPHA))
    assert decibels(ON_WHITE, clear) > 30
    assert (clear[:, :70] == 255).all()


@pytest.mark.parametrize("tile", [None, (64, 64)])
def test_a_turned_heic(tile, tmp_path, native):
    path = write_heif(tmp_path / "a.heic", "heic", PICTURE, tile, turns=1)
    assert decibels(np.rot90(PICTURE), image_of(path)) > 35


def test_a_damaged_heic(tmp_path):
    path = write_heif(tmp_path / "a.heic", "heic", PICTURE, (64, 64))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 3 // 4])
    with pytest.raises(MediaError, match="corrupt image"):
        read_media(path)
    path.write_bytes(content.replace(b"dimg", b"thmb"))
    with pytest.raises(MediaError, match="a grid of 2 x 3 tiles has 0"):
        read_media(path)
    path.write_bytes(content.replace(b"grid", b"iovl"))
    with pytest.raises(MediaError):
        read_media(path)


def test_animated_avif_is_its_first_picture(tmp_path, native):
    path = write_video(tmp_path / "a.avif", "libsvtav1", count=5, options={"crf": "5", "preset": "10"})
    assert decibels(next(moving_picture(1, 96, 64)), image_of(path)) > 25


def test_animated_gif_with_clear_parts(tmp_path, native):
    path = tmp_path / "a.gif"
    rgba = np.dstack([np.full((60, 60, 3), 85, np.uint8), np.full((60, 60), 255, np.uint8)])
    rgba[:, :30] = 0
    with av.open(str(path), "w") as container:
        stream = container.add_stream("gif", rate=10)
        stream.width, stream.height, stream.pix_fmt = 60, 60, "pal8"
        for shade in (0, 1):
            frame = av.VideoFrame(60, 60, "pal8")
            frame.planes[0].update(
                np.pad(np.tile(np.repeat([[0, 1]], 30, 1), (60, 1)), ((0, 0), (0, frame.planes[0].line_size - 60)))
                .astype(np.uint8)
                .tobytes()
            )
            frame.planes[1].update(struct.pack("<256I", 0, 0xFF555555 + shade, *[0xFF000000] * 254))
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    picture = image_of(path)
    assert (picture[:, :30] == 255).all() and (picture[:, 30:] == 85).all()


def animated_webp(path):
    """Two frames in the boxes of an animation, each a still WebP's picture."""

    def chunk(kind, data):
        return kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)

    with av.open(str(path), "w", format="image2") as container:
        stream = container.add_stream("libwebp", rate=1)
        stream.width, stream.height, stream.pix_fmt = 56, 56, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((56, 56, 3), np.uint8), "rgb24")))
        container.mux(stream.encode(None))
    still = path.read_bytes()
    picture = still[still.index(b"VP8 ") :]
    size = (55).to_bytes(3, "little") * 2
    frame = chunk(b"ANMF", bytes(6) + size + (100).to_bytes(3, "little") + b"\0" + picture)
    body = b"WEBP" + chunk(b"VP8X", b"\2\0\0\0" + size) + chunk(b"ANIM", bytes(6)) + frame * 2
    path.write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)
    return path


def test_animated_webp_is_refused_by_its_name(tmp_path):
    with pytest.raises(MediaError, match="an animated WebP, which FFmpeg can't decode"):
        read_media(animated_webp(tmp_path / "a.webp"))


def write_tiff(path, order, compression, data):
    """A TIFF of 64 x 64 RGB pixels in one strip."""
    entries = [
        (256, 3, 64), (257, 3, 64), (258, 3, 8), (259, 3, compression), (262, 3, 2), (273, 4, 8),
        (277, 3, 3), (278, 3, 64), (279, 4, len(data)),
    ]  # fmt: skip
    directory = struct.pack(f"{order}H", len(entries))
    for tag, kind, value in entries:
        directory += struct.pack(f"{order}HHI", tag, kind, 1) + struct.pack(
            f"{order}{'HH' if kind == 3 else 'I'}", *[value, 0][: 5 - kind]
        )
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8 + len(data))
    path.write_bytes(head + data + directory + bytes(4))
    return path


@pytest.mark.parametrize("order", ["<", ">"])
def test_tiff_in_jpeg_is_refused_by_its_name(order, tmp_path, native):
    source = next(moving_picture(1, 64, 64))
    np.testing.assert_array_equal(image_of(write_tiff(tmp_path / "a.tiff", order, 1, source.tobytes())), source)
    with av.open(str(tmp_path / "a.jpg"), "w", format="image2") as container:
        stream = container.add_stream("mjpeg", rate=1)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuvj444p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(source, "rgb24")))
        container.mux(stream.encode(None))
    path = write_tiff(tmp_path / "b.tiff", order, 7, (tmp_path / "a.jpg").read_bytes())
    with pytest.raises(MediaError, match="a TIFF with JPEG compression, which FFmpeg can't decode"):
        read_media(path)
    with pytest.raises(MediaError, match="or one of a kind that FFmpeg can't decode"):
        read_media(write_tiff(tmp_path / "c.tiff", order, 50000, source.tobytes()))


# Memory


PEAK = """
import resource, sys, torch
torch.set_num_threads(1)
from hov2.data.media import read_media
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
for path in sys.argv[1:3]:
    read_media(path)
before = peak()
read_media(sys.argv[3])
print(peak() - before)
"""


def megabytes(small, large):
    """Peak memory of reading a large file, in MB, after small ones of its kind."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(small), str(small), str(large)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    return float(done.stdout)


def write_png(path, side):
    """RGBA pixels, half of them clear."""
    row = b"\0" + bytes([200, 100, 50, 255, 0, 0, 0, 128]) * (side // 2)
    parts = []
    for kind, data in (
        (b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 6, 0, 0, 0)),
        (b"IDAT", zlib.compress(row * side, 1)),
        (b"IEND", b""),
    ):
        parts.append(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


@pytest.mark.slow
def test_memory_for_a_large_picture(tmp_path):
    side = 4000
    small = write_png(tmp_path / "small.png", 100)
    assert megabytes(small, write_png(tmp_path / "large.png", side)) < 3 * side * side * 4 / 2**20


@pytest.mark.slow
def test_memory_for_sound_of_a_high_rate(tmp_path):
    """A minute at 192 kHz would be 46 MB as float32; at 16 kHz it is 4."""
    for name, seconds in (("small", 1), ("large", 60)):
        with wave.open(str(tmp_path / f"{name}.wav"), "wb") as file:
            file.setparams((1, 2, 192000, 0, "NONE", ""))
            file.writeframes(np.round(tone(440, 192000, 1) * 20000).astype("<i2").tobytes() * seconds)
    assert megabytes(tmp_path / "small.wav", tmp_path / "large.wav") < 25


def test_blocks_are_resampled_as_one(tmp_path):
    """The same samples, whether they come in small packets or in one."""
    samples = np.round(np.random.default_rng(0).normal(0, 3000, 150_000)).astype(np.int16)
    whole = read_media(write_wav(tmp_path / "a.wav", samples[:, None], 44100)).audio
    with av.open(str(tmp_path / "b.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=44100, layout="mono")
        for start in range(0, len(samples), 777):
            frame = av.AudioFrame.from_ndarray(samples[None, start : start + 777], "s16", "mono")
            frame.sample_rate = 44100
            frame.pts, frame.time_base = start, Fraction(1, 44100)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert read_media(tmp_path / "b.mkv").audio.equal(whole)
