"""The order in which questions are asked, and their answers on disk as they come."""

import hashlib
import json
import os
import re
from contextlib import suppress
from pathlib import Path

from hov2.config import ConfigError
from hov2.data.samples import Sample
from hov2.distributed import atomic_write, gather_objects, rank, writing
from hov2.engine.checkpoint import set_aside
from hov2.evaluation.results import differing

_SECONDS = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:s|sec|seconds)?\s*")


def longest_first(samples: list[Sample]) -> list[int]:
    """Return the samples' positions, longest clip first.

    By `video_duration` or `duration` in seconds where the data say it ("30s", 30.5), then by the size of the media
    files; equals, and questions without media, stay in the data's order.
    """
    lengths = [_length(sample) for sample in samples]
    return sorted(range(len(samples)), key=lengths.__getitem__, reverse=True)  # stable: equals keep their order


def _length(sample: Sample) -> tuple[float, int]:
    """Return (seconds or 0, bytes of the media files)."""
    duration = sample.extra.get("video_duration", sample.extra.get("duration"))
    seconds = _SECONDS.fullmatch(str(duration))
    size = 0
    for path in set(sample.paths.values()):
        if os.path.isfile(path):
            size += os.path.getsize(path)
    return float(seconds[1]) if seconds else 0.0, size


class Journal:
    """Answers in `output_dir/answers`, a file a rank, and the protocol that they were had under.

    `protocol` is a dict for JSON of all that an answer depends on, but for the questions. Answers of an earlier run are
    taken up; ConfigError if that had another protocol or other questions. `resume` false moves them, with that run's
    results, to `output_dir/earlier-N` instead. All ranks make one, before any appends.
    """

    def __init__(self, output_dir: str | Path, protocol: dict, samples: list[Sample], resume: bool = True):
        self.folder = Path(output_dir) / "answers"
        self.path = self.folder / f"rank-{rank()}.jsonl"
        changes = ""
        if rank() == 0:
            changes = self._begin(protocol | {"questions and clips": _digest(samples)}, resume)
        changes = gather_objects(changes)[0]
        if changes:
            raise ConfigError(
                f"{self.folder}: answers of another protocol: {changes}. Set these back, choose another output_dir, "
                "or set the answers aside with resume=false"
            )

    def _begin(self, protocol: dict, resume: bool) -> str:
        """Make the folder ready for answers under `protocol`; return how that of the answers in it differs, or ""."""
        path = self.folder / "protocol.json"
        if not resume:
            set_aside(self.folder.parent, ("answers", "predictions.jsonl", "results.json", "results.txt"))
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            atomic_write(path, json.dumps(protocol, indent=2) + "\n")
        old = json.loads(path.read_text())
        new = json.loads(json.dumps(protocol))  # tuples are lists in JSON
        changes = []
        for key, (was, now) in differing(old, new).items():
            changes.append(f"{key} was {was!r:.80} and is {now!r:.80}")
        return "; ".join(changes)

    def read(self) -> dict[int, dict]:
        """Return {index: record} of all answers so far, by whatever rank; a line that a kill cut short is left out."""
        records = {}
        for path in sorted(self.folder.glob("rank-*.jsonl")):
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                with suppress(ValueError):
                    entry = json.loads(line)
                    records[entry["index"]] = entry["record"]
        return records

    def append(self, records: dict[int, dict]) -> None:
        """Write {index: record} to this rank's file, at once."""
        lines = [json.dumps({"index": index, "record": record}) for index, record in records.items()]
        with writing(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write("\n" + "\n".join(lines))  # the line before may have been cut short by a kill


def _digest(samples: list[Sample]) -> str:
    """Return a checksum of the questions and of the order in which they are asked, which their clips' sizes decide."""
    fields = [vars(sample) for sample in samples]
    text = json.dumps([fields, longest_first(samples)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
