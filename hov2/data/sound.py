"""The sound of a file: decoding, mixing down, resampling, and the log-mel that the audio tower takes."""

import functools
import math
import warnings
from fractions import Fraction

import av
import numpy as np
import torch
from av.error import FFmpegError
from torch import Tensor
from transformers import WhisperFeatureExtractor

from hov2.data.errors import MediaError

MAX_AUDIO_SECONDS = 300  # what the audio tower was made for
MIN_AUDIO_SECONDS = Fraction(1, 50)  # what is no longer than this gives it less than a token
BLOCK = 1 << 16  # samples of a channel that are mixed down at a time
MAX_AMPLITUDE = 1e6  # of sound, where 1 is full scale: floating-point files may be above it, damaged ones at 1e30

_TAPS = 128  # of the resampling filter, in samples of the lower rate
_KAISER = (
    f"filter_size={_TAPS}:cutoff=.957:filter_type=kaiser:kaiser_beta=12"  # 44-101 dB from soxr, swr's default 28-85
)


def log_mel(audio: Tensor) -> Tensor:
    """Return sound, float32 (N,) at 16 kHz, as log-mel float32 (128, F) with F = ceil(N / 160).

    The same numbers, bit for bit, as the first F frames of WhisperFeatureExtractor with its padding to 300 s, without
    the 15 MB and the half second that this costs: a window is 400 samples, so zeros for one more window are enough.
    """
    extractor = _whisper()
    hop = extractor.hop_length
    window = extractor.n_fft
    length = len(audio)
    # at least a second: with fewer than 10 frames the matrix products would round in another way
    zeros = max(-length % hop + window, extractor.sampling_rate - length)
    padded = torch.cat([audio, audio.new_zeros(zeros)])
    features = extractor(
        padded.numpy(),
        sampling_rate=extractor.sampling_rate,
        padding=True,
        truncation=False,
        return_attention_mask=True,
        return_tensors="pt",
    )["input_features"][0]
    return features[:, : math.ceil(length / hop)]


@functools.lru_cache(maxsize=1)
def _whisper() -> WhisperFeatureExtractor:
    """The feature extractor with the settings of Qwen2.5-Omni."""
    return WhisperFeatureExtractor(
        feature_size=128,
        sampling_rate=16000,
        hop_length=160,
        n_fft=400,
        chunk_length=MAX_AUDIO_SECONDS,
        dither=0.0,
    )


class SoundReader:
    """One sound stream, decoded packet by packet into its channels' mean at `sample_rate`."""

    def __init__(self, path: str, stream: av.AudioStream, sample_rate: int):
        self.path = path
        self.stream = stream
        self.codec = stream.codec_context
        self.sample_rate = sample_rate
        self.rate = None  # of the first frame, samples a second
        self.rates = set()  # of all frames
        self.length = 0  # samples of a channel so far
        self.cut = 0.0  # seconds beyond MAX_AUDIO_SECONDS
        self.packets = 0
        self.lost = 0  # packets that can't be decoded
        self._resampler = None
        self._mixed = 0  # samples of a channel that went into the resampler
        self._waiting = None  # an AudioFifo: samples of all channels
        self._kind = None  # sample format, channels and rate of what waits

    def feed(self, packet: av.Packet | None) -> None:
        """Decode a packet, or what the decoder holds back for None. Beyond MAX_AUDIO_SECONDS it only counts.

        Raises MediaError for samples that are no sound.
        """
        if self.rate and self.length >= MAX_AUDIO_SECONDS * self.rate:
            if packet and packet.duration:
                self.cut += float(packet.duration * packet.time_base)
            return
        if packet is not None:
            self.packets += 1
        try:
            frames = self.codec.decode(packet)
        except FFmpegError:
            self.lost += 1
            return
        for frame in frames:
            self._add(frame)

    def _add(self, frame: av.AudioFrame) -> None:
        """Let a frame wait until there are enough of its kind for a block."""
        kind = (frame.format.name, frame.layout.nb_channels, frame.sample_rate)
        if kind != self._kind or self._waiting.samples > BLOCK:
            self._mix()
            self._waiting = av.AudioFifo()
            self._kind = kind
        if self.rate is None:
            self.rate = frame.sample_rate
            self._resampler = Resampler(self.rate, self.sample_rate)
        self.rates.add(frame.sample_rate)
        self.length += frame.samples
        frame.pts = None  # or it would have to fit
        self._waiting.write(frame)

    def _mix(self) -> None:
        """Resample what waits as one block: a call for each frame of 20 ms would cost more than its decoding."""
        if self._waiting is None:
            return
        frame = self._waiting.read()
        if frame is None:
            return
        samples = _channel_mean(frame)
        if not np.abs(samples).max() < MAX_AMPLITUDE:  # so that NaN fails too
            raise MediaError(self.path, "the sound has samples that are infinite, no numbers or far too large")
        kept = samples[: MAX_AUDIO_SECONDS * self.rate - self._mixed]
        self._mixed += len(kept)
        self.cut += (len(samples) - len(kept)) / self.rate
        self._resampler.feed(kept)

    def waveform(self) -> Tensor | None:
        """Return float32 (N,) at `sample_rate`, at most MAX_AUDIO_SECONDS of it; None if there is no sound.

        None, too, for sound that is shorter than a token of the audio tower. Raises MediaError for sound whose rate
        changes and for samples that are no sound.
        """
        if self.lost:
            warnings.warn(f"{self.path}: {self.lost} of {self.packets} sound packets can't be decoded", stacklevel=3)
        if not self.length or self.length <= MIN_AUDIO_SECONDS * self.rate:
            return None
        if len(self.rates) > 1:
            rates = ", ".join(map(str, sorted(self.rates)))
            raise MediaError(self.path, f"the sound's rate changes ({rates} Hz)")
        self._mix()
        return torch.from_numpy(self._resampler.end())


