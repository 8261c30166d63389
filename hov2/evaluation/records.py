"""What is known of an answered question, a line of predictions.jsonl: texts are scored, and made into records."""

from dataclasses import dataclass
from fractions import Fraction

from hov2.answers import answer_text, parse_answer, untagged_answer
from hov2.data.samples import Sample
from hov2.evaluation.results import COUNTS, SCORES, over_samples
from hov2.scoring import Scorer

_NO_ANSWER = dict.fromkeys(("completion", "answer", "parsed", *SCORES, *COUNTS))


@dataclass
class Completion:
    """What a model wrote in answer to a question."""

    text: str
    truncated: bool | None  # cut off at the length limit; None: not known


def scores_of(scorer: Scorer, training_rewards: bool = False) -> tuple[str, ...]:
    """Return the names of the scores that an evaluation asks for; that of the context needs a judge."""
    if scorer.judge is None or training_rewards:
        return ("accuracy", "format")
    return ("accuracy", "format", "context")


def score_answers(
    questions: list[tuple[Sample, list[Completion]]], scorer: Scorer, scores: tuple[str, ...]
) -> list[dict]:
    """Return a record for each question with its completions, one or several; waits for this rank's scores."""
    pending = []  # of each question, of each completion: {score: Pending}
    everything = []
    for sample, completions in questions:
        of_question = []
        for completion in completions:
            asked = {name: scorer.submit(name, completion.text, sample) for name in scores}
            of_question.append(asked)
            everything.extend(asked.values())
        pending.append(of_question)
    scorer.wait_for_scores(everything, together=False)  # other ranks are at other questions

    records = []
    for (sample, completions), of_question in zip(questions, pending):
        answers = []
        for completion, asked in zip(completions, of_question):
            values = {name: score.result().value for name, score in asked.items()}
            answers.append(answer_record(sample, completion, values))
        said = answers[0] if len(answers) == 1 else over_samples(answers)
        records.append(_record(sample, said))
    return records


def not_asked(sample: Sample, error: str) -> dict:
    """Return the record of a question without an answer; `error` says why."""
    return _record(sample, _NO_ANSWER, error)


def _record(sample: Sample, said: dict, error: str | None = None) -> dict:
    return {
        "id": sample.id,
        "source": sample.source,
        "problem": sample.problem,
        "problem_type": sample.problem_type,
        "solution": sample.solution,
        **said,
        "error": error,
        "extra": sample.extra,
    }


def answer_record(sample: Sample, completion: Completion, scores: dict[str, float | None]) -> dict:
    """Return what is known of one answer; `parsed` is what counts of it, as text."""
    answer = answer_text(completion.text)
    said = untagged_answer(completion.text) if answer is None else answer
    return {
        "completion": completion.text,
        "answer": answer,
        "parsed": _parsed(said, sample),
        "accuracy": scores["accuracy"],
        "format": scores["format"],
        "context": scores.get("context"),
        "no_answer": answer is None,
        "truncated": completion.truncated,
    }


def _parsed(said: str, sample: Sample) -> str | None:
    """Return what counts of an answer as text, so that answers can be counted; None if nothing does."""
    parsed = parse_answer(said, sample.problem_type, sample.options)
    if not parsed:
        return None
    if isinstance(parsed, set):
        return ",".join(sorted(parsed))
    if isinstance(parsed, str):
        return parsed
    return str(Fraction(parsed.value))
