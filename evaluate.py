"""Evaluation: greedy answers to held-out questions, accuracy per problem type and in all.

    torchrun --standalone --nproc_per_node 8 evaluate.py configs/eval.json model=runs/stage3/model
    torchrun --standalone --nproc_per_node 2 evaluate.py                       the embedded toy, on a laptop's CPU

The questions are those of data files or of a benchmark (`benchmark`, `benchmark_root`). Writes `predictions.jsonl` (one
line a question) and `results.json` to `output_dir`, and prints a table.
"""

import json
from pathlib import Path

from hov2 import distributed, toy
from hov2.benchmarks import read_benchmark, render
from hov2.config import EvalConfig
from hov2.data import read_samples
from hov2.evaluation import Evaluator, format_summary
from hov2.setup import command, say, start


def main(config):
    """Answers and scores every question of `config.data` or `config.benchmark`."""
    device = distributed.setup()
    with distributed.rank_zero_first():
        toy.prepare(config)  # builds the toy's world for the toy's configs, and nothing for others
    run = start(config, device, trained=False)
    if config.benchmark:
        samples = read_benchmark(config.benchmark, config.benchmark_root)
    else:
        samples = read_samples(config.data, config.seed)
    evaluator = Evaluator(run, max_new_tokens=config.max_new_tokens, batch_size=config.batch_size,
                          temperature=config.temperature)
    say(evaluator.scorer.note(samples))
    summary, records = evaluator.evaluate(samples)
    if distributed.rank() == 0:
        write_results(Path(config.output_dir), config, summary, records)
    say(render(config.benchmark, records) if config.benchmark else format_summary(summary))
    for record in records:
        if record["error"]:
            say(f"not asked: {record['id']}: {record['error']}")
    distributed.cleanup()


def write_results(folder, config, summary, records):
    """`predictions.jsonl` and `results.json`, with the model and the protocol that the score was had under."""
    with open(folder / "predictions.jsonl", "w") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    protocol = {"model": config.model, "media": vars(config.media), "max_new_tokens": config.max_new_tokens,
                "temperature": config.temperature, "prompts": config.prompts}
    (folder / "results.json").write_text(json.dumps({"protocol": protocol, **summary}, indent=2) + "\n")


if __name__ == "__main__":
    command(main, EvalConfig, default="configs/toy/eval.json")
