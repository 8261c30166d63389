"""Configs: what is accepted, and that everything else is one clear error."""

import dataclasses
import json
import math
import re
import typing
from pathlib import Path

import pytest

from hov2.config import BaseConfig, ConfigError, EvalConfig, GRPOConfig, JudgeConfig, SFTConfig, Source
from hov2.config_io import _build, config_from_argv, load_config, save_config

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


# Every key of a number, and values that it can't have; the message begins with the key.
NONSENSE = {
    GRPOConfig: {
        "num_train_epochs": [0, -1],
        "max_steps": [0, -1],
        "learning_rate": [0, -1e-6],
        "warmup_steps": [-1],
        "adam_beta1": [-0.1, 1, 9],
        "adam_beta2": [-0.1, 1],
        "weight_decay": [-0.1],
        "max_grad_norm": [0, -1],
        "logprob_chunk": [0],
        "loader_workers": [-1],
        "max_bad_samples": [-0.1, 1.5],
        "max_bad_steps": [-1],
        "max_hours": [-1],
        "eval_steps": [-1],
        "eval_max_completion_length": [0],
        "eval_batch_size": [0],
        "save_steps": [-1],
        "keep_last": [-1],
        "keep_every": [-1],
        "profile_steps": [[-1]],
        "prompts_per_step": [0, -8],
        "prompts_per_forward": [0],
        "completions_per_forward": [0],
        "num_generations": [0, 1],
        "num_iterations": [0],
        "temperature": [0, -1],
        "top_p": [0, -0.5, 1.5],
        "top_k": [-1],
        "max_completion_length": [0],
        "beta": [-0.04],
        "epsilon": [0, -0.2, 20],
        "epsilon_high": [0, -0.2],
        "gate_threshold": [-0.1, 1.1],
        "dump_every": [-1],
        "reward_weights": [{"accuracy": -1}, {"format": 0, "accuracy": 0}, {"format": math.nan, "accuracy": 1}, {}],
        "seed": [-1, 2**64],
        "max_prompt_length": [0],
        "encoding_cache": [-1],
        "hang_minutes": [-1],
        "media.fps": [0, -1],
        "media.max_frames": [0, 1],
        "media.min_pixels": [0, 100353],
        "media.max_pixels": [0, 783],
        "lora.rank": [0],
        "lora.alpha": [0],
        "lora.target_modules": [[]],
        "alarms.kl": [-1],
        "data": [[{"path": "x", "slice": text}] for text in ("last:0%", "first:0", "first:101%", "half", "random:-1")],
        "judge.timeout": [0],
        "judge.concurrency": [0],
        "judge.max_missing": [1.1],
    },
    SFTConfig: {"samples_per_step": [0], "prompts_per_forward": [0], "num_train_epochs": [0]},
    EvalConfig: {
        "max_completion_length": [0],
        "batch_size": [0],
        "num_samples": [0],
        "temperature": [-0.5],
        "top_p": [0, 1.5],
        "top_k": [-1],
        "filter.threshold": [-0.1, 1],
        "filter.min_share": [-0.1, 0.9],
        "filter.max_share": [0, 1.5],
        "benchmark_root": ["https://x.org/b"],
    },
}
OBJECTS = {"judge": {"url": "http://a"}, "lora": {}, "filter": {"output": "kept.jsonl"}}


def number_keys(config_class, parent=""):
    """The keys of numbers of a config class, with the names of the objects that they are in."""
    found = set()
    for field in dataclasses.fields(config_class):
        kind = typing.get_type_hints(config_class)[field.name]
        inner = next((part for part in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(part)), None)
        if inner and typing.get_origin(kind) is not list:
            found |= number_keys(inner, f"{parent}{field.name}.")
        elif {int, float} & {kind, *typing.get_args(kind)}:
            found.add(parent + field.name)
    return found


def refusal(config_class, key, value):
    """What loading says of a config with this value, from the key on."""
    first, *rest = key.split(".")
    changed = value if not rest else {**OBJECTS.get(first, {}), rest[0]: value}
    with pytest.raises(ConfigError) as error:
        _build(config_class, {**MINIMAL, first: changed}, where="x.json")
    return str(error.value).removeprefix("x.json: ").replace(": ", ".", len(rest))


