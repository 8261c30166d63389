"""Answering held-out questions and scoring the answers: used by evaluate.py and by both training loops.

The questions, longest clips first, are cut into batches once; whichever rank is free takes the next batch. Neither the
number of ranks nor a run that was killed and goes on changes what is decoded together, so the answers are the same.
What could not be had is counted and named, never scored: a clip that can't be read, a judge that did not answer.
"""

import hashlib
import itertools
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import torch
from tqdm import tqdm

from hov2.answers import PROBLEM_TYPES, answer_text
from hov2.config import ConfigError
from hov2.data.media import MediaError
from hov2.data.samples import SkipSample, read_samples
from hov2.distributed import atomic_write, compute_dtype, gather_objects, print0, rank, store, unsharded, world_size
from hov2.engine.checkpoint import set_aside
from hov2.engine.guard import heartbeat
from hov2.evaluation.results import COUNTS, SCORES, differing, over_samples, summarize
from hov2.model.rollout import generate, make_generator, sampling_for
from hov2.model.thinker import set_training
from hov2.model.weights import export
from hov2.scoring import Scorer
from hov2.spans import completion_texts, completion_tokens

READERS = 4  # threads that read a batch's clips
BARE = {"multiple choice": "[A-Z]", "emer_ov_mc": r"[A-Z](,\s?[A-Z])*", "judge": "(?i:yes|no)"}  # and nothing else
_SECONDS = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:s|sec|seconds)?\s*")


