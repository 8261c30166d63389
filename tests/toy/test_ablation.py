"""The toy's ablations: which steps variants share, what each step is told, and what is made of the results."""

import json
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest

from hov2 import toy
from hov2.config_io import read_config
from hov2.toy import ablation

VARIANTS = {
    "full": {},
    "other": {"stage2": {"judged_advantage": "full"}},
    "late": {"stage3": {"beta": 0}},
    "cold": {"steps": ["stage1", "eval"]},
    "own": {"stage1": {"train_on_prompt": True}},
}


def test_variants_share_the_steps_up_to_the_first_that_differs():
    folders = ablation.step_folders(VARIANTS, Path("seed0"))
    owners = {name: {step: place.parent.name for step, place in places.items()} for name, places in folders.items()}
    assert owners["other"] == dict.fromkeys(ablation.STEPS, "other") | {"stage1": "full", "filter_stage2": "full"}
    assert owners["late"] == dict.fromkeys(ablation.STEPS, "full") | {"stage3": "late", "eval": "late"}
    assert owners["cold"] == {"stage1": "full", "eval": "cold"}
    assert owners["own"] == dict.fromkeys(ablation.STEPS, "own")


@pytest.mark.parametrize("file", ["ablation", "released"])
def test_the_files_of_variants_fit_the_configs(file):
    for variant in ablation.read_variants(f"configs/toy/{file}.json").values():
        for step in set(ablation.STEPS) & set(variant):
            read_config(f"configs/toy/{step}.json", [f"{k}={json.dumps(v)}" for k, v in variant[step].items()])


def test_a_step_that_there_is_not(tmp_path):
    (tmp_path / "mine.json").write_text('{"a": {"stage4": {}}}')
    with pytest.raises(
        SystemExit, match=r"mine.json: a: unknown key or step 'stage4'; known: what, why, steps, stage1"
    ):
        ablation.read_variants(tmp_path / "mine.json")


def test_a_step_reads_and_writes_the_run_s_own_places_and_is_kept(tmp_path, monkeypatch):
    commands, codes = [], [0]
    monkeypatch.setattr(
        subprocess,
        "run",
        lambda command, **_: (
            commands.append(command) or subprocess.CompletedProcess(command, codes[0]).check_returncode()
        ),
    )
    places = ablation.step_folders(VARIANTS, tmp_path / "seed0")["other"]

    def run(variant):
        ablation.run_step("stage2", places, variant, seed=7, quick=True, judge_url="http://127.0.0.1:1/v1")

    run(VARIANTS["other"])
    config = read_config(*commands[0][2:3], commands[0][3:])
    assert config.model == str(tmp_path / "seed0/full/stage1/model") and config.output_dir == str(places["stage2"])
    assert config.data[0].path == str(tmp_path / "seed0/full/filter_stage2/kept.jsonl")
    assert (config.judged_advantage, config.seed, config.max_steps) == ("full", 7, toy.QUICK_STEPS["stage2"])
    run(VARIANTS["other"])
    assert len(commands) == 1
    run({"stage2": {"beta": 0}})  # the file has changed meanwhile
    assert len(commands) == 2
    codes[0] = 3
    with pytest.raises(SystemExit, match=r"stage2: exit code 3; .*stage2.log says why"):
        run(VARIANTS["other"])
    assert not places["stage2"].with_suffix(".done").exists()


def test_table_and_figure():
    columns = ablation.columns_of([{"accuracy": 0.25, "context": None}, {"accuracy": 0.75, "context": None}])
    rows = {"a & b": columns}
    assert "| a & b | 0.500 (0.250 to 0.750) | - |" in ablation.as_table(rows, [0, 1])
    marks = [
        mark.get("d")
        for mark in ElementTree.fromstring(ablation.as_figure(rows, left=100, width=200)).iter()
        if mark.get("class") == "mark"
    ]
    assert marks == ["M150.0 44H250.0M200.0 37v14M150.0 41v6M250.0 41v6"]
