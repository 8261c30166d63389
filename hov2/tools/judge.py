"""Tries a judge with real questions, shows its replies, and says how many state a score and how fast they come.

    python -m hov2.tools.judge configs/stage2.json judge.url=http://judge-host:8000/v1
    python -m hov2.tools.judge configs/stage2.json --rollouts runs/stage2/rollouts.jsonl -n 64

The questions are those that the rewards ask about a run's completions; without --rollouts, the solutions in the
config's data stand in for completions. Nothing is taken from judge.cache. Exit code 1 if more scores are missing than
judge.max_missing allows.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hov2.config import BaseConfig, ConfigError
from hov2.config_io import read_config
from hov2.data.formats import DataError
from hov2.data.samples import Sample, read_samples
from hov2.engine.setup import USER_ERRORS
from hov2.judge import CompletionJudge, Judge, JudgeReply
from hov2.prompts import load_prompts
from hov2.rewards import REWARDS, Completion

WIDTH = 70  # characters of a reply that are shown


class Questions(CompletionJudge):
    """Stands in for a judge, and keeps what it is asked."""

    def __init__(self) -> None:
        self.asked = []  # (kind, fields)

    def ask(self, kind: str, **fields: Any) -> None:
        """Keep a question."""
        self.asked.append((kind, fields))


def completions(config: BaseConfig, rollouts: str | None) -> Iterator[tuple[str, Sample]]:
    """Yield texts to judge, each with its sample. Raises DataError."""
    if rollouts is None:
        for sample in read_samples(config.data, config.seed):
            yield sample.solution, sample
        return
    try:
        for line in Path(rollouts).read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            sample = Sample(
                record["sample"],
                record["problem"],
                record["problem_type"],
                record["options"],
                record["solution"],
                "text",
            )
            for completion in record["completions"]:
                yield completion["text"], sample
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{rollouts}: not a run's rollouts.jsonl: {type(error).__name__}: {error}") from None


def questions(config: BaseConfig, rollouts: str | None, count: int) -> list[tuple[str, dict]]:
    """Return up to `count` different questions, (kind, fields), as the rewards ask them. Raises DataError."""
    found = {}
    for text, sample in completions(config, rollouts):
        stand_in = Questions()
        for reward in REWARDS.values():
            reward.score(Completion(text, sample, stand_in))
        for kind, fields in stand_in.asked:
            found[json.dumps([kind, fields])] = (kind, fields)
        if len(found) >= count:
            break
    if not found:
        raise DataError("nothing to ask a judge: the solutions have no context and no free-form answer; see --rollouts")
    return list(found.values())[:count]


def one_line(kind: str, reply: JudgeReply) -> str:
    """Return a row of the table: kind, score or fault, seconds, and the reply."""
    if reply.error is None:
        score = f"{reply.score:.2f}"
    elif reply.faults:
        score = reply.faults[-1].kind
    else:
        score = "left alone"
    said = reply.raw if reply.raw is not None else reply.reason
    said = json.dumps(said, ensure_ascii=False)
    if len(said) > WIDTH:
        said = said[:WIDTH] + "..."
    return f"{kind:<12}{score:<14}{reply.latency:>7.2f}  {said}"


def summary(replies: list[JudgeReply], seconds: float) -> str:
    """Return how many replies state a score, and how long they took; `seconds`: all of them together."""
    scored = sum(reply.error is None for reply in replies)
    latencies = sorted(reply.latency for reply in replies)
    slow = latencies[round(0.9 * (len(latencies) - 1))]
    requests = sum(len(reply.faults) + (reply.error is None) for reply in replies)
    return (
        f"{scored} of {len(replies)} state a score ({scored / len(replies):.0%}); seconds until then: "
        f"median {statistics.median(latencies):.2f}, 90 % within {slow:.2f}; {requests / seconds:.1f} requests a second"
    )


def main(argv: list[str] | None = None) -> int:
    """Do what the command line says and return the exit code; a mistake of the user's is one line and code 1."""
    parser = argparse.ArgumentParser(prog="python -m hov2.tools.judge", description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("config", help="a config with a judge")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--rollouts", metavar="FILE", help="a run's rollouts.jsonl, whose completions are judged")
    parser.add_argument("-n", type=int, default=32, help="questions (default 32)")
    args = parser.parse_intermixed_args(argv)
    try:
        config = read_config(args.config, args.overrides)
        if config.judge is None:
            raise ConfigError(f"{args.config}: it has no judge; say judge.url=http://...")
        judge = Judge(dataclasses.replace(config.judge, cache=None), load_prompts(config.prompts))
        asked = questions(config, args.rollouts, args.n)
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{'question':<12}{'score':<14}{'seconds':>7}  reply")
    started = time.monotonic()
    with ThreadPoolExecutor(config.judge.concurrency) as pool:
        futures = [pool.submit(judge.score, kind, **fields) for kind, fields in asked]
        for (kind, _), future in zip(asked, futures, strict=True):
            print(one_line(kind, future.result()), flush=True)
    replies = judge.take_replies()
    print(summary(replies, time.monotonic() - started))
    missing = sum(reply.error is not None for reply in replies)
    return int(missing > config.judge.max_missing * len(replies))


if __name__ == "__main__":
    sys.exit(main())
