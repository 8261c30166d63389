"""Asks a model about a clip, a sound or an image and shows what it writes while it writes it.

    python -m hov2.ask MODEL CLIP "What does she intend?" [--options "A. praise" "B. mockery"]
    python -m hov2.ask MODEL IMAGE "Do the two fit together?" --audio SOUND
    python -m hov2.ask MODEL --batch questions.jsonl > answers.jsonl
    python -m hov2.ask runs/toy/stage3/model CLIP "What does she intend?" --prompts configs/toy/prompts.json

One process, one question at a time, greedy; `evaluate.py` is the way to many answers at once, with scores.
"""

import argparse
import codecs
import json
import os
import re
import sys
import time
from pathlib import Path

import torch

from hov2.config import MediaConfig
from hov2.data import DATA_TYPES, DataError, Sample, make_inputs
from hov2.distributed import compute_dtype
from hov2.media import MediaError, read_media
from hov2.model import Encoder, load_thinker, load_tokenizer
from hov2.prompts import CHOICE_TYPES, Prompts, PromptsError, load_prompts
from hov2.rewards import PROBLEM_TYPES, answer_text
from hov2.rollout import generate, sampling_for
from hov2.setup import USER_ERRORS
from hov2.spans import completion_texts, completion_tokens, token_bytes_of


class Asker:
    """A loaded model that answers one question at a time. `system` replaces the system prompt; "" leaves it out.

    `prompts`: a file as in a config's `prompts`.
    """

    def __init__(self, model, system=None, limit=2048, prompts=None):
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.prompts = Prompts(load_prompts(prompts).words | ({} if system is None else {"system": system}))
        self.tokenizer = load_tokenizer(model)
        self.thinker = load_thinker(model, compute_dtype("auto", device)).to(device).eval()
        self.sampling = sampling_for(self.tokenizer, self.thinker.config, temperature=0.0, max_completion_length=limit)

    def ask(self, sample, write=lambda piece: None):
        """Answers `sample`, handing its text to `write` as it comes; returns what a line of --batch holds.

        "first_token" is in seconds from the question on, "read" of them spent on the media files; "rate" is in tokens a
        second after the first, "tokens" counts the end of turn. Raises MediaError and DataError for what can't be
        asked.
        """
        start = time.perf_counter()
        inputs = make_inputs(sample, self.tokenizer, self.prompts, MediaConfig())
        read, times, ids, stops = time.perf_counter() - start, [], [], set(self.sampling.stop_ids)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")  # keeps back characters that aren't all there yet

        def show(row):
            if stops.isdisjoint(ids[-1:]):  # what follows the end of turn is padding
                ids.append(int(row[0]))
                times.append(time.perf_counter())
                write(decoder.decode(b"".join(token_bytes_of(self.tokenizer, set(ids[-1:]) - stops))))

        prompt = Encoder(self.thinker, self.thinker.device)(inputs)
        rollout = generate(self.thinker, [prompt], 1, self.sampling, [None], on_token=show)[0]
        write(decoder.decode(b"", final=True))
        text = completion_texts(completion_tokens(self.tokenizer, rollout))[0]
        return {"id": sample.id, "problem": sample.problem, "completion": text, "answer": answer_text(text),
                "truncated": bool(rollout.truncated[0]), "tokens": len(ids), "read": read,
                "first_token": times[0] - start, "rate": (len(ids) - 1) / max(times[-1] - times[0], 1e-9)}


def read_questions(path):
    """The samples of a JSONL file of records as in training data, but without need of `solution` or `problem_type`."""
    try:
        lines = enumerate(Path(path).read_text(encoding="utf-8").split("\n"), 1)
        records = [(number, dict(json.loads(line))) for number, line in lines if line.strip()]
    except (OSError, ValueError, TypeError) as error:  # JSON's and UTF-8's errors are ValueErrors; dict(5): TypeError
        raise DataError(f"{path}: can't be read as lines of JSON objects: {error}") from None
    return [to_sample(record, f"{Path(path).name}:{number}", Path(path).parent) for number, record in records]


