"""Evaluation: answers to held-out questions or to a published benchmark, and what they score.

    torchrun --standalone --nproc_per_node 8 evaluate.py configs/eval_intentbench.json model=runs/stage3/model
    torchrun --standalone --nproc_per_node 8 evaluate.py configs/filter_stage2.json      the difficulty filter
    torchrun --standalone --nproc_per_node 2 evaluate.py                       the embedded toy, on a laptop's CPU
    torchrun --standalone --nproc_per_node 8 evaluate.py --senses configs/eval_intentbench.json
    python evaluate.py --score answers.jsonl benchmark=daily-omni benchmark_root=data/Daily-Omni
    python evaluate.py --compare runs/eval-a runs/eval-b [only=ids.txt] [exclude=ids.txt]

Writes `predictions.jsonl` (one line a question), `results.json` and the printed `results.txt` to `output_dir`. Answers
are kept in `output_dir/answers` as they come: a run that was killed goes on where it stopped when it is started again.
--senses asks all again with the picture alone and with the sound alone. --score scores answers that another program
wrote, without a model, into a folder beside them.
"""

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from hov2 import distributed, toy
from hov2.config import ConfigError, EvalConfig
from hov2.data.formats import DataError
from hov2.data.samples import Sample, read_samples
from hov2.engine.setup import Run, command, print0, start
from hov2.evaluation.benchmarks import columns, missing_clips, read_benchmark
from hov2.evaluation.evaluator import Evaluator
from hov2.evaluation.filter import format_filter, write_filtered
from hov2.evaluation.ids import Coverage, answered, listed, read_answers, select
from hov2.evaluation.journal import Journal
from hov2.evaluation.records import not_asked, score_answers, scores_of
from hov2.evaluation.results import format_comparison, format_errors, format_protocol, format_summary, summarize
from hov2.evaluation.senses import VIEWS, compare_senses, format_senses
from hov2.evaluation.tables import render
from hov2.judge import Judge
from hov2.model.weights import source_folder
from hov2.prompts import PromptsError, load_prompts
from hov2.scoring import Scorer

# ---- With a model ----


def main(config: EvalConfig) -> None:
    """Answer and score every question of `config.data` or `config.benchmark`."""
    run = load(config)
    evaluate(config, run)
    distributed.cleanup()


def prove_senses(config: EvalConfig) -> None:
    """Evaluate three times, with both senses and with either alone; write and print what each is worth."""
    if config.filter:
        raise ConfigError("--senses compares scores: leave `filter` out")
    run = load(config)
    records = {}
    for view, senses in VIEWS.items():
        folder = config.output_dir if view == "both" else f"{config.output_dir}/{view}_only"
        of_view = replace(config, senses=list(senses), output_dir=folder)
        records[view] = evaluate(of_view, run, show=view == "both")
    if distributed.rank() == 0:
        found = compare_senses(records)
        text = format_senses(found)
        distributed.atomic_write(f"{config.output_dir}/senses.json", json.dumps(found, indent=2) + "\n")
        distributed.atomic_write(f"{config.output_dir}/senses.txt", text + "\n")
        print(f"\n{text}", flush=True)
    distributed.cleanup()


def load(config: EvalConfig) -> Run:
    """Start the processes and load what `config` names, with the system prompt that it means among the words."""
    device = distributed.setup(config.device)
    with distributed.rank_zero_first():
        toy.prepare(config)  # builds the toy's world for the toy's configs, and nothing for others
    run = start(config, device, trained=False)
    words = run.make.prompts.words
    words["system"] = system_text(config, run.tokenizer, words["system"])
    return run


def evaluate(config: EvalConfig, run: Run, show: bool = True) -> list[dict]:
    """Answer and score the questions with a loaded model; write the results, `show` them; return the records."""
    samples, coverage = questions(config)
    run.make.senses = tuple(config.senses)
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
    if show:
        print0(evaluator.scorer.note(samples))
        print0(missing_clips(samples, config.benchmark_root) if config.benchmark else "")
    protocol = protocol_of(config, run)
    weights = {"weights": weights_of(config.model)}
    journal = Journal(config.output_dir, protocol | weights, samples, config.resume)
    _, records = evaluator.evaluate(samples, journal)
    if distributed.rank() == 0:
        report(config, protocol, coverage, samples, records, show)
    return records


def questions(config: EvalConfig) -> tuple[list[Sample], Coverage]:
    """Return the questions of the data or the benchmark that the lists `only` and `exclude` leave."""
    if config.benchmark:
        samples = read_benchmark(config.benchmark, config.benchmark_root)
    else:
        samples = read_samples(config.data, config.seed)
    return select(samples, config.only, config.exclude)


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
    "only",
    "exclude",
    "senses",
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


def protocol_of(config: EvalConfig, run: Run) -> dict:
    """Return all that a score depends on besides the questions, as it is written beside the score."""
    words = run.make.prompts.words
    protocol = {key: getattr(config, key) for key in PROTOCOL_KEYS}
    protocol["system_text"] = words["system"]
    protocol["words"] = hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()[:16]
    protocol["media"] = vars(config.media)
    protocol["dtype"] = str(distributed.compute_dtype(config.dtype, run.device))
    return protocol | scoring_of(config)


