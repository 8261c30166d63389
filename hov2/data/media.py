"""Media files in, tensors out: what happens between a clip on disk and the towers' inputs.

`read_media` goes through a file once and returns evenly spaced frames and mono sound; `patchify` and `log_mel` turn
these into what Qwen2.5-Omni's vision and audio towers take. Frame choice and sizes are those of qwen-omni-utils 0.0.9;
pixels and sound differ from what it reads by less than one can see or hear.

As there, frame 0 and sample 0 are the first in the file, whatever their time stamps say; frames are chosen by number,
not by time; pixel aspect ratios, EXIF orientation and mirrored display matrices are ignored.
"""

import functools
import itertools
import math
import os
import re
import stat
import warnings
from dataclasses import dataclass

import av
import numpy as np
import torch
from av.error import FFmpegError
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from torch.nn.functional import interpolate
from transformers import WhisperFeatureExtractor

PATCH = 14  # pixels, each way
MERGE = 2  # patches, each way, that become one token
TEMPORAL = 2  # frames in a patch
MIN_FRAMES = 4  # frames taken of a clip that has them, however short it is
MAX_ASPECT = 200
MAX_AUDIO_SECONDS = 300  # what the audio tower was made for
BLOCK = 1 << 16  # samples of a channel that are mixed down at a time
MAX_AMPLITUDE = 1e6  # of sound, where 1 is full scale: floating-point files may be above it, damaged ones at 1e30
MAX_LOST = 0.01  # share of a video's packets that may be undecodable

_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
_STD = (0.26862954, 0.26130258, 0.27577711)
_STILLS = {"image2", "gif", "apng", "webp", "ico"}  # and every demuxer called *_pipe
_NOT_MEDIA = {"tty": "a text file", "hls": "a playlist", "concat": "a playlist", "dash": "a playlist"}
_KAISER = "filter_size=128:cutoff=.957:filter_type=kaiser:kaiser_beta=12"  # 44-101 dB from soxr, swr's default 28-85


class MediaError(ValueError):
    """A media file that can't be used: `path` and `reason`."""

    def __init__(self, path, reason):
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self):
        return f"{self.path}: {self.reason}"


@dataclass
class Media:
    """What a file holds."""

    frames: torch.Tensor | None  # uint8 (T, 3, H, W), resized; T is even for a video and 1 for an image
    sample_fps: float | None  # kept frames in a second of the clip; None for an image and for sound
    audio: torch.Tensor | None  # float32 (N,), mono
    audio_cut: float = 0.0  # seconds of sound left out beyond MAX_AUDIO_SECONDS


