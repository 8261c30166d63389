"""From data files to model inputs: samples, slices, the global order of prompts, and loading with replacements.

`read_samples` reads strictly: a record that can't be used is one DataError that names file, record and field.
`python -m hov2.data CONFIG` (hov2.check) reads everything that a config names, and says what is wrong with it.
`InputMaker` turns a sample into token ids, patches and mel frames on the CPU. `PromptOrder` says which samples belong
to which step, for any number of ranks, and `StepLoader` loads a rank's share of them.
"""

import functools
import json
import math
import multiprocessing.connection
import os
import re
import threading
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import astuple, dataclass, field, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

from hov2.distributed import gather_objects, rank, rank_zero_first, say
from hov2.formats import CONVERTERS, DataError, convert, files_of, read_parquet
from hov2.media import MediaError, log_mel, patchify, read_media
from hov2.media_cache import MediaCache
from hov2.prompts import CHOICE_TYPES, SPECIAL_TOKEN, render
from hov2.rewards import PROBLEM_TYPES, check_reference

DATA_TYPES = ("image", "video", "audio", "image_audio", "text")
RECORD_FIELDS = ("problem", "problem_type", "solution", "options", "data_type", "path", "id")
END_OF_TURN = "<|im_end|>"
THREADS = 4  # that read a step's clips where no processes do
POSITIONS_PER_SECOND, SECONDS_PER_CHUNK = 25, 2.0  # of the time-aligned layout; Qwen2.5-Omni's config


class SkipSample(Exception):
    """A sample that this run can't use and may replace; the text says why."""


@dataclass(frozen=True)
class Sample:
    """One question with its media. `paths` maps "image", "video" or "audio" to a file; {} is a text-only question."""

    id: str
    problem: str
    problem_type: str
    options: tuple | None
    solution: str
    data_type: str
    paths: dict = field(default_factory=dict)
    source: str = ""  # the data file
    extra: dict = field(default_factory=dict)  # the record's other fields, for grouping in evaluation
    has_sound: bool = False  # the video has a sound track; known once the file has been read (InputMaker)

    @property
    def media_kinds(self):
        """The media in the order of the prompt, such as ("video", "audio"): a video's sound is an item of its own."""
        kinds = tuple(kind for kind in ("video", "image", "audio") if kind in self.paths)
        return kinds + ("audio",) if self.has_sound else kinds


# ---- Reading ----


def read_samples(sources, seed=0):
    """The samples of all `sources` (config.Source), in order, each cut to its slice; `seed` is for random slices.

    All records of a source are checked, also those outside the slice; media files aren't looked for until they are
    loaded. Raises DataError for the first bad record and for a source of which nothing is left. With the source's
    `on_bad_record: "skip"`, the slice's bad records are left out with a warning that counts them.
    """
    samples = []
    for source in sources:
        kept, errors, count = read_slice(source, seed)
        if errors and source.on_bad_record == "error":
            raise DataError(f"{errors[0]} ({len(errors)} of {count} records can't be used; the config's entry can "
                            'leave them out: on_bad_record: "skip")')
        if not kept:
            raise DataError(f"{source.path}: no record of slice {source.slice!r} can be used")
        if errors and rank() == 0:
            warnings.warn(f"{source.path}: {len(errors)} of {count} records left out; first: {errors[0]}", stacklevel=2)
        samples += kept
    return samples


def read_slice(source, seed=0):
    """(samples of the source's slice, a DataError for each bad record, records looked through for such).

    These are all of the source's where one of them would stop a run, and the slice's where they are left out.

    Raises DataError for a file that can't be read as such, and for a slice without a record.
    """
    found = read_source(source)
    cut = take_slice(found, source.slice, seed)
    if not cut:
        raise DataError(f"{source.path}: slice {source.slice!r} of {len(found)} records leaves none")
    looked = found if source.on_bad_record == "error" else cut
    errors = [item for item in looked if isinstance(item, DataError)]
    return [item for item in cut if isinstance(item, Sample)], errors, len(looked)


