"""The schema of the configs: every key with its type, its default and, in the comment beside it, what it means.

The comments are the keys' only documentation, and `--help` of the scripts prints them. config_io.py reads JSON into
these dataclasses.
"""

import json
import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from hov2.rewards import REWARDS

RewardName = Literal[tuple(REWARDS)]
SENSES = ("video", "audio")  # the picture, also that of an image, and the sound
MAY_BE_0 = ("top_k", "max_retries", "max_bad_steps", "dump_every")  # beside the whole numbers whose default is 0
# fmt: off
ABOVE_0 = (
    "timeout", "alpha", "top_p", "fps", "num_train_epochs", "learning_rate", "max_grad_norm", "epsilon", "epsilon_high",
)
# fmt: on
AT_MOST_1 = ("top_p", "max_missing", "max_bad_samples", "epsilon", "gate_threshold")
BELOW_1 = ("adam_beta1", "adam_beta2", "threshold")
LARGEST = 2**63 - 1  # what 64 bits hold

URL = re.compile(r"\s*(?:[a-z][a-z0-9+.-]+://|data:[\w.+-]+/)", re.IGNORECASE)  # how an address starts; no path does
SLICE = re.compile(r"(first|last|random):(?:(\d+)|(\d+(?:\.\d+)?)%)", re.ASCII)
HALF_CHARACTER = re.compile("[\ud800-\udfff]")


class ConfigError(ValueError):
    """A config that can't be used; the message names the file and the key and says what would be right."""


class Checked:
    """A dataclass whose whole numbers are at least 1, unless their default is 0, and others not below 0."""

    def __post_init__(self):
        """Raises ConfigError for other numbers, and beyond the limits of the tables above."""
        for name, value in vars(self).items():
            if type(value) in (int, float):
                whole = type(value) is int and not isinstance(getattr(type(self), name), float)
                least = int(whole and getattr(type(self), name) != 0 and name not in MAY_BE_0)
                _need(abs(value) <= LARGEST, f"{name}: expected a number of at most {LARGEST}, got {value}")
                _need(value >= least, f"{name}: at least {least}, got {value}")
                _need(value or name not in ABOVE_0, f"{name}: expected more than 0, got {value}")
                _need(value <= 1 or name not in AT_MOST_1, f"{name}: at most 1, got {value}")
                _need(value < 1 or name not in BELOW_1, f"{name}: expected less than 1, got {value}")


@dataclass
class Source:
    """One data file: `slice` is "all" or "first|last|random:N" or "...:N%" (percentages round down)."""

    path: str  # the data file, or a folder of them, as `format` says
    media_root: str | None = None  # where the samples' media paths start; default: the data file's own folder
    slice: str = "all"  # which of its records
    format: str = "hov2"  # how the file is published: formats.py
    on_bad_record: Literal["error", "skip"] = "error"  # skip: a record that can't be used is left out, and counted

    def __post_init__(self):
        """Refuses places that can't be read from, and slices that hold nothing."""
        _need_local("path", self.path)
        _need_local("media_root", self.media_root)
        match = SLICE.fullmatch(self.slice)
        _need(
            match or self.slice == "all",
            f"slice: expected all, first:N, last:N or random:N, where N may be a percentage (50%); got {self.slice!r}",
        )
        if match:
            amount = match[2] or match[3]
            _need(float(amount) > 0, f"slice: {self.slice!r} leaves no record")
            _need(not match[3] or float(amount) <= 100, f"slice: at most 100%, got {self.slice!r}")


@dataclass
class MediaConfig(Checked):
    """How clips become tensors (docs/data.md, "How clips are read")."""

    fps: float = 2.0  # frames a second that are looked at
    max_frames: int = 32  # of a clip, spread over it if it is longer
    min_pixels: int = 4 * 28 * 28  # of a frame: smaller ones are enlarged
    max_pixels: int = 128 * 28 * 28  # of a frame: larger ones are reduced; a token is 28 x 28 pixels
    interleave_audio: bool = False  # true: Qwen2.5-Omni's time-aligned layout; false: audio as an item after the video

    def __post_init__(self):
        """Refuses sizes that no clip can have."""
        super().__post_init__()
        _need(self.max_frames >= 2, f"max_frames: at least 2, a token is of two frames; got {self.max_frames}")
        _need(self.max_pixels >= 28 * 28, f"max_pixels: at least {28 * 28}, one token; got {self.max_pixels}")
        _need(
            self.min_pixels <= self.max_pixels,
            f"min_pixels, max_pixels: expected the first to be no larger, got {self.min_pixels} and {self.max_pixels}",
        )


