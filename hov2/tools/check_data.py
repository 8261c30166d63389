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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from av.stream import Disposition
from tqdm import tqdm

from hov2.config import SENSES, BaseConfig, EvalConfig, MediaConfig, SFTConfig, Source
from hov2.config_io import read_config
from hov2.data.formats import DataError
from hov2.data.inputs import InputMaker, MediaShape, load_media, media_key
from hov2.data.media import MediaError, open_media
from hov2.data.samples import Sample, SkipSample, read_slice
from hov2.engine.checkpoint import sha256
from hov2.engine.setup import USER_ERRORS
from hov2.evaluation.benchmarks import read_benchmark
from hov2.evaluation.ids import listed
from hov2.evaluation.results import table
from hov2.model.thinker import load_tokenizer
from hov2.prompts import load_prompts
from hov2.rewards import format_reward

SKIPPED = ("bad record", "missing", "unreadable", "too long")  # what a run can't use
SEEN = {"none": SKIPPED[:2], "probe": SKIPPED[:3], "decode": SKIPPED}  # by --media
BLOCKS = "no 3 blocks"
SHOWN = 10  # problems and shared clips printed


@dataclass
class Problem:
    """Something that is wrong with a record, a clip or a solution."""

    kind: str  # one of SKIPPED, or BLOCKS
    sample_id: str | None  # None: a bad record has none
    reason: str


@dataclass
class Part:
    """What one data file or benchmark gives to a config."""

    group: str  # whose clips these are: the config, or its held-out questions
    name: str
    config: BaseConfig
    make: InputMaker | None  # None: prompts aren't, or needn't be, measured
    learned: bool  # its solutions are what SFT learns, blocks and all
    samples: list[Sample]
    problems: list[Problem]
    media: Counter = field(default_factory=Counter)  # how many samples have such media

    def key(self, sample: Sample) -> tuple:
        """Return the media key of a sample's clip, as this part's config has it read."""
        return media_key(sample, self.config.media, _senses(self.config))


@dataclass
class Clip:
    """What looking at a clip gave; `shape` and `sums` are only known of what was decoded."""

    fault: str | None = None  # one of SKIPPED
    reason: str = ""
    shape: MediaShape | None = None  # as an InputMaker would have it
    sums: dict[str, str] = field(default_factory=dict)  # {path: SHA-256}


def read_parts(configs: dict[str, BaseConfig], media: str) -> Iterator[Part]:
    """Yield a Part for each data file or benchmark of `configs` ({path: config}).

    Where a config comes after the one that makes its model, its prompts are measured with that one's tokenizer. Raises
    ModelError and PromptsError.
    """
    bases = {}  # {the model that a config makes: what it starts from}
    for path, config in configs.items():
        prompts = load_prompts(config.prompts)
        base = bases.get(Path(config.model), config.model)
        bases[Path(config.output_dir, "model")] = base
        make = None
        if media == "decode" and config.max_prompt_length:
            make = InputMaker(
                load_tokenizer(base),
                prompts,
                config.media,
                config.max_prompt_length,
                config.on_long_prompt,
                senses=_senses(config),
            )
        asked = []
        held_out = []
        for source in config.data:
            samples, problems = _read_slice(source, config.seed)
            name = f"{source.path} {source.slice}"
            asked.append(Part(path, name, config, make, isinstance(config, SFTConfig), samples, problems))
        for source in getattr(config, "eval_data", []):
            samples, problems = _read_slice(source, config.seed)
            name = f"{source.path} {source.slice}"
            held_out.append(Part(f"{path} (held out)", name, config, make, False, samples, problems))
        if getattr(config, "benchmark", None):
            samples, problems = _read_benchmark(config)
            name = f"{config.benchmark} in {config.benchmark_root}"
            asked.append(Part(path, name, config, make, False, samples, problems))
        if isinstance(config, EvalConfig) and (config.only or config.exclude):
            _leave_out(asked, config)
        yield from asked + held_out


def _read_slice(source: Source, seed: int) -> tuple[list[Sample], list[Problem]]:
    try:
        samples, errors, _ = read_slice(source, seed)
    except DataError as error:  # nothing of it can be read
        samples, errors = [], [error]
    return samples, [Problem("bad record", None, str(error)) for error in errors]