def _channel_mean(frame: av.AudioFrame) -> np.ndarray:
    """Return float32 (n,) in -1..1: the plain mean, as FFmpeg's own downmix is louder (1.4 times for stereo)."""
    data = frame.to_ndarray()
    if not frame.format.is_planar:
        data = data.reshape(-1, frame.layout.nb_channels).T
    if data.dtype == np.uint8:
        data = data.astype(np.float32) / 128 - 1
    elif data.dtype.kind == "i":
        data = data / np.float32(-np.iinfo(data.dtype).min)
    return data.mean(axis=0, dtype=np.float32)


class Resampler:
    """Brings float32 samples from `rate` to `target` Hz, block by block: ceil(n * target / rate) of them."""

    def __init__(self, rate: int, target: int):
        self.rate = rate
        self.target = target
        self.length = 0  # samples so far
        self._blocks = []
        if rate == target:
            return
        self._graph = av.filter.Graph()  # kept, as its filters don't keep it
        self._source = self._graph.add_abuffer(sample_rate=rate, format="flt", layout="mono")
        resampler = self._graph.add("aresample", f"{target}:{_KAISER}")
        self._sink = self._graph.add("abuffersink")
        self._graph.link_nodes(self._source, resampler, self._sink).configure()

    def feed(self, samples: np.ndarray) -> None:
        """Take the next samples."""
        self.length += len(samples)
        if self.rate == self.target:
            self._blocks.append(samples)
        elif len(samples):
            self._push(samples)

    def _push(self, samples: np.ndarray | None) -> None:
        """Give the filter samples, or None for the end, and take what comes out."""
        frame = None
        if samples is not None:
            frame = av.AudioFrame.from_ndarray(samples[None], "flt", "mono")
            frame.sample_rate = self.rate
        self._source.push(frame)
        while True:
            try:
                self._blocks.append(self._sink.pull().to_ndarray()[0])
            except (EOFError, BlockingIOError):
                break

    def end(self) -> np.ndarray:
        """Return all samples, resampled."""
        if self.rate != self.target:
            taps = _TAPS * max(1, -(-self.rate // self.target))
            if self.length < 4 * taps:  # too little for the filter to give anything, or the last of it
                self._push(np.zeros(2 * taps, np.float32))
            self._push(None)
        length = -(-self.length * self.target // self.rate)
        result = np.concatenate(self._blocks)[:length]
        return np.pad(result, (0, length - len(result)))
