"""`--help` of the scripts says all of config.py, and `python -m hov2.tools` names all tools."""

import dataclasses
import inspect
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from hov2 import config
from hov2.config import (
    AlarmConfig,
    EvalConfig,
    FilterConfig,
    GRPOConfig,
    JudgeConfig,
    LoRAConfig,
    MediaConfig,
    SFTConfig,
    Source,
)
from hov2.config_help import config_keys, field_comments, help_text

ROOT = Path(__file__).parent.parent
SCRIPTS = {SFTConfig: "train_sft.py", GRPOConfig: "train_grpo.py", EvalConfig: "evaluate.py"}
NESTED = {
    "data[]": Source,
    "eval_data[]": Source,
    "media": MediaConfig,
    "judge": JudgeConfig,
    "lora": LoRAConfig,
    "alarms": AlarmConfig,
    "filter": FilterConfig,
}
EACH_SCRIPT = pytest.mark.parametrize("config_class", SCRIPTS, ids=lambda cls: cls.__name__)


def text_of(config_class):
    return help_text(config_class, "script.py", "About it.\n\n    script.py x\n\nNot shown.", "configs/default.json")


def without_breaks(text):
    return " ".join(text.split())


def plain_default(field):
    """What the help says behind a key's name."""
    factory = field.default_factory
    value = field.default if factory is dataclasses.MISSING else factory()
    if value is dataclasses.MISSING or dataclasses.is_dataclass(value):
        return ""
    return f"={value}" if isinstance(value, str) else f"={json.dumps(value)}"


@EACH_SCRIPT
def test_every_key_is_shown_with_its_default(config_class):
    lines = text_of(config_class).splitlines()
    objects = {"": config_class}
    own_names = {field.name for field in dataclasses.fields(config_class)}
    for name, nested in NESTED.items():
        if name.removesuffix("[]") in own_names:
            objects[f"{name}."] = nested
    assert len(objects) >= 5
    for parent, cls in objects.items():
        for field in dataclasses.fields(cls):
            wanted = f"  {parent}{field.name}{plain_default(field)}"
            assert any(line == wanted or line.startswith(f"{wanted} ") for line in lines), wanted


def test_every_class_of_the_schema_is_shown():
    shown = {key.group for config_class in SCRIPTS for key in config_keys(config_class)}
    for cls in vars(config).values():
        if dataclasses.is_dataclass(cls):
            assert cls in shown


def test_every_comment_is_shown():
    text = without_breaks("\n".join(text_of(config_class) for config_class in SCRIPTS))
    comments = re.findall(r"^    \w+: .*  # (.*)$", inspect.getsource(config), re.MULTILINE)
    assert len(comments) > 50
    for comment in comments:
        assert without_breaks(comment) in text


def test_a_key_has_its_type_its_default_and_its_comment():
    text = without_breaks(text_of(GRPOConfig))
    comment = field_comments(GRPOConfig)["max_completion_length"]
    assert comment
    assert f" max_completion_length=1024 (int) {comment}" in text
    assert " model (text, required) a thinker's folder" in text
    assert " max_prompt_length=null (int | null) tokens, media included" in text
    assert " dtype=auto (auto | float32 | bfloat16) auto: bfloat16 on CUDA" in text
    assert " judge=null (object | null) OpenAI-compatible servers" in text
    assert " data[].slice=all (text)" in text
    assert " report_to=[] (list of tensorboard | wandb)" in text
    assert " media.fps=2.0 (number)" in text


def test_a_new_default_keeps_the_comment_and_a_comment_may_stand_above():
    sft = {key.name: key for key in config_keys(SFTConfig)}
    assert sft["num_train_epochs"].default == "2.0" and sft["num_train_epochs"].group is config.TrainConfig
    own = field_comments(Repeated)
    assert own["beta"] == "the weight of the KL term, at the beginning"
    assert own["max_steps"] == field_comments(SFTConfig)["max_steps"] != ""


@dataclasses.dataclass
class Repeated(GRPOConfig):
    """Two keys with other defaults."""

    max_steps: int | None = 4
    # the weight of the KL term,
    beta: float = 0.1  # at the beginning


@EACH_SCRIPT
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_scripts_print_it(config_class, option, monkeypatch, capsys):
    script = SCRIPTS[config_class]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [script, option])
    runpy.run_path(script, run_name="__main__")
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: {script} [config.json] [key=value ...]\n")
    assert f" 8 {script} configs/" in printed and "Without a config it takes configs/toy/" in printed
    assert "\n  max_prompt_length=null " in printed


def test_the_tools_are_listed():
    done = subprocess.run([sys.executable, "-m", "hov2.tools"], cwd=ROOT, capture_output=True, text=True, check=True)
    modules = [path.stem for path in (ROOT / "hov2" / "tools").glob("[!_]*.py")]
    packages = [path.parent.name for path in (ROOT / "hov2" / "tools").glob("*/__init__.py")]
    assert {"ask", "check_data", "plan", "report"} <= {*modules, *packages}
    lines = done.stdout.splitlines()
    assert lines[0::2] == [f"python -m hov2.tools.{name}" for name in sorted([*modules, *packages])]
    for line in lines[1::2]:
        assert line.startswith("    ") and len(line) > 20