def _read_benchmark(config: EvalConfig) -> tuple[list[Sample], list[Problem]]:
    try:
        return read_benchmark(config.benchmark, config.benchmark_root), []
    except DataError as error:
        return [], [Problem("bad record", None, str(error))]


def _leave_out(parts: list[Part], config: EvalConfig) -> None:
    """Take out of the parts of an evaluation what its lists `only` and `exclude` leave out."""
    ids = []
    for part in parts:
        ids.extend(sample.id for sample in part.samples)
    try:
        left = listed(ids, config.only, config.exclude)
    except DataError as error:
        parts[0].problems.append(Problem("bad record", None, str(error)))
        return
    for part in parts:
        part.samples = [sample for sample in part.samples if sample.id in left]


def _senses(config: BaseConfig) -> tuple[str, ...]:
    """Return the senses that reach the prompt: all, unless an evaluation names those that it is about."""
    return tuple(getattr(config, "senses", SENSES))


# ---- Looking at clips ----


def run_all(function: Callable, tasks: list, workers: int) -> list:
    """Return [function(task) for each task], by `workers` processes (1: in this one), with a progress bar."""
    bar = functools.partial(tqdm, desc="clips", unit="clip", total=len(tasks), disable=None if tasks else True)
    if min(workers, len(tasks)) < 2:
        return [function(task) for task in bar(tasks)]
    results = []
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        try:
            results.extend(bar(pool.map(function, tasks)))
        except BrokenExecutor:
            in_work = tasks[len(results) : len(results) + 2 * workers]
            suspects = "; ".join(str(task) for task in in_work)
            raise DataError(f"clips: a process died, most likely on one of these: {suspects}") from None
    return results


def look_at(key: tuple, media: str) -> Clip:
    """Return what the clip of a media key gives, looked at as --media says."""
    paths = dict(key[0])
    settings = MediaConfig(*key[1])
    senses = key[2]
    for path in paths.values():
        if not os.path.isfile(path):
            return Clip("missing", f"{path}: no such file")
    try:
        if media == "decode":
            shape = load_media(paths, settings, senses)[0]
            return Clip(shape=shape, sums={path: sha256(path) for path in paths.values()})
        if media == "probe":
            probe(paths)
    except MediaError as error:
        return Clip("unreadable", str(error))
    return Clip()


def probe(paths: dict[str, str]) -> None:
    """Raise MediaError for one of a sample's `paths` whose header doesn't promise its medium; nothing is decoded."""
    for kind, path in paths.items():
        with open_media(path) as container:
            streams = [stream for stream in container.streams if not stream.disposition & Disposition.attached_pic]
            found = {stream.type for stream in streams}
        if ("audio" if kind == "audio" else "video") not in found:
            raise MediaError(path, f"expected {kind}, found none")


def look_at_all(parts: list[Part], media: str, workers: int) -> dict[str, str]:
    """Fill the parts' problems and media; return {path: SHA-256}. A clip of several samples is looked at once."""
    keys = {}  # for its order; the values don't matter
    for part in parts:
        for sample in part.samples:
            if sample.paths:
                keys[part.key(sample)] = None
    found = run_all(functools.partial(look_at, media=media), list(keys), workers)
    clips = dict(zip(keys, found))
    shapes = {key: clip.shape for key, clip in clips.items() if clip.shape}
    for part in parts:
        if part.make:
            part.make.known = shapes  # so that measuring a prompt doesn't read its clip again
        for sample in part.samples:
            if sample.paths:
                clip = clips[part.key(sample)]
            else:
                clip = Clip(shape=MediaShape())
            part.problems += _problems_of(sample, clip, part)
            part.media[_media_of(sample, clip)] += 1
    sums = {}
    for clip in found:
        sums |= clip.sums
    return sums


def _problems_of(sample: Sample, clip: Clip, part: Part) -> list[Problem]:
    """Return what is wrong with a sample: its clip or its prompt, and its solution."""
    problems = []
    if clip.fault:
        problems.append(Problem(clip.fault, sample.id, clip.reason))
    elif clip.shape and part.make:
        try:
            part.make(sample)
        except (DataError, SkipSample) as error:
            problems.append(Problem("too long", sample.id, str(error)))
    if part.learned and not format_reward(sample.solution):
        problems.append(Problem(BLOCKS, sample.id, "the solution isn't context, think and answer"))
    return problems


