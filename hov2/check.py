"""What a config's data holds and what would go wrong with it, before a run finds out on its second day.

    python -m hov2.data configs/stage1.json configs/stage2.json [key=value ...]
    python -m hov2.data configs/stage2.json --media probe --workers 16 --bad bad.jsonl

Reads every data file and benchmark that the configs name, looks at every clip and prints a table for each config, then
which clips the configs share. Exit code 1 if anything would be skipped or would stop the run, 2 for an unusable config.
"""

import argparse
import dataclasses
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import sys
import warnings
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

import av
import torch
from av.error import FFmpegError
from av.stream import Disposition
from tqdm import tqdm

from hov2.benchmarks import read_benchmark
from hov2.config import ConfigError, EvalConfig, GRPOConfig, MediaConfig, SFTConfig, load_config
from hov2.data import DataError, Sample, SkipSample, load_media, make_inputs, read_source, take_slice
from hov2.media import MediaError
from hov2.model import ModelError, load_tokenizer
from hov2.prompts import load_prompts
from hov2.rewards import format_reward
from hov2.setup import USER_ERRORS

SKIPPED = ("bad record", "missing", "unreadable", "too long")  # what a run can't use
COLUMNS = (*SKIPPED, "damaged", "no 3 blocks")  # damaged: used as far as it can be decoded
SHOWN = 10  # problems and shared clips printed


@dataclass(frozen=True)
class How:
    """What the check of a sample depends on, beside the sample itself."""

    look: str  # none | probe | decode
    tokenizer: str | None  # None: prompts aren't measured
    prompts: str | None
    media: tuple  # MediaConfig's values
    max_prompt_length: int | None
    on_long_prompt: str


@dataclass
class Part:
    """What one data file or benchmark gives to a config."""

    group: str  # whose clips these are: the config, or its held-out questions
    name: str
    how: How
    blocks: str | None  # solutions without the three blocks: "count" them, "list" them too (SFT), or they are no matter
    samples: list
    problems: list  # (kind, sample id or None, reason)
    media: Counter = field(default_factory=Counter)


# ---- Reading what the configs name ----


def read_config(path, overrides=()):
    """The config at `path`, of the class (SFT, GRPO or evaluation) that knows most of its keys."""
    try:
        keys = set(json.loads(Path(path).read_text()))
    except (OSError, ValueError, TypeError):
        keys = set()  # load_config says what is wrong
    classes = (EvalConfig, SFTConfig, GRPOConfig)
    known = [len(keys & {f.name for f in dataclasses.fields(kind)}) for kind in classes]
    return load_config(classes[known.index(max(known))], path, overrides)


def find_tokenizer(name, configs):
    """The model whose tokenizer a run with model `name` uses; ModelError if it can't be had.

    A model that isn't there yet, because another of the configs is to make it, will have that one's.
    """
    made = {Path(config.output_dir, "model"): config.model for config in configs}
    for _ in configs:
        name = name if Path(name).exists() else made.get(Path(name), name)
    load_tokenizer(name)
    return name


def parts_of(path, config, how, read):
    """A Part for each data file or benchmark of a config; `read` is read_source, or the like that remembers."""
    blocks = {SFTConfig: "list", GRPOConfig: "count"}.get(type(config))
    named = [(path, source, blocks) for source in config.data]
    named += [(f"{path} (held out)", source, None) for source in getattr(config, "eval_data", [])]
    benchmark = getattr(config, "benchmark", None)
    for group, source, blocks in named + ([(path, None, None)] if benchmark else []):
        name = f"{source.path} {source.slice}" if source else f"{benchmark} in {config.benchmark_root}"
        try:
            found = read(source) if source else read_benchmark(benchmark, config.benchmark_root)
            cut = take_slice(found, source.slice, config.seed) if source else found
            bad = [item for item in (found if source and source.on_bad_record == "error" else cut)
                   if isinstance(item, DataError)]
            if not cut:
                bad = [DataError(f"{source.path}: slice {source.slice!r} of {len(found)} records leaves none")]
        except DataError as error:
            cut, bad = [], [error]
        yield Part(group, name, how, blocks, [item for item in cut if isinstance(item, Sample)],
                   [("bad record", None, str(error)) for error in bad])


# ---- Looking at clips ----


def look_at(task):
    """Checks samples that show the same files: ([(problem, reason, media) of each], {file: size}).

    `task` is (How, samples); problem and reason are None for a sample in order.
    """
    how, samples = task
    paths = samples[0].paths
    if absent := [path for path in paths.values() if not os.path.isfile(path)]:
        return [("missing", f"{absent[0]}: no such file", "+".join(paths))] * len(samples), {}
    known, found = {}, []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for sample in samples:
            found.append(_look(sample, how, known))
    damage = next((str(w.message) for w in caught if str(w.message).startswith(tuple(paths.values()))), None)
    found = [("damaged", damage, media) if damage and not problem else (problem, reason, media)
             for problem, reason, media in found]
    return found, {path: os.path.getsize(path) for path in paths.values()}


