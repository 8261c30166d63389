"""What a config's data holds and what would go wrong with it, before a run finds out on its second day.

    python -m hov2.tools.check_data configs/stage1.json configs/stage2.json [key=value ...]
    python -m hov2.tools.check_data configs/stage2.json --media probe --workers 16 --bad bad.jsonl

Reads every data file and benchmark that the configs name, looks at every clip and prints a table for each config, then
which clips the configs share. Exit code 1 if anything would be skipped or would stop the run, 2 for an unusable config.
Prompts are measured with the model's tokenizer; max_prompt_length=null does without.
"""

import argparse
import functools
import itertools
import json
import multiprocessing
import os
import sys
from collections import Counter
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from av.stream import Disposition
from tqdm import tqdm

from hov2.config import BaseConfig, MediaConfig, SFTConfig
from hov2.config_io import read_config
from hov2.data.formats import DataError
from hov2.data.inputs import InputMaker, MediaShape, load_media, media_key
from hov2.data.media import MediaError, open_media
from hov2.data.samples import SkipSample, read_slice
from hov2.engine.checkpoint import sha256
from hov2.engine.setup import USER_ERRORS
from hov2.evaluation.benchmarks import read_benchmark
from hov2.evaluation.results import table
from hov2.model.thinker import load_tokenizer
from hov2.prompts import load_prompts
from hov2.rewards import format_reward

SKIPPED = ("bad record", "missing", "unreadable", "too long")  # what a run can't use
SEEN = {"none": SKIPPED[:2], "probe": SKIPPED[:3], "decode": SKIPPED}  # by --media
BLOCKS = "no 3 blocks"
SHOWN = 10  # problems and shared clips printed


@dataclass
class Part:
    """What one data file or benchmark gives to a config."""

    group: str  # whose clips these are: the config, or its held-out questions
    name: str
    config: BaseConfig
    make: InputMaker | None  # None: prompts aren't, or needn't be, measured
    learned: bool  # its solutions are what SFT learns, blocks and all
    samples: list
    problems: list  # (one of SKIPPED or BLOCKS, sample id or None, reason)
    media: Counter = field(default_factory=Counter)


def read_parts(configs, media):
    """Yields a Part for each data file or benchmark of `configs` ({path: config}).

    Where a config comes after the one that makes its model, its prompts are measured with that one's tokenizer. Raises
    ModelError and PromptsError.
    """
    bases = {}
    for path, config in configs.items():
        prompts, make = load_prompts(config.prompts), None
        base = bases[Path(config.output_dir, "model")] = bases.get(Path(config.model), config.model)
        if media == "decode" and config.max_prompt_length:
            make = InputMaker(load_tokenizer(base), prompts, config.media, config.max_prompt_length,
                              config.on_long_prompt)
        entries = [(path, source) for source in config.data]
        entries += [(f"{path} (held out)", source) for source in getattr(config, "eval_data", [])]
        entries += [(path, None)] if getattr(config, "benchmark", None) else []
        for group, source in entries:
            name = f"{source.path} {source.slice}" if source else f"{config.benchmark} in {config.benchmark_root}"
            try:
                samples, errors, _ = (read_slice(source, config.seed) if source else
                                      (read_benchmark(config.benchmark, config.benchmark_root), [], None))
            except DataError as error:
                samples, errors = [], [error]
            yield Part(group, name, config, make, group == path and isinstance(config, SFTConfig), samples,
                       [("bad record", None, str(error)) for error in errors])


# ---- Looking at clips ----


def run_all(function, tasks, workers):
    """[function(task) for each task], by `workers` processes (1: in this one), with a progress bar."""
    bar = functools.partial(tqdm, desc="clips", unit="clip", total=len(tasks), disable=None if tasks else True)
    if min(workers, len(tasks)) < 2:
        return [function(task) for task in bar(tasks)]
    results = []
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        try:
            results.extend(bar(pool.map(function, tasks)))
        except BrokenExecutor:
            suspects = "; ".join(map(str, tasks[len(results):][:2 * workers]))
            raise DataError(f"clips: a process died, most likely on one of these: {suspects}") from None
    return results


def look_at(key, media):
    """What the clip of a media key gives: ((problem, reason) or None, MediaShape or None, {path: SHA-256}).

    Shape and sums are only known of what is decoded, and as an InputMaker would have it.
    """
    paths, settings = dict(key[0]), MediaConfig(*key[1:])
    if absent := [path for path in paths.values() if not os.path.isfile(path)]:
        return ("missing", f"{absent[0]}: no such file"), None, {}
    try:
        if media == "decode":
            return None, load_media(paths, settings)[0], {path: sha256(path) for path in paths.values()}
        if media == "probe":
            probe(paths)
    except MediaError as error:
        return ("unreadable", str(error)), None, {}
    return None, None, {}