@dataclass
class JudgeConfig(Checked):
    """OpenAI-compatible servers; `url`, or each of `urls`, is a base that `/chat/completions` is appended to."""

    url: str | None = None  # base of one server, such as http://localhost:8000/v1
    urls: list[str] = field(default_factory=list)  # instead of url: asked in turn, each when those before it fail
    model: str = "judge"  # the model's name at the server
    api_key_env: str | None = None  # name of the environment variable that holds the key
    max_tokens: int = 256  # of a reply; a judge that reasons first needs thousands, and a longer timeout
    extra_body: dict[str, Any] = field(default_factory=dict)  # added to the request's JSON; null leaves a field out
    timeout: float = 30.0  # seconds for one request, from connecting to the reply's last byte
    max_retries: int = 4  # further tries where nobody answered; waiting for a rate limit is none
    concurrency: int = 32  # requests at a time, of one rank
    cache: str | None = None  # folder of scores, by urls, model, extra_body and question
    max_missing: float = 0.1  # share of the scores of the last `missing_window` steps that may be missing
    missing_window: int = 10  # steps: the same for all ranks, however many scores each of them asks for
    on_judge_down: Literal["wait", "continue", "stop"] = "wait"  # more are missing; wait: while nobody answers

    def __post_init__(self):
        """Refuses values that nothing can be asked with."""
        super().__post_init__()
        _need((self.url is None) != (not self.urls), "url, urls: expected one of the two")
        for name in ("model", "messages", "stream", "n"):
            _need(name not in self.extra_body, f"extra_body: {name!r} can't be changed here")
        try:
            json.dumps(self.extra_body, allow_nan=False)
        except ValueError:
            raise ConfigError("extra_body: expected what JSON can say, got a NaN or an infinity") from None


@dataclass
class LoRAConfig(Checked):
    """Adapters of low rank on the decoder's linear layers, trained instead of its weights (Hu et al., 2021)."""

    rank: int = 16  # of an adapter: its two matrices have so many columns and rows
    alpha: float = 32.0  # an adapter's output is multiplied by alpha / rank
    target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )

    def __post_init__(self):
        """Refuses adapters on nothing."""
        super().__post_init__()
        _need(self.target_modules, "target_modules: expected at least one layer's name")


@dataclass
class AlarmConfig(Checked):
    """Signs of collapse that the log says once; limits for the mean of 20 steps (guard.py), null: never said."""

    format_drop: float | None = 0.2  # the format reward has fallen by more than this from its highest
    zero_std: float | None = 0.8  # frac_reward_zero_std is above this
    kl: float | None = 0.5  # kl is above this
    clipped: float | None = 0.5  # completions/clipped_ratio is above this


@dataclass
class BaseConfig(Checked):
    """What training and evaluation share."""

    model: str  # a thinker's folder, a full Qwen2.5-Omni folder, or a hub id
    output_dir: str  # where metrics, rollouts, checkpoints and the model go
    data: list[Source]
    seed: int = 0  # of all randomness: order, samples, adapters
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA where there is any; a GPU for each process
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on CUDA, float32 on CPU
    shard_within_node: bool = False  # true: each node holds a whole copy (HSDP), so that weights never cross nodes
    media: MediaConfig = field(default_factory=MediaConfig)
    prompts: str | None = None  # JSON file that replaces words of hov2/prompts.json
    max_prompt_length: int | None = None  # tokens, media included
    on_long_prompt: Literal["error", "skip", "fewer_frames"] = "error"  # of a prompt beyond it
    encoding_cache: int = 0  # clips whose tower outputs are kept in memory (the towers are frozen, so this is exact)
    judge: JudgeConfig | None = None
    hang_minutes: float = 30.0  # a phase that lasts longer is said, with the rank and its stack; 0: never
    why: dict[str, str] = field(default_factory=dict)  # for readers: why a key has the value it has; nothing reads it


