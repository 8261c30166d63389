"""Evaluation: answers to held-out questions or to a published benchmark, and what they score.

    torchrun --standalone --nproc_per_node 8 evaluate.py configs/eval.json model=runs/stage3/model
    torchrun --standalone --nproc_per_node 8 evaluate.py configs/filter_stage2.json      the difficulty filter
    torchrun --standalone --nproc_per_node 2 evaluate.py                       the embedded toy, on a laptop's CPU
    python evaluate.py --compare runs/eval-a runs/eval-b

Writes `predictions.jsonl` (one line a question), `results.json` and the printed `results.txt` to `output_dir`. Answers
are kept in `output_dir/answers` as they come: a run that was killed goes on where it stopped when it is started again.
"""

import hashlib
import json
import sys
from pathlib import Path

from hov2 import distributed, toy
from hov2.config import ConfigError, EvalConfig
from hov2.data.formats import DataError
from hov2.data.samples import read_samples
from hov2.engine.setup import command, print0, start
from hov2.evaluation.benchmarks import columns, read_benchmark, render
from hov2.evaluation.evaluator import Evaluator, Journal
from hov2.evaluation.results import (
    format_comparison,
    format_filter,
    format_protocol,
    format_summary,
    interval,
    keep,
    share_right,
)
from hov2.model.weights import source_folder
from hov2.prompts import PromptsError


def main(config):
    """Answers and scores every question of `config.data` or `config.benchmark`."""
    device = distributed.setup(config.device)
    with distributed.rank_zero_first():
        toy.prepare(config)  # builds the toy's world for the toy's configs, and nothing for others
    run = start(config, device, trained=False)
    words = run.make.prompts.words
    words["system"] = system_text(config, run.tokenizer, words["system"])
    samples = (read_benchmark(config.benchmark, config.benchmark_root) if config.benchmark
               else read_samples(config.data, config.seed))
    evaluator = Evaluator(run, max_new_tokens=config.max_new_tokens, batch_size=config.batch_size,
                          num_samples=config.num_samples, temperature=config.temperature, top_k=config.top_k,
                          top_p=config.top_p, training_rewards=config.filter is not None)
    print0(evaluator.scorer.note(samples))
    protocol = protocol_of(config, words, device)
    journal = Journal(config.output_dir, protocol | {"weights": weights_of(config.model)}, samples, config.resume)
    summary, records = evaluator.evaluate(samples, journal)
    if distributed.rank() == 0:
        report(config, protocol, samples, summary, records)
    distributed.cleanup()


def system_text(config, tokenizer, default):
    """The system prompt that `config.system_prompt` means; `default` is that of the prompts. Empty: no system turn."""
    name = config.system_prompt
    if name in ("hov2", "none"):
        return default if name == "hov2" else ""
    if name == "qwen":  # what the model's own chat template puts where a conversation has no system turn
        template, legacy = tokenizer.chat_template, source_folder(config.model) / "chat_template.json"
        if not template and legacy.exists():
            template = json.loads(legacy.read_text(encoding="utf-8"))["chat_template"]
        chat = tokenizer.apply_chat_template([{"role": "user", "content": "-"}], chat_template=template,
                                             tokenize=False) if template else ""
        text = chat.partition("<|im_start|>system\n")[2].partition("<|im_end|>")[0]
        if not text:
            raise PromptsError(f"system_prompt 'qwen': {config.model} has no chat template with a system prompt of its "
                               "own; put the text into a file and give its path as system_prompt")
        return text
    try:
        return Path(name).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise PromptsError(f"system_prompt: expected hov2, none, qwen or a text file; {name}: {error}") from None


def protocol_of(config, words, device):
    """All that a score depends on besides the questions, as it is written beside the score."""
    names = ("model", "benchmark", "system_prompt", "prompts", "max_prompt_length", "on_long_prompt", "max_new_tokens",
             "batch_size", "num_samples", "temperature", "top_p", "top_k", "seed")
    return {
        **{name: getattr(config, name) for name in names}, "system_text": words["system"],
        "words": hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()[:16],
        "media": vars(config.media), "dtype": str(distributed.compute_dtype(config.dtype, device)),
        "judge": config.judge and config.judge.model,
        "rewards": "evaluation" if config.filter is None else "training",
    }


def weights_of(name):
    """Tells another model in the same place apart: sizes and times of its files."""
    files = sorted(source_folder(name).glob("*.safetensors"))
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files}


def report(config, protocol, samples, summary, records):
    """Writes and prints the results, the benchmark's columns, the questions that could not be asked, and the filter's
    data file."""
    folder, parts = Path(config.output_dir), [format_protocol(protocol), format_summary(summary)]
    if config.benchmark:
        summary["columns"] = columns(config.benchmark, records)
        parts.append(render(config.benchmark, records, interval))
    parts += [f"not asked: {record['id']}: {record['error']}" for record in records if record["error"]]
    parts += [format_filter(records, config.filter)] if config.filter else []
    distributed.atomic_write(folder / "predictions.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    distributed.atomic_write(folder / "results.json", json.dumps({"protocol": protocol, **summary}, indent=2) + "\n")
    distributed.atomic_write(folder / "results.txt", "\n\n".join(parts) + "\n")
    print("\n\n".join(parts), flush=True)
    if config.filter:
        left = write_filtered(config.filter, samples, records)
        print(f"{left} of {len(samples)} questions are left, in {config.filter.output}", flush=True)


def write_filtered(rule, samples, records):
    """Writes the questions that `rule` keeps, as data for a config, with absolute media paths; returns how many."""
    fields = ("id", "problem", "problem_type", "options", "solution", "data_type")
    lines = [{**sample.extra, **{name: getattr(sample, name) for name in fields},
              "path": sample.paths if len(sample.paths) > 1 else next(iter(sample.paths.values()), None),
              "share_right": share_right(record, rule.threshold)}
             for sample, record in zip(samples, records) if keep(record, rule) == "kept"]
    if not lines:
        raise DataError(f"filter: no question has a share of right answers between {rule.min_share} and "
                        f"{rule.max_share}; nothing is left for the next stage")
    Path(rule.output).parent.mkdir(parents=True, exist_ok=True)
    distributed.atomic_write(rule.output, "".join(json.dumps(line) + "\n" for line in lines))
    return len(lines)


def compare(folders):
    """The text that shows two evaluations side by side."""
    if len(folders) != 2:
        raise ConfigError("expected evaluate.py --compare FOLDER FOLDER")
    results, records = [], []
    for folder in map(Path, folders):
        try:
            results.append(json.loads((folder / "results.json").read_text()))
            records.append(list(map(json.loads, (folder / "predictions.jsonl").read_text().splitlines())))
        except (OSError, ValueError) as error:
            raise DataError(f"{folder}: not the folder of a finished evaluation: {error}") from None
    return format_comparison(folders, results, records)


if __name__ == "__main__":
    if "--compare" not in sys.argv[1:2]:
        command(main, EvalConfig, default="configs/toy/eval.json")
    else:
        try:
            print(compare(sys.argv[2:]))
        except (ConfigError, DataError) as error:
            sys.exit(f"error: {error}")
