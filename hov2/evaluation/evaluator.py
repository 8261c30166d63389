"""Answering held-out questions and scoring the answers: used by evaluate.py and by both training loops.

The questions, longest clips first, are cut into batches once; whichever rank is free takes the next batch. Neither the
number of ranks nor a run that was killed and goes on changes what is decoded together, so the answers are the same.
What could not be had is counted and named, never scored: a clip that can't be read, a judge that did not answer.
"""

import itertools
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from tqdm import tqdm

from hov2.data.media import MediaError
from hov2.data.samples import Sample, SkipSample, read_samples
from hov2.distributed import WriteError, compute_dtype, gather_objects, print0, rank, store, unsharded, world_size
from hov2.engine.guard import heartbeat
from hov2.engine.setup import Run
from hov2.evaluation.journal import Journal, longest_first
from hov2.evaluation.records import Completion, not_asked, score_answers, scores_of
from hov2.evaluation.results import summarize
from hov2.model.rollout import generate, make_generator, sampling_for
from hov2.model.thinker import set_training
from hov2.model.weights import export
from hov2.scoring import Scorer
from hov2.spans import completion_texts, completion_tokens

READERS = 4  # threads that read a batch's clips


class Evaluator:
    """Answers questions with a run's policy; `temperature` 0 is greedy, `num_samples` answers to each question.

    `training_rewards`: scores as in training, where a text without an answer block has no answer, and asks the judge
    about no contexts. For the difficulty filter.
    """

    def __init__(
        self,
        run: Run,
        *,
        max_completion_length: int,
        batch_size: int,
        num_samples: int = 1,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        training_rewards: bool = False,
    ):
        self.run = run
        self.batch_size = batch_size
        self.num_samples = num_samples
        format_rule = getattr(run.config, "format_rule", "strict")
        self.scorer = Scorer(run.judge, format_rule, evaluation=not training_rewards, heartbeat=heartbeat)
        self.scores = scores_of(self.scorer, training_rewards)
        self.sampling = sampling_for(
            run.tokenizer,
            run.policy.thinker.config,
            max_completion_length=max_completion_length,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )

    def evaluate(self, samples: list[Sample], journal: Journal | None = None) -> tuple[dict, list[dict]]:
        """Return (summary, records), the same on every rank; the policy must be in eval mode.

        Each record has the fields of records.py; a value that is unknown or doesn't apply is None. With a `journal`,
        batches that it holds whole are not answered again.
        """
        known = _merged(gather_objects(journal.read() if journal else {}))
        batches = self._batches_to_do(samples, known)
        if known:
            done = len(samples) - sum(len(batch) for batch in batches)
            print0(f"going on with the answers to {done} of {len(samples)} questions")
        records = {}
        silent = None if rank() == 0 else True  # None: a bar where there is a terminal
        bar = tqdm(total=len(batches), desc="evaluate", unit="batch", disable=silent)
        with torch.no_grad(), unsharded(self.run.policy), bar:
            for turn, loading in self._loaded(samples, batches):
                heartbeat("evaluate")
                answered = self._answer(samples, batches[turn], loading)
                if journal:
                    journal.append(answered)
                records |= answered
                bar.update(turn + 1 - bar.n)  # those before are done, or another rank's
        known |= _merged(gather_objects(records))
        ordered = [known[i] for i in range(len(samples))]
        return summarize(ordered), ordered

    def _batches_to_do(self, samples: list[Sample], known: dict[int, dict]) -> list[list[int]]:
        """Return the batches, positions of samples, in which an answer is lacking."""
        order = longest_first(samples)
        batches = []
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            if not known.keys() >= set(batch):
                batches.append(batch)
        return batches

    def _loaded(self, samples: list[Sample], batches: list[list[int]]) -> Iterator[tuple[int, list[Future]]]:
        """Yield (number of a batch, futures of its Inputs), one a turn of this rank, while the next is being read."""
        with ThreadPoolExecutor(READERS) as pool:
            ready = None
            for turn in _turns(len(batches)):
                loading = [pool.submit(self.run.make, samples[i]) for i in batches[turn]]
                if ready:
                    yield ready
                ready = turn, loading
            if ready:
                yield ready

    def _answer(self, samples: list[Sample], batch: list[int], loading: list[Future]) -> dict[int, dict]:
        """Return {position: record} of the samples at the positions `batch`, decoded together."""
        records = {}
        prompts = {}
        for i, inputs in zip(batch, loading):
            try:
                prompts[i] = self.run.encoder(inputs.result())
            except (MediaError, SkipSample) as error:
                records[i] = not_asked(samples[i], str(error))
        if not prompts:
            return records
        generators = [make_generator(self.run.device, self.run.config.seed, 0, i) for i in prompts]
        rollouts = self.run.policy(generate, list(prompts.values()), self.num_samples, self.sampling, generators)
        questions = []
        for i, rollout in zip(prompts, rollouts):
            texts = completion_texts(completion_tokens(self.run.tokenizer, rollout))
            truncated = rollout.truncated.tolist()
            questions.append((samples[i], [Completion(*answer) for answer in zip(texts, truncated)]))
        scored = score_answers(questions, self.scorer, self.scores)
        return records | dict(zip(prompts, scored))


class HeldOut:
    """The held-out questions of a training run: evaluated every `eval_steps`, the best policy exported to `best/`."""

    def __init__(self, run: Run):
        config = run.config
        self.run = run
        self.best = None  # the highest accuracy so far
        self.samples = read_samples(config.eval_data, config.seed) if config.eval_steps else []
        self.evaluator = Evaluator(
            run, max_completion_length=config.eval_max_completion_length, batch_size=config.eval_batch_size
        )

    def after(self, steps_done: int, steps: int) -> dict[str, float | None]:
        """Return the metrics of an evaluation when one is due after `steps_done` of `steps` steps, else {}."""
        config = self.run.config
        if not config.eval_steps:
            return {}
        if steps_done % config.eval_steps and steps_done != steps:
            return {}
        set_training(self.run.policy, False, config.gradient_checkpointing)
        summary, _ = self.evaluator.evaluate(self.samples)
        accuracy = summary["accuracy"]
        if accuracy is not None and (self.best is None or accuracy > self.best):
            dtype = compute_dtype(config.dtype, self.run.device)
            best = f"{config.output_dir}/best"
            try:
                export(self.run.policy, best, config.model, dtype, config.export, config.media)
                self.best = accuracy
            except WriteError as error:
                print0(f"warning: {error}; the run goes on, with the best policy before this one")
        if self.run.judge is not None:
            self.run.judge.take_replies()  # these requests are none of the next step's
        return {f"eval/{name}": summary[name] for name in ("accuracy", "format", "context", "unreadable")}


_rounds = itertools.count()


def _turns(count: int) -> Iterator[int]:
    """Yield numbers below `count`: of all ranks, the one that asks gets the next, so that none waits for another."""
    if world_size() == 1:
        yield from range(count)
        return
    name = f"hov2/turns/{next(_rounds)}"
    turn = store().add(name, 1) - 1
    while turn < count:
        yield turn
        turn = store().add(name, 1) - 1


def _merged(of_ranks: list[dict[int, dict]]) -> dict[int, dict]:
    merged = {}
    for records in of_ranks:
        merged |= records
    return merged
