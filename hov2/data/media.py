"""Media files in, tensors out: what happens between a clip on disk and the towers' inputs.

`read_media` goes through a file once and returns evenly spaced frames (video.py) and mono sound (sound.py). Frame
choice and sizes are those of qwen-omni-utils 0.0.9; pixels and sound differ from what it reads by less than one can see
or hear.

As there, frame 0 and sample 0 are the first in the file, whatever their time stamps say; frames are chosen by number,
not by time; pixel aspect ratios, EXIF orientation and mirrored display matrices are ignored.
"""

import os
import stat
import warnings
from dataclasses import dataclass

import av
from av.error import FFmpegError
from av.stream import Disposition
from torch import Tensor

from hov2.data.errors import MediaError
from hov2.data.sound import SoundReader
from hov2.data.video import Resizer, VideoReader, read_image

_STILLS = {"image2", "gif", "apng", "webp", "ico"}  # and every demuxer called *_pipe
_NOT_MEDIA = {"tty": "a text file", "hls": "a playlist", "concat": "a playlist", "dash": "a playlist"}


@dataclass
class Media:
    """What a file holds."""

    frames: Tensor | None  # uint8 (T, 3, H, W), resized; T is even for a video and 1 for an image
    sample_fps: float | None  # kept frames in a second of the clip; None for an image and for sound
    audio: Tensor | None  # float32 (N,), mono
    audio_cut: float = 0.0  # seconds of sound left out beyond MAX_AUDIO_SECONDS


def read_media(
    path: str | os.PathLike,
    *,
    fps: float = 2.0,
    max_frames: int = 32,
    min_pixels: int = 4 * 28 * 28,
    max_pixels: int = 128 * 28 * 28,
    sample_rate: int = 16000,
) -> Media:
    """Read a local video, sound or image file into a Media.

    A video gives frames and, if it has sound, audio; a sound file (cover art or not) only audio; an image one frame. Of
    an animated GIF, WebP or PNG, the first frame is the image. A video of one frame gives that frame twice. Of several
    streams of a kind, the first is read.

    Frames are decoded to RGB at their own size, turned as the file's display matrix says and resized in uint8. Images,
    before resizing, are what Pillow makes of them, with RGBA on white: PNG, GIF, BMP and lossless WebP exactly, JPEG
    and lossy WebP within 4 levels (a PNG's colour key, which Pillow ignores, becomes white). Sound is the mean of the
    channels, then resampled. The compressed video is held in memory while it's read.

    A file that ends early, or has up to 1 % undecodable video packets or any undecodable sound, is used as far as it
    goes, with a warning that names it; frames are then chosen among those that can be decoded. A file cut off is only
    noticed where the header says how much there should be (MP4, AVI, Matroska, WebM). A damaged image is refused,
    but for a GIF cut off, of which FFmpeg shows what there is.

    Raises MediaError for anything that can't be used: a missing, empty or unreadable file, a URL, a playlist, a file
    that is not media, one without picture and sound, one too damaged, a picture more than 200 times as wide as high.
    """
    path = os.fspath(path)
    check_file(path)
    resize = Resizer(path, min_pixels, max_pixels)
    frames, sample_fps = None, None
    with open_media(path) as container:
        video, audio = _first_streams(path, container)
        if video and _is_still(container):
            return Media(read_image(path, container, video, resize), None, None)
        packets, sound = _demux(path, container, video, audio)
        if video:
            frames, sample_fps = VideoReader(path, video, packets, resize).read(fps, max_frames)
    if sound is None:
        return Media(frames, sample_fps, None)
    waveform = sound.waveform(path, sample_rate)
    if waveform is None and not video:
        raise MediaError(path, "no sound that can be decoded")
    return Media(frames, sample_fps, waveform, sound.cut)


def open_media(path: str) -> av.container.InputContainer:
    """Open a local file with PyAV. Raises MediaError for one that FFmpeg can't read."""
    try:
        # "file:" keeps a colon in a name from meaning a protocol; the whitelist holds for what a file refers to as well
        return av.open(f"file:{path}", metadata_errors="ignore", options={"protocol_whitelist": "file"})
    except FFmpegError as error:
        raise MediaError(path, f"not a media file that FFmpeg can read ({error.strerror})") from None