def _media_of(sample: Sample, clip: Clip) -> str:
    """Return the media of a sample in words, such as "video with sound" or "image+audio"."""
    text = "+".join(sample.paths) or "text"
    if "video" in sample.paths and clip.shape and clip.shape.mel_frames:
        text += " with sound"
    if clip.shape and clip.shape.audio_lost:
        text += " with sound that can't be decoded"
    return text


# ---- The report ----


def print_parts(group: str, parts: list[Part], media: str) -> None:
    """Print what was found in the parts of one group; "-" is not looked for."""
    kinds = (*SKIPPED, BLOCKS)
    rows = [("source", "samples", *kinds)]
    for part in parts:
        counts = Counter(problem.kind for problem in part.problems)
        seen = list(SEEN[media])
        if part.learned:
            seen.append(BLOCKS)
        cells = [counts[kind] if kind in seen else "-" for kind in kinds]
        rows.append((part.name, len(part.samples), *cells))
    print(f"\n{group}\n{table(rows)}")
    for part in parts:
        print(f"{part.name}:")
        for counts in (Counter(sample.problem_type for sample in part.samples), part.media):
            for name, count in counts.most_common():
                print(f"    {count} {name}")


def print_shared_clips(parts: list[Part], sums: dict[str, str]) -> None:
    """Print for each two groups which files of the one the other has too.

    By name: without folder and ending; by content: with an equal sum in `sums` ({path: SHA-256}), if there are any.
    """
    groups = {}
    for part in parts:
        paths = groups.setdefault(part.group, set())
        for sample in part.samples:
            paths.update(sample.paths.values())
    keys = {"name": lambda path: Path(path).stem}
    if sums:
        keys["content"] = lambda path: sums.get(path, path)
    for (one, paths), (other, others) in itertools.combinations(groups.items(), 2):
        print(f"\n{one} and {other} share clips")
        for by, key in keys.items():
            theirs = {key(path) for path in others}
            clips = sorted(path for path in paths if key(path) in theirs)
            more = ", ..." if len(clips) > SHOWN else ""
            print(f"  {len(clips)} by {by}: {', '.join(clips[:SHOWN])}{more}")


def check(
    paths: Sequence[str],
    overrides: Sequence[str] = (),
    media: str = "decode",
    workers: int = 1,
    bad: str | None = None,
) -> bool:
    """Look at everything that the configs at `paths` name, and print what is found; return whether any is skipped.

    The problems are also written to the file `bad`.
    """
    parts = list(read_parts({path: read_config(path, overrides) for path in paths}, media))
    sums = look_at_all(parts, media, workers)
    for group, members in itertools.groupby(parts, lambda part: part.group):
        print_parts(group, list(members), media)
    print_shared_clips(parts, sums)
    entries = []
    for part in parts:
        for problem in part.problems:
            entries.append(_entry(part, problem))
    if bad:
        lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries]
        Path(bad).write_text("".join(lines), "utf-8")
    print(f"\nproblems: {len(entries)}" + (f", all in {bad}" if bad else ""))
    for entry in entries[:SHOWN]:
        print(f"  {entry['problem']}: {entry['id'] or entry['source']}: {entry['reason']}")
    return any(entry["problem"] in SKIPPED for entry in entries)


def _entry(part: Part, problem: Problem) -> dict:
    """Return a problem as a line of --bad has it."""
    return {
        "config": part.group,
        "source": part.name,
        "id": problem.sample_id,
        "problem": problem.kind,
        "reason": problem.reason,
    }


def main(argv: list[str] | None = None) -> None:
    """The command line; ends the process with exit code 0, 1 or 2."""
    parser = argparse.ArgumentParser(
        prog="python -m hov2.tools.check_data", description="Checks all data that configs name."
    )
    parser.add_argument("configs", nargs="+", metavar="CONFIG|key=value", help="configs, and overrides for all of them")
    parser.add_argument(
        "--media",
        choices=("none", "probe", "decode"),
        default="decode",
        help="none: are the files there; probe: read their headers; decode: as in training (default)",
    )
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 16), help="processes")
    parser.add_argument("--bad", metavar="FILE", help="write every problem to this file, one JSON object a line")
    args = parser.parse_args(argv)
    paths = [text for text in args.configs if "=" not in text]
    overrides = [text for text in args.configs if "=" in text]
    if not paths:
        parser.error("expected a config")
    try:
        sys.exit(int(check(paths, overrides, args.media, args.workers, args.bad)))
    except USER_ERRORS as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
