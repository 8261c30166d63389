"""One rank of several that ask a judge, with a process group whose timeout is shorter than the judge's outage.

    torchrun --nproc_per_node 2 tests/support/judge_ranks.py URL URL-OF-RANK-0 URL-OF-RANK-1

Three steps that wait for URL, then three that stop when too many scores are missing, with a judge for each rank.
Prints what the rank has found as one line of JSON.
"""

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from torch.distributed.distributed_c10d import _set_pg_timeout

from hov2 import distributed, judge_server, scoring
from hov2.config import JudgeConfig
from hov2.judge import Judge
from hov2.judge_server import JudgeError
from hov2.prompts import load_prompts

GROUP_TIMEOUT = 4.0  # seconds


def group_times_out(rank):
    """Whether a collective fails that rank 1 is late for."""
    time.sleep(1.5 * GROUP_TIMEOUT * rank)
    try:
        distributed.gather_objects(0)
    except RuntimeError:
        return True
    return False


def three_steps(rank, url, **settings):
    """What three steps of scores bring this rank; rank 1 asks for twice as many."""
    beats, found = [], {"scores": [], "error": None}
    config = JudgeConfig(url=url, max_retries=1, **settings)
    scorer = scoring.Scorer(Judge(config, load_prompts(), first_delay=0.01), heartbeat=beats.append)
    try:
        for step in range(3):
            texts = [
                f"<context>A smile.</context><think>The smile: thanks. {rank} {step} {i}</think>"
                for i in range(4 + 4 * rank)
            ]
            scores = [scorer.submit("logic", text, None) for text in texts]
            scorer.wait_for_scores(scores)
            found["scores"].append([score.result().value for score in scores])
    except JudgeError as error:
        found["error"] = str(error)
    return found | {"beats": len(beats)}


def main(url, urls):
    """See above."""
    distributed.setup()
    distributed.barrier()  # both have started: from here on the timeout is short
    _set_pg_timeout(timedelta(seconds=GROUP_TIMEOUT))
    scoring.HEARTBEAT = 0.3
    judge_server.DOWN_AFTER = 4
    rank = distributed.rank()
    found = {
        "rank": rank,
        "wait": three_steps(rank, url, on_judge_down="wait", max_missing=0.0),
        "stop": three_steps(rank, urls[rank], on_judge_down="stop"),
    }
    print(json.dumps(found | {"times out": group_times_out(rank)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
    os._exit(0)  # a collective that timed out leaves a thread of gloo's, which may bring the process down as it ends
