"""What runs did, as one page that works from disk.

    python -m hov2.tools.report RUN [RUN2 ...] -o report.html

Curves of all metrics, the rollouts with each token's credit, and evaluations with what changed between runs. The page
is report.html with report.css, report.js and the data in it: no network, no library. What a model wrote is data in JSON
(or deflated JSON in base64), which report.js puts in as text, never as HTML. A rollouts.jsonl is held in memory.
"""

import argparse
import base64
import html
import io
import json
import re
import sys
import zlib
from pathlib import Path

import av

from hov2.evaluation.results import format_comparison

MAX_BYTES = 14e6  # of the page, for rollouts with their clips
MAX_PROMPTS = 8  # of a step
THUMBNAIL = 64  # pixels, its height
RESULTS = ("results.txt", "*/results.txt")  # of evaluate.py
_HERE = Path(__file__).parent


class ReportError(ValueError):
    """A run that can't be shown; the message names the folder or the file."""


def make_report(folders):
    """The page of the runs in `folders`, as text. ReportError for a folder that holds nothing to show."""
    names = [Path(folder).resolve().name for folder in folders]
    folders = {name if names.count(name) == 1 else str(folder): Path(folder) for name, folder in zip(names, folders)}
    for folder in folders.values():
        if not any(list(folder.glob(name)) for name in ("metrics.jsonl", "rollouts.jsonl", *RESULTS)):
            raise ReportError(f"{folder}: no metrics.jsonl, rollouts.jsonl or results.txt of a run in it")
    runs = [{"name": name, "metrics": read_records(folder / "metrics.jsonl"),
             "rollouts": pack_rollouts(folder, MAX_BYTES / len(folders))} for name, folder in folders.items()]
    parts = {kind: (_HERE / f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js")}
    parts["data"] = _json({"runs": runs, "about": explanations(), "evaluations": read_evaluations(folders)})
    parts["title"] = html.escape(", ".join(folders))
    return re.sub("@(title|css|js|data)@", lambda match: parts[match[1]], parts["html"])


def _json(data):
    """JSON that can stand in a <script>: no `<` in it, so that nothing ends that element."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def _record(path, text):
    try:
        return json.loads(text)
    except ValueError as error:
        raise ReportError(f"{path}: expected JSON, got {text[:40]!r}: {error}") from None


def _lines(path):
    """The whole lines of a file, as bytes: none of one that isn't there, and no last one that is cut off."""
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def read_records(path):
    """What the whole lines of a JSONL file hold. ReportError for what is no JSON."""
    return [_record(path, line) for line in _lines(path)]


def explanations():
    """[[pattern of names in backticks, what it is]] of the values in the tables of docs/metrics.md, in their order."""
    text = (_HERE.parents[2] / "docs/metrics.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.+?) \| (.+?) \|", text, re.MULTILINE)
    return [[re.sub("NAME|KIND", "[^/]+", names).replace(", ", "|"), about.replace("`", "")] for names, about in rows]


# ---- Rollouts ----


def pack_rollouts(folder, budget):
    """The run's rollouts for the page, of steps spread evenly over it, as many as go into `budget` bytes.

    Returns {"steps": {step: base64 of deflated JSON}, "dumped": steps in the file, "clips": {path: clip}}. A step is a
    list of at most MAX_PROMPTS records of train_grpo.dump_record, with what `_add_to` adds.
    """
    path, groups, packed, clips, used = folder / "rollouts.jsonl", {}, {}, {}, 0
    for line in _lines(path):
        match = re.match(rb'{"step": (\d+),', line)
        if not match:
            raise ReportError(f"{path}: expected the records that train_grpo.py writes, got {line[:40]!r}")
        groups.setdefault(int(match[1]), []).append(line)
    settings = groups and _record(folder / "config.json", (folder / "config.json").read_bytes())["media"]
    steps = sorted(groups, reverse=True)
    ruler = sorted(range(len(steps)), key=lambda i: i & -i or len(steps), reverse=True)  # its longest marks first
    for step in (steps[i] for i in ruler):
        records = [_record(path, line) for line in groups[step][::-(-len(groups[step]) // MAX_PROMPTS)]]
        for completion in (c for record in records for c in record["completions"]):
            _add_to(completion)
        files = {file for record in records for file in record["media"].values()} - clips.keys()
        more = {file: read_clip(file, settings) for file in sorted(files)}
        text = base64.b64encode(zlib.compress(_json(records).encode(), 9)).decode()
        used += len(text) + len(_json(more))
        if used > budget and packed:
            break
        packed[step] = text
        clips |= more
    return {"steps": packed, "dumped": len(groups), "clips": clips}


def _add_to(completion):
    """Adds `blocks`, {tag: [start, end] in its text}, and, as the first value of its tokens, the sum of all credits."""
    from hov2.spans import find_block  # here, as below: this module is imported without torch
    found = {tag: find_block(completion["text"], tag) for tag in ("context", "think", "answer")}
    completion["blocks"] = {tag: [block[0], block[3]] for tag, block in found.items() if block}
    credits = {name: values for name, values in completion["tokens"].items() if name.startswith("credit/")}
    total = [round(sum(values), 5) for values in zip(*credits.values())]
    completion["tokens"] = {"credit/total": total, **credits, **completion["tokens"]}


def read_clip(path, settings):
    """What the model saw and heard of a file: {"frames": data URIs, "sound": data URI, "seconds"}, or {"error"}.

    `settings`: config.MediaConfig as a dict.
    """
    from hov2.data.media import MediaError, read_media
    try:
        media = read_media(path, **{name: settings[name] for name in ("fps", "max_frames", "min_pixels", "max_pixels")})
    except MediaError as error:
        return {"error": str(error)}
    frames = [] if media.frames is None else media.frames
    sound = {} if media.audio is None else {"sound": _opus(media.audio), "seconds": len(media.audio) / 16000}
    return {"frames": [_jpeg(frame) for frame in frames], **sound}


def _jpeg(pixels):
    """A frame, uint8 (3, H, W), as a small picture: the encoder shrinks it."""
    frame = av.VideoFrame.from_ndarray(pixels.permute(1, 2, 0).contiguous().numpy(), format="rgb24")
    width = max(2, round(frame.width / frame.height * THUMBNAIL))
    return _data_uri("image/jpeg", "mjpeg", "mjpeg", frame, rate=1, width=width, height=THUMBNAIL, pix_fmt="yuvj444p",
                     options={"qmin": "4", "qmax": "4"})


def _opus(waveform):
    """Mono sound at 16 kHz, float32 (N,)."""
    frame = av.AudioFrame.from_ndarray(waveform[None].numpy(), format="flt", layout="mono")
    frame.sample_rate = 16000
    return _data_uri("audio/webm", "webm", "libopus", frame, rate=16000, layout="mono", options={"b": "24k"})


def _data_uri(kind, container_format, codec, frame, **settings):
    file = io.BytesIO()
    with av.open(file, "w", format=container_format) as container:
        stream = container.add_stream(codec, **settings)
        container.mux([*stream.encode(frame), *stream.encode()])
    return f"data:{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


# ---- Evaluation ----


def read_evaluations(folders):
    """[[title, text]] of what evaluate.py wrote to the runs' folders {run: folder} or to folders in them.

    The tables of each evaluation, and what changed to it from the last run's of the same name.
    """
    found, earlier = [], {}
    for run, folder in folders.items():
        for path in sorted(path for name in RESULTS for path in folder.glob(name)):
            name, results = path.parent.name, path.with_name("results.json")
            evaluation = run, _record(results, results.read_bytes()), read_records(path.with_name("predictions.jsonl"))
            found.append([f"{run}: {name}", path.read_text(encoding="utf-8")])
            if before := earlier.get(name):
                found.append([f"{before[0]} → {run}: {name}", format_comparison(*zip(before, evaluation))])
            earlier[name] = evaluation
    return found


def main():
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