@dataclass
class TrainConfig(BaseConfig):
    """What SFT and GRPO share."""

    num_train_epochs: float = 1.0  # times through the data
    max_steps: int | None = None  # stops earlier than the epochs say
    learning_rate: float = 1e-6  # the highest, after the warm-up
    lr_scheduler: Literal["linear", "cosine", "constant"] = "linear"  # after the warm-up: down to 0, or as it is
    warmup_steps: int = 0  # updates in which the learning rate rises
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    weight_decay: float = 0.0  # AdamW's
    max_grad_norm: float = 1.0  # gradients are scaled down to it, over all ranks
    optimizer_states: Literal["float32", "cpu"] = "float32"  # cpu: AdamW's moments in the host's memory; slower steps
    lora: LoRAConfig | None = None  # null: all of the decoder's weights are trained
    gradient_checkpointing: bool = True  # activations are computed again in the backward pass, not kept
    logprob_chunk: int = 128  # tokens whose logits exist at a time
    loader_workers: int = 0  # processes of a rank that read the next step's clips meanwhile; 0: read when needed
    max_bad_samples: float = 0.01  # share of the samples drawn that may be unusable before the run stops
    max_bad_steps: int = 10  # updates skipped for a loss or gradient that is not finite; more of them stop the run
    max_hours: float | None = None  # saves and ends in time before so many hours; leave the cluster's limit some more
    eval_data: list[Source] = field(default_factory=list)
    eval_steps: int = 0  # 0: never
    eval_max_completion_length: int = 2048  # tokens of an answer to them
    eval_batch_size: int = 8  # questions decoded together on one rank
    save_steps: int = 0  # 0: only at the end
    keep_last: int = 0  # newest checkpoints that are kept; 0: all
    keep_every: int = 0  # checkpoints after a multiple of this many steps are kept too; 0: no others
    resume: Literal["auto", "never"] = "never"  # auto: from the newest whole checkpoint in output_dir, if there is one
    report_to: list[Literal["tensorboard", "wandb"]] = field(default_factory=list)  # beside metrics.jsonl
    export: Literal["thinker", "omni"] | None = None  # what the model is written as: layout.py; null: as `model` is
    profile_steps: list[int] = field(default_factory=list)  # steps that leave a trace of torch.profiler: log.traced

    def __post_init__(self):
        """Refuses values that can't train."""
        super().__post_init__()
        for step in self.profile_steps:
            _need(step >= 0, f"profile_steps: steps count from 0, got {step}")
        _need(self.keep_last or not self.keep_every, "keep_every: needs keep_last, else all checkpoints are kept")
        _need(
            bool(self.eval_data) == bool(self.eval_steps),
            "eval_data and eval_steps: held-out evaluation needs both, or leave both out",
        )


@dataclass
class SFTConfig(TrainConfig):
    """Stage 1, the supervised cold start."""

    num_train_epochs: float = 2.0  # times through the data
    learning_rate: float = 2e-5  # the highest, after the warm-up
    samples_per_step: int = 32  # of all ranks together
    prompts_per_forward: int = 1  # samples in one forward pass of one rank
    train_on_prompt: bool = False  # true: the released rule, every text token of the conversation


@dataclass
class GRPOConfig(TrainConfig):
    """Stages 2 and 3, GRPO."""

    prompts_per_step: int = 8  # of all ranks together
    prompts_per_forward: int = 1  # prompts (whole groups) in one forward pass of one rank
    completions_per_forward: int | None = None  # of each group; null: all. Fewer need less memory, more work
    num_generations: int = 8  # completions of a prompt: a group, G
    num_iterations: int = 1  # updates with each rollout, mu
    temperature: float = 0.9  # of sampling, and of the log-probs in the loss
    top_p: float = 1.0  # the smallest set of tokens with so much probability; 1: all
    top_k: int = 50  # so many of the likeliest tokens; 0: all
    max_completion_length: int = 1024  # tokens, end-of-turn token included; a longer completion is cut off there
    stop_at_answer: bool = False  # a completion ends with its first `</answer>`, without an end-of-turn token
    beta: float = 0.04  # weight of the KL term at first; it falls to a quarter. 0: no reference model
    epsilon: float = 0.2  # ratios are clipped to 1 - epsilon and 1 + epsilon
    epsilon_high: float | None = None  # None: epsilon
    loss_type: Literal["dapo", "grpo", "dr_grpo"] = "dapo"  # what the loss is divided by: grpo.grpo_loss
    scale_rewards: bool = False
    reward_weights: dict[RewardName, float] = field(default_factory=lambda: {"format": 1.0, "accuracy": 1.0})
    judged_advantage: Literal["own", "full"] = "own"  # full: A(R_full) instead of the judged rewards' own (released)
    span: Literal["seen", "inside", "before_tag"] = "seen"  # the tokens that a judged reward reaches (spans.py)
    format_rule: Literal["strict", "released"] = "strict"  # rewards.format_reward
    gate_threshold: float | None = None  # a judged score up to it zeroes what depends on it; null: off
    mask_truncated_completions: bool = False  # completions cut off at the limit teach nothing
    alarms: AlarmConfig = field(default_factory=AlarmConfig)
    dump_every: int = 1  # steps between rollout dumps; 0: never

    def __post_init__(self):
        """Refuses values that can't train."""
        super().__post_init__()
        for name, weight in self.reward_weights.items():
            _need(math.isfinite(weight) and weight >= 0, f"reward_weights.{name}: at least 0, got {weight}")
        _need(any(self.reward_weights.values()), f"reward_weights: one above 0 is needed, got {self.reward_weights}")
        of_completion = [name for name, reward in REWARDS.items() if reward.span == "completion"]
        _need(
            set(of_completion) & set(self.reward_weights),
            f"reward_weights: {' or '.join(of_completion)} is needed, the rewards that reach every token",
        )
        whole_weight = sum(self.reward_weights.get(name, 0) for name in of_completion)
        _need(
            whole_weight or self.judged_advantage == "own",
            f"reward_weights: with judged_advantage={self.judged_advantage}, {' or '.join(of_completion)} above 0 is "
            "needed",
        )
        judged = [repr(name) for name, reward in REWARDS.items() if reward.needs_judge and name in self.reward_weights]
        _need(
            self.judge or not judged,
            f"reward_weights: a judge is needed for {' and '.join(judged)}; give one as judge.url, or train without: "
            """'reward_weights={"format": 1, "accuracy": 1}'""",
        )
        _need(self.num_generations >= 2, f"num_generations: at least 2, to compare them; got {self.num_generations}")
        _need(self.temperature > 0, f"temperature: greater than 0, equals teach nothing; got {self.temperature}")


