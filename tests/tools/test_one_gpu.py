"""configs/one_gpu and docs/one-gpu.md: the plan of each config fits a GPU of 24 GB, and the page quotes the plan."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from hov2.config_io import read_config
from hov2.model.weights import ModelError
from hov2.tools import plan

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs" / "one_gpu").glob("*.json"))


def test_the_published_sizes_are_those_of_their_parts():
    """Billions: Qwen2.5 without embeddings 2.77 (3B) and 6.53, tower of Qwen2.5-VL 0.67, of Whisper-large 0.64."""
    found = {name[-2:]: plan.shapes_of(plan.published_thinker(name)) for name in plan.PUBLISHED}
    layers = {name: shapes.decoder - 2 * shapes.vocab * shapes.hidden for name, shapes in found.items()}
    assert layers == {"3B": 2_774_773_760, "7B": 6_525_621_760}  # embedding and head are not tied, also in the 3B
    totals = {name: shapes.decoder + shapes.towers for name, shapes in found.items()}
    assert totals == {"3B": 4_703_464_448, "7B": 8_931_813_888}


@pytest.mark.parametrize("path", [*CONFIGS, *ROOT.glob("configs/*own_data.json")], ids=lambda path: path.name)
def test_configs_for_one_gpu_fit_24_gb(path):
    config = read_config(path)
    name, thinker = plan.thinker_of(config.model, path.parent)
    assert "Qwen/Qwen2.5-Omni-3B" in name
    shapes = plan.shapes_of(thinker, getattr(config, "lora", None))
    _, fits = plan.report(plan.plan(shapes, config, 1, config.max_prompt_length), 0.9 * 24e9)
    assert fits


def test_a_model_that_is_not_there_yet_has_the_sizes_of_the_one_it_comes_from(tmp_path, monkeypatch):
    configs = ROOT / "configs"
    assert plan.origin_of("runs/stage3/model", configs) == "Qwen/Qwen2.5-Omni-7B"
    assert plan.origin_of("runs/one_gpu/stage1/model", configs / "one_gpu") == "Qwen/Qwen2.5-Omni-3B"
    assert plan.origin_of("runs/elsewhere/model", configs) == "runs/elsewhere/model"
    for name, model in (("a", "runs/b/model"), ("b", "runs/a/model")):
        text = f'{{"model": "{model}", "output_dir": "runs/{name}", "data": []}}'
        (tmp_path / f"{name}.json").write_text(text)
    assert plan.origin_of("runs/a/model", tmp_path) == "runs/a/model"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="runs/elsewhere/model: no such folder.*model=Qwen/Qwen2.5-Omni-7B or"):
        plan.thinker_of("runs/elsewhere/model", configs)


@pytest.mark.docs
def test_the_page_quotes_what_the_plan_prints(monkeypatch, capsys):
    page = (ROOT / "docs" / "one-gpu.md").read_text(encoding="utf-8")
    quotes = re.findall(r"^\$ python -m hov2.tools.plan (.*)\n((?:.+\n)+?)(?=\n|```)", page, re.MULTILINE)
    assert len(quotes) >= 6
    monkeypatch.chdir(ROOT)
    for arguments, quoted in quotes:
        monkeypatch.setattr(sys, "argv", ["plan", *shlex.split(arguments)])
        with pytest.raises(SystemExit) as ended:
            plan.main()
        printed = capsys.readouterr().out
        parts = [re.escape(part) for part in quoted.split("...\n")]
        assert ended.value.code == 0 and re.match(".*".join(parts), printed, re.DOTALL), printed
    for peak, overrides in (("36.93", []), ("34.17", ["max_prompt_length=4096", "prompts_per_step=2"])):
        config = read_config("configs/one_gpu/stage2.json", overrides)
        shapes = plan.shapes_of(plan.published_thinker("Qwen/Qwen2.5-Omni-7B"), config.lora)
        text, _ = plan.report(plan.plan(shapes, config, 1, config.max_prompt_length), 40e9)
        assert f"{peak} GiB of 37.25" in text and peak in page
