"""A real language model under the thinker's towers: hov2's own loops with real weights and a real tokenizer, on a CPU.

    python benchmarks/real_lm.py graft SOURCE OUT [--gguf FILE]    OUT: a thinker's folder, for `model` in a config
    python benchmarks/real_lm.py data OUT                          OUT: sft.jsonl, grpo.jsonl, held_out.jsonl
    python benchmarks/real_lm.py report RUN [--svg FILE]           a table of the run's figures, and its reward curve

SOURCE is a local Hugging Face folder of a Llama or a Qwen2 with a byte-level BPE tokenizer that knows ChatML, such as
SmolLM2-135M-Instruct. With --gguf the weights are those of a GGUF file in it, which needs `pip install gguf accelerate`.
docs/real-lm.md has the commands of a whole run, and what came of it.
"""

import argparse
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # hov2 isn't installed, it is used from where it stands
sys.path.insert(0, str(ROOT / "docs"))

import torch
from figures import Figure
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
)

from hov2.evaluation.results import compare, interval, mean, table
from hov2.model.layout import MEDIA_TOKENS
from hov2.model.versions import decoder_of

# ---- The graft -------------------------------------------------------------------------------------------------------

CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
TOKEN_IDS = {
    "image_token_index": "<|IMAGE|>",
    "audio_token_index": "<|AUDIO|>",
    "video_token_index": "<|VIDEO|>",
    "vision_start_token_id": "<|vision_bos|>",
    "vision_end_token_id": "<|vision_eos|>",
    "audio_start_token_id": "<|audio_bos|>",
    "audio_end_token_id": "<|audio_eos|>",
    "pad_token_id": "<|endoftext|>",
    "eos_token_id": "<|im_end|>",
}
KEPT = (  # keys that a Llama's or Qwen2's config and the thinker's text config both have
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
)
VISION = {"depth": 2, "hidden_size": 64, "num_heads": 2, "intermediate_size": 128, "fullatt_block_indexes": [1]}
AUDIO = {"encoder_layers": 2, "d_model": 64, "encoder_attention_heads": 2, "encoder_ffn_dim": 128, "num_mel_bins": 128}
ROWS = 64  # the embedding has a multiple of so many


class GraftError(ValueError):
    """A model that can't be a thinker's decoder; the message says why."""


def graft(source, target, gguf=None):
    """Writes a thinker's folder to `target`: the decoder of `source`, small random towers, its tokenizer and more."""
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf, dtype=torch.float32)
    tokenizer = with_media_tokens(AutoTokenizer.from_pretrained(source, gguf_file=gguf))
    thinker = under_towers(model, tokenizer)
    thinker.save_pretrained(target)
    tokenizer.save_pretrained(target)


def with_media_tokens(tokenizer):
    """A tokenizer with the BPE of `tokenizer` and, behind its tokens, Qwen's seven for media."""
    missing = [token for token in CHATML if token not in tokenizer.get_vocab()]
    if missing:
        raise GraftError(f"the tokenizer has no {missing[0]}: expected one that knows ChatML")
    if '"ByteLevel"' not in tokenizer.backend_tokenizer.to_str():
        raise GraftError("the tokenizer is no byte-level BPE, which hov2 reads the bytes of tokens from")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=MEDIA_TOKENS,
        chat_template=tokenizer.chat_template,
    )


