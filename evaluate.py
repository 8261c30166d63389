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

import torch
from transformers import PreTrainedTokenizerBase

from hov2 import distributed, toy
from hov2.config import ConfigError, EvalConfig, FilterConfig
from hov2.data.formats import DataError
from hov2.data.samples import Sample, read_samples
from hov2.engine.setup import command, print0, start
from hov2.evaluation.benchmarks import columns, read_benchmark, render
from hov2.evaluation.evaluator import Evaluator
from hov2.evaluation.journal import Journal
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


def main(config: EvalConfig) -> None:
    """Answer and score every question of `config.data` or `config.benchmark`."""
    device = distributed.setup(config.device)
    with distributed.rank_zero_first():
        toy.prepare(config)  # builds the toy's world for the toy's configs, and nothing for others
    run = start(config, device, trained=False)
    words = run.make.prompts.words
    words["system"] = system_text(config, run.tokenizer, words["system"])
    if config.benchmark:
        samples = read_benchmark(config.benchmark, config.benchmark_root)
    else:
        samples = read_samples(config.data, config.seed)
    evaluator = Evaluator(
        run,
        max_completion_length=config.max_completion_length,
        batch_size=config.batch_size,
        num_samples=config.num_samples,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        training_rewards=config.filter is not None,
    )
    print0(evaluator.scorer.note(samples))
    protocol = protocol_of(config, words, device)
    weights = {"weights": weights_of(config.model)}
    journal = Journal(config.output_dir, protocol | weights, samples, config.resume)
    summary, records = evaluator.evaluate(samples, journal)
    if distributed.rank() == 0:
        report(config, protocol, samples, summary, records)
    distributed.cleanup()


def system_text(config: EvalConfig, tokenizer: PreTrainedTokenizerBase, default: str) -> str:
    """Return the system prompt that `config.system_prompt` means; `default` is that of the prompts.

    An empty one leaves the system's turn out.
    """
    name = config.system_prompt
    if name == "hov2":
        return default
    if name == "none":
        return ""
    if name == "qwen":
        return _system_text_of_model(config.model, tokenizer)
    try:
        return Path(name).read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise PromptsError(f"system_prompt: expected hov2, none, qwen or a text file; {name}: {error}") from None


def _system_text_of_model(model: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what the model's own chat template puts where a conversation has no system turn."""
    template = tokenizer.chat_template
    legacy = source_folder(model) / "chat_template.json"
    if not template and legacy.exists():
        template = json.loads(legacy.read_text(encoding="utf-8"))["chat_template"]
    text = ""
    if template:
        conversation = [{"role": "user", "content": "-"}]
        chat = tokenizer.apply_chat_template(conversation, chat_template=template, tokenize=False)
        text = chat.partition("<|im_start|>system\n")[2].partition("<|im_end|>")[0]
    if not text:
        raise PromptsError(
            f"system_prompt 'qwen': {model} has no chat template with a system prompt of its own; put the text into a "
            "file and give its path as system_prompt"
        )
    return text


PROTOCOL_KEYS = (
    "model",
    "benchmark",
    "system_prompt",
    "prompts",
    "max_prompt_length",
    "on_long_prompt",
    "max_completion_length",
    "batch_size",
    "num_samples",
    "temperature",
    "top_p",
    "top_k",
    "seed",
)


def protocol_of(config: EvalConfig, words: dict, device: torch.device) -> dict:
    """Return all that a score depends on besides the questions, as it is written beside the score."""
    protocol = {key: getattr(config, key) for key in PROTOCOL_KEYS}
    protocol["system_text"] = words["system"]
    protocol["words"] = hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()[:16]
    protocol["media"] = vars(config.media)
    protocol["dtype"] = str(distributed.compute_dtype(config.dtype, device))
    protocol["judge"] = config.judge.model if config.judge else None
    protocol["rewards"] = "evaluation" if config.filter is None else "training"
    return protocol


def weights_of(name: str) -> dict[str, list[int]]:
    """Return the sizes and times of a model's files, which tell another model in the same place apart."""
    files = sorted(source_folder(name).glob("*.safetensors"))
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files}


def report(config: EvalConfig, protocol: dict, samples: list[Sample], summary: dict, records: list[dict]) -> None:
    """Write and print the results: scores, the benchmark's columns, questions that could not be asked, the filter."""
    folder = Path(config.output_dir)
    parts = [format_protocol(protocol), format_summary(summary)]
    if config.benchmark:
        summary["columns"] = columns(config.benchmark, records)
        parts.append(render(config.benchmark, records, interval))
    for record in records:
        if record["error"]:
            parts.append(f"not asked: {record['id']}: {record['error']}")
    if config.filter:
        parts.append(format_filter(records, config.filter))
    text = "\n\n".join(parts)
    distributed.atomic_write(folder / "predictions.jsonl", _json_lines(records))
    distributed.atomic_write(folder / "results.json", json.dumps({"protocol": protocol, **summary}, indent=2) + "\n")
    distributed.atomic_write(folder / "results.txt", text + "\n")
    print(text, flush=True)
    if config.filter:
        left = write_filtered(config.filter, samples, records)
        print(f"{left} of {len(samples)} questions are left, in {config.filter.output}", flush=True)


def _json_lines(records: list[dict]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def write_filtered(rule: FilterConfig, samples: list[Sample], records: list[dict]) -> int:
    """Write the questions that `rule` keeps, as data for a config, with absolute media paths; return how many."""
    kept = []
    for sample, record in zip(samples, records):
        if keep(record, rule) == "kept":
            kept.append(_as_data(sample) | {"share_right": share_right(record, rule.threshold)})
    if not kept:
        raise DataError(
            f"filter: no question has a share of right answers between {rule.min_share} and {rule.max_share}; "
            "nothing is left for the next stage"
        )
    Path(rule.output).parent.mkdir(parents=True, exist_ok=True)
    distributed.atomic_write(rule.output, _json_lines(kept))
    return len(kept)


def _as_data(sample: Sample) -> dict:
    """Return the record of a data file that reads as this sample."""
    record = dict(sample.extra)
    for name in ("id", "problem", "problem_type", "options", "solution", "data_type"):
        record[name] = getattr(sample, name)
    if len(sample.paths) > 1:
        record["path"] = sample.paths
    else:
        record["path"] = next(iter(sample.paths.values()), None)
    return record


def compare(folders: list[str]) -> str:
    """Return the text that shows two evaluations side by side."""
    if len(folders) != 2:
        raise ConfigError("expected evaluate.py --compare FOLDER FOLDER")
    results = []
    records = []
    for folder in map(Path, folders):
        try:
            results.append(json.loads((folder / "results.json").read_text()))
            lines = (folder / "predictions.jsonl").read_text().splitlines()
            records.append([json.loads(line) for line in lines])
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
