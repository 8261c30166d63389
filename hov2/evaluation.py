"""Answering held-out questions and scoring the answers: used by evaluate.py and by both training loops.

Every rank takes every n-th question and decodes a few at a time; the records are gathered in the questions' order. What
could not be had is counted and named, never scored: a clip that can't be read, a judge that did not answer.
"""

import math

import torch
from tqdm import tqdm

from hov2.checkpoint import export
from hov2.data import SkipSample, read_samples
from hov2.distributed import compute_dtype, gather_objects, rank, unsharded, world_size
from hov2.media import MediaError
from hov2.model import set_training
from hov2.rewards import answer_text
from hov2.rollout import generate, make_generator, sampling_for
from hov2.scoring import Scorer
from hov2.spans import completion_texts, completion_tokens

SCORES = ("accuracy", "format", "context")  # of an evaluated answer; context only with a judge


class Evaluator:
    """Answers questions with a run's policy; `temperature` 0 is greedy."""

    def __init__(self, run, *, max_new_tokens, batch_size, temperature=0.0):
        self.run, self.batch_size = run, batch_size
        self.scorer = Scorer(run.judge, evaluation=True)
        self.scores = SCORES if run.judge else SCORES[:2]
        self.sampling = sampling_for(run.tokenizer, run.policy.thinker.config, max_completion_length=max_new_tokens,
                                     temperature=temperature)

    def evaluate(self, samples):
        """Returns (summary, records), the same on every rank; the policy must be in eval mode.

        Each record has the fields of `_record`; a value that is unknown or doesn't apply is None.
        """
        mine, records = list(range(len(samples)))[rank()::world_size()], {}
        with torch.no_grad(), unsharded(self.run.policy), tqdm(
                total=len(mine), desc="evaluate", unit="question", disable=None if rank() == 0 else True) as bar:
            for start in range(0, len(mine), self.batch_size):
                batch = mine[start:start + self.batch_size]
                records |= self._answer(samples, batch)
                bar.update(len(batch))
        gathered = {i: record for of_rank in gather_objects(records) for i, record in of_rank.items()}
        ordered = [gathered[i] for i in range(len(samples))]
        return summarize(ordered), ordered

    def _answer(self, samples, batch):
        """{index: record} for the samples numbered `batch`, decoded together."""
        run, records, prompts = self.run, {}, {}
        for i in batch:
            try:
                prompts[i] = run.encoder(run.make(samples[i]))
            except (MediaError, SkipSample) as error:
                records[i] = _record(samples[i], error=str(error))
        if not prompts:
            return records
        generators = [make_generator(run.device, run.config.seed, 0, i) for i in prompts]
        rollouts = run.policy(generate, list(prompts.values()), 1, self.sampling, generators)
        texts = [completion_texts(completion_tokens(run.tokenizer, r), r.truncated)[0] for r in rollouts]
        pending = [[self.scorer.submit(name, text, samples[i]) for name in self.scores]
                   for i, text in zip(prompts, texts)]
        for i, rollout, text, scores in zip(prompts, rollouts, texts, pending):
            values = {name: score.result().value for name, score in zip(self.scores, scores)}
            records[i] = _record(samples[i], text, bool(rollout.truncated[0]), values)
        return records


class HeldOut:
    """The held-out questions of a training run: evaluated every `eval_steps`, the best policy exported to `best/`."""

    def __init__(self, run):
        config = run.config
        self.run, self.best = run, None  # best: the highest accuracy so far
        self.samples = read_samples(config.eval_data, config.seed) if config.eval_steps else []
        self.evaluator = Evaluator(run, max_new_tokens=config.eval_max_new_tokens, batch_size=config.eval_batch_size)

    def after(self, steps_done, steps):
        """Metrics after `steps_done` steps: those of an evaluation when one is due, else {}."""
        config = self.run.config
        if not config.eval_steps or (steps_done % config.eval_steps and steps_done != steps):
            return {}
        set_training(self.run.policy, False, config.gradient_checkpointing)
        summary, _ = self.evaluator.evaluate(self.samples)
        if summary["accuracy"] is not None and (self.best is None or summary["accuracy"] > self.best):
            self.best = summary["accuracy"]
            export(self.run.policy, f"{config.output_dir}/best", config.model,
                   compute_dtype(config.dtype, self.run.device))
        if self.run.judge is not None:
            self.run.judge.stats()  # these requests are none of the next step's
        return {f"eval/{name}": summary[name] for name in ("accuracy", "format", "context", "unreadable")}


def _record(sample, text=None, truncated=None, scores=None, error=None):
    """One line of predictions.jsonl; `error` says why a question could not be asked."""
    answer = None if text is None else answer_text(text)
    return {
        "id": sample.id, "source": sample.source, "problem": sample.problem, "problem_type": sample.problem_type,
        "solution": sample.solution, "completion": text, "answer": answer, **(dict.fromkeys(SCORES) | (scores or {})),
        "no_answer": None if text is None else answer is None, "truncated": truncated, "error": error,
        "extra": sample.extra,
    }


def summarize(records):
    """Means over the records where a value is present, in all and by problem type, and counts of what is missing."""
    kinds = sorted({r["problem_type"] for r in records})
    answered = [r for r in records if r["error"] is None]
    return {
        "questions": len(records),
        "accuracy": _mean(r["accuracy"] for r in records),
        "format": _mean(r["format"] for r in records),
        "context": _mean(r["context"] for r in records),
        "by_problem_type": {kind: {
            "questions": sum(r["problem_type"] == kind for r in records),
            "accuracy": _mean(r["accuracy"] for r in records if r["problem_type"] == kind),
        } for kind in kinds},
        "no_answer": sum(r["no_answer"] for r in answered),
        "truncated": sum(r["truncated"] for r in answered),
        "unscored": sum(r["accuracy"] is None for r in answered),
        "unreadable": len(records) - len(answered),
    }


def _mean(values):
    present = [v for v in values if v is not None]
    return math.fsum(present) / len(present) if present else None


def format_summary(summary):
    """The summary as a text table."""
    rows = [(kind, row["questions"], row["accuracy"]) for kind, row in summary["by_problem_type"].items()]
    rows.append(("all", summary["questions"], summary["accuracy"]))
    lines = [f"{'problem type':<18}{'questions':>10}{'accuracy':>10}"]
    lines += [f"{kind:<18}{count:>10}{_number(accuracy):>10}" for kind, count, accuracy in rows]
    lines.append(f"format {_number(summary['format'])}, context {_number(summary['context'])}; " + ", ".join(
        f"{name.replace('_', ' ')}: {summary[name]}" for name in ("no_answer", "truncated", "unscored", "unreadable")))
    return "\n".join(lines)


def _number(value):
    return "-" if value is None else f"{value:.3f}"
