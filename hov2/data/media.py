"""Media files in, tensors out: what happens between a clip on disk and the towers' inputs.

`read_media` goes through a file once and returns evenly spaced frames (video.py) and mono sound (sound.py). Frame
choice and sizes are those of qwen-omni-utils 0.0.9; pixels and sound differ from what it reads by less than one can see
or hear.

As there, frame 0 and sample 0 are the first in the file, whatever their time stamps say; frames are chosen by number,
not by time; pixel aspect ratios, EXIF orientation and mirrored display matrices are ignored. Where it differs, because
the time stamps, tracks or codecs of a file are odd, docs/data.md says how.
"""

import os
import re
import stat
import warnings
from dataclasses import dataclass

import av
from av.error import FFmpegError
from av.stream import Disposition
from torch import Tensor

from hov2.data.errors import MediaError
from hov2.data.pictures import read_image
from hov2.data.sound import MIN_AUDIO_SECONDS, SoundReader
from hov2.data.video import Resizer, VideoReader

_STILLS = {"image2", "gif", "apng", "webp", "ico"}  # and every demuxer called *_pipe
_STILL_BRANDS = {"avif", "avis", "heic", "heix", "heim", "heis", "hevc", "hevx", "mif1", "mif2", "msf1"}
_STILL_CODECS = {"mjpeg", "png", "bmp", "webp", "gif", "tiff", "apng"}  # of a poster beside the film
_NOT_MEDIA = {"tty": "a text file", "hls": "a playlist", "concat": "a playlist", "dash": "a playlist"}