def _look(sample, how, known):
    """(problem, reason, media); `known` remembers what earlier samples with the same files found."""
    media, settings = "+".join(sample.paths) or "text", MediaConfig(*how.media)
    if how.look == "none":
        return None, None, media
    try:
        if how.look == "probe":
            probe(sample.paths)
            return None, None, media
        if how.tokenizer:
            tokenizer, prompts = _words(how.tokenizer, how.prompts)
            inputs = make_inputs(sample, tokenizer, prompts, settings, max_prompt_length=how.max_prompt_length,
                                 on_long_prompt=how.on_long_prompt, known=known)
            shape = known[inputs.media_key] = inputs.shape
        else:
            shape = known["shape"] = known.get("shape") or load_media(sample.paths, settings)[0]
    except MediaError as error:
        return "unreadable", str(error), media
    except (DataError, SkipSample) as error:
        return "too long", str(error), media
    return None, None, media + " with sound" * ("video" in sample.paths and shape.mel_frames > 0)


@functools.lru_cache
def _words(tokenizer, prompts):
    return load_tokenizer(tokenizer), load_prompts(prompts)


def probe(paths):
    """MediaError for one of a sample's `paths` whose header doesn't promise its medium; nothing is decoded."""
    for kind, path in paths.items():
        try:
            with av.open(f"file:{path}", metadata_errors="ignore", options={"protocol_whitelist": "file"}) as container:
                pictures = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
                if not (container.streams.audio if kind == "audio" else pictures):
                    raise MediaError(path, f"expected {kind}, found none")
        except FFmpegError as error:
            raise MediaError(path, f"not a media file that FFmpeg can read ({error.strerror})") from None


def digest(path):
    """SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def run_all(function, tasks, workers, title):
    """[function(task) for each task], in order, by `workers` processes (1: in this one), with a progress bar."""
    with tqdm(total=len(tasks), desc=title, unit="clip", disable=None) as bar:
        if min(workers, len(tasks)) <= 1:
            return [(function(task), bar.update())[0] for task in tasks]
        spawn = multiprocessing.get_context("spawn")
        count = min(workers, len(tasks))
        with ProcessPoolExecutor(count, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            futures = [pool.submit(function, task) for task in tasks]
            try:
                for future in as_completed(futures):
                    future.result()
                    bar.update()
            except BrokenProcessPool:
                lost = [str(task) for task, future in zip(tasks, futures) if future.done() and future.exception()]
                raise DataError(f"{title}: a process died, most likely on one of these: "
                                + "; ".join(lost[:2 * workers])) from None
            finally:
                pool.shutdown(cancel_futures=True)
        return [future.result() for future in futures]


def look_at_all(parts, workers):
    """Fills the parts' problems and media; returns {file: size} of all files that are there."""
    tasks = defaultdict(dict)  # the same sample in two configs of equal settings is looked at once
    for part in parts:
        for sample in part.samples:
            tasks[part.how, tuple(sample.paths.items())][id(sample)] = sample
    results = run_all(look_at, [(how, list(samples.values())) for (how, _), samples in tasks.items()], workers, "clips")
    verdicts = {(how, key): verdict for ((how, _), samples), (found, _) in zip(tasks.items(), results)
                for key, verdict in zip(samples, found)}
    for part in parts:
        for sample in part.samples:
            problem, reason, media = verdicts[part.how, id(sample)]
            part.media[media] += 1
            if problem:
                part.problems.append((problem, sample.id, reason))
            if part.blocks and not format_reward(sample.solution):
                part.problems.append(("no 3 blocks", sample.id, "the solution isn't context, think and answer"))
    return {path: size for _, sizes in results for path, size in sizes.items()}


def shared_clips(parts, sizes, workers):
    """[(group, other group, file names that both have, the group's files whose content the other has)] for every two.

    Names are compared without folder and ending; contents, by SHA-256, among files of the same size.
    """
    groups, of_size = defaultdict(set), defaultdict(set)
    for part in parts:
        groups[part.group] |= {path for sample in part.samples for path in sample.paths.values()}
    for path, size in sizes.items():
        of_size[size].add(path)
    alike = [path for paths in of_size.values() if len(groups) > 1 < len(paths) for path in sorted(paths)]
    digests = dict(zip(alike, run_all(digest, alike, workers, "contents"))) if alike else {}
    for (one, paths), (other, others) in itertools.combinations(groups.items(), 2):
        names = {Path(path).stem for path in paths} & {Path(path).stem for path in others}
        contents = {digests.get(path, path) for path in others}
        yield one, other, sorted(names), sorted(path for path in paths if digests.get(path, path) in contents)


