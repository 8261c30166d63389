"""Runs the checks and commands of docs/recipes.md, each in its own copy of the repository.

    python tests/support/recipe_runs.py COPY...

A copy holds check.py (the recipe's python block), commands.txt (its bash block) and tiny.json (what the toy's config
stands for here). What takes long to import is imported once; each copy then has a process of its own, which imports
hov2 from there.
"""

import json
import os
import runpy
import shlex
import sys
from pathlib import Path

import av  # noqa: F401
import torch
import torch.distributed.fsdp
from transformers import AutoTokenizer, Qwen2_5OmniThinkerForConditionalGeneration, Qwen2Tokenizer  # noqa: F401


def run(copy):
    """The commands one after the other, training for one step; then the check."""
    os.chdir(copy)
    sys.path.insert(0, str(copy))
    import train_grpo
    from hov2 import toy
    from hov2.config import GRPOConfig
    from hov2.config_io import load_config

    assert Path(train_grpo.__file__).parent == Path(toy.__file__).parents[2] == copy
    toy.prepare = lambda config: None
    for line in Path("commands.txt").read_text().splitlines():
        words = shlex.split(line)
        if words[0] == "python":
            sys.argv = words[1:]
            runpy.run_path(words[1], run_name="__main__")
        else:
            overrides = [word for word in words[words.index("train_grpo.py") + 2 :] if "=" in word]
            config = load_config(GRPOConfig, "tiny.json", overrides)
            train_grpo.main(config)
            logged = json.loads(Path(config.output_dir, "metrics.jsonl").read_text())
            assert {f"rewards/{name}/mean" for name in config.reward_weights} <= logged.keys()
    runpy.run_path("check.py")


if __name__ == "__main__":
    torch.set_num_threads(1)
    failed = []
    for copy in map(Path, sys.argv[1:]):
        child = os.fork()
        if not child:
            run(copy)
            sys.stdout.flush()
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            failed.append(copy.name)
    sys.exit(f"failed: {failed}" if failed else 0)