def scoring_of(config: EvalConfig) -> dict:
    """Return what a score depends on besides the questions and the answers."""
    return {
        "judge": config.judge.model if config.judge else None,
        "rewards": "evaluation" if config.filter is None else "training",
    }


def weights_of(name: str) -> dict[str, list[int]]:
    """Return the sizes and times of a model's files, which tell another model in the same place apart."""
    files = sorted(source_folder(name).glob("*.safetensors"))
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files}


# ---- Without a model ----


def score(config: EvalConfig, file: str) -> None:
    """Score the answers in `file` to the questions of `config`; write and print the results as `main` does."""
    toy.prepare(config)
    prompts = load_prompts(config.prompts)
    judge = Judge(config.judge, prompts) if config.judge else None
    if judge:
        judge.check()
    samples, coverage = questions(config)
    given = read_answers(file)
    samples, coverage = answered(samples, given, coverage)

    training_rewards = config.filter is not None
    scorer = Scorer(judge, evaluation=not training_rewards)
    print0(scorer.note(samples))
    scored = [(sample, given[sample.id].completions) for sample in samples if not given[sample.id].error]
    records = {record["id"]: record for record in score_answers(scored, scorer, scores_of(scorer, training_rewards))}
    for sample in samples:
        if given[sample.id].error:
            records[sample.id] = not_asked(sample, given[sample.id].error)
    ordered = [records[sample.id] for sample in samples]
    protocol = {"answers": file, "benchmark": config.benchmark, "only": config.only, "exclude": config.exclude}
    report(config, protocol | scoring_of(config), coverage, samples, ordered)


def score_arguments(file: str, arguments: list[str]) -> list[str]:
    """Return the arguments for a config whose results go to a folder beside the `file` of answers.

    They overrule a config's `model` and `output_dir`, which are those of the run that wrote the answers.
    """
    folder = Path(file).with_suffix("")
    own = [f"model={json.dumps(file)}", f"output_dir={json.dumps(str(folder) + '-scored')}"]
    return [*own, *arguments]


def compare(arguments: list[str]) -> str:
    """Return the text that shows two evaluations side by side, on the questions that `only` and `exclude` leave."""
    folders = [argument for argument in arguments if "=" not in argument]
    lists = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    if len(folders) != 2 or not lists.keys() <= {"only", "exclude"}:
        raise ConfigError("expected evaluate.py --compare FOLDER FOLDER [only=FILE] [exclude=FILE]")
    results = []
    records = []
    for folder in map(Path, folders):
        try:
            results.append(json.loads((folder / "results.json").read_text()))
            lines = (folder / "predictions.jsonl").read_text().splitlines()
            records.append([json.loads(line) for line in lines])
        except (OSError, ValueError) as error:
            raise DataError(f"{folder}: not the folder of a finished evaluation: {error}") from None
    if not lists:
        return format_comparison(folders, results, records)

    ids = set()
    for of_folder in records:
        ids |= {record["id"] for record in of_folder}
    left = listed(ids, lists.get("only"), lists.get("exclude"))
    for number, of_folder in enumerate(records):
        records[number] = [record for record in of_folder if record["id"] in left]
        results[number] = {"protocol": results[number]["protocol"], **summarize(records[number])}
    text = format_comparison(folders, results, records)
    return f"{Coverage(list(ids), len(ids) - len(left)).text()}\n{text}"


# ---- Results ----


def report(
    config: EvalConfig,
    protocol: dict,
    coverage: Coverage,
    samples: list[Sample],
    records: list[dict],
    show: bool = True,
) -> None:
    """Write the results, and `show` them: protocol, scores, columns, what could not be asked; apply the filter."""
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    summary = summarize(records) | {"left_out": coverage.left_out, "missing": len(coverage.missing)}
    parts = [format_protocol(protocol), coverage.text(), format_summary(summary)]
    if config.benchmark:
        summary["columns"] = columns(config.benchmark, records)
        parts.append(render(config.benchmark, records))
    parts.append(format_errors(records))
    if config.filter:
        parts.append(format_filter(records, config.filter))
    text = "\n\n".join(part for part in parts if part)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    distributed.atomic_write(folder / "predictions.jsonl", lines)
    distributed.atomic_write(folder / "results.json", json.dumps({"protocol": protocol, **summary}, indent=2) + "\n")
    distributed.atomic_write(folder / "results.txt", text + "\n")
    if show:
        print(text, flush=True)
    if config.filter:
        left = write_filtered(config.filter, samples, records)
        print(f"{left} of {len(samples)} questions are left, in {config.filter.output}", flush=True)


def run_command(arguments: list[str]) -> None:
    """Do what the command line says."""
    mode = arguments[0] if arguments else ""
    if mode == "--compare":
        try:
            print(compare(arguments[1:]))
        except (ConfigError, DataError) as error:
            sys.exit(f"error: {error}")
    elif mode == "--score":
        if len(arguments) < 2:
            sys.exit("error: expected evaluate.py --score ANSWERS.jsonl [config.json] [key=value ...]")
        file = arguments[1]
        command(lambda config: score(config, file), EvalConfig, None, score_arguments(file, arguments[2:]))
    elif mode == "--senses":
        command(prove_senses, EvalConfig, "configs/toy/eval.json", arguments[1:])
    else:
        command(main, EvalConfig, "configs/toy/eval.json")


if __name__ == "__main__":
    run_command(sys.argv[1:])