# ---- The report ----


def table(parts):
    """What was found in the parts of one group, as text; "-" is not looked at."""
    width = max(len(part.name) for part in parts)
    lines = [f"  {'source':<{width}}  {'samples':>8}" + "".join(f"  {name:>11}" for name in COLUMNS)]
    for part in parts:
        counts = Counter(kind for kind, *_ in part.problems)
        measured = part.how.tokenizer or not part.how.max_prompt_length
        shown = {"unreadable": part.how.look != "none", "damaged": part.how.look == "decode", "too long": measured,
                 "no 3 blocks": part.blocks}
        cells = [counts[name] if shown.get(name, True) else "-" for name in COLUMNS]
        lines.append(f"  {part.name:<{width}}  {len(part.samples):>8}" + "".join(f"  {cell:>11}" for cell in cells))
        types = Counter(sample.problem_type for sample in part.samples)
        for counter in (types, part.media):
            lines += ["    " + ", ".join(f"{count} {name}" for name, count in counter.most_common())] if counter else []
    return "\n".join(lines)


def report(parts, pairs, contents, bad):
    """Prints all that was found and writes the problems to the file `bad`; returns whether anything is skipped."""
    for group in dict.fromkeys(part.group for part in parts):
        print(f"\n{group}\n" + table([part for part in parts if part.group == group]))
    for one, other, names, same in pairs:
        print(f"\n{one} and {other} share clips: {len(names)} by name, {len(same) if contents else '-'} by content")
        for title, clips in (("by name", names), ("by content", same if contents else [])):
            if clips:
                print(f"  {title}: {', '.join(clips[:SHOWN])}{', ...' if len(clips) > SHOWN else ''}")
    problems = [{"config": part.group, "source": part.name, "id": name, "problem": kind, "reason": reason}
                for part in parts for kind, name, reason in part.problems
                if kind != "no 3 blocks" or part.blocks == "list"]
    if bad:
        with open(bad, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in problems)
    print(f"\nproblems: {len(problems)}" + (f", all in {bad}" if bad else ""))
    for entry in problems[:SHOWN]:
        print(f"  {entry['problem']}: {entry['id'] or entry['source']}: {entry['reason']}")
    return any(entry["problem"] in SKIPPED for entry in problems)


def check(paths, overrides=(), media="decode", workers=1, bad=None):
    """Looks at everything that the configs at `paths` name and reports it; returns whether anything is skipped."""
    configs, parts, remembered = {path: read_config(path, overrides) for path in paths}, [], {}

    def read(source):
        key = source.path, source.format, source.media_root
        remembered[key] = remembered[key] if key in remembered else read_source(source)
        return remembered[key]

    for path, config in configs.items():
        load_prompts(config.prompts)  # its errors belong here, not into a worker
        tokenizer = None
        if media == "decode" and config.max_prompt_length:
            try:
                tokenizer = find_tokenizer(config.model, configs.values())
            except ModelError as error:
                print(f"{path}: no tokenizer, so prompt lengths are left out: {error}")
        how = How(media, tokenizer, config.prompts, dataclasses.astuple(config.media), config.max_prompt_length,
                  config.on_long_prompt)
        parts += parts_of(path, config, how, read)
    sizes = look_at_all(parts, workers)
    pairs = list(shared_clips(parts, sizes if media != "none" else {}, workers))
    return report(parts, pairs, media != "none", bad)


def main(argv=None):
    """The command line; ends the process with exit code 0, 1 or 2."""
    parser = argparse.ArgumentParser(prog="python -m hov2.data", description="Checks all data that configs name.")
    parser.add_argument("configs", nargs="+", metavar="CONFIG|key=value", help="configs, and overrides for all of them")
    parser.add_argument("--media", choices=("none", "probe", "decode"), default="decode",
                        help="none: are the files there; probe: read their headers; decode: as in training (default)")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 16), help="processes")
    parser.add_argument("--bad", metavar="FILE", help="write every problem to this file, one JSON object a line")
    arguments = parser.parse_args(argv)
    overrides = [text for text in arguments.configs if "=" in text]
    try:
        paths = [text for text in arguments.configs if "=" not in text]
        if not paths:
            raise ConfigError("expected a config")
        skipped = check(paths, overrides, arguments.media, arguments.workers, arguments.bad)
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(int(skipped))