@dataclass
class Media:
    """What a file holds."""

    frames: Tensor | None  # uint8 (T, 3, H, W), resized; T is even for a video and 1 for an image
    sample_fps: float | None  # kept frames in a second of the clip; None for an image and for sound
    audio: Tensor | None  # float32 (N,), mono
    audio_cut: float = 0.0  # seconds of sound left out beyond MAX_AUDIO_SECONDS
    audio_lost: bool = False  # the file has sound, none of which can be decoded


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
    an animated GIF, PNG or AVIF, the first frame is the image. A video of one frame gives that frame twice. Of several
    streams of a kind, FFmpeg's best that can be decoded is read.

    Frames are decoded to RGB at their own size, turned as the file's display matrix says and resized in uint8. Images,
    before resizing, are what Pillow makes of them, with RGBA on white: PNG, GIF, BMP and lossless WebP exactly, JPEG
    and lossy WebP within 4 levels (a PNG's colour key, which Pillow ignores, becomes white). Sound is the mean of the
    channels, then resampled; 0.02 s or less is none. The compressed video is held in memory while it's read.

    A file that ends early, or has up to 1 % undecodable video packets or any undecodable sound, is used as far as it
    goes, with a warning that names it; frames are then chosen among those that can be decoded. Sound or video of a
    codec that FFmpeg doesn't know, beside the other, is left out with a warning that names it. A file cut off is only
    noticed where the header says how much there should be (MP4, AVI, Matroska, WebM). A damaged image is refused,
    but for a GIF cut off, of which FFmpeg shows what there is.

    Raises MediaError for anything that can't be used: a missing, empty or unreadable file, a URL, a playlist, a file
    that is not media, one without picture and sound, one too damaged, a picture more than 200 times as wide as high.
    """
    path = os.fspath(path)
    check_file(path)
    resize = Resizer(path, min_pixels, max_pixels)
    media = Media(None, None, None)
    with open_media(path) as container:
        video, audio = _choose_streams(path, container)
        if video and _is_still(container):
            media.frames = read_image(path, container, video, resize)
            return media
        media.audio_lost = audio is None and bool(container.streams.audio)
        sound = SoundReader(path, audio, sample_rate) if audio else None
        packets = _demux(path, container, video, sound)
        if video:
            media.frames, media.sample_fps = VideoReader(path, video, packets, resize).read(fps, max_frames)
    if sound:
        media.audio = sound.waveform()
        media.audio_cut = sound.cut
        media.audio_lost = not sound.length and sound.lost > 0
    if media.frames is None and media.audio is None:
        raise MediaError(path, _no_sound(sound))
    return media


def _no_sound(sound: SoundReader) -> str:
    """Say in words why a file of sound gives none."""
    if sound.length:
        return f"the sound is shorter than one token of the audio tower ({float(MIN_AUDIO_SECONDS)} s)"
    return "no sound that can be decoded"


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


def _choose_streams(
    path: str, container: av.container.InputContainer
) -> tuple[av.VideoStream | None, av.AudioStream | None]:
    """Return the video and the sound that a player would take, None where there is none that can be decoded.

    Warns of a kind of which there is some, but none that can be decoded; raises MediaError if nothing can.
    """
    name = container.format.name
    if name in _NOT_MEDIA:
        raise MediaError(path, f"{_NOT_MEDIA[name]}, not a media file")
    video = _best_stream(container, "video")
    audio = _best_stream(container, "audio", related=video)
    problems = []
    for kind, chosen in (("video", video), ("audio", audio)):
        unknown = [stream for stream in container.streams if stream.type == kind and not stream.codec_context]
        if unknown and not chosen:
            name = _codec_name(path, container, unknown[0])
            problems.append(
                f"its {'sound' if kind == 'audio' else kind} is of a codec that FFmpeg can't decode: {name}"
            )
    if not video and not audio:
        raise MediaError(path, "; ".join(["no video, sound or image that can be decoded", *problems]))
    for problem in problems:
        warnings.warn(f"{path}: {problem}; using the rest", stacklevel=3)
    return video, audio


def _best_stream(
    container: av.container.InputContainer, kind: str, related: av.stream.Stream | None = None
) -> av.stream.Stream | None:
    """Return FFmpeg's best stream of a kind that can be decoded; a picture only if there is no film."""
    streams = []
    for stream in container.streams:
        is_cover = stream.disposition & Disposition.attached_pic
        if stream.type == kind and stream.codec_context and not is_cover:
            streams.append(stream)
    films = [stream for stream in streams if stream.codec_context.name not in _STILL_CODECS]
    candidates = films or streams
    best = container.streams.best(kind, related)
    if best in candidates or not candidates:
        return best if candidates else None
    return candidates[0]


def _codec_name(path: str, container: av.container.InputContainer, stream: av.stream.Stream) -> str:
    """Return what the file calls the codec of a stream that FFmpeg can't decode."""
    level = av.logging.get_level()
    av.logging.set_level(av.logging.INFO)  # or the next line gives nothing
    description = container.dumps_format()
    av.logging.set_level(level)
    found = re.search(rf"Stream #0:{stream.index}\b.*?: (?:Audio|Video): ([^,\n]+)", description)
    name = "unknown"
    if found and found[1] != "none":
        name = found[1]
    if container.format.name.startswith("matroska"):  # its names are longer than what FFmpeg keeps of them
        with open(path, "rb") as file:
            head = file.read(1 << 20)
        places = [found.start() for found in re.finditer(rb"\x86[\x83-\xbf][AVS]_", head)]
        if stream.index < len(places):
            start = places[stream.index] + 2
            name = head[start : start + (head[start - 1] & 0x7F)].decode(errors="replace")
    return name


def _is_still(container: av.container.InputContainer) -> bool:
    """Whether the file is an image rather than a video."""
    name = container.format.name
    return name in _STILLS or name.endswith("_pipe") or container.metadata.get("major_brand") in _STILL_BRANDS


def _demux(
    path: str,
    container: av.container.InputContainer,
    video: av.VideoStream | None,
    sound: SoundReader | None,
) -> list[av.Packet]:
    """Go through the file once: return the video's packets, still compressed, and decode the sound as it passes."""
    streams = []
    if video:
        streams.append(video)
    if sound:
        streams.append(sound.stream)
    packets = []
    counts = dict.fromkeys(streams, 0)  # packets of each stream, PyAV's end mark among them
    ends = dict.fromkeys(streams, 0)  # the latest time stamp of each stream, in its own unit
    problem = None
    try:
        for packet in container.demux(streams):
            stream = packet.stream  # `stream_index` is 0 in every end mark of PyAV's
            counts[stream] += 1
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
        problem = _shortage(path, container, counts, last_second)
    if problem:
        warnings.warn(f"{path}: {problem}; using what is there", stacklevel=3)
    if sound:
        sound.feed(None)
    return packets


def _shortage(
    path: str, container: av.container.InputContainer, counts: dict[av.stream.Stream, int], end: float
) -> str | None:
    """Say in words what the header promises beyond what is in the file, None if nothing; `end` in seconds."""
    name = container.format.name
    if name == "avi" and _is_whole_avi(path):  # its header counts empty packets too, which FFmpeg passes over
        return None
    for stream, count in counts.items():  # with PyAV's end mark: one more than there are
        promised = stream.frames if stream.type == "video" else 0
        if name.startswith("mov"):  # `frames` counts samples of PCM, and what an edit list cuts off
            promised = len(stream.index_entries)
        if promised > count:
            return f"{count - 1} {stream.type} packets where the header counts {promised}"
    promised = (container.duration or 0) / av.time_base
    if name.startswith("matroska") and not _is_whole_matroska(path):
        return f"ends at {end:.1f} s where the header says {promised:.1f} s"
    return None


def _is_whole_avi(path: str) -> bool:
    """Whether the outermost chunks of an AVI file, one for each GB, are as long as they say."""
    size = os.path.getsize(path)
    end = 0
    with open(path, "rb") as file:
        while end + 8 <= size:
            file.seek(end + 4)
            end += 8 + int.from_bytes(file.read(4), "little")
    return end <= size


def _is_whole_matroska(path: str) -> bool:
    """Whether the one segment of a Matroska or WebM file is as long as it says, or doesn't say it."""
    with open(path, "rb") as file:
        head = file.read(4096)
    header_size, start = _matroska_size(head, 4)
    segment_size, start = _matroska_size(head, start + header_size + 4)
    return start + segment_size <= os.path.getsize(path)


def _matroska_size(head: bytes, at: int) -> tuple[int, int]:
    """Return the size that stands at a place, 0 for an unknown one, and the place behind it."""
    if at >= len(head):
        return 0, at
    length = 9 - head[at].bit_length()  # as many bytes as there are zeros before the first one, and one
    value = int.from_bytes(head[at : at + length], "big") - (1 << 7 * length)
    unknown = (1 << 7 * length) - 1
    return (0 if value == unknown else value), at + length
