"""train_grpo.py as it is, which says where it is: rank 0 adds a line to $HOV2_PHASES as each timed part of a step begins.

Without a judge's address in the config's `judge.url`, the scores are train_runs' stand-in, as for other tiny models.
"""

import os
import sys
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train_grpo
from hov2 import distributed
from hov2.config import GRPOConfig
from hov2.config_io import load_config
from hov2.engine import setup
from hov2.engine.log import Timer
from tests.support import train_runs


class Announced(Timer):
    """The loop's timer; the names of its parts go to the file."""

    @contextmanager
    def __call__(self, name):
        if distributed.rank() == 0:
            with open(os.environ["HOV2_PHASES"], "a") as file:
                file.write(name + "\n")
        with super().__call__(name):
            yield


if __name__ == "__main__":
    train_grpo.Timer = Announced
    if load_config(GRPOConfig, sys.argv[1]).judge.url == "http://stand-in":
        train_grpo.Scorer, setup.Judge = train_runs.HashScorer, train_runs.stand_in_judge
    setup.command(train_grpo.main, GRPOConfig, default=None)
