"""Clips for the media tests, made with PyAV, and what to compare them by."""

import math
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

DATA = Path(__file__).parents[1] / "assets"
BUNNY = DATA / "bigbuckbunny.mp4"


def moving_picture(count, width, height, seed=0):
    """RGB frames of smooth blobs that move; each frame differs from every other."""
    y, x = np.mgrid[:height, :width]
    for i in range(count):
        phase = np.array([0.9, 1.3, 1.7]) * i + seed
        yield (127 + 120 * np.sin(x[..., None] / 9 + phase) * np.cos(y[..., None] / 7 - phase)).astype(np.uint8)


def write_video(
    path,
    codec="libx264",
    count=40,
    width=96,
    height=64,
    rate=10,
    pix_fmt="yuv420p",
    options=None,
    times=None,
    sound=None,
    container_options=None,
):
    """`times`: the frames' time stamps in units of 1/rate; `sound`: (codec, rate, layout, float32 (channels, n))."""
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        audio = container.add_stream(sound[0], rate=sound[1], layout=sound[2]) if sound else None
        for i, picture in enumerate(moving_picture(count, width, height)):
            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            frame.pts, frame.time_base = times[i] if times else i, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound:
            frame = av.AudioFrame.from_ndarray(sound[3], "fltp", sound[2])
            frame.sample_rate = sound[1]
            container.mux(audio.encode(frame))
            container.mux(audio.encode(None))
    return path


def write_wav(path, samples, rate, layout="mono", fmt="s16", codec="pcm_s16le"):
    """`samples`: (n, channels) of the format's own type."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout=layout, format=fmt)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples).reshape(1, -1), fmt, layout)
        frame.sample_rate = rate
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def remux(source, path, options=None):
    with av.open(str(source)) as old, av.open(str(path), "w", options=options or {}) as new:
        streams = {s.index: new.add_stream_from_template(s) for s in old.streams}
        for packet in old.demux():
            if packet.dts is not None:
                packet.stream = streams[packet.stream_index]
                new.mux(packet)
    return path


def tone(frequency, rate, seconds, amplitude=0.5):
    return (amplitude * np.sin(2 * np.pi * frequency * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


def every_frame(path):
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def pixels(frames):
    return frames.permute(0, 2, 3, 1).numpy()


def decibels(reference, value):
    noise = np.mean((np.asarray(reference, np.float64) - np.asarray(value, np.float64)) ** 2)
    return math.inf if noise == 0 else 10 * math.log10(255**2 / noise)


def snr(reference, value):
    power, noise = (np.mean(x.astype(np.float64) ** 2) for x in (reference, reference - value))
    return 10 * np.log10(power / noise)
