"""Reading clips, frames and sound: hov2 beside qwen-omni-utils with its decoders, and beside plain FFmpeg decoding.

    python benchmarks/media.py                        three synthesised clips
    python benchmarks/media.py a.mp4 b.webm           and these

Each way gives 2 frames a second, at most 32, of at most 128 x 28 x 28 pixels, and mono sound at 16 kHz. "ffmpeg" decodes
every frame and all sound and throws them away: the cost of decoding alone, without colours, resizing and resampling.
The peers are optional: `pip install qwen-omni-utils[decord] torchcodec` and the `ffmpeg` program, which they read sound
with; what is missing is said and left out. CPU seconds are those of all threads and child processes.
"""

import argparse
import importlib.util
import os
import resource
import shutil
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import av
import kit
import numpy as np
import torch

from hov2.data.media import read_media

FPS, MAX_FRAMES, MIN_PIXELS, MAX_PIXELS = 2.0, 32, 4 * 28 * 28, 128 * 28 * 28
PEERS = ("torchcodec", "decord")
CLIPS = {  # name: seconds, width, height, frames a second, video codec and its options, sound codec
    "480p.mp4": (60, 854, 480, 25, "libx264", {"preset": "veryfast"}, "aac"),
    "1080p.mp4": (10, 1920, 1080, 30, "libx264", {"preset": "veryfast"}, "aac"),
    "vp9.webm": (20, 640, 360, 25, "libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}, "libopus"),
}


# ---- Clips -----------------------------------------------------------------------------------------------------------


def make_clip(path, seconds, width, height, fps, codec, options, sound_codec):
    """Writes a clip: a large picture of soft noise that a camera pans over, with some grain, and stereo sound."""
    rng = np.random.default_rng(0)
    picture = _soft_noise(rng, height + 256, width + 256)
    grain = rng.integers(-6, 7, (height, width, 1), dtype=np.int16)
    with av.open(str(path), "w") as container:
        video = container.add_stream(codec, rate=fps, options=options)
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        audio = container.add_stream(sound_codec, rate=48000, layout="stereo")
        for i in range(round(seconds * fps)):
            top, left = (int(128 + 127 * np.sin(i / fps * speed)) for speed in (0.7, 1.1))
            image = picture[top : top + height, left : left + width] + np.roll(grain, 37 * i, (0, 1))
            frame = av.VideoFrame.from_ndarray(image.clip(0, 255).astype(np.uint8), format="rgb24")
            container.mux(video.encode(frame))
        container.mux(video.encode())
        tone = np.sin(np.arange(round(seconds * 48000)) * 2 * np.pi * 220 / 48000)
        samples = (6000 * tone + rng.normal(0, 300, tone.shape)).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(np.repeat(samples, 2)[None], format="s16", layout="stereo")
        frame.sample_rate = 48000
        container.mux(audio.encode(frame))
        container.mux(audio.encode())


def _soft_noise(rng, height, width):
    """Int16 (height, width, 3): noise at several scales, as large shapes with some detail."""
    total = np.zeros((height, width, 3), np.float32)
    for scale, strength in ((128, 90), (32, 40), (8, 15)):
        small = torch.from_numpy(rng.normal(0, strength, (1, 3, height // scale + 2, width // scale + 2)))
        large = torch.nn.functional.interpolate(small, (height, width), mode="bilinear")[0]
        total += large.permute(1, 2, 0).numpy()
    return (total + 128).clip(8, 247).astype(np.int16)


# ---- In the process of one way ---------------------------------------------------------------------------------------


def setup(name, small):
    """Imports what the way needs, reads a small clip so that nothing is done for the first time; what fails, raises."""
    global read, memory  # of this process
    warnings.simplefilter("ignore")
    read = {"hov2": read_hov2, "ffmpeg": decode_all}.get(name) or peer(name)
    read(small)
    memory = kit.Memory()


def read_hov2(path):
    """(frames, samples) by hov2."""
    media = read_media(path, fps=FPS, max_frames=MAX_FRAMES, min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)
    return media.frames, media.audio


def decode_all(path):
    """Decodes everything, keeps nothing."""
    with av.open(path) as container:
        streams = [s for s in container.streams if s.type in ("video", "audio")]
        for stream in streams:
            stream.codec_context.thread_count = 1
        for packet in container.demux(streams):
            if packet.size:
                packet.decode()
    return None, None


def peer(decoder):
    """A function like `read_hov2` on qwen-omni-utils with this decoder."""
    os.environ["FORCE_QWENVL_VIDEO_READER"] = decoder
    os.environ["TORCHCODEC_NUM_THREADS"] = str(torch.get_num_threads())
    __import__(decoder)
    try:
        import torchvision  # noqa: F401, qwen-omni-utils does it
    except RuntimeError:  # a build of torchvision that doesn't fit this torch; its own operators aren't used here
        operators = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            operators.define(f"{operator}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
    from qwen_omni_utils import process_mm_info

    def read_peer(path):
        video = {
            "type": "video",
            "video": path,
            "fps": FPS,
            "max_frames": MAX_FRAMES,
            "min_pixels": MIN_PIXELS,
            "max_pixels": MAX_PIXELS,
        }
        audios, _, videos = process_mm_info([{"role": "user", "content": [video]}], use_audio_in_video=True)
        return videos[0], torch.from_numpy(audios[0])

    return read_peer


def measure(path):
    """{"cpu", "wall", "growth", "frames": shape, "samples": count} of one reading."""
    memory.reset_peak()
    before, start = _cpu(), time.perf_counter()
    frames, audio = read(path)
    return {
        "cpu": _cpu() - before,
        "wall": time.perf_counter() - start,
        "growth": memory.growth(),
        "frames": frames if frames is None else list(frames.shape),
        "samples": None if audio is None else len(audio),
    }


def _cpu():
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


# ---- The run ---------------------------------------------------------------------------------------------------------


def run(job, folder):
    """{"clips": {clip: {way: figures}}, "absent": {way: why}}, as it goes into the JSON file."""
    clips = {}
    for name in job.synthesise:
        seconds, *rest = CLIPS[name]
        clips[name] = str(Path(folder, name))
        make_clip(clips[name], max(1, round(seconds * job.scale)), *rest)
    clips |= {Path(path).name: path for path in job.clips}
    small = str(Path(folder, "small.mp4"))
    make_clip(small, 2, 320, 240, 10, "libx264", {}, "aac")
    absent = {peer: why for peer in PEERS if (why := missing(peer))}
    ways = ["hov2", "ffmpeg", *(peer for peer in PEERS if peer not in absent)]
    workers = kit.Workers(ways, job.threads, setup, small)
    result = {"clips": {}, "absent": absent, "job": vars(job)}
    for clip, path in clips.items():
        runs = {way: [] for way in ways}
        for _, way in kit.interleaved(ways, job.repeats):
            runs[way].append(workers.call(way, measure, path))
        result["clips"][clip] = {
            way: of_way[0] | {key: kit.median([r[key] for r in of_way]) for key in ("cpu", "wall", "growth")}
            for way, of_way in runs.items()
        }
    workers.close()
    return result


def missing(decoder):
    """What qwen-omni-utils with this decoder lacks here, in words; "" if nothing."""
    lacking = [name for name in ("qwen_omni_utils", decoder) if not importlib.util.find_spec(name)]
    lacking += [] if shutil.which("ffmpeg") else ["the ffmpeg program"]
    return ", ".join(lacking) and f"{', '.join(lacking)} not installed"


def report(result):
    """Prints the table of CPU seconds and memory, and the gains over the faster peer."""
    print(f"\n{kit.machine()}; medians of {result['job']['repeats']}")
    for way, why in result["absent"].items():
        print(f"{way}: not measured, {why}")
    ways = list(next(iter(result["clips"].values())))
    peers = [way for way in ways if way in PEERS]
    rows, gains = [], []
    for clip, found in result["clips"].items():
        ours = found["hov2"]
        best = min((found[way]["cpu"] for way in peers), default=None)
        least = min((found[way]["growth"] or 0 for way in peers), default=None)
        gains.append(best / ours["cpu"] if best else None)
        rows.append(
            [
                clip,
                *(found[way]["cpu"] for way in ways),
                gains[-1],
                ours["cpu"] / found["ffmpeg"]["cpu"],
                ours["growth"],
                least,
            ]
        )
    kit.print_table(["CPU s", *ways, "best peer / hov2", "hov2 / ffmpeg", "hov2 MiB", "least of peers, MiB"], rows)
    if peers:
        print(f"median gain over the faster peer: {statistics.median(gains):.2f}")
    for clip, found in result["clips"].items():
        print(
            f"{clip}: "
            + "; ".join(
                f"{way} frames {found[way]['frames']}, {found[way]['samples']} samples"
                for way in ways
                if way != "ffmpeg"
            )
        )


def arguments(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description="Reading clips: hov2, its peers and plain decoding.")
    parser.add_argument("clips", nargs="*", help="files to read, beside the synthesised ones")
    parser.add_argument("--synthesise", nargs="*", default=list(CLIPS), choices=list(CLIPS))
    parser.add_argument("--scale", type=float, default=1.0, help="of the synthesised clips' lengths")
    return kit.parse(parser, argv)


def main(argv=None):
    """Runs, prints, and writes the JSON file if there is to be one."""
    job = arguments(argv)
    with tempfile.TemporaryDirectory() as folder:
        result = run(job, folder)
    report(result)
    kit.write_json(job.json, result)


if __name__ == "__main__":
    main()