def probe(paths):
    """MediaError for one of a sample's `paths` whose header doesn't promise its medium; nothing is decoded."""
    for kind, path in paths.items():
        with open_media(path) as container:
            found = {s.type for s in container.streams if not s.disposition & Disposition.attached_pic}
        if ("audio" if kind == "audio" else "video") not in found:
            raise MediaError(path, f"expected {kind}, found none")


def look_at_all(parts, media, workers):
    """Fills the parts' problems and media; returns {path: SHA-256}. A clip of several samples is looked at once."""
    keys = list(dict.fromkeys(media_key(s, part.config.media) for part in parts for s in part.samples if s.paths))
    clips = dict(zip(keys, run_all(functools.partial(look_at, media=media), keys, workers)))
    known = {key: shape for key, (_, shape, _) in clips.items() if shape}
    for part in parts:
        if part.make:
            part.make.known = known
        for sample in part.samples:
            problem, shape, _ = clips.get(media_key(sample, part.config.media), (None, MediaShape(), {}))
            if shape and part.make:
                try:
                    part.make(sample)
                except (DataError, SkipSample) as error:
                    problem = "too long", str(error)
            if problem:
                part.problems.append((problem[0], sample.id, problem[1]))
            if part.learned and not format_reward(sample.solution):
                part.problems.append((BLOCKS, sample.id, "the solution isn't context, think and answer"))
            sound = " with sound" if "video" in sample.paths and shape and shape.mel_frames else ""
            part.media[("+".join(sample.paths) or "text") + sound] += 1
    return {path: digest for *_, sums in clips.values() for path, digest in sums.items()}


# ---- The report ----


def print_parts(group, parts, media):
    """Prints what was found in the parts of one group; "-" is not looked for."""
    rows = [("source", "samples", *SKIPPED, BLOCKS)]
    for part in parts:
        counts, seen = Counter(kind for kind, *_ in part.problems), {*SEEN[media], BLOCKS if part.learned else None}
        rows.append((part.name, len(part.samples), *(counts[name] if name in seen else "-" for name in rows[0][2:])))
    print(f"\n{group}\n{table(rows)}")
    for part in parts:
        kinds = Counter(sample.problem_type for sample in part.samples), part.media
        print(f"{part.name}:", *(f"{count} {name}" for counter in kinds for name, count in counter.most_common()),
              sep="\n    ")


def print_shared_clips(parts, sums):
    """Prints for each two groups which files of the one the other has too.

    By name: without folder and ending; by content: with an equal sum in `sums` ({path: SHA-256}), if there are any.
    """
    groups = {}
    for part in parts:
        groups.setdefault(part.group, set()).update(path for s in part.samples for path in s.paths.values())
    keys = {"name": lambda path: Path(path).stem} | ({"content": lambda path: sums.get(path, path)} if sums else {})
    for (one, paths), (other, others) in itertools.combinations(groups.items(), 2):
        print(f"\n{one} and {other} share clips")
        for by, key in keys.items():
            theirs = set(map(key, others))
            clips = sorted(path for path in paths if key(path) in theirs)
            print(f"  {len(clips)} by {by}: {', '.join(clips[:SHOWN])}{', ...' if len(clips) > SHOWN else ''}")


def check(paths, overrides=(), media="decode", workers=1, bad=None):
    """Looks at everything that the configs at `paths` name, prints what it finds and writes the problems to the file
    `bad`; returns whether anything is skipped."""
    parts = list(read_parts({path: read_config(path, overrides) for path in paths}, media))
    sums = look_at_all(parts, media, workers)
    for group, members in itertools.groupby(parts, lambda part: part.group):
        print_parts(group, list(members), media)
    print_shared_clips(parts, sums)
    problems = [{"config": part.group, "source": part.name, "id": name, "problem": kind, "reason": reason}
                for part in parts for kind, name, reason in part.problems]
    if bad:
        Path(bad).write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in problems), "utf-8")
    print(f"\nproblems: {len(problems)}" + (f", all in {bad}" if bad else ""))
    for entry in problems[:SHOWN]:
        print(f"  {entry['problem']}: {entry['id'] or entry['source']}: {entry['reason']}")
    return any(entry["problem"] in SKIPPED for entry in problems)


def main(argv=None):
    """The command line; ends the process with exit code 0, 1 or 2."""
    parser = argparse.ArgumentParser(prog="python -m hov2.tools.check_data", description="Checks all data that configs name.")
    parser.add_argument("configs", nargs="+", metavar="CONFIG|key=value", help="configs, and overrides for all of them")
    parser.add_argument("--media", choices=("none", "probe", "decode"), default="decode",
                        help="none: are the files there; probe: read their headers; decode: as in training (default)")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 16), help="processes")
    parser.add_argument("--bad", metavar="FILE", help="write every problem to this file, one JSON object a line")
    args = parser.parse_args(argv)
    paths, overrides = ([text for text in args.configs if ("=" in text) == wanted] for wanted in (False, True))
    if not paths:
        parser.error("expected a config")
    try:
        sys.exit(int(check(paths, overrides, args.media, args.workers, args.bad)))
    except USER_ERRORS as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
