"""Asks a model about a clip, a sound or an image and shows what it writes while it writes it.

    python -m hov2.tools.ask MODEL CLIP "What does she intend?" [--options "A. praise" "B. mockery"]
    python -m hov2.tools.ask MODEL --batch questions.jsonl > answers.jsonl
    python -m hov2.tools.ask runs/toy/stage3/model CLIP "What does she intend?" --prompts configs/toy/prompts.json

One process, one question at a time, greedy; `evaluate.py` is the way to many answers at once, with scores.
"""

import argparse
import codecs
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from hov2.answers import answer_text
from hov2.config import MediaConfig
from hov2.data.formats import DataError
from hov2.data.inputs import InputMaker, kind_of
from hov2.data.media import MediaError, read_media
from hov2.data.samples import Sample, read_records, to_sample, tried
from hov2.distributed import compute_dtype, device_of, use_cuda
from hov2.engine.setup import USER_ERRORS
from hov2.model.encoder import Encoder
from hov2.model.rollout import generate, sampling_for
from hov2.model.thinker import load_thinker, load_tokenizer
from hov2.prompts import Prompts, load_prompts
from hov2.spans import completion_texts, completion_tokens, token_bytes_of


class Asker:
    """A loaded model that answers one question at a time.

    `prompts`: a file as in a config's `prompts`. `system` replaces its system prompt; "" leaves it out.
    """

    def __init__(self, model: str, prompts: str | None = None, system: str | None = None, limit: int = 2048):
        device = device_of("auto")
        if device.type == "cuda":
            use_cuda(device)
        words = load_prompts(prompts).words
        if system is not None:
            words = words | {"system": system}
        self.tokenizer = load_tokenizer(model)
        self.make = InputMaker(self.tokenizer, Prompts(words), MediaConfig())
        self.thinker = load_thinker(model, compute_dtype("auto", device)).to(device).eval()
        self.sampling = sampling_for(self.tokenizer, self.thinker.config, temperature=0.0, max_completion_length=limit)

    def ask(self, sample: Sample, write: Callable[[str], object] = lambda piece: None) -> dict:
        """Answer `sample`, handing its text to `write` as it comes; return what a line of --batch holds.

        "first_token" is in seconds from the question on; "rate" is in tokens a second after the first; "tokens" counts
        the end of turn. Raises MediaError and DataError for what can't be asked.
        """
        start = time.perf_counter()
        times = []  # of the tokens
        ended = False
        decoder = codecs.getincrementaldecoder("utf-8")("replace")  # keeps back characters that aren't all there yet

        def show(row: torch.Tensor) -> None:
            """Write the text of one more token, (1,), and note when it came."""
            nonlocal ended
            if ended:  # what follows the end of turn is padding
                return
            times.append(time.perf_counter())
            ended = int(row[0]) in self.sampling.stop_ids
            if not ended:
                write(decoder.decode(token_bytes_of(self.tokenizer, row)[0]))

        prompt = Encoder(self.thinker, self.thinker.device)(self.make(sample))
        rollout = generate(self.thinker, [prompt], 1, self.sampling, [None], on_token=show)[0]
        write(decoder.decode(b"", final=True))
        text = completion_texts(completion_tokens(self.tokenizer, rollout))[0]
        return {
            "id": sample.id,
            "problem": sample.problem,
            "completion": text,
            "answer": answer_text(text),
            "truncated": bool(rollout.truncated[0]),
            "tokens": len(times),
            "first_token": times[0] - start,
            "rate": (len(times) - 1) / max(times[-1] - times[0], 1e-9),
        }


def to_question(record: dict | DataError, number: int, path: str | Path) -> Sample:
    """Return a record as a Sample, as in training data but without need of solution, problem_type or data_type."""
    if isinstance(record, dict):
        defaults = {
            "solution": "-",
            "problem_type": "multiple choice" if record.get("options") else "free-form",
            "data_type": "image_audio" if isinstance(record.get("path"), dict) else "text",
        }
        record = defaults | record
    return to_sample(record, number, path, Path(path).parent)


def read_questions(args: argparse.Namespace) -> list[Sample]:
    """Return the samples that the command line asks about. Raises DataError and MediaError."""
    if args.batch:
        return [to_question(record, number, args.batch) for number, record in read_records(args.batch)]
    record = {
        "problem": args.question,
        "options": args.options,
        "path": args.clip,
        "data_type": kind_of(read_media(args.clip, max_frames=2)),
    }
    return [to_question(record, 1, "the question")]


def answer_all(asker: Asker, samples: list[Sample]) -> int:
    """Print a line of JSON for each sample; return the exit code: 1 if one could not be asked."""
    code = 0
    for sample in samples:
        answer = tried(asker.ask, sample)
        if isinstance(answer, Exception):
            answer = {"id": sample.id, "problem": sample.problem, "error": str(answer)}
            code = 1
        print(json.dumps(answer), flush=True)
    return code


def answer_one(asker: Asker, sample: Sample) -> int:
    """Print the answer to a sample as it comes, then its timing; return the exit code 0."""
    answer = asker.ask(sample, lambda piece: print(piece, end="", flush=True))
    cut_off = ", cut off at the limit" if answer["truncated"] else ""
    print(
        f"\n[first token after {answer['first_token']:.2f} s; {answer['tokens']} tokens{cut_off}; "
        f"{answer['rate']:.1f} tokens/s]"
    )
    return 0


def main(argv: list[str] | None = None) -> int:
    """Do what the command line says and return the exit code; a mistake of the user's is one line and code 1."""
    parser = argparse.ArgumentParser(prog="python -m hov2.tools.ask", description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("model", help="a thinker's folder, a full Qwen2.5-Omni folder, or a hub id")
    parser.add_argument("clip", nargs="?", help="a video, a sound or an image")
    parser.add_argument("question", nargs="?")
    parser.add_argument("--options", nargs="+", help='what to choose from: "A. joke" "B. threat"')
    parser.add_argument("--system", metavar="TEXT", help="in place of the system prompt")
    parser.add_argument("--prompts", metavar="FILE", help="the words that the model was trained with")
    parser.add_argument("--batch", metavar="QUESTIONS.jsonl", help="many questions; JSON lines of answers to stdout")
    parser.add_argument("--max-completion-length", type=int, default=2048)
    args = parser.parse_args(argv)
    if (args.question is None) == (args.batch is None) or args.max_completion_length < 1:
        parser.error("expected CLIP and QUESTION, or --batch; and --max-completion-length of at least 1")
    try:
        samples = read_questions(args)
        asker = Asker(args.model, args.prompts, args.system, args.max_completion_length)
        if args.batch:
            return answer_all(asker, samples)
        return answer_one(asker, samples[0])
    except (*USER_ERRORS, MediaError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")  # whatever the terminal's encoding
    sys.exit(main())