def read_source(source):
    """Every record of a `source`, uncut: a Sample, or the DataError that says what is wrong with it.

    hov2's own files, and the published ones in JSON, are a list (.json) or one object a line (.jsonl), UTF-8. Raises
    DataError for a file that can't be read as such.
    """
    if source.format not in CONVERTERS:
        raise DataError(f"{source.path}: unknown format {source.format!r}; known: {', '.join(CONVERTERS)}")
    found = []
    for file in files_of(source.format, source.path):
        root = Path(source.media_root) if source.media_root else Path(file).parent
        if source.format == "omniinstruct":
            with rank_zero_first():  # the first to read it writes out its media
                records = list(read_parquet(file, root))
        else:
            records = read_records(file)
        found += [tried(_read, record, source.format, number, file, root) for number, record in records]
    return found


def take_slice(items, text, seed=0):
    """`items` cut to "all" or "first|last|random:N" or "...:N%".

    Percentages round down at either end, so "first:50%" and "last:50%" never share an item. N beyond the end takes all.
    A random slice keeps the order of the file.
    """
    if text == "all":
        return list(items)
    match = re.fullmatch(r"(first|last|random):(?:(\d+)|(\d+(?:\.\d+)?)%)", text)
    if not match or (match[3] and Fraction(match[3]) > 100):
        raise DataError(f"slice {text!r}: expected all, first:N, last:N or random:N; N may be a percentage (50%)")
    where = match[1]
    count = min(int(match[2]), len(items)) if match[2] else math.floor(len(items) * Fraction(match[3]) / 100)
    if where == "random":
        return [items[i] for i in sorted(_permutation(len(items), seed, _SLICE, 0)[:count].tolist())]
    return list(items[:count] if where == "first" else items[len(items) - count:])


def read_records(path):
    """(record number from 1, record) of a JSON list or of JSON lines; the number of a line is that of the file.

    For a line that is no JSON the record is a DataError. Raises DataError for a file that can't be read as such.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        hint = " (evaluate.py configs/filter_stageN.json writes it)" if "filter" in str(path) else ""
        raise DataError(f"{path}: no such data file{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read: {error}") from None
    if str(path).endswith(".jsonl"):
        return [(number, tried(_parsed, line, f"{path}: record {number}"))
                for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    records = _parsed(text, path)
    if not isinstance(records, list):
        raise DataError(f"{path}: expected a list of records (one object a line needs the ending .jsonl)")
    return enumerate(records, 1)


def _parsed(text, where):
    """What the JSON `text` says; DataError if it isn't any."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON: {error}") from None


def _read(record, name, number, path, root):
    """One record of the format `name` -> Sample. Raises DataError, also for a solution that has no usable answer."""
    where = f"{path}: record {number}"
    sample = to_sample(convert(name, record, root, where), number, path, root)
    try:
        check_reference(sample.solution, sample.problem_type)
    except ValueError as error:
        raise DataError(f"{where}: {error}") from None
    return sample


def to_sample(record, number, path, root):
    """A record in hov2's own form -> Sample (method.md, "Samples"), its media paths starting from `root`.

    Raises DataError, which begins with the data file's `path` and the record's `number`, also one that `record` is.
    """
    if isinstance(record, DataError):
        raise record
    where = f"{path}: record {number}"
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected an object, got {type(record).__name__}")
    problem, options, solution, problem_type = read_texts(record, where)
    if problem_type in CHOICE_TYPES and not options:
        raise DataError(f"{where}: options: {problem_type!r} needs them")
    own_id = record.get("id")
    data_type, paths = _paths(record, where)
    return Sample(
        id=f"{Path(path).name}:{number}" if own_id is None else str(own_id), problem=problem,
        problem_type=problem_type, options=options, solution=solution, data_type=data_type, source=str(path),
        paths={kind: os.path.abspath(Path(root, file)) for kind, file in paths.items()},
        extra={key: value for key, value in record.items() if key not in RECORD_FIELDS},
    )


def text_field(record, name, where):
    """The text in a record's field `name`; DataError, which begins with `where`, if there is none."""
    if name not in record:
        raise DataError(f"{where}: missing field {name!r}")
    if not isinstance(record[name], str) or not record[name].strip():
        raise DataError(f"{where}: {name}: expected text, got {record[name]!r}")
    return record[name]