class Evaluator:
    """Answers questions with a run's policy; `temperature` 0 is greedy, `num_samples` answers to each question.

    `training_rewards`: scores as in training, where a text without an answer block has no answer, and asks the judge
    about no contexts. For the difficulty filter.
    """

    def __init__(self, run, *, max_new_tokens, batch_size, num_samples=1, temperature=0.0, top_k=0, top_p=1.0,
                 training_rewards=False):
        self.run, self.batch_size, self.num_samples = run, batch_size, num_samples
        self.scorer = Scorer(run.judge, getattr(run.config, "format", "strict"), evaluation=not training_rewards, heartbeat=heartbeat)
        self.scores = ["accuracy", "format"] + (["context"] if run.judge and not training_rewards else [])
        self.sampling = sampling_for(run.tokenizer, run.policy.thinker.config, max_completion_length=max_new_tokens,
                                     temperature=temperature, top_k=top_k, top_p=top_p)

    def evaluate(self, samples, journal=None):
        """Returns (summary, records), the same on every rank; the policy must be in eval mode.

        Each record has the fields of `_record`; a value that is unknown or doesn't apply is None. With a `Journal`,
        batches that it holds whole are not answered again.
        """
        order, records = longest_first(samples), {}
        batches = [order[i:i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        kept = _merged(gather_objects(journal.read() if journal else {}))
        batches = [batch for batch in batches if not kept.keys() >= set(batch)]
        done = len(samples) - sum(map(len, batches))
        print0(f"going on with the answers to {done} of {len(samples)} questions" if kept else "")
        with torch.no_grad(), unsharded(self.run.policy), tqdm(
                total=len(batches), desc="evaluate", unit="batch", disable=None if rank() == 0 else True) as bar:
            for turn, loading in self._loaded(samples, batches):
                heartbeat("evaluate")
                answered = self._answer(samples, batches[turn], loading)
                if journal:
                    journal.append(answered)
                records |= answered
                bar.update(turn + 1 - bar.n)  # those before are done, or another rank's
        kept |= _merged(gather_objects(records))
        ordered = [kept[i] for i in range(len(samples))]
        return summarize(ordered), ordered

    def _loaded(self, samples, batches):
        """(number of a batch, futures of its Inputs) in turn; the next one is read meanwhile."""
        with ThreadPoolExecutor(READERS) as pool:
            begun = ((turn, [pool.submit(self.run.make, samples[i]) for i in batches[turn]])
                     for turn in _turns(len(batches)))
            for this, _ in itertools.pairwise(itertools.chain(begun, [None])):  # takes the next before this is yielded
                yield this

    def _answer(self, samples, batch, loading):
        """{index: record} for the samples numbered `batch`, decoded together."""
        run, records, prompts, pending = self.run, {}, {}, {}
        for i, inputs in zip(batch, loading):
            try:
                prompts[i] = run.encoder(inputs.result())
            except (MediaError, SkipSample) as error:
                records[i] = _record(samples[i], error=str(error))
        if not prompts:
            return records
        generators = [make_generator(run.device, run.config.seed, 0, i) for i in prompts]
        rollouts = run.policy(generate, list(prompts.values()), self.num_samples, self.sampling, generators)
        for i, rollout in zip(prompts, rollouts):
            texts = completion_texts(completion_tokens(run.tokenizer, rollout))
            pending[i] = [(text, cut, [self.scorer.submit(name, text, samples[i]) for name in self.scores])
                          for text, cut in zip(texts, rollout.truncated.tolist())]
        self.scorer.wait_for_scores([s for of_one in pending.values() for *_, scores in of_one for s in scores], together=False)
        for i, answers in pending.items():
            records[i] = _record(samples[i], [
                _scored(samples[i], text, cut, {n: s.result().value for n, s in zip(self.scores, scores)})
                for text, cut, scores in answers])
        return records


class Journal:
    """Answers on disk as they come, in `output_dir/answers`: a file a rank, and the protocol that they were had under.

    `protocol` is a JSON-able dict of all that an answer depends on, but for the questions. Answers of an earlier run
    are taken up; ConfigError if that had another protocol or other questions. `resume` false moves them, with that
    run's results, to `output_dir/earlier-N` instead. All ranks make one, before any appends.
    """

    def __init__(self, output_dir, protocol, samples, resume=True):
        self.folder = Path(output_dir) / "answers"
        self.path = self.folder / f"rank-{rank()}.jsonl"
        protocol = protocol | {"questions and clips": _digest(samples)}
        if changes := gather_objects(self._begin(protocol, resume) if rank() == 0 else "")[0]:
            raise ConfigError(f"{self.folder}: answers of another protocol: {changes}. Set these back, choose another "
                              "output_dir, or set the answers aside with resume=false")

    def _begin(self, protocol, resume):
        """Makes the folder ready for answers under `protocol`; returns how those that it has differ, or ""."""
        path = self.folder / "protocol.json"
        if not resume:
            set_aside(self.folder.parent, ("answers", "predictions.jsonl", "results.json", "results.txt"))
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            atomic_write(path, json.dumps(protocol, indent=2) + "\n")
        old, new = json.loads(path.read_text()), json.loads(json.dumps(protocol))
        return "; ".join(f"{key} was {was!r:.80} and is {now!r:.80}" for key, (was, now) in differing(old, new).items())

    def read(self):
        """{index: record} of all answers so far, whatever rank wrote them; a line that a kill cut short is left out."""
        records = {}
        for path in sorted(self.folder.glob("rank-*.jsonl")):
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                with suppress(ValueError):
                    entry = json.loads(line)
                    records[entry["index"]] = entry["record"]
        return records

    def append(self, records):
        """Writes {index: record} to this rank's file, at once."""
        lines = [json.dumps({"index": i, "record": record}) for i, record in records.items()]
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("\n" + "\n".join(lines))  # the line before may have been cut short by a kill


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
            self.run.judge.take_replies()  # these requests are none of the next step's
        return {f"eval/{name}": summary[name] for name in ("accuracy", "format", "context", "unreadable")}


def longest_first(samples):
    """The samples' positions, longest clip first, by `video_duration` or `duration` in seconds where the data say it
    ("30s", 30.5), then by the size of the media files; equals, and questions without media, in the data's order."""
    def _length(i):
        extra = samples[i].extra
        seconds = _SECONDS.fullmatch(str(extra.get("video_duration", extra.get("duration"))))
        size = sum(os.path.getsize(path) for path in {*samples[i].paths.values()} if os.path.isfile(path))
        return float(seconds[1]) if seconds else 0.0, size
    return sorted(range(len(samples)), key=_length, reverse=True)  # stable: equals keep their order


_rounds = itertools.count()


def _turns(count):
    """Numbers below `count`: of all ranks, the one that asks next gets the next, so that none waits for another."""
    if world_size() == 1:
        yield from range(count)
        return
    name = f"hov2/turns/{next(_rounds)}"
    while (turn := store().add(name, 1) - 1) < count:
        yield turn


def _merged(of_ranks):
    return {i: record for records in of_ranks for i, record in records.items()}


def _digest(samples):
    """A checksum of the questions and of the order in which they are asked, which their clips' sizes decide."""
    return hashlib.sha256(json.dumps([[*map(vars, samples)], longest_first(samples)]).encode()).hexdigest()[:16]


def _scored(sample, text, truncated, scores):
    """One answer: `parsed` is what counts of it, `exact` its accuracy if it is put as it should be (BARE), else 0."""
    answer = answer_text(text)
    said = text.strip() if answer is None else answer
    bare = re.fullmatch(BARE.get(sample.problem_type, "(?s:.*)"), said)
    parsed = PROBLEM_TYPES[sample.problem_type][0](said) if said else None
    if parsed and not isinstance(parsed, str):
        parsed = ",".join(sorted(parsed)) if isinstance(parsed, set) else str(Fraction(parsed.value))
    accuracy = scores["accuracy"]
    return {"completion": text, "answer": answer, "parsed": parsed or None, "accuracy": accuracy,
            "exact": accuracy if bare or accuracy is None else 0.0, "format": scores["format"],
            "context": scores.get("context"), "no_answer": answer is None, "truncated": truncated}


_NO_ANSWER = dict.fromkeys(("completion", "answer", "parsed", *SCORES, *COUNTS))


def _record(sample, answers=None, error=None):
    """One line of predictions.jsonl: a question with its answer, or what several add up to (results.over_samples);
    `error` says why it could not be asked."""
    said = _NO_ANSWER if answers is None else answers[0] if len(answers) == 1 else over_samples(answers)
    return {"id": sample.id, "source": sample.source, "problem": sample.problem, "problem_type": sample.problem_type,
            "solution": sample.solution, **said, "error": error, "extra": sample.extra}
