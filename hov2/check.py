"""What a config's data holds and what would go wrong with it, before a run finds out on its second day.

    python -m hov2.data configs/stage1.json configs/stage2.json [key=value ...]
    python -m hov2.data configs/stage2.json --media probe --workers 16 --bad bad.jsonl

Reads every data file and benchmark that the configs name, looks at every clip and prints a table for each config, then
which clips the configs share. Exit code 1 if anything would be skipped or would stop the run, 2 for an unusable config.
Prompts are measured with the model's tokenizer; max_prompt_length=null does without.
"""

import argparse
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import sys
import warnings
from collections import Counter, defaultdict
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import av
import torch
from av.stream import Disposition
from tqdm import tqdm

from hov2.benchmarks import read_benchmark
from hov2.config import BaseConfig, EvalConfig, MediaConfig, SFTConfig, read_config
from hov2.data import DataError, InputMaker, MediaShape, SkipSample, load_media, media_key, read_slice
from hov2.media import MediaError
from hov2.model import load_tokenizer
from hov2.prompts import load_prompts
from hov2.rewards import format_reward
from hov2.setup import USER_ERRORS

SKIPPED = ("bad record", "missing", "unreadable", "too long")  # what a run can't use
COLUMNS = (*SKIPPED, "damaged", "no 3 blocks")  # damaged: used as far as it can be decoded
UNSEEN = {"none": ("unreadable", "too long", "damaged"), "probe": ("too long", "damaged"), "decode": ()}  # by --media
SHOWN = 10  # problems and shared clips printed


@dataclass
class Part:
    """What one data file or benchmark gives to a config."""

    group: str  # whose clips these are: the config, or its held-out questions
    name: str
    config: BaseConfig
    make: InputMaker | None  # None: prompts aren't, or needn't be, measured
    trained: bool  # on these solutions
    samples: list
    problems: list  # (one of COLUMNS, sample id or None, reason)
    media: Counter = field(default_factory=Counter)


# ---- Reading what the configs name ----


def prompt_maker(config, prompts, configs):
    """The InputMaker of a config, with `prompts`. Raises ModelError.

    A model that isn't there yet, because another of `configs` is to make it, will have that one's tokenizer.
    """
    name, made = config.model, {Path(other.output_dir, "model"): other.model for other in configs}
    for _ in configs:
        name = name if Path(name).exists() else made.get(Path(name), name)
    return InputMaker(load_tokenizer(name), prompts, config.media, config.max_prompt_length, config.on_long_prompt, {})


def parts_of(path, configs, media):
    """A Part for each data file or benchmark of the config at `path`, but for files that another config will write."""
    config, prompts = configs[path], load_prompts(configs[path].prompts)
    measured = media == "decode" and config.max_prompt_length
    make = prompt_maker(config, prompts, configs.values()) if measured else None
    made = {c.filter.output: maker for maker, c in configs.items() if isinstance(c, EvalConfig) and c.filter}
    entries = [(path, source) for source in config.data]
    entries += [(f"{path} (held out)", source) for source in getattr(config, "eval_data", [])]
    entries += [(path, None)] if getattr(config, "benchmark", None) else []
    for group, source in entries:
        if source and source.path in made and not Path(source.path).exists():
            print(f"{path}: {source.path}: made by {made[source.path]}: not there yet")
            continue
        name = f"{source.path} {source.slice}" if source else f"{config.benchmark} in {config.benchmark_root}"
        try:
            samples, errors, _ = (read_slice(source, config.seed) if source else
                                  (read_benchmark(config.benchmark, config.benchmark_root), [], None))
        except DataError as error:
            samples, errors = [], [error]
        yield Part(group, name, config, make, group == path and not isinstance(config, EvalConfig), samples,
                   [("bad record", None, str(error)) for error in errors])


# ---- Looking at clips ----


def run_all(function, tasks, workers, title):
    """[function(task) for each task], by `workers` processes (1: in this one), with a progress bar."""
    bar = functools.partial(tqdm, desc=title, unit="clip", disable=None if tasks else True)
    workers = min(workers, len(tasks))
    if workers < 2:
        return [function(task) for task in bar(tasks)]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = [pool.submit(function, task) for task in tasks]
        try:
            return [future.result() for future in bar(futures)]
        except BrokenExecutor:
            lost = [str(task) for task, future in zip(tasks, futures) if future.exception()]
            raise DataError(f"{title}: a process died, most likely on one of these: "
                            + "; ".join(lost[:2 * workers])) from None
        finally:
            pool.shutdown(cancel_futures=True)


def look_at(key, media):
    """((problem, reason) or None, MediaShape if decoded) of the clip of a media key, as make_inputs has it."""
    paths, settings = dict(key[0]), MediaConfig(*key[1:])
    if absent := [path for path in paths.values() if not os.path.isfile(path)]:
        return ("missing", f"{absent[0]}: no such file"), None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            shape = load_media(paths, settings)[0] if media == "decode" else probe(paths) if media == "probe" else None
        except MediaError as error:
            return ("unreadable", str(error)), None
    damage = [str(w.message) for w in caught if str(w.message).startswith(tuple(paths.values()))]
    return ("damaged", damage[0]) if damage else None, shape


