"""What test_guard.py starts under torchrun: ranks that fail, hang, get a signal, or compute what is no number.

    python tests/support/guard_runs.py loop CONFIG              steps without end, and without a model
    python tests/support/guard_runs.py fail CONFIG              rank 1 hangs until that was said, and then fails
    python tests/support/guard_runs.py train CONFIG SFT GRPO    real runs with numbers and signals on rank 1 alone, then `fail`

CONFIG is an SFT config whose output_dir the runs write to.
"""

import math
import os
import signal
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from hov2 import distributed
from hov2.config import GRPOConfig, SFTConfig
from hov2.config_io import load_config
from hov2.engine import guard, optim
from hov2.engine.log import Timer


def loop(config):
    """Steps until it is told to stop; `output_dir/ready` says that it can be told."""
    of_loop, step = guard.Guard(config, 0, []), 0
    while not of_loop.stop_due(step, 10**9):
        step += 1
        Path(config.output_dir, "ready").touch()
        time.sleep(0.01)
    distributed.cleanup()


def fail(config):
    """Rank 1 is long in its rollout, and fails in it; rank 0 waits in what never ends, rank 2 in a collective."""
    guard.Guard(config, 7, [])
    timer, reported, report = Timer(), threading.Event(), guard._report_hang

    def report_when_rank_0_waits(store):
        while b"logps" not in store.get(f"{guard.PLACE}0"):
            time.sleep(0.1)
        report(store)
        reported.set()

    if distributed.rank() == 1:
        guard._report_hang = report_when_rank_0_waits
    distributed.barrier()
    guard.watch(0.01)
    if distributed.rank() == 1:
        with timer("rollout"):
            distributed.store().set("in rollout", "")
            stuck_here(reported)
    distributed.store().wait(["in rollout"])
    with timer("logps"):
        distributed.global_sum(torch.ones(1)) if distributed.rank() == 2 else threading.Event().wait()


def stuck_here(reported):
    reported.wait()
    raise RuntimeError("sample s7 burst")


def train(config, sft, grpo):
    """SFT with a loss that is NaN in step 1, undisturbed, and with a signal and resumed; then GRPO with NaN always."""
    from train_runs import HashScorer

    import train_grpo
    import train_sft
    from hov2.engine import setup

    distributed.setup, distributed.cleanup = lambda _: torch.device("cpu"), lambda: None
    train_grpo.Scorer = HashScorer
    check_that_bad_updates_change_nothing()
    setup.Judge = lambda config, prompts: type("Judge", (), {"check": lambda self: None, "config": config})()
    label_logps, forward, calls, signals = train_sft.label_logps, train_grpo.forward, [], []

    def bad_in_step_1(run, batch, config):
        logps = label_logps(run, batch, config)
        if distributed.rank() == 1 and guard._place[1] == 1:
            for number in signals:
                os.kill(os.getpid(), number)
            calls.append(1)
            return logps * (float("nan") if len(calls) % 2 else 1.0)  # the first of this step's two batches
        return logps

    def run(script, path, name, *overrides):
        kind = SFTConfig if script is train_sft else GRPOConfig
        script.main(load_config(kind, path, [f"output_dir={config.output_dir}/{name}", *overrides]))

    train_sft.label_logps = bad_in_step_1
    run(train_sft, sft, "plain")
    signals.append(signal.SIGUSR1)
    run(train_sft, sft, "stopped")
    run(train_sft, sft, "stopped", "resume=auto")

    train_grpo.forward = lambda policy, batch, config: tuple(
        [values * float("nan") for values in of_batch] if distributed.rank() == 1 and policy.training else of_batch
        for of_batch in forward(policy, batch, config)
    )
    try:
        run(train_grpo, grpo, "grpo", "max_bad_steps=1")
    except FloatingPointError as error:
        print(f"rank {distributed.rank()}: {error}\n", end="", flush=True)
    fail(config)


def check_that_bad_updates_change_nothing():
    """From here on, a gradient's norm that is not finite must be so on all ranks, and leave weights and states alone."""
    make_optimizer, clip_gradients, check_update = optim.make_optimizer, optim.clip_gradients, guard.Guard.check_update
    seen = {}

    def state():
        tensors = [p.to_local() for p in seen["policy"].parameters() if p.requires_grad]
        for of_one in seen["optimizer"].state.values():
            tensors += [torch.as_tensor(getattr(value, "_local_tensor", value)) for value in of_one.values()]
        return [tensor.clone() for tensor in tensors]

    def make(policy, config):
        seen["policy"], seen["optimizer"] = policy, make_optimizer(policy, config)
        return seen["optimizer"]

    def clip(policy, max_norm):
        seen["before"] = state()
        return clip_gradients(policy, max_norm)

    def check(self, step, norm, ids):
        before, after = seen["before"], state()
        same = len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after))
        assert distributed.gather_objects(same) == distributed.gather_objects(math.isnan(norm))
        assert all(p.grad is None for p in seen["policy"].parameters())
        return check_update(self, step, norm, ids)

    optim.make_optimizer, optim.clip_gradients, guard.Guard.check_update = make, clip, check


if __name__ == "__main__":
    torch.set_num_threads(1)
    mode, config, *paths = sys.argv[1:]
    distributed.setup()
    if mode == "loop":
        loop(load_config(SFTConfig, config))
    else:
        from hov2.engine.setup import command

        sys.argv[1:] = [config]
        command(lambda config: fail(config) if mode == "fail" else train(config, *paths), SFTConfig, default=None)