def read_media(path, *, fps=2.0, max_frames=32, min_pixels=4 * 28 * 28, max_pixels=128 * 28 * 28, sample_rate=16000):
    """Reads a local video, sound or image file into a Media.

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
    with open_media(path) as container:
        name = container.format.name
        if name in _NOT_MEDIA:
            raise MediaError(path, f"{_NOT_MEDIA[name]}, not a media file")
        streams = [s for s in container.streams if s.type in ("video", "audio") and s.codec_context]
        video = next((s for s in streams if s.type == "video" and not s.disposition & Disposition.attached_pic), None)
        audio = next((s for s in streams if s.type == "audio"), None)
        if not video and not audio:
            raise MediaError(path, "no video, sound or image that can be decoded")
        size = functools.partial(_size, path, min_pixels, max_pixels)
        if video and (name in _STILLS or name.endswith("_pipe") or container.metadata.get("major_brand") == "avif"):
            return Media(_read_image(path, container, video, size), None, None)
        packets, sound = _demux(path, container, video, audio)
        frames, sample_fps = _Video(path, video, packets, size).read(fps, max_frames) if video else (None, None)
    waveform = sound.waveform(path, sample_rate) if sound else None
    if waveform is None and not video:
        raise MediaError(path, "no sound that can be decoded")
    return Media(frames, sample_fps, waveform, sound.cut if sound else 0.0)


def smart_resize(height, width, *, factor=28, min_pixels, max_pixels):
    """The size (height, width), in multiples of `factor`, that is nearest with `min_pixels` to `max_pixels` pixels.

    From Qwen2-VL, where a thin picture can get a side of 0; here it gets `factor`, and may so be above `max_pixels`.
    Raises ValueError if one side is more than 200 times the other.
    """
    if max(height, width) / min(height, width) > MAX_ASPECT:
        raise ValueError(f"{width}x{height} pixels: one side is more than {MAX_ASPECT} times the other")
    h, w = (max(factor, round(side / factor) * factor) for side in (height, width))
    if h * w > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        h, w = (max(factor, math.floor(side / scale / factor) * factor) for side in (height, width))
    elif h * w < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        h, w = (math.ceil(side * scale / factor) * factor for side in (height, width))
    return h, w


def frame_indices(total, video_fps, fps, max_frames):
    """Which of `total` frames at `video_fps` to keep for `fps` frames a second.

    An even number of indices, first and last frame included: at least 4 (if there are that many), at most `max_frames`.
    As qwen-omni-utils, but for a single frame, which it refuses and which gives [0, 0] here. Raises ValueError if
    `total` is less than 1 or `max_frames` less than 2.
    """
    if total < 1 or max_frames < TEMPORAL:
        raise ValueError(f"can't choose frames: {total} in the video, at most {max_frames} wanted")
    if total == 1:
        return [0] * TEMPORAL
    count = min(max(total / video_fps * fps, MIN_FRAMES), max_frames, total)
    count = math.floor(count / TEMPORAL) * TEMPORAL
    return torch.linspace(0, total - 1, count).round().long().tolist()  # rounds half to even


def patchify(frames):
    """Frames, uint8 (T, 3, H, W) with sides in multiples of 28, as the vision tower takes them.

    Returns patches, float32 (N, 3*2*14*14), and grid_thw, int64 (1, 3): N = t*h*w with t frame pairs of h rows and w
    columns of patches, the 2x2 patches of one token next to each other. An odd T (an image) gets its last frame twice.
    The same numbers, bit for bit, as transformers' Qwen2VLVideoProcessor without its resizing.
    """
    if frames.shape[2] % (PATCH * MERGE) or frames.shape[3] % (PATCH * MERGE):
        raise ValueError(f"frames of {frames.shape[3]}x{frames.shape[2]} pixels: sides must be multiples of 28")
    if len(frames) % TEMPORAL:
        frames = torch.cat([frames, frames[-1:]])
    # transformers folds the scaling by 1/255 into mean and std; its rounding is part of being bit-exact
    mean, std = (torch.tensor(v).mul(1 / (1 / 255)).view(3, 1, 1) for v in (_MEAN, _STD))
    values = (frames.float() - mean) / std
    t, h, w = len(frames) // TEMPORAL, frames.shape[2] // PATCH, frames.shape[3] // PATCH
    values = values.view(t, TEMPORAL, 3, h // MERGE, MERGE, PATCH, w // MERGE, MERGE, PATCH)
    patches = values.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, 3 * TEMPORAL * PATCH * PATCH)
    return patches, torch.tensor([[t, h, w]])


def log_mel(audio):
    """Sound, float32 (N,) at 16 kHz, as log-mel float32 (128, F) with F = ceil(N / 160).

    The same numbers, bit for bit, as the first F frames of WhisperFeatureExtractor with its padding to 300 s, without
    the 15 MB and the half second that this costs: a window is 400 samples, so zeros for one more window are enough.
    """
    extractor = _whisper()
    hop, window, length = extractor.hop_length, extractor.n_fft, len(audio)
    # at least a second: with fewer than 10 frames the matrix products would round in another way
    zeros = max(-length % hop + window, extractor.sampling_rate - length)
    padded = torch.cat([audio, audio.new_zeros(zeros)])
    features = extractor(padded.numpy(), sampling_rate=extractor.sampling_rate, padding=True, truncation=False,
                         return_attention_mask=True, return_tensors="pt")["input_features"][0]
    return features[:, : math.ceil(length / hop)]


@functools.lru_cache(maxsize=1)
def _whisper():
    return WhisperFeatureExtractor(feature_size=128, sampling_rate=16000, hop_length=160, n_fft=400,
                                   chunk_length=MAX_AUDIO_SECONDS, dither=0.0)


def open_media(path):
    """PyAV's container of a local file. Raises MediaError for one that FFmpeg can't read."""
    try:
        # "file:" keeps a colon in a name from meaning a protocol; the whitelist holds for what a file refers to as well
        return av.open(f"file:{path}", metadata_errors="ignore", options={"protocol_whitelist": "file"})
    except FFmpegError as error:
        raise MediaError(path, f"not a media file that FFmpeg can read ({error.strerror})") from None


def check_file(path):
    """The os.stat of a file that isn't empty. Raises MediaError for what isn't one."""
    try:
        info = os.stat(path)
    except FileNotFoundError:
        raise MediaError(path, "a URL; only local files are read" if "://" in path else "no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise MediaError(path, f"can't be opened: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISREG(info.st_mode):
        raise MediaError(path, "is a directory" if stat.S_ISDIR(info.st_mode) else "not a regular file")
    if info.st_size == 0:
        raise MediaError(path, "is empty")
    return info


def _size(path, min_pixels, max_pixels, picture):
    """The (height, width) to which `picture` (3, H, W) is resized."""
    try:
        return smart_resize(*picture.shape[1:], min_pixels=min_pixels, max_pixels=max_pixels)
    except ValueError as error:
        raise MediaError(path, str(error)) from None


def _demux(path, container, video, audio):
    """One pass over the file: the video's packets, still compressed, and the sound, decoded as it passes."""
    streams = [s for s in (video, audio) if s]
    packets, sound = [], _Sound(audio) if audio else None
    counts, ends, problem = {s: 0 for s in streams}, {s: 0 for s in streams}, None
    try:
        for packet in container.demux(streams):
            stream, pts = packet.stream, packet.pts  # `stream_index` is 0 in every end mark of PyAV's
            counts[stream] += 1
            if stream is video and packet.dts is not None and container.format.name == "avi":
                counts[stream] = packet.dts + 1  # FFmpeg passes over empty packets, the header counts them
            if pts is not None and pts > ends[stream]:
                ends[stream] = pts
            if packet.size == 0:  # "repeat the last frame" of AVI and Theora, and PyAV's end mark; decoders refuse it
                continue
            if stream is video:
                packets.append(packet)
            else:
                sound.feed(packet)
    except FFmpegError as error:
        problem = f"can't be read to its end ({error.strerror})"
    problem = problem or _shortage(container, counts, max(float(ends[s] * s.time_base) for s in streams))
    if problem:
        warnings.warn(f"{path}: {problem}; using what is there", stacklevel=3)
    if sound:
        sound.feed(None)
    return packets, sound


