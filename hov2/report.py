"""python -m hov2.report RUN [RUN2 ...] -o report.html: what runs did, as one page that works from disk.

Curves of all metrics, the rollouts with each token's credit, and evaluations with what changed between runs. The page
is report.html with report.css, report.js and the data in it: no network, no library. What a model wrote is data in JSON
(or deflated JSON in base64), which report.js puts in as text, never as HTML.
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

from hov2.results import format_comparison

MAX_BYTES = 14e6  # of the page, for rollouts with their clips
MAX_PROMPTS = 8  # of a step
THUMBNAIL = 112  # pixels, the longer side
_HERE = Path(__file__).parent


class ReportError(ValueError):
    """A run that can't be shown; the message names the folder or the file."""


def make_report(folders):
    """The page of the runs in `folders`, as text. ReportError for a folder that holds nothing to show."""
    names = [Path(folder).resolve().name for folder in folders]
    folders = {name if names.count(name) == 1 else str(folder): Path(folder) for name, folder in zip(names, folders)}
    evaluations = [e for name, folder in folders.items() for e in read_evaluations(name, folder)]
    runs = [{"name": name, **read_metrics(folder / "metrics.jsonl"),
             "rollouts": pack_rollouts(folder, MAX_BYTES / len(folders))} for name, folder in folders.items()]
    for run in runs:
        if not (run["steps"] or run["rollouts"]["steps"] or run["name"] in [e["run"] for e in evaluations]):
            raise ReportError(f"{folders[run['name']]}: no metrics.jsonl, rollouts.jsonl or results.txt of a run in it")
    data = {"runs": runs, "about": explanations(), "evaluations": texts(evaluations)}
    parts = {kind: (_HERE / f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js")}
    parts |= {"title": html.escape(", ".join(folders)), "data": _json(data)}
    return re.sub("@(title|css|js|data)@", lambda match: parts[match[1]], parts["html"])


def _json(data):
    """JSON that can stand in a <script>: no `<` in it, so that nothing ends that element."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def _lines(path):
    """(offset in bytes, line) of each whole line: none of a file that isn't there, and no last one that is cut off."""
    offset = 0
    with path.open("rb") if path.exists() else io.BytesIO() as file:
        for line in file:
            if line.endswith(b"\n"):
                yield offset, line
            offset += len(line)


def _record(path, line):
    try:
        return json.loads(line)
    except ValueError as error:
        raise ReportError(f"{path}: expected JSON, got {line[:40]!r}: {error}") from None


# ---- Curves ----


def read_metrics(path):
    """{"steps": [...], "values": {metric: [number or None, ...]}} of a metrics.jsonl."""
    records = [_record(path, line) for _, line in _lines(path)]
    names = dict.fromkeys(name for record in records for name in record if name != "step")
    return {"steps": [record["step"] for record in records],
            "values": {name: [record.get(name) for record in records] for name in names}}


def explanations():
    """[[pattern of names in backticks, what it is]] of the metrics in the tables of docs/metrics.md, in their order."""
    text = (_HERE.parent / "docs/metrics.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.+?) \| (.+?) \|", text, re.MULTILINE)
    return [[re.sub("NAME|KIND", "[^/]+", names).replace(", ", "|"), about.replace("`", "")] for names, about in rows]


# ---- Rollouts ----


def pack_rollouts(folder, budget):
    """The run's rollouts for the page, of steps spread evenly over it, as many as go into `budget` bytes.

    Returns {"steps": {step: base64 of deflated JSON}, "dumped": steps in the file, "prompts": most of one step in it,
    "clips": {path: clip}}. A step is a list of at most MAX_PROMPTS records of train_grpo.dump_record, with the `blocks`
    of each completion.
    """
    path, config, offsets, packed, clips, used = folder / "rollouts.jsonl", folder / "config.json", {}, {}, {}, 0
    for offset, line in _lines(path):
        match = re.match(rb'{"step": (\d+),', line)
        if not match:
            raise ReportError(f"{path}: expected the records that train_grpo.py writes, got {line[:40]!r}")
        offsets.setdefault(int(match[1]), []).append(offset)
    settings = offsets and _record(config, config.read_bytes())["media"]
    steps = sorted(offsets, reverse=True)
    ruler = sorted(range(len(steps)), key=lambda i: i & -i or len(steps), reverse=True)  # its longest marks first
    for step in (steps[i] for i in ruler):
        records = _read_records(path, offsets[step][::-(-len(offsets[step]) // MAX_PROMPTS)])
        files = {file for record in records for file in record["media"].values()} - clips.keys()
        more = {file: read_clip(file, settings) for file in sorted(files)}
        text = base64.b64encode(zlib.compress(_json(records).encode(), 9)).decode()
        used += len(text) + len(_json(more))
        if used > budget and packed:
            break
        packed[step] = text
        clips |= more
    return {"steps": packed, "dumped": len(offsets), "clips": clips,
            "prompts": max(map(len, offsets.values()), default=0)}


def _read_records(path, offsets):
    from hov2.spans import find_block  # here, as below: this module is imported without torch
    records = []
    with path.open("rb") as file:
        for offset in offsets:
            file.seek(offset)
            records.append(_record(path, file.readline()))
    for completion in (c for record in records for c in record["completions"]):
        found = {tag: find_block(completion["text"], tag) for tag in ("context", "think", "answer")}
        completion["blocks"] = {tag: [block[0], block[3]] for tag, block in found.items() if block}
    return records


def read_clip(path, settings):
    """What the model saw and heard of a file: {"frames": data URIs, "fps", "sound": data URI, "seconds"}, or {"error"}.

    `settings`: config.MediaConfig as a dict.
    """
    from hov2.media import MediaError, read_media
    try:
        media = read_media(path, **{name: settings[name] for name in ("fps", "max_frames", "min_pixels", "max_pixels")})
    except MediaError as error:
        return {"error": str(error)}
    frames = [] if media.frames is None else media.frames
    clip = {"frames": [_jpeg(frame) for frame in frames], "fps": media.sample_fps}
    if media.audio is not None:
        clip |= {"sound": _opus(media.audio), "seconds": len(media.audio) / 16000}
    return clip


def _jpeg(pixels):
    """A frame, uint8 (3, H, W), as a small picture."""
    import av
    frame = av.VideoFrame.from_ndarray(pixels.permute(1, 2, 0).contiguous().numpy(), format="rgb24")
    shrink = min(1, THUMBNAIL / max(frame.width, frame.height))
    frame = frame.reformat(max(2, round(frame.width * shrink)), max(2, round(frame.height * shrink)), "yuvj444p")
    return _data_uri("image/jpeg", "mjpeg", "mjpeg", frame, rate=1, width=frame.width, height=frame.height,
                     pix_fmt="yuvj444p", options={"qmin": "4", "qmax": "4"})


def _opus(waveform):
    """Mono sound at 16 kHz, float32 (N,)."""
    import av
    frame = av.AudioFrame.from_ndarray(waveform[None].numpy(), format="flt", layout="mono")
    frame.sample_rate = 16000
    return _data_uri("audio/webm", "webm", "libopus", frame, rate=16000, layout="mono", options={"b": "24k"})


def _data_uri(kind, container_format, codec, frame, **settings):
    import av
    file = io.BytesIO()
    with av.open(file, "w", format=container_format) as container:
        stream = container.add_stream(codec, **settings)
        container.mux([*stream.encode(frame), *stream.encode()])
    return f"data:{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


# ---- Evaluation ----


def read_evaluations(run, folder):
    """What evaluate.py wrote to `folder` or to folders in it: [{"run", "name", "text", "results", "records"}]."""
    found = []
    for path in sorted([*folder.glob("results.txt"), *folder.glob("*/results.txt")]):
        results, predictions = path.with_name("results.json"), path.with_name("predictions.jsonl")
        found.append({"run": run, "name": path.parent.name, "text": path.read_text(encoding="utf-8"),
                      "results": _record(results, results.read_bytes()),
                      "records": [_record(predictions, line) for _, line in _lines(predictions)]})
    return found


def texts(evaluations):
    """[[title, text]]: the tables of each evaluation, and what changed from it to the next run's of the same name."""
    found, earlier = [], {}
    for e in evaluations:
        found.append([f"{e['run']}: {e['name']}", e["text"]])
        if before := earlier.get(e["name"]):
            pair = [(x["run"], x["results"], x["records"]) for x in (before, e)]
            found.append([f"{before['run']} → {e['run']}: {e['name']}", format_comparison(*zip(*pair))])
        earlier[e["name"]] = e
    return found


def main():
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m hov2.report", description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output_dir of a training run or of an evaluation")
    parser.add_argument("-o", "--output", default="report.html")
    args = parser.parse_args()
    try:
        Path(args.output).write_text(make_report(args.runs), encoding="utf-8")
    except (ReportError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{args.output}: {Path(args.output).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