def read_texts(record, where, names=("problem", "options", "solution"), problem_type=None):
    """(problem, options or None, solution, problem type) of a record that calls the first three `names`.

    `problem_type`: for records without such a field. Raises DataError, which begins with `where`, for a text that is
    missing or can't be one, or for an unknown type.
    """
    problem, solution = (text_field(record, name, where) for name in names[::2])
    problem_type = problem_type or text_field(record, "problem_type", where)
    if problem_type not in PROBLEM_TYPES:
        raise DataError(f"{where}: problem_type: unknown {problem_type!r}; known: {', '.join(PROBLEM_TYPES)}")
    options = record.get(names[1]) or []
    if not isinstance(options, list) or not all(isinstance(option, str) and option.strip() for option in options):
        raise DataError(f"{where}: {names[1]}: expected a list of texts or null, got {options!r}")
    for name, text in zip(names, (problem, "\n".join(options), solution)):
        if special := SPECIAL_TOKEN.search(text):
            raise DataError(f"{where}: {name}: {special[0]} has the form of a special token, no part of a text")
    return problem, tuple(options) or None, solution, problem_type


def _paths(record, where):
    """(data type, {kind: file}) of a record; an object of paths is image_audio, also where it is published as image."""
    path, data_type = record.get("path"), record.get("data_type")
    if isinstance(path, dict) and data_type in (None, "image", "audio"):
        data_type = "image_audio"
    if data_type not in DATA_TYPES:
        raise DataError(f"{where}: data_type: unknown {data_type!r}; known: {', '.join(DATA_TYPES)}")
    kinds = {"text": (), "image_audio": ("image", "audio")}.get(data_type, (data_type,))
    files = path if isinstance(path, dict) else {} if path is None else {data_type: path}
    if set(files) != set(kinds):
        expected = {"text": "none for text", "image_audio": "an object with image and audio"}.get(data_type, "a file")
        raise DataError(f"{where}: path: expected {expected}, got {path!r}")
    return data_type, {kind: text_field(files, kind, f"{where}: path") for kind in kinds}


# ---- A sample as model inputs ----


