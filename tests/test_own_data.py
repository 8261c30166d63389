"""docs/data.md, "Your own data in five minutes": its lines and its commands, with a tiny model in place of the 3B."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

import train_grpo
from hov2 import distributed
from hov2.config import GRPOConfig
from hov2.config_io import load_config
from hov2.engine.setup import USER_ERRORS
from tests.support.helpers import synth_clip, tiny_thinker, tiny_tokenizer

ROOT = Path(__file__).resolve().parent.parent
SMALL = "max_completion_length=8"
CHANGES = {  # what the commands get besides, so that they take seconds on a CPU
    "hov2.tools.check_data": ["model=tiny", "--workers", "1"],
    "train_grpo.py": ["model=tiny", SMALL],
    "evaluate.py": [SMALL],
    "hov2.tools.ask": ["--max-completion-length", "8"],
}


@pytest.mark.docs
def test_the_page_s_lines_and_commands_run(tmp_path):
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    section = page.partition("## Your own data in five minutes\n")[2].partition("\n## ")[0]
    lines = re.search(r"^```jsonl\n(.*?)^```", section, re.DOTALL | re.MULTILINE)[1]
    (tmp_path / "mine" / "clips").mkdir(parents=True)
    (tmp_path / "mine" / "questions.jsonl").write_text(lines)
    for number, line in enumerate(lines.splitlines()):
        synth_clip(tmp_path / "mine" / json.loads(line)["path"], seed=number)
    tiny_thinker().save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    (tmp_path / "configs").symlink_to(ROOT / "configs")

    commands = []
    for line in re.search(r"^```bash\n(.*?)^```", section, re.DOTALL | re.MULTILINE)[1].splitlines():
        what = line.split()[2 if " -m " in line else 1]
        commands.append(" ".join([line, *CHANGES[what]]))
    assert len(commands) == len(CHANGES)
    (tmp_path / "commands.txt").write_text("\n".join(commands))
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "support" / "page_runs.py"), "commands.txt"],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        timeout=120,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    metrics = (tmp_path / "runs" / "own_data" / "metrics.jsonl").read_text().splitlines()
    assert len(metrics) == 3 and "rewards/accuracy/mean" in metrics[0]  # 3 epochs of 3 questions, 4 prompts a step
    assert (tmp_path / "runs" / "own_data" / "eval" / "results.txt").exists()


def test_what_a_newcomer_lacks_is_one_line_that_says_what_to_do(tmp_path, monkeypatch):
    """The 8-GPU config with data of one's own, no judge, and no stage 1 before it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    Path("mine.jsonl").write_text(
        '{"problem": "Why?", "problem_type": "judge", "data_type": "text", "solution": "<answer>yes</answer>"}'
    )
    data = 'data=[{"path": "mine.jsonl"}]'
    without = 'reward_weights={"format": 1, "accuracy": 1}'
    steps = [  # what is given besides, and what the next error asks for
        ([], "runs/filter_stage2/kept.jsonl: no such data file (evaluate.py configs/filter_stageN.json writes it)"),
        ([data, "judge.url=http://127.0.0.1:9/v1", "judge.max_retries=0"], "no judge at http://127.0.0.1:9/v1"),
        ([data, "judge=null"], without),
        ([data, "judge=null", without], "run the stage before this one, or start from another model"),
    ]
    for overrides, message in steps:
        with pytest.raises(USER_ERRORS, match=re.escape(message)) as error:
            train_grpo.main(load_config(GRPOConfig, ROOT / "configs" / "stage2.json", ["hang_minutes=0", *overrides]))
        assert "\n" not in str(error.value)
        if dist.is_initialized():
            distributed.cleanup()
