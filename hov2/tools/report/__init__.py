"""What runs did, as one page that works from disk.

    python -m hov2.tools.report RUN [RUN2 ...] -o report.html

Curves of all metrics, the rollouts with each token's credit, and evaluations with what changed between runs. The page
is report.html with report.css, report.js and the data in it: no network, no library. What a model wrote is data in JSON
(or deflated JSON in base64), which report.js puts in as text, never as HTML. A rollouts.jsonl is held in memory. What
each value means is in metrics.json, in the words of docs/metrics.md.
"""

import argparse
import base64
import html
import io
import json
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import av

from hov2.evaluation.results import format_comparison
from hov2.rewards import REWARDS

if TYPE_CHECKING:
    import torch

MAX_BYTES = 14e6  # of the page, for rollouts with their clips
MAX_PROMPTS = 8  # of a step
THUMBNAIL = 64  # pixels, its height
RESULTS = ("results.txt", "*/results.txt")  # of evaluate.py
_HERE = Path(__file__).parent


class ReportError(ValueError):
    """A run that can't be shown; the message names the folder or the file."""


def make_report(folders: list[str | Path]) -> str:
    """Return the page of the runs in `folders`. ReportError for a folder that holds nothing to show."""
    folders = _named(folders)
    for folder in folders.values():
        if not _holds_a_run(folder):
            raise ReportError(f"{folder}: no metrics.jsonl, rollouts.jsonl or results.txt of a run in it")
    runs = []
    for name, folder in folders.items():
        metrics = read_records(folder / "metrics.jsonl")
        rollouts = pack_rollouts(folder, MAX_BYTES / len(folders))
        runs.append({"name": name, "metrics": metrics, "rollouts": rollouts})
    parts = {kind: (_HERE / f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js")}
    parts["data"] = _json({"runs": runs, "about": explanations(), "evaluations": read_evaluations(folders)})
    parts["title"] = html.escape(", ".join(folders))
    return re.sub("@(title|css|js|data)@", lambda match: parts[match[1]], parts["html"])


def _named(folders: list[str | Path]) -> dict[str, Path]:
    """Return {name of the run: its folder}: the folder's own name, its whole path where two have the same."""
    names = [Path(folder).resolve().name for folder in folders]
    named = {}
    for name, folder in zip(names, folders):
        key = name if names.count(name) == 1 else str(folder)
        named[key] = Path(folder)
    return named


def _holds_a_run(folder: Path) -> bool:
    for pattern in ("metrics.jsonl", "rollouts.jsonl", *RESULTS):
        if list(folder.glob(pattern)):
            return True
    return False


def _json(data: object) -> str:
    """Return JSON that can stand in a <script>: no `<` in it, so that nothing ends that element."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def _record(path: Path, text: bytes) -> dict:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ReportError(f"{path}: expected JSON, got {text[:40]!r}: {error}") from None


def _lines(path: Path) -> list[bytes]:
    """Return the whole lines of a file: none of one that isn't there, and no last one that is cut off."""
    if not path.exists():
        return []
    return path.read_bytes().split(b"\n")[:-1]


def read_records(path: Path) -> list[dict]:
    """Return what the whole lines of a JSONL file hold. ReportError for what is no JSON."""
    return [_record(path, line) for line in _lines(path)]


def explanations() -> list[list[str]]:
    """Return [pattern of its name, what it is] of each value that is explained, in the order of metrics.json."""
    texts = json.loads((_HERE / "metrics.json").read_text(encoding="utf-8"))
    return [[re.sub("NAME|KIND", "[^/]+", name), text] for name, text in texts.items()]


# ---- Rollouts ----


def pack_rollouts(folder: Path, budget: float) -> dict:
    """Return the run's rollouts for the page, of steps spread evenly over it, as many as go into `budget` bytes.

    {"steps": {step: base64 of deflated JSON}, "dumped": steps in the file, "clips": {path: clip}}. A step is a list of
    at most MAX_PROMPTS records of train_grpo.dump_record, with what `_add_to` adds.
    """
    path = folder / "rollouts.jsonl"
    lines_of = _lines_by_step(path)
    settings = None
    if lines_of:
        settings = _record(folder / "config.json", (folder / "config.json").read_bytes())["media"]
    packed = {}
    clips = {}
    used = 0
    for step in _spread(sorted(lines_of, reverse=True)):
        every = -(-len(lines_of[step]) // MAX_PROMPTS)  # rounded up
        records = [_record(path, line) for line in lines_of[step][::every]]
        new_files = set()
        for record in records:
            new_files.update(record["media"].values())
            for completion in record["completions"]:
                _add_to(completion)
        new_files -= clips.keys()
        new_clips = {file: read_clip(file, settings) for file in sorted(new_files)}
        text = base64.b64encode(zlib.compress(_json(records).encode(), 9)).decode()
        used += len(text) + len(_json(new_clips))
        if used > budget and packed:  # one step is always shown
            break
        packed[step] = text
        clips |= new_clips
    return {"steps": packed, "dumped": len(lines_of), "clips": clips}


def _lines_by_step(path: Path) -> dict[int, list[bytes]]:
    """Return {step: its records' lines}; they are read without parsing them, since most may not be shown."""
    lines_of = {}
    for line in _lines(path):
        match = re.match(rb'{"step": (\d+),', line)
        if not match:
            raise ReportError(f"{path}: expected the records that train_grpo.py writes, got {line[:40]!r}")
        lines_of.setdefault(int(match[1]), []).append(line)
    return lines_of


def _spread(items: list[int]) -> Iterator[int]:
    """Yield all items, so that wherever one stops, those so far are spread evenly.

    As the marks of a ruler, the longest first: the first item, then those whose position is a multiple of the highest
    power of two, then of the next lower one, and so on.
    """
    size = 1
    while size < len(items):
        size *= 2
    yield from items[:1]
    while size > 1:
        size //= 2
        yield from items[size :: 2 * size]  # the odd multiples of `size`


def _add_to(completion: dict) -> None:
    """Add what the page needs beside the dump.

    `spans`: {reward: the span that it reaches}; `blocks`: {tag: [start, end] in its text}; and, as the first value of
    its tokens, the sum of all credits.
    """
    from hov2.spans import find_block  # here, as below: this module is imported without torch

    completion["spans"] = {name: REWARDS[name].span for name in completion["rewards"] if name in REWARDS}
    completion["blocks"] = {}
    for tag in ("context", "think", "answer"):
        block = find_block(completion["text"], tag)
        if block:
            completion["blocks"][tag] = [block[0], block[3]]
    credits = {name: values for name, values in completion["tokens"].items() if name.startswith("credit/")}
    total = [round(sum(values), 5) for values in zip(*credits.values())]
    completion["tokens"] = {"credit/total": total, **credits, **completion["tokens"]}


def read_clip(path: str, settings: dict) -> dict:
    """Return what the model saw and heard of a file: {"frames": data URIs, "sound": data URI, "seconds"}, or {"error"}.

    `settings`: config.MediaConfig as a dict.
    """
    from hov2.data.media import MediaError, read_media

    options = {name: settings[name] for name in ("fps", "max_frames", "min_pixels", "max_pixels")}
    try:
        media = read_media(path, **options)
    except MediaError as error:
        return {"error": str(error)}
    frames = [] if media.frames is None else media.frames
    clip = {"frames": [_jpeg(frame) for frame in frames]}
    if media.audio is not None:
        clip["sound"] = _opus(media.audio)
        clip["seconds"] = len(media.audio) / 16000
    return clip


def _jpeg(pixels: "torch.Tensor") -> str:
    """Return a frame, uint8 (3, H, W), as a small picture: the encoder shrinks it."""
    frame = av.VideoFrame.from_ndarray(pixels.permute(1, 2, 0).contiguous().numpy(), format="rgb24")
    settings = {
        "rate": 1,
        "width": max(2, round(frame.width / frame.height * THUMBNAIL)),
        "height": THUMBNAIL,
        "pix_fmt": "yuvj444p",
        "options": {"qmin": "4", "qmax": "4"},
    }
    return _data_uri("image/jpeg", "mjpeg", "mjpeg", frame, settings)


def _opus(waveform: "torch.Tensor") -> str:
    """Return mono sound at 16 kHz, float32 (N,), as a small file."""
    frame = av.AudioFrame.from_ndarray(waveform[None].numpy(), format="flt", layout="mono")
    frame.sample_rate = 16000
    settings = {"rate": 16000, "layout": "mono", "options": {"b": "24k"}}
    return _data_uri("audio/webm", "webm", "libopus", frame, settings)


def _data_uri(
    kind: str, container_format: str, codec: str, frame: av.VideoFrame | av.AudioFrame, settings: dict
) -> str:
    """Return a frame, encoded with the `settings` of a stream, as a data URI of the MIME type `kind`."""
    file = io.BytesIO()
    with av.open(file, "w", format=container_format) as container:
        stream = container.add_stream(codec, **settings)
        container.mux([*stream.encode(frame), *stream.encode()])
    return f"data:{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


# ---- Evaluation ----


def read_evaluations(folders: dict[str, Path]) -> list[list[str]]:
    """Return [title, text] of what evaluate.py wrote to the runs' folders {run: folder} or to folders in them.

    The tables of each evaluation, and what changed to it from the last run's of the same name.
    """
    found = []
    last = {}  # {name: the last run's evaluation of that name}
    for run, folder in folders.items():
        paths = []
        for pattern in RESULTS:
            paths.extend(folder.glob(pattern))
        for path in sorted(paths):
            name = path.parent.name
            results_path = path.with_name("results.json")
            results = _record(results_path, results_path.read_bytes())
            records = read_records(path.with_name("predictions.jsonl"))
            found.append([f"{run}: {name}", path.read_text(encoding="utf-8")])
            if name in last:
                other_run, other_results, other_records = last[name]
                comparison = format_comparison((other_run, run), (other_results, results), (other_records, records))
                found.append([f"{other_run} → {run}: {name}", comparison])
            last[name] = run, results, records
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m hov2.tools.report", description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output_dir of a training run or of an evaluation")
    parser.add_argument("-o", "--output", default="report.html")
    args = parser.parse_args()
    try:
        Path(args.output).write_text(make_report(args.runs), encoding="utf-8")
    except (ReportError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{args.output}: {Path(args.output).stat().st_size / 1e6:.1f} MB")