def _shortage(container, counts, end):
    """In words, what the header promises beyond what is in the file (None: nothing); `end` in seconds."""
    name = container.format.name
    for stream, count in counts.items():  # with PyAV's end mark: one more than there are, as some AVI headers count
        if stream.frames > count and (stream.type == "video" or name.startswith("mov")):
            return f"{count - 1} {stream.type} packets where the header counts {stream.frames}"
    promised = (container.duration or 0) / av.time_base
    if name.startswith("matroska") and end < 0.95 * promised - 1:
        return f"ends at {end:.1f} s where the header says {promised:.1f} s"
    return None


def _decode(codec, packets, errors):
    """Frames of `packets`, in the order shown; what can't be decoded goes to `errors`. Leaves the decoder empty."""
    for packet in itertools.chain(packets, [None]):  # None: whatever the decoder still holds back
        try:
            yield from codec.decode(packet)
        except FFmpegError as error:
            errors.append(error)
    codec.flush_buffers()


class _Video:
    """The frames of one video stream, out of its packets."""

    def __init__(self, path, stream, packets, size):
        self.path, self.stream, self.packets, self.size = path, stream, packets, size
        self.codec = stream.codec_context
        self.codec.thread_count = 1  # clips are read side by side anyway; and threads by frame would hide errors
        self.to_rgb = VideoReformatter()
        self.target = None  # (height, width), from the first frame seen
        self.fps = float(stream.average_rate or stream.guessed_rate or 0)

    def read(self, fps, max_frames):
        """uint8 (T, 3, H, W) and the true frames per second of these T."""
        if not self.packets:
            raise MediaError(self.path, "the video holds no frames")
        if not self.fps:
            raise MediaError(self.path, "the video has no frame rate")
        shown = [i for i, packet in enumerate(self.packets) if not packet.is_discard]  # discard: cut by an edit list
        stamps = [self.packets[i].pts for i in shown]
        if shown and None not in stamps and len(set(stamps)) == len(stamps):
            shown.sort(key=lambda i: self.packets[i].pts)
            chosen = frame_indices(len(shown), self.fps, fps, max_frames)
            frames = self._seek([shown[i] for i in chosen])
            if frames:
                return torch.stack(frames), len(chosen) / len(shown) * self.fps
        return self._decode_through(fps, max_frames)

    def _seek(self, wanted):
        """The frames of the packets `wanted` (positions in the file), decoding as little as that takes.

        None if one doesn't come out or anything goes wrong: then the packets don't tell what frames there are.
        """
        found, errors = {}, []
        stamps = {self.packets[i].pts for i in wanted}
        for start, stop in _runs(self.packets, set(wanted)):
            for frame in _decode(self.codec, self._needed(range(start, stop), set(wanted)), errors):
                if frame.pts in stamps:
                    found[frame.pts] = self._picture(frame)
        return [found[self.packets[i].pts] for i in wanted] if not errors and len(found) == len(stamps) else None

    def _needed(self, run, wanted):
        """The packets numbered `run`; the decoder is to pass over those that are neither wanted nor leant on.

        Only H.264 says of a frame that no other at all leans on it. HEVC says it of those of the same temporal layer;
        VP9 and AV1 adapt their probabilities by every frame.
        """
        can_skip = self.codec.name == "h264"
        for i in run:
            self.codec.skip_frame = "NONREF" if can_skip and i not in wanted else "DEFAULT"
            yield self.packets[i]
        self.codec.skip_frame = "DEFAULT"

    def _decode_through(self, fps, max_frames):
        """The slow and sure way: everything is decoded once to count the frames and again to take some of them."""
        errors = []
        total = sum(1 for _ in _decode(self.codec, self.packets, errors))
        lost = f"{len(errors)} of {len(self.packets)} video packets can't be decoded"
        if not total or len(errors) > max(1, MAX_LOST * len(self.packets)):
            raise MediaError(self.path, f"corrupt: {lost}")
        if errors:
            warnings.warn(f"{self.path}: {lost}; using the other frames", stacklevel=5)
        chosen = frame_indices(total, self.fps, fps, max_frames)
        found = {i: self._picture(frame) for i, frame in enumerate(_decode(self.codec, self.packets, errors))
                 if i in chosen}
        return torch.stack([found[i] for i in chosen]), len(chosen) / total * self.fps

    def _picture(self, frame):
        picture = torch.from_numpy(self.to_rgb.reformat(frame, format="rgb24", threads=1).to_ndarray()).permute(2, 0, 1)
        if quarters := round(frame.rotation / 90) % 4:  # counterclockwise, as the display matrix and rot90 turn
            picture = picture.rot90(quarters, (1, 2))
        self.target = self.target or self.size(picture)
        return _resize(picture, self.target)


