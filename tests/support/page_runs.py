"""Runs the commands of a page one after the other in this process, from the folder that it is started in.

    python tests/support/page_runs.py COMMANDS.txt

A line is a shell command without variables or pipes. What takes long to import is imported once.
"""

import runpy
import shlex
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


def run(words):
    """Run `python SCRIPT ...` or `python -m MODULE ...`; a command that fails ends this process."""
    assert words[0] == "python", words
    try:
        if words[1] == "-m":
            sys.argv = words[2:]
            runpy.run_module(words[2], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words[1:]
            runpy.run_path(str(ROOT / words[1]), run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            raise


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.path.insert(0, str(ROOT))
    for line in Path(sys.argv[1]).read_text().splitlines():
        print(f"$ {line}", flush=True)
        run(shlex.split(line))