@dataclass
class FilterConfig(Checked):
    """The difficulty filter: questions with a share of right answers between two bounds make the next stage's data."""

    output: str  # the data file to write, .jsonl
    threshold: float = 0.2  # a sample is right when its accuracy reward is above this
    min_share: float = 0.0  # a question stays when its share of right samples is above this ...
    max_share: float = 0.75  # ... and below this

    def __post_init__(self):
        """Refuses bounds that nothing lies between."""
        super().__post_init__()
        _need(self.output.endswith(".jsonl"), f"output: expected a file that ends in .jsonl, got {self.output!r}")
        _need(
            0 <= self.min_share < self.max_share <= 1,
            "min_share, max_share: expected 0 <= min_share < max_share <= 1, "
            f"got {self.min_share} and {self.max_share}",
        )


@dataclass
class EvalConfig(BaseConfig):
    """Evaluation: answers to the questions of data files, or of a benchmark, and their scores."""

    data: list[Source] = field(default_factory=list)
    benchmark: Literal["intentbench", "daily-omni", "worldsense"] | None = None  # instead of data
    benchmark_root: str | None = None  # the benchmark's folder, as its authors publish it
    only: str | None = None  # file of ids, one a line or a JSON list: no other questions are asked
    exclude: str | None = None  # likewise: these questions are left out
    senses: list[Literal[SENSES]] = field(default_factory=lambda: list(SENSES))  # the other medium is left out
    system_prompt: str = "hov2"  # hov2: that of the prompts; none; qwen: the model's own default; else a text file
    max_completion_length: int = 2048  # tokens of an answer
    batch_size: int = 8  # questions decoded together on one rank
    num_samples: int = 1  # answers to each question
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0  # as for training
    top_k: int = 0  # as for training
    filter: FilterConfig | None = None
    resume: bool = True  # go on with the answers in output_dir; false: sets them aside

    def __post_init__(self):
        """Refuses what can't be evaluated."""
        super().__post_init__()
        _need_local("benchmark_root", self.benchmark_root)
        _need(bool(self.data) != bool(self.benchmark), "data, benchmark: expected one of the two")
        _need(bool(self.benchmark) == bool(self.benchmark_root), "benchmark, benchmark_root: expected both, or neither")
        _need(self.senses, f"senses: expected at least one of {', '.join(SENSES)}")
        self.senses = [sense for sense in SENSES if sense in self.senses]  # in one order, each once
        _need(
            self.num_samples == 1 or self.temperature,
            f"num_samples: {self.num_samples} greedy answers are one answer; set a temperature",
        )
        _need(
            not self.filter or (self.num_samples > 1 and not self.benchmark),
            "filter: needs num_samples of at least 2, and data (not a benchmark)",
        )


def _need(condition: object, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _need_local(key: str, path: str | None) -> None:
    _need(path is None or not URL.match(path), f"{key}: {path!r} is a URL; only local files are read")


def fault_of_text(text: str) -> str | None:
    """Return what is wrong with a text that can't be written as UTF-8; None for all others."""
    match = HALF_CHARACTER.search(text)
    return match and f"{match[0]!r} is half of a surrogate pair, or a byte that is not UTF-8, and can't be read"