def _runs(packets, wanted):
    """The ranges (start, stop) of `packets` to decode for those `wanted` (positions), in order and not overlapping.

    Each starts at a keyframe that's neither decoded nor shown after the wanted frame: an open group of pictures has
    frames that come after its keyframe in the file, are shown before it and lean on the group before.
    """
    keys = [i for i, packet in enumerate(packets) if packet.is_keyframe and packet.pts is not None]
    runs = []
    for i in sorted(wanted):
        start = max((k for k in keys if k <= i and packets[k].pts <= packets[i].pts), default=0)
        while runs and runs[-1][1] >= start:
            start = min(start, runs.pop()[0])
        runs.append((start, i + 1))
    return runs


def _resize(picture, size):
    """uint8 (3, H, W) to `size`; on uint8, as it's five times as fast as on float32 and at least 50 dB from it."""
    return interpolate(picture[None], size, mode="bicubic", antialias=True)[0].contiguous()


def _read_image(path, container, stream, size):
    if stream.codec_context.name != "tiff":  # whose decoder would refuse any file with a tag that it doesn't know
        stream.codec_context.options = {"err_detect": "explode"}  # or half a JPEG is an image without a word
    errors = []
    try:
        frame = next(_decode(stream.codec_context, [p for p in container.demux(stream) if p.size], errors), None)
    except FFmpegError as error:
        raise MediaError(path, f"corrupt image ({error.strerror})") from None
    if frame is None:
        raise MediaError(path, f"corrupt image ({errors[0].strerror})" if errors else "the image holds no pixels")
    # colour halved by JPEG or WebP, scaled up as libjpeg does it: 56 dB from Pillow, where RGB at once has 24-46
    full = re.sub(r"^(yuva?j?)4\d\d", r"\g<1>444", frame.format.name)
    frame = frame.reformat(format=full, interpolation="BILINEAR")
    alpha = [c for c in frame.format.components if c.is_alpha]
    # RGBA goes on white; alpha of grey or palette images is dropped as by Pillow; a CMYK JPEG has one that's always 255
    if alpha and len(frame.format.components) == 4:
        pixels = frame.to_ndarray(format="rgba").astype(np.uint32)
        alpha = pixels[..., 3:]
        blend = pixels[..., :3] * alpha + 255 * (255 - alpha) + 128
        pixels = ((blend >> 8) + blend >> 8).astype(np.uint8)  # Pillow's rounded division by 255
    else:
        pixels = frame.to_ndarray(format="rgb24")
    picture = torch.from_numpy(pixels).permute(2, 0, 1)
    return _resize(picture, size(picture))[None]