def under_towers(model, tokenizer, seed=0):
    """A thinker whose decoder computes what `model` computes; new tokens get the mean of the old embeddings."""
    config = model.config
    check(config)
    rows = max(len(tokenizer), config.vocab_size)
    rows = -(-rows // ROWS) * ROWS  # rounded up
    torch.manual_seed(seed)
    thinker = Qwen2_5OmniThinkerForConditionalGeneration(thinker_config(config, tokenizer, rows))
    new_tokens = [tokenizer.convert_tokens_to_ids(token) for token in MEDIA_TOKENS.values()]
    weights = model.model.state_dict()
    weights["embed_tokens.weight"] = with_new_rows(weights["embed_tokens.weight"], rows, new_tokens)
    decoder = decoder_of(thinker)
    lacking = decoder.load_state_dict(weights, strict=False).missing_keys
    for name in lacking:  # a Llama has no biases
        if not name.endswith("_proj.bias"):
            raise GraftError(f"the model has no {name}")
        nn.init.zeros_(decoder.get_parameter(name))
    if not config.tie_word_embeddings:
        thinker.lm_head.load_state_dict({"weight": with_new_rows(model.lm_head.weight, rows, new_tokens)})
    return thinker.eval()


def check(config):
    """Raises GraftError for a model that does what the thinker's decoder doesn't do."""
    if config.model_type not in ("llama", "qwen2"):
        raise GraftError(f"a model of the type {config.model_type!r}; expected llama or qwen2")
    if config.rope_parameters["rope_type"] != "default":
        raise GraftError(f"rope_type {config.rope_parameters['rope_type']!r}; expected default")
    if getattr(config, "head_dim", None) not in (None, config.hidden_size // config.num_attention_heads):
        raise GraftError(f"head_dim {config.head_dim}; expected hidden_size / num_attention_heads")
    for key in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if getattr(config, key, False):
            raise GraftError(f"{key}: the thinker's decoder has none")


def thinker_config(config, tokenizer, rows):
    """The thinker's config: sizes and rotary base of `config`, a vocabulary of `rows`, small towers."""
    half = config.hidden_size // config.num_attention_heads // 2
    sections = [half // 4, half * 3 // 8]  # as 16, 24 and 24 of 64; text has equal positions on all three axes
    sections.append(half - sum(sections))
    text = {key: getattr(config, key) for key in KEPT}
    text |= {
        "vocab_size": rows,
        "max_window_layers": config.num_hidden_layers,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": config.rope_parameters["rope_theta"],
            "mrope_section": sections,
        },
        "bos_token_id": None,
    }
    return Qwen2_5OmniThinkerConfig(
        text_config=text,
        vision_config=VISION | {"out_hidden_size": config.hidden_size},
        audio_config=AUDIO | {"output_dim": config.hidden_size},
        tie_word_embeddings=config.tie_word_embeddings,
        **{name: tokenizer.convert_tokens_to_ids(token) for name, token in TOKEN_IDS.items()},
    )


def with_new_rows(weight, rows, new_tokens):
    """The matrix with `rows` rows, of which those of `new_tokens` and all behind the old ones are the old ones' mean."""
    average = weight.detach().mean(0)
    behind = average.expand(rows - len(weight), -1)
    grown = torch.cat([weight.detach(), behind])
    grown[new_tokens] = average
    return grown


# ---- The questions ---------------------------------------------------------------------------------------------------

SPLITS = {"sft": 240, "grpo": 720, "held_out": 240}
LEVELS = ("easier", "harder")


@dataclass
class Question:
    """A question with the three blocks of its solution."""

    problem: str
    context: str
    think: str
    answer: int


def sum_question(level, rng):
    """A sum: one digit added, or two numbers of two digits."""
    first = rng.randint(11, 89)
    second = rng.randint(2, 9) if level == "easier" else rng.randint(11, 89)
    total = first + second
    return Question(f"What is {first} + {second}?", f"{first} and {second}.", f"{first} + {second} = {total}.", total)


def three_numbers_question(level, rng):
    """A sum of three: of one digit each, or the first of two."""
    first = rng.randint(2, 9) if level == "easier" else rng.randint(11, 79)
    second = rng.randint(2, 9)
    third = rng.randint(2, 9)
    both = first + second
    total = both + third
    return Question(
        f"What is {first} + {second} + {third}?",
        f"{first}, {second} and {third}.",
        f"{first} + {second} = {both}. {both} + {third} = {total}.",
        total,
    )


def next_number_question(level, rng):
    """How a row of numbers goes on: by 1, 2, 5 or 10 each time, or by another number of one digit."""
    step = rng.choice([1, 2, 5, 10] if level == "easier" else [3, 4, 6, 7, 8, 9])
    first = rng.randint(2, 60)
    second = first + step
    third = second + step
    following = third + step
    row = f"{first}, {second}, {third}"
    return Question(f"Which number comes after {row}?", f"{row}.", f"{third} + {step} = {following}.", following)


MAKERS = {"sum": sum_question, "three numbers": three_numbers_question, "next number": next_number_question}


def write_data(folder, seed=0):
    """Writes the splits; every kind and level comes equally often, and no question comes twice."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    seen = set()
    for split, count in SPLITS.items():
        records = []
        for number in range(count):
            kind = list(MAKERS)[number % len(MAKERS)]
            level = LEVELS[number // len(MAKERS) % len(LEVELS)]
            question = unseen_question(kind, level, rng, seen)
            records.append(record(f"{split}-{number:04d}", kind, level, question))
        lines = [json.dumps(entry) + "\n" for entry in records]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def unseen_question(kind, level, rng, seen):
    """A question that is not in `seen`, where it is put."""
    while True:
        question = MAKERS[kind](level, rng)
        if question.problem not in seen:
            seen.add(question.problem)
            return question


def record(sample_id, kind, level, question):
    """The question as a line of hov2's data; `kind` and `level` are for the report."""
    return {
        "id": sample_id,
        "problem": question.problem,
        "problem_type": "numerical",
        "solution": f"<context>{question.context}</context><think>{question.think}</think>"
        f"<answer>{question.answer}</answer>",
        "data_type": "text",
        "kind": kind,
        "level": level,
    }


# ---- The report ------------------------------------------------------------------------------------------------------

EVALUATIONS = {"eval_sft": "after SFT", "eval_grpo": "after GRPO"}  # folders of the run
CURVES = {"format": ("flat", "bad"), "accuracy": ("curve", "good")}  # the reward: line and dots in figures.py
SMOOTH = 5  # steps whose mean is drawn
WINDOW = 10  # steps whose samples are one column


def report(run, svg=None):
    """Prints accuracy by kind and level of question, held out and as sampled in GRPO; `svg`: its rewards as a figure."""
    groups = {"all": []}
    for question in read_lines(run / "data" / "held_out.jsonl"):
        groups["all"].append(question["id"])
        groups.setdefault(group_of(question), []).append(question["id"])
    found = {}
    for folder in EVALUATIONS:
        found[folder] = {answer["id"]: answer for answer in read_lines(run / folder / "predictions.jsonl")}
    rows = [("accuracy", "questions", *EVALUATIONS.values())]
    for group, names in groups.items():
        rows.append((group, len(names), *score_cells("accuracy", names, found)))
    rows.append(("format", len(groups["all"]), *score_cells("format", groups["all"], found)))
    print(table(rows))
    before, after = [list(answers.values()) for answers in found.values()]
    print(f"accuracy, question by question: {change(before, after)}")
    in_form = [answer for answer in before if answer["format"]]
    print(f"  where the form was right before: {change(in_form, after)}")
    print()
    print(table(sampled(run, list(groups))))
    steps = read_lines(run / "grpo" / "metrics.jsonl")
    seconds = sum(value for step in steps for key, value in step.items() if key.startswith("time/"))
    print(f"{len(steps)} steps of GRPO, {seconds / len(steps):.0f} s a step")
    if svg:
        Path(svg).write_text(curve(steps).svg(), encoding="utf-8")


def change(before, after):
    """The difference that the later answers make to the earlier ones' accuracy, with its interval, as text."""
    asked = {answer["id"] for answer in before}
    found = compare(before, [answer for answer in after if answer["id"] in asked])
    low, high = found["interval"]
    return f"{found['difference']:+.3f} [{low:+.3f}, {high:+.3f}] over {len(before)}"


def group_of(question):
    """The row of the report that a question belongs to, beside "all"."""
    return f"{question['kind']}, {question['level']}"


def sampled(run, groups):
    """Rows of the mean accuracy of GRPO's own samples, by group of questions, and of their format: by steps."""
    group_of_id = {question["id"]: group_of(question) for question in read_lines(run / "data" / "grpo.jsonl")}
    scores = {}  # (row, window) -> scores
    for rollout in read_lines(run / "grpo" / "rollouts.jsonl"):
        window = rollout["step"] // WINDOW
        for completion in rollout["completions"]:
            rewards = completion["rewards"]
            for row in ("all", group_of_id[rollout["sample"]]):
                scores.setdefault((row, window), []).append(rewards["accuracy"])
            scores.setdefault(("format", window), []).append(rewards["format"])
    windows = range(max(window for _, window in scores) + 1)
    heads = [f"steps {WINDOW * window}-{WINDOW * window + WINDOW - 1}" for window in windows]
    rows = [("accuracy of samples", *heads)]
    for row in [*groups, "format"]:
        cells = []
        for window in windows:
            values = scores.get((row, window))  # a short run has no samples of some kinds
            cells.append(f"{mean(values):.3f}" if values else "-")
        rows.append((row, *cells))
    return rows


def score_cells(name, questions, found):
    """The mean of a score with its 95 % interval as text, for each evaluation."""
    cells = []
    for answers in found.values():
        values = [answers[question][name] for question in questions]
        low, high = interval(values)
        cells.append(f"{mean(values):.3f} [{low:.3f}, {high:.3f}]")
    return cells


def read_lines(path):
    """The objects of a file of JSON lines."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def curve(steps):
    """The figure of the mean rewards: a dot for each step, a line for the mean of the last few."""
    figure = Figure(300)
    left, top, width, height = 60, 30, 640, 220

    def at(step, value):
        return left + width * step / (len(steps) - 1), top + height * (1 - value)

    for value in (0, 0.25, 0.5, 0.75, 1):
        figure.path([at(0, value), at(len(steps) - 1, value)], "thin")
        figure.text(left - 8, at(0, value)[1] + 4, f"{value:g}", "small right")
    for number in range(0, len(steps), 10):
        figure.text(at(number, 0)[0], top + height + 18, f"{number}", "mid small")
    figure.text(left + width / 2, top + height + 38, "step of GRPO", "mid small")
    for row, (name, (line, dot)) in enumerate(CURVES.items()):
        values = [step[f"rewards/{name}/mean"] for step in steps]
        smooth = [mean(values[max(0, number + 1 - SMOOTH) : number + 1]) for number in range(len(values))]
        for number, value in enumerate(values):
            x, y = at(number, value)
            figure.rect(x - 2, y - 2, 4, 4, dot, 0.5, radius=2)
        figure.path([at(number, value) for number, value in enumerate(smooth)], line)
        figure.rect(left + width - 112, top + height - 45 + 18 * row, 10, 10, dot)
        figure.text(left + width - 96, top + height - 36 + 18 * row, f"{name} reward", "small")
    return figure


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    grafting = commands.add_parser("graft")
    grafting.add_argument("source")
    grafting.add_argument("out")
    grafting.add_argument("--gguf", metavar="FILE", help="its name in SOURCE")
    writing = commands.add_parser("data")
    writing.add_argument("out")
    reporting = commands.add_parser("report")
    reporting.add_argument("run", type=Path)
    reporting.add_argument("--svg", metavar="FILE")
    arguments = parser.parse_args(argv)
    if arguments.command == "graft":
        graft(arguments.source, arguments.out, arguments.gguf)
    elif arguments.command == "data":
        write_data(arguments.out)
    else:
        report(arguments.run, arguments.svg)


if __name__ == "__main__":
    main()