def check_file(path: str) -> os.stat_result:
    """Return the `os.stat` of a file that isn't empty. Raises MediaError for what isn't one."""
    try:
        info = os.stat(path)
    except FileNotFoundError:
        raise MediaError(path, "a URL; only local files are read" if "://" in path else "no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = getattr(error, "strerror", None) or error
        raise MediaError(path, f"can't be opened: {reason}") from None
    if stat.S_ISDIR(info.st_mode):
        raise MediaError(path, "is a directory")
    if not stat.S_ISREG(info.st_mode):
        raise MediaError(path, "not a regular file")
    if info.st_size == 0:
        raise MediaError(path, "is empty")
    return info


def _first_streams(
    path: str, container: av.container.InputContainer
) -> tuple[av.VideoStream | None, av.AudioStream | None]:
    """Return the file's first video stream that is no cover art and its first sound stream, None where there is none.

    Raises MediaError for a file that has neither.
    """
    name = container.format.name
    if name in _NOT_MEDIA:
        raise MediaError(path, f"{_NOT_MEDIA[name]}, not a media file")
    video, audio = None, None
    for stream in container.streams:
        if not stream.codec_context:
            continue
        is_cover = stream.disposition & Disposition.attached_pic
        if stream.type == "video" and video is None and not is_cover:
            video = stream
        if stream.type == "audio" and audio is None:
            audio = stream
    if not video and not audio:
        raise MediaError(path, "no video, sound or image that can be decoded")
    return video, audio


def _is_still(container: av.container.InputContainer) -> bool:
    """Whether the file is an image rather than a video."""
    name = container.format.name
    return name in _STILLS or name.endswith("_pipe") or container.metadata.get("major_brand") == "avif"


def _demux(
    path: str,
    container: av.container.InputContainer,
    video: av.VideoStream | None,
    audio: av.AudioStream | None,
) -> tuple[list[av.Packet], SoundReader | None]:
    """Go through the file once: return the video's packets, still compressed, and the sound, decoded as it passes."""
    streams = [stream for stream in (video, audio) if stream]
    packets = []
    sound = SoundReader(audio) if audio else None
    counts = dict.fromkeys(streams, 0)  # packets of each stream, PyAV's end mark among them
    ends = dict.fromkeys(streams, 0)  # the latest time stamp of each stream, in its own unit
    problem = None
    try:
        for packet in container.demux(streams):
            stream = packet.stream  # `stream_index` is 0 in every end mark of PyAV's
            counts[stream] += 1
            if stream is video and packet.dts is not None and container.format.name == "avi":
                counts[stream] = packet.dts + 1  # FFmpeg passes over empty packets, the header counts them
            if packet.pts is not None:
                ends[stream] = max(ends[stream], packet.pts)
            if packet.size == 0:  # "repeat the last frame" of AVI and Theora, and PyAV's end mark; decoders refuse it
                continue
            if stream is video:
                packets.append(packet)
            else:
                sound.feed(packet)
    except FFmpegError as error:
        problem = f"can't be read to its end ({error.strerror})"
    if problem is None:
        last_second = max(float(end * stream.time_base) for stream, end in ends.items())
        problem = _shortage(container, counts, last_second)
    if problem:
        warnings.warn(f"{path}: {problem}; using what is there", stacklevel=3)
    if sound:
        sound.feed(None)
    return packets, sound


def _shortage(container: av.container.InputContainer, counts: dict[av.stream.Stream, int], end: float) -> str | None:
    """Say in words what the header promises beyond what is in the file, None if nothing; `end` in seconds."""
    name = container.format.name
    for stream, count in counts.items():  # with PyAV's end mark: one more than there are, as some AVI headers count
        is_counted = stream.type == "video" or name.startswith("mov")
        if is_counted and stream.frames > count:
            return f"{count - 1} {stream.type} packets where the header counts {stream.frames}"
    promised = (container.duration or 0) / av.time_base
    if name.startswith("matroska") and end < 0.95 * promised - 1:
        return f"ends at {end:.1f} s where the header says {promised:.1f} s"
    return None