@dataclass(frozen=True)
class MediaShape:
    """What a prompt's token ids and positions need to know about its media, without the pixels and the sound."""

    visual_kind: str | None = None  # "video" | "image"
    grid_thw: torch.Tensor | None = None  # (1, 3) int64: frames / 2, height / 14, width / 14
    second_per_grid: float | None = None  # of a video: seconds between two of its grids (2 / sample_fps)
    mel_frames: int = 0  # 100 a second; 0: no sound
    interleaved: bool = False  # the sound is laid between the video's tokens, in time
    audio_cut: float = 0.0  # seconds of sound left out because they are beyond the audio tower's 300

    @property
    def visual_tokens(self):
        """Tokens of the image or video: 2 x 2 patches each."""
        return 0 if self.grid_thw is None else int(self.grid_thw.prod()) // 4

    @property
    def audio_tokens(self):
        """Tokens of the sound, 25 a second, as Qwen2.5-Omni counts them."""
        return max(0, ((self.mel_frames - 1) // 2 + 1 - 2) // 2 + 1)


@dataclass
class Inputs:
    """A prompt as CPU tensors. `pixel_values` and `mel` are None where there is no such medium, or where the model
    already has the encoding of `media_key`."""

    prompt_ids: torch.Tensor  # (P,) int64
    shape: MediaShape
    media_key: tuple  # files and media settings; () for text alone
    pixel_values: torch.Tensor | None = None  # (patches, 1176) float32
    mel: torch.Tensor | None = None  # (128, mel frames) float32


def media_key(sample, media_config):
    """What a clip's encoding depends on: its files and how they are read; () for text alone."""
    return (tuple(sample.paths.items()), *astuple(media_config)) if sample.paths else ()


@dataclass
class InputMaker:
    """Reads a sample's media and writes its prompt, with a run's settings: `maker(sample) -> Inputs`.

    `known` maps a media key to the MediaShape of a clip whose encoding the model keeps: such a clip isn't read again.
    One that `cache` has isn't decoded again.
    """

    tokenizer: object
    prompts: object
    media_config: object
    max_prompt_length: int | None = None
    on_long_prompt: str = "error"
    known: dict = field(default_factory=dict)  # of model.Encoder
    cache: MediaCache | None = None

    def __call__(self, sample):
        """A prompt of more than `max_prompt_length` tokens is, by `on_long_prompt`, a DataError ("error"), a SkipSample
        ("skip"), or tried again with half the frames until it fits and skipped if it never does ("fewer_frames").

        Raises MediaError for a file that can't be used.
        """
        settings, limit = self.media_config, self.max_prompt_length
        while True:
            key = media_key(sample, settings)
            shape, pixel_values, mel = ((self.known[key], None, None) if key in self.known else
                                        load_media(sample.paths, settings, self.cache))
            ids = _prompt_ids(sample, self.tokenizer, self.prompts, shape)
            if limit is None or len(ids) <= limit:
                return Inputs(torch.tensor(ids), shape, key, pixel_values, mel)
            message = f"sample {sample.id}: the prompt has {len(ids)} tokens, max_prompt_length is {limit}"
            if self.on_long_prompt == "error":
                raise DataError(f'{message} (on_long_prompt: "skip" or "fewer_frames" would go on)')
            frames = 2 * int(shape.grid_thw[0, 0]) if shape.visual_kind == "video" else 0
            if self.on_long_prompt == "skip" or frames <= 2 or settings.max_frames <= 2:
                raise SkipSample(message)
            settings = replace(settings, max_frames=max(2, min(frames, settings.max_frames) // 4 * 2))


def load_media(paths, settings, cache=None):
    """(MediaShape, patches or None, mel or None) of a sample's `paths`, read as `settings` (MediaConfig) say,
    or taken from `cache` (a MediaCache).

    Raises MediaError for a file that can't be used, or that holds something else than its place in `paths` says.
    """
    shape, pixel_values, mel = {}, None, None
    for kind, path in paths.items():
        read = cache.read if cache else read_media
        media = read(path, fps=settings.fps, max_frames=settings.max_frames, min_pixels=settings.min_pixels,
                     max_pixels=settings.max_pixels)
        found = kind_of(media)
        if kind != found and not (kind == "audio" and media.audio is not None):
            raise MediaError(path, f"expected {kind}, found {found}")
        if kind != "audio":
            pixel_values, grid_thw = patchify(media.frames)
            shape |= {"visual_kind": kind, "grid_thw": grid_thw}
        if kind == "video":
            shape["second_per_grid"] = 2 / media.sample_fps
        if kind != "image" and media.audio is not None:
            mel = log_mel(media.audio)
            shape |= {"mel_frames": mel.shape[1], "audio_cut": media.audio_cut}
        if kind == "audio" and MediaShape(**shape).audio_tokens == 0:
            raise MediaError(path, "the sound is shorter than one token of the audio tower (0.03 s)")
    if not MediaShape(**shape).audio_tokens:  # a video's blip too short for the tower is no sound
        shape["mel_frames"], mel = 0, None
    interleaved = settings.interleave_audio and "video" in paths and mel is not None
    return MediaShape(**shape, interleaved=interleaved), pixel_values, mel


def kind_of(media):
    """"video", "image" or "audio": what a Media is, by itself."""
    return "audio" if media.frames is None else "image" if media.sample_fps is None else "video"


def _prompt_ids(sample, tokenizer, prompts, shape):
    """Token ids of the chat up to the assistant's turn, each media placeholder once per token of its medium."""
    sample = replace(sample, has_sound="video" in sample.paths and shape.audio_tokens > 0)
    try:
        text = render(prompts.chat(sample), interleave_audio=shape.interleaved)
    except ValueError as error:  # a control token among the words
        raise DataError(f"sample {sample.id}: {error}") from None
    video, image, audio = (tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("VIDEO", "IMAGE", "AUDIO"))
    counts = {video: shape.visual_tokens, image: shape.visual_tokens, audio: shape.audio_tokens}
    runs = {token_id: [token_id] * count for token_id, count in counts.items()}
    if shape.interleaved:  # the one placeholder stands for both
        runs[video] = interleave(shape, video, audio)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return [i for token_id in ids for i in runs.get(token_id, [token_id])]


def interleave(shape, video_id, audio_id):
    """Token ids of a video with its sound in time order: for each 2 s the video's tokens, then the sound's.

    The chunks are those of transformers' Qwen2_5OmniProcessor.get_chunked_index and of the thinker's get_rope_index,
    computed with the latter's float32 numbers, so that tokens and positions agree: a chunk ends before the first token
    at or after its time, and where frames are more than 2 s apart that rule leaves chunks of a single token.
    """
    grids, height, width = shape.grid_thw[0].tolist()
    times = torch.arange(grids) * torch.tensor(shape.second_per_grid) * POSITIONS_PER_SECOND
    limit, chunk = int(POSITIONS_PER_SECOND * SECONDS_PER_CHUNK), 0
    tokens = [(i // limit, True) for i in range(shape.audio_tokens)]  # (chunk, whether it's sound)
    for at in times.long().repeat_interleave(height * width // 4).tolist():
        chunk += at >= (chunk + 1) * limit
        tokens.append((chunk, False))
    return [audio_id if sound else video_id for _, sound in sorted(tokens)]


def encode_solution(sample, tokenizer):
    """Token ids (C,) of what the assistant says in the cold start: the solution as it is written, then the end of turn.

    They decode to exactly that text, up to the Unicode normalisation (NFC) of Qwen's tokenizer.
    """
    ids = tokenizer(sample.solution, add_special_tokens=False).input_ids
    return torch.tensor([*ids, tokenizer.convert_tokens_to_ids(END_OF_TURN)])


# ---- Order and loading ----

_ORDER, _SPARE, _SLICE = range(3)  # keep the random streams of one seed apart


@functools.lru_cache(maxsize=8)
def _permutation(size, seed, stream, round_):
    return np.random.default_rng(np.random.SeedSequence([seed, stream, round_])).permutation(size)


class PromptOrder:
    """Which samples belong to which step: a pure function of (seed, step), the same for any number of ranks.

    Each epoch is one permutation, and the permutations are laid end to end: a step that an epoch can't fill goes on
    with the next epoch's samples, so that none is left out.
    """

    def __init__(self, num_samples, prompts_per_step, seed):
        self.num_samples, self.prompts_per_step, self.seed = num_samples, prompts_per_step, seed

    def step(self, step):
        """The sample indices of `step` (from 0), prompts_per_step of them."""
        first = step * self.prompts_per_step
        return [self._at(_ORDER, position) for position in range(first, first + self.prompts_per_step)]

    def spare(self, position):
        """The sample index at `position` of the one endless list that replacements come from."""
        return self._at(_SPARE, position)

    def total_steps(self, num_train_epochs, max_steps=None):
        """Steps that cover the epochs (the last one may reach into the next), at most `max_steps`."""
        steps = max(1, math.ceil(num_train_epochs * self.num_samples / self.prompts_per_step - 1e-9))
        return steps if max_steps is None else min(steps, max_steps)

    def _at(self, stream, position):
        round_, offset = divmod(position, self.num_samples)
        return int(_permutation(self.num_samples, self.seed, stream, round_)[offset])


class StepLoader:
    """Loads this rank's share of each step, and replaces what can't be loaded, in the same way on every rank.

    `make(sample) -> Inputs` is an InputMaker. The slots of a step are dealt to the ranks in order, as whole runs. A
    slot whose sample raises MediaError or SkipSample takes the next sample of the order's spare list, in slot order
    over all ranks, until every slot is filled; `replaced` names each case. `gather(value)` returns every rank's value,
    in rank order. The run stops with a DataError when more than `max_bad_samples` (a share) of the samples drawn were
    bad; as long as fewer have been drawn than there are samples, the share is of the latter.

    With `workers`, so many processes read the next step's clips while this one is trained on; else threads read them
    when they are needed. What is loaded is the same.
    """

    def __init__(self, samples, make, order, rank=0, world_size=1, gather=gather_objects, max_bad_samples=0.01,
                 workers=0):
        if order.prompts_per_step % world_size:
            raise DataError(f"{order.prompts_per_step} samples a step can't be shared evenly by {world_size} processes")
        self.samples, self.make, self.order, self.gather = samples, make, order, gather
        self.max_bad_samples = max_bad_samples
        spawn = multiprocessing.get_context("spawn")
        self.readers = ProcessPoolExecutor(workers, spawn, _begin_reading, (make,)) if workers else None
        self.threads = ThreadPoolExecutor(THREADS)
        self.ahead = {}  # sample index -> future, of the next step
        share = order.prompts_per_step // world_size
        self.slots = range(rank * share, (rank + 1) * share)
        self.drawn, self.spares_used, self.replaced = 0, 0, []

    def next_step(self, step):
        """[(sample index, sample, inputs)] of this rank's slots. A DataError on one rank is raised on every rank."""
        indices, loaded, spares_before = self.order.step(step), {}, self.spares_used
        self.drawn += len(indices)
        todo = list(self.slots)
        while True:
            futures = {slot: self.ahead.pop(indices[slot], None) or self._begin(indices[slot]) for slot in todo}
            loaded |= {slot: future.result() for slot, future in futures.items()}
            failures = [(slot, indices[slot], str(loaded[slot]), isinstance(loaded[slot], DataError))
                        for slot in todo if isinstance(loaded[slot], Exception)]
            failures = sorted(failure for of_rank in self.gather(failures) for failure in of_rank)
            if not failures:
                following = self.order.step(step + 1)
                self.ahead = {following[slot]: self._begin(following[slot]) for slot in self.slots if self.readers}
                return [(indices[slot], self.samples[indices[slot]], loaded[slot]) for slot in self.slots]
            for slot, index, reason, fatal in failures:
                if fatal:
                    raise DataError(reason)
                indices[slot] = self.order.spare(self.spares_used)
                self.spares_used += 1
                bad, spare = self.samples[index].id, self.samples[indices[slot]].id
                self.replaced.append({"step": step, "id": bad, "reason": reason, "by": spare})
                say(f"step {step}: sample {bad} replaced by {spare}: {reason}")
            self.drawn += len(failures)
            self._check_share(self.spares_used - spares_before)
            todo = [slot for slot, *_ in failures if slot in self.slots]

    def state_dict(self):
        """What a resumed run needs to go on identically; the same on every rank."""
        return {"drawn": self.drawn, "spares_used": self.spares_used, "replaced": list(self.replaced)}

    def load_state_dict(self, state):
        """Takes up what state_dict() returned."""
        self.drawn, self.spares_used, self.replaced = state["drawn"], state["spares_used"], list(state["replaced"])

    def close(self):
        """Ends the reading of what won't be needed."""
        for pool in filter(None, (self.threads, self.readers)):
            pool.shutdown(cancel_futures=True)

    def _begin(self, index):
        """A future of the sample's Inputs, or of the exception that says why there are none."""
        sample = self.samples[index]
        if self.readers and media_key(sample, self.make.media_config) not in self.make.known:
            return self.readers.submit(_read_here, sample)
        return self.threads.submit(tried, self.make, sample)

    def _check_share(self, in_this_step):
        bad, seen = len(self.replaced), max(self.drawn, len(self.samples))
        if bad <= self.max_bad_samples * seen and in_this_step <= len(self.samples):
            return
        first = "".join(f"\n  {entry['id']}: {entry['reason']}" for entry in self.replaced[:5])
        raise DataError(f"{bad} of {self.drawn} samples drawn can't be used, more than max_bad_samples = "
                        f"{self.max_bad_samples} allows; the first ones:{first}")


def tried(function, *args):
    """What the function returns, or the exception that says why a sample can't be had."""
    try:
        return function(*args)
    except (DataError, MediaError, SkipSample) as error:
        return error


def _begin_reading(make):
    """In a process that reads: takes its InputMaker, one thread, and an end when the process that trains has ended."""
    global _make
    _make = make
    torch.set_num_threads(1)
    trains = multiprocessing.parent_process().sentinel
    threading.Thread(target=lambda: (multiprocessing.connection.wait([trains]), os._exit(0)), daemon=True).start()


def _read_here(sample):
    return tried(_make, sample)