class _Sound:
    """One sound stream, decoded packet by packet into its channels' mean."""

    def __init__(self, stream):
        self.codec = stream.codec_context
        self.blocks, self.length, self.rate = [], 0, None  # float32 samples at the file's own rate
        self.waiting, self.kind = None, None  # samples of all channels, and what they are
        self.rates = set()
        self.cut = 0.0
        self.packets, self.lost = 0, 0

    def feed(self, packet):
        """Decodes a packet, or what the decoder holds back for None. Beyond MAX_AUDIO_SECONDS it only counts."""
        if self.rate and self.length >= MAX_AUDIO_SECONDS * self.rate:
            self.cut += float(packet.duration * packet.time_base) if packet and packet.duration else 0.0
            return
        self.packets += packet is not None
        try:
            frames = self.codec.decode(packet)
        except FFmpegError:
            self.lost += 1
            return
        for frame in frames:
            kind = frame.format.name, frame.layout.nb_channels, frame.sample_rate
            if kind != self.kind or self.waiting.samples > BLOCK:
                self._mix()
                self.waiting, self.kind = av.AudioFifo(), kind
            self.rate = self.rate or frame.sample_rate
            self.rates.add(frame.sample_rate)
            self.length += frame.samples
            frame.pts = None  # or it would have to fit
            self.waiting.write(frame)

    def _mix(self):
        """Turns what waits into one block: a call for each frame of 20 ms would cost more than its decoding."""
        if frame := self.waiting and self.waiting.read():
            self.blocks.append(_channel_mean(frame))

    def waveform(self, path, sample_rate):
        """float32 (N,) at `sample_rate`, at most MAX_AUDIO_SECONDS of it; None if nothing could be decoded."""
        if self.lost:
            warnings.warn(f"{path}: {self.lost} of {self.packets} sound packets can't be decoded", stacklevel=3)
        if not self.length:
            return None
        self._mix()
        if len(self.rates) > 1:
            raise MediaError(path, f"the sound's rate changes ({', '.join(map(str, sorted(self.rates)))} Hz)")
        samples = np.concatenate(self.blocks)
        if not np.abs(samples).max() < MAX_AMPLITUDE:  # so that NaN fails too
            raise MediaError(path, "the sound has samples that are infinite, no numbers or far too large")
        kept = samples[: MAX_AUDIO_SECONDS * self.rate]
        self.cut += (len(samples) - len(kept)) / self.rate
        return torch.from_numpy(_resample(kept, self.rate, sample_rate))


def _channel_mean(frame):
    """float32 (n,) in -1..1: the plain mean, as FFmpeg's own downmix is louder (1.4 times for stereo, 5 for 5.1)."""
    data = frame.to_ndarray()
    if not frame.format.is_planar:
        data = data.reshape(-1, frame.layout.nb_channels).T
    if data.dtype == np.uint8:
        data = data.astype(np.float32) / 128 - 1
    elif data.dtype.kind == "i":
        data = data / np.float32(-np.iinfo(data.dtype).min)
    return data.mean(axis=0, dtype=np.float32)


def _resample(samples, rate, target):
    """float32 (n,) from `rate` to `target` Hz: ceil(n * target / rate) samples."""
    if rate == target:
        return samples
    graph = av.filter.Graph()
    source = graph.add_abuffer(sample_rate=rate, format="flt", layout="mono")
    sink = graph.add("abuffersink")
    graph.link_nodes(source, graph.add("aresample", f"{target}:{_KAISER}"), sink).configure()
    frame = av.AudioFrame.from_ndarray(samples[None], "flt", "mono")
    frame.sample_rate = rate
    source.push(frame)
    source.push(None)
    blocks = []
    while True:
        try:
            blocks.append(sink.pull().to_ndarray()[0])
        except (EOFError, BlockingIOError):
            break
    length = -(-len(samples) * target // rate)
    result = np.concatenate(blocks)[:length]
    return np.pad(result, (0, length - len(result)))
