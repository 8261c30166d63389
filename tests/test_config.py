"""Configs: what is accepted, and that everything else is one clear error."""

import json
import re
from pathlib import Path

import pytest

from hov2.config import BaseConfig, ConfigError, EvalConfig, GRPOConfig, SFTConfig, Source
from hov2.config_io import config_from_argv, load_config, save_config

ROOT = Path(__file__).parent.parent
MINIMAL = {"model": "m", "output_dir": "runs/x", "data": [{"path": "train.json"}]}


@pytest.fixture
def write(tmp_path):
    def write_config(values):
        path = tmp_path / "config.json"
        path.write_text(values if isinstance(values, str) else json.dumps(values))
        return path

    return write_config


def test_defaults_and_nested_objects(write):
    config = load_config(GRPOConfig, write({**MINIMAL, "media": {"fps": 1}, "judge": {"url": "http://localhost:1"}}))
    assert config.data == [Source("train.json")] and config.data[0].slice == "all"
    assert config.media.fps == 1.0 and isinstance(config.media.fps, float) and config.media.max_frames == 32
    assert config.judge.url == "http://localhost:1" and config.judge.concurrency == 32
    assert (config.beta, config.epsilon, config.num_generations, config.top_k) == (0.04, 0.2, 8, 50)


def test_overrides(write):
    overrides = [
        "max_steps=4",
        "media.max_frames=16",
        "judge.url=http://localhost:8",
        "loss_type=dr_grpo",
        "resume=auto",
        'reward_weights={"accuracy": 2}',
        "max_prompt_length=null",
        "output_dir=a=b",
    ]
    config = load_config(GRPOConfig, write(MINIMAL), overrides)
    assert (config.max_steps, config.media.max_frames, config.loss_type, config.resume) == (4, 16, "dr_grpo", "auto")
    assert config.judge.url == "http://localhost:8" and config.reward_weights == {"accuracy": 2.0}
    assert config.max_prompt_length is None and config.output_dir == "a=b"


@pytest.mark.parametrize(
    "values, message",
    [
        ({"learning_rat": 1}, "unknown key 'learning_rat'; did you mean 'learning_rate'?"),
        ({"xyzzy": 1}, "unknown key 'xyzzy'; known keys: "),
        ({"media": {"max_frame": 4}}, "media: unknown key 'max_frame'; did you mean 'max_frames'?"),
        ({"data": [{"pth": "x"}]}, "data[0]: unknown key 'pth'; did you mean 'path'?"),
        ({"data": [{}]}, "data[0]: missing key 'path'"),
        ({"data": "train.json"}, "data: expected a list, got 'train.json'"),
        ({"max_steps": "4"}, "max_steps: expected int, got '4'"),
        ({"max_steps": 4.0}, "max_steps: expected int, got 4.0"),
        ({"max_steps": True}, "max_steps: expected int, got True"),
        ({"beta": True}, "beta: expected a number, got True"),
        ({"seed": None}, "seed: expected int, got None"),
        ({"gradient_checkpointing": 1}, "gradient_checkpointing: expected bool, got 1"),
        ({"resume": True}, "resume: True is not one of 'auto', 'never'"),
        ({"keep_last": -1}, ": keep_last: at least 0, got -1"),
        ({"keep_every": 100}, "keep_every: needs keep_last"),
        ({"loss_type": "tokens"}, "loss_type: 'tokens' is not one of 'dapo', 'grpo', 'dr_grpo'"),
        ({"report_to": ["mlflow"]}, "report_to[0]: 'mlflow' is not one of 'tensorboard', 'wandb'"),
        ({"reward_weights": {"format": "1"}}, "reward_weights.format: expected a number, got '1'"),
        ({"judge": {"timeout": 3}}, "judge: url, urls: expected one of the two"),
        ({"judge": {"url": "http://a/v1", "urls": ["http://b/v1"]}}, "judge: url, urls: expected one of the two"),
        ({"judge": {"url": "http://a/v1", "missing_window": 0}}, "judge: missing_window: at least 1, got 0"),
        ({"judge": {"url": "http://a/v1", "on_judge_down": "pray"}}, "'pray' is not one of 'wait', 'continue', 'stop'"),
        ({"media": 3}, "media: expected an object, got 3"),
    ],
)
def test_wrong_values(write, values, message):
    path = write({**MINIMAL, **values})
    with pytest.raises(ConfigError) as error:
        load_config(GRPOConfig, path)
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value)


def test_missing_key_and_bad_files(write, tmp_path):
    with pytest.raises(ConfigError, match="missing key 'output_dir'"):
        load_config(BaseConfig, write({"model": "m", "data": []}))
    with pytest.raises(ConfigError, match="none.json: no such config file, or not valid JSON: .*No such file"):
        load_config(BaseConfig, tmp_path / "none.json")
    with pytest.raises(ConfigError, match="not valid JSON: Expecting value"):
        load_config(BaseConfig, write('{"model": '))
    with pytest.raises(ConfigError, match="expected a JSON object, got list"):
        load_config(BaseConfig, write([]))


def test_bad_overrides(write):
    for override, message in [
        ("max_steps", "expected key=value"),
        ("seed.x=1", "seed is not an object"),
        ("max_stps=1", "did you mean 'max_steps'"),
        ("beta=big", "beta: expected a number"),
    ]:
        with pytest.raises(ConfigError, match=message):
            load_config(GRPOConfig, write({**MINIMAL, "seed": 0}), [override])


def test_argv(write):
    path = str(write(MINIMAL))
    assert config_from_argv(SFTConfig, [path, "seed=3"], "none.json").seed == 3
    assert config_from_argv(SFTConfig, ["seed=3"], path).seed == 3
    for argv in (["a.json", "b.json"], ["--help"]):
        with pytest.raises(ConfigError, match="expected \\[config.json\\]"):
            config_from_argv(SFTConfig, argv, path)


def test_saved_config_loads_again(write, tmp_path):
    config = load_config(GRPOConfig, write({**MINIMAL, "judge": {"url": "http://localhost:1"}}), ["beta=0.1"])
    save_config(config, tmp_path / "run")
    assert load_config(GRPOConfig, tmp_path / "run/config.json") == config


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/**/*.json")), ids=lambda path: path.name)
def test_shipped_configs_load(path):
    values = json.loads(path.read_text())
    if "model" not in values:
        pytest.skip("not a config of a script")
    kind = GRPOConfig if "num_generations" in values or "prompts_per_step" in values else SFTConfig
    kind = SFTConfig if "samples_per_step" in values else kind
    kind = EvalConfig if path.stem.startswith(("eval", "filter")) else kind
    load_config(kind, path)


@pytest.mark.parametrize(
    "override, message",
    [
        ("num_iterations=0", "num_iterations: at least 1, got 0"),
        ("num_generations=1", "num_generations: at least 2"),
        ("temperature=0", "temperature: greater than 0"),
        ("eval_steps=5", "held-out evaluation needs both"),
        (
            'reward_weights={"style": 1}',
            "reward_weights: 'style' is not one of 'format', 'accuracy', 'context', 'logic'",
        ),
        ('reward_weights={"context": 1}', "format or accuracy is needed"),
        ('reward_weights={"format": 1, "logic": 1}', "a judge is needed for 'logic'"),
    ],
)
def test_values_that_cannot_train_are_refused(tmp_path, override, message):
    path = tmp_path / "grpo.json"
    path.write_text('{"model": "m", "output_dir": "o", "data": []}')
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        load_config(GRPOConfig, path, [override])
    assert str(path) in str(error.value)