def probe(paths):
    """MediaError for one of a sample's `paths` whose header doesn't promise its medium; nothing is decoded."""
    for kind, path in paths.items():
        try:
            with av.open(f"file:{path}", metadata_errors="ignore", options={"protocol_whitelist": "file"}) as container:
                found = {s.type for s in container.streams if not s.disposition & Disposition.attached_pic}
        except av.FFmpegError as error:
            raise MediaError(path, f"not a media file that FFmpeg can read ({error.strerror})") from None
        if ("audio" if kind == "audio" else "video") not in found:
            raise MediaError(path, f"expected {kind}, found none")


def look_at_all(parts, media, workers):
    """Fills the parts' problems and media; a clip of several samples is looked at once."""
    keys = list(dict.fromkeys(media_key(s, part.config.media) for part in parts for s in part.samples if s.paths))
    clips = dict(zip(keys, run_all(functools.partial(look_at, media=media), keys, workers, "clips")))
    known = {key: shape for key, (_, shape) in clips.items() if shape}
    for part in parts:
        if part.make:
            part.make.known = known
        for sample in part.samples:
            problem, shape = clips.get(media_key(sample, part.config.media), (None, MediaShape()))
            if shape and part.make:
                try:
                    part.make(sample)
                except (DataError, SkipSample) as error:
                    problem = "too long", str(error)
            if problem:
                part.problems.append((problem[0], sample.id, problem[1]))
            if part.trained and not format_reward(sample.solution):
                part.problems.append(("no 3 blocks", sample.id, "the solution isn't context, think and answer"))
            sound = " with sound" if "video" in sample.paths and shape and shape.mel_frames else ""
            part.media[("+".join(sample.paths) or "text") + sound] += 1


def digest(path):
    """SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shared_clips(parts, media, workers):
    """Yields (group, other group, {"name": names of files in both, "content": files of the group also in the other}).

    Names are without folder and ending. Contents are compared by SHA-256, among files of the same size, and not at all
    if no media are looked at.
    """
    groups = defaultdict(set)
    for part in parts:
        groups[part.group].update(path for sample in part.samples for path in sample.paths.values())
    files = sorted(path for path in set().union(*groups.values()) if os.path.isfile(path)) if len(groups) > 1 else []
    sizes = Counter(map(os.path.getsize, files))
    alike = [path for path in files if sizes[os.path.getsize(path)] > 1 and media != "none"]
    digests = dict(zip(alike, run_all(digest, alike, workers, "contents")))
    for (one, paths), (other, others) in itertools.combinations(groups.items(), 2):
        shared = {"name": sorted({Path(path).stem for path in paths} & {Path(path).stem for path in others})}
        if media != "none":
            theirs = {digests.get(path, path) for path in others}
            shared["content"] = sorted(path for path in paths if digests.get(path, path) in theirs)
        yield one, other, shared


# ---- The report ----


def table(parts, media):
    """What was found in the parts of one group, as text; "-" is not looked at."""
    width = max(len(part.name) for part in parts)
    lines = [f"  {'source':<{width}}  {'samples':>8}" + "".join(f"  {name:>11}" for name in COLUMNS)]
    for part in parts:
        unseen = UNSEEN[media] if part.trained else (*UNSEEN[media], "no 3 blocks")
        counts = Counter(kind for kind, *_ in part.problems)
        cells = [f"  {'-' if name in unseen else counts[name]:>11}" for name in COLUMNS]
        lines.append(f"  {part.name:<{width}}  {len(part.samples):>8}" + "".join(cells))
        for counter in filter(None, (Counter(sample.problem_type for sample in part.samples), part.media)):
            lines.append("    " + ", ".join(f"{count} {name}" for name, count in counter.most_common()))
    return "\n".join(lines)


def check(paths, overrides=(), media="decode", workers=1, bad=None):
    """Looks at everything that the configs at `paths` name, prints what it finds and writes the problems to the file
    `bad`; returns whether anything is skipped."""
    configs = {path: read_config(path, overrides) for path in paths}
    parts = [part for path in configs for part in parts_of(path, configs, media)]
    look_at_all(parts, media, workers)
    for group, members in itertools.groupby(parts, lambda part: part.group):
        print(f"\n{group}\n{table(list(members), media)}")
    for one, other, shared in shared_clips(parts, media, workers):
        print(f"\n{one} and {other} share clips")
        for by, clips in shared.items():
            print(f"  {len(clips)} by {by}: {', '.join(clips[:SHOWN])}{', ...' if len(clips) > SHOWN else ''}")
    problems = [{"config": part.group, "source": part.name, "id": name, "problem": kind, "reason": reason}
                for part in parts for kind, name, reason in part.problems
                if kind != "no 3 blocks" or isinstance(part.config, SFTConfig)]  # GRPO can do without them
    if bad:
        Path(bad).write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in problems), "utf-8")
    print(f"\nproblems: {len(problems)}" + (f", all in {bad}" if bad else ""))
    for entry in problems[:SHOWN]:
        print(f"  {entry['problem']}: {entry['id'] or entry['source']}: {entry['reason']}")
    return any(entry["problem"] in SKIPPED for entry in problems)


def main(argv=None):
    """The command line; ends the process with exit code 0, 1 or 2."""
    parser = argparse.ArgumentParser(prog="python -m hov2.data", description="Checks all data that configs name.")
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