@pytest.mark.parametrize(
    "config_class, key",
    [(config_class, key) for config_class, keys in NONSENSE.items() for key in keys],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_values_of_no_use_are_refused_by_the_name_of_their_key(config_class, key):
    for value in NONSENSE[config_class][key]:
        said = refusal(config_class, key, value)
        assert key.rpartition(".")[2] in said.partition(": ")[0], said


@pytest.mark.parametrize("config_class", [GRPOConfig, SFTConfig, EvalConfig], ids=lambda value: value.__name__)
def test_no_number_may_be_nan_or_infinite(config_class):
    for key in number_keys(config_class):
        for value in (math.nan, math.inf, -math.inf):
            if key.endswith("reward_weights"):
                value = {"format": value}
            elif key == "profile_steps":
                continue  # whole numbers
            assert key.rpartition(".")[2] in refusal(config_class, key, value)


def test_rewards_that_nothing_is_made_of_are_refused(write):
    values = {"judge": {"url": "http://a"}, "reward_weights": {"format": 0, "context": 1}}
    load_config(GRPOConfig, write(MINIMAL | values))
    with pytest.raises(ConfigError, match="reward_weights: with judged_advantage=full, format or accuracy above 0"):
        load_config(GRPOConfig, write(MINIMAL | values), ["judged_advantage=full"])


def test_texts_that_are_none_files_with_marks_and_what_is_too_large_or_deep(write, tmp_path):
    for key, value in [("prompts", "\ud83d"), ("data", [{"path": "\udce9.json"}]), ("why", {"seed": "\ud83d"})]:
        with pytest.raises(ConfigError, match=f"config.json: {key}.*: '.ud.*' is half of a surrogate pair"):
            load_config(GRPOConfig, write({**MINIMAL, key: value}))
    (tmp_path / "mark.json").write_text(json.dumps(MINIMAL), encoding="utf-8-sig")
    assert load_config(GRPOConfig, tmp_path / "mark.json").model == "m"
    for override, message in [
        ("beta=" + "9" * 400, "beta: too large a number"),
        ("seed=" + "9" * 5000, "seed: expected int"),
        ("seed=" + "[" * 5000, "seed: expected int"),
    ]:
        with pytest.raises(ConfigError, match=message):
            load_config(GRPOConfig, write(MINIMAL), [override])
    with pytest.raises(ConfigError, match=r"config.json: no such config file, or not valid JSON"):
        load_config(GRPOConfig, write("[" * 5000))


@pytest.mark.parametrize("name", ["model", "messages", "stream", "n"])
def test_the_judges_extra_body_cannot_change_what_the_client_needs(name):
    with pytest.raises(ConfigError, match=f"extra_body: '{name}' can't be changed"):
        JudgeConfig(url="http://x/v1", extra_body={name: None})


def test_numbers_are_finite(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"model": "m", "output_dir": "o", "data": [], "weight_decay": NaN}')
    with pytest.raises(ConfigError, match=r"config.json: weight_decay: expected a number, got nan"):
        load_config(GRPOConfig, path)
    path.write_text('{"model": "m", "output_dir": "o", "data": [], "judge": {"url": "http://x/v1"}}')
    with pytest.raises(ConfigError, match="beta: expected a number, got inf"):
        load_config(GRPOConfig, path, ["beta=1e999"])
    with pytest.raises(ConfigError, match="judge: extra_body: expected what JSON can say, got a NaN or an infinity"):
        load_config(GRPOConfig, path, ["judge.extra_body.top_p=NaN"])


def test_the_judges_extra_body_is_any_json(tmp_path):
    path = tmp_path / "c.json"
    body = {"max_tokens": None, "chat_template_kwargs": {"enable_thinking": False}, "stop": ["\n"]}
    values = {"model": "m", "output_dir": "o", "data": [], "judge": {"url": "http://x/v1", "extra_body": body}}
    path.write_text(json.dumps(values))
    assert load_config(GRPOConfig, path).judge.extra_body == body
    overrides = ["judge.extra_body.temperature=null", "judge.max_tokens=4096"]
    judge = load_config(GRPOConfig, path, overrides).judge
    assert judge.extra_body == body | {"temperature": None} and judge.max_tokens == 4096
    with pytest.raises(ConfigError, match="judge: extra_body: expected an object"):
        load_config(GRPOConfig, path, ["judge.extra_body=[]"])
    with pytest.raises(ConfigError, match="judge.*max_tokens: at least 1"):
        load_config(GRPOConfig, path, ["judge.max_tokens=0"])