def to_sample(record, name, root="."):
    """A record -> Sample, called `name` if it has no id, its files below `root`; DataError for an unusable field."""
    problem, options, path = (record.get(key) for key in ("problem", "options", "path"))
    paths = path if isinstance(path, dict) else {} if path is None else {str(record.get("data_type")): path}
    media = "_".join(sorted(paths, reverse=True)) or "text"
    kind = record.get("problem_type") or ("multiple choice" if options else "free-form")
    for field, usable in (
            ("problem", isinstance(problem, str) and problem.strip()),
            ("options", options is None or isinstance(options, list) and all(isinstance(o, str) for o in options)),
            ("problem_type", kind in list(PROBLEM_TYPES) and (options or kind not in CHOICE_TYPES)),
            ("path" if isinstance(path, dict) else "data_type", media in DATA_TYPES),
            ("path", all(isinstance(file, str) for file in paths.values()))):
        if not usable:
            raise DataError(f"{name}: {field}: can't be used: {record.get(field)!r}")
    paths = {medium: os.path.abspath(Path(root) / file) for medium, file in paths.items()}
    return Sample(str(record.get("id", name)), problem, kind, tuple(options or ()), "", media, paths)


def medium(path):
    """"video", "image" or "audio": what the file at `path` is; MediaError if it's none of these."""
    media = read_media(path, max_frames=2)
    return "audio" if media.frames is None else "image" if media.sample_fps is None else "video"


def system_text(value):
    """The system prompt that `--system` means: the content of a file, or the text itself; None stays None.

    What looks like a path (a dot or slash inside a single word) is meant as one. Raises PromptsError for a file that
    isn't there or isn't UTF-8.
    """
    if not value or not (os.path.isfile(value) or re.fullmatch(r"\S*[./]\S+", value)):
        return value
    try:
        return Path(value).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise PromptsError(f"--system: {value} can't be read as a text file: {error}") from None


def arguments(argv):
    """The parsed command line; `samples` holds its questions, checked before a model is loaded."""
    parser = argparse.ArgumentParser(prog="python -m hov2.ask", description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("model", help="a thinker's folder, a full Qwen2.5-Omni folder, or a hub id")
    parser.add_argument("clip", nargs="?", help="a video, a sound or an image")
    parser.add_argument("question", nargs="?")
    parser.add_argument("--options", nargs="+", help='what to choose from: "A. joke" "B. threat"')
    parser.add_argument("--audio", help="the sound that goes with an image")
    parser.add_argument("--system", metavar="TEXT_OR_FILE", help="in place of hov2's system prompt")
    parser.add_argument("--prompts", metavar="FILE", help="the prompts that the model was trained with: JSON, as a "
                                                          "config's prompts")
    parser.add_argument("--batch", metavar="QUESTIONS.jsonl", help="many questions; JSON lines of answers to stdout")
    parser.add_argument("--max-new-tokens", type=int, default=2048)
    args = parser.parse_args(argv)
    if (args.clip or args.options or args.audio if args.batch else args.question is None) or args.max_new_tokens < 1:
        parser.error("expected CLIP and QUESTION, or --batch alone; and --max-new-tokens of at least 1")
    args.system = system_text(args.system)
    args.samples = read_questions(args.batch) if args.batch else [to_sample({
        "problem": args.question, "options": args.options, "data_type": medium(args.clip),
        "path": {"image": args.clip, "audio": args.audio} if args.audio else args.clip}, "the question")]
    return args


def answer_all(asker, samples):
    """Prints one JSON line a sample; returns 1 if one could not be asked (its line has "error"), else 0."""
    failed = 0
    for sample in samples:
        try:
            answer = asker.ask(sample)
        except (MediaError, DataError) as error:
            failed, answer = 1, {"id": sample.id, "problem": sample.problem, "error": str(error)}
        print(json.dumps(answer), flush=True)
    return failed


def main(argv=None):
    """Does what the command line says and returns the exit code; a mistake of the user's is one line and code 1."""
    try:
        args = arguments(argv)
        asker = Asker(args.model, args.system, args.max_new_tokens, args.prompts)
        if args.batch:
            return answer_all(asker, args.samples)
        answer = asker.ask(args.samples[0], lambda piece: print(piece, end="", flush=True))
    except (*USER_ERRORS, MediaError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"\n[first token after {answer['first_token']:.2f} s, {answer['read']:.2f} s of them for reading the media; "
          f"{answer['tokens']} tokens{', cut off at the limit' * answer['truncated']}; {answer['rate']:.1f} tokens/s]")
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")  # whatever the terminal's encoding
    sys.exit(main())
