"""Records of an evaluation, made up."""

from hov2.evaluation.results import over_samples


def answer(accuracy, parsed="A", **values):
    return {
        "completion": f"<answer>{parsed}</answer>",
        "answer": parsed,
        "parsed": parsed,
        "accuracy": accuracy,
        "format": 1.0,
        "context": None,
        "no_answer": False,
        "truncated": False,
    } | values


def record(name, accuracy=None, kind="multiple choice", samples=None, error=None, **values):
    said = dict.fromkeys(answer(0)) if error else over_samples(samples) if samples else answer(accuracy, **values)
    return {"id": name, "problem_type": kind, **said, "error": error, "extra": {}}


def benchmark_record(accuracy, extra=(), problem="Is it?", problem_type="multiple choice", answer="B", **fields):
    """An answered question of a benchmark."""
    return {
        "id": "x",
        "problem": problem,
        "problem_type": problem_type,
        "solution": "<answer>B</answer>",
        "completion": f"<answer>{answer}</answer>",
        "answer": answer,
        "accuracy": accuracy,
        "error": None,
        "extra": dict(extra),
    } | fields
