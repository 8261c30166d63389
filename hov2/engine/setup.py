"""What the three scripts have in common before their loops begin: processes, model, words, judge, samples to inputs."""

import math
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from hov2 import distributed
from hov2.config import BaseConfig, ConfigError
from hov2.config_help import help_text
from hov2.config_io import config_from_argv, save_config
from hov2.data.formats import DataError
from hov2.data.inputs import InputMaker
from hov2.distributed import WriteError, print0, writing
from hov2.engine import guard
from hov2.engine.checkpoint import CheckpointError
from hov2.judge import Judge, JudgeError
from hov2.model.encoder import Encoder
from hov2.model.thinker import Policy, load_policy, load_tokenizer
from hov2.model.weights import ModelError
from hov2.prompts import PromptsError, load_prompts

# each says by itself what would be right
USER_ERRORS = (CheckpointError, ConfigError, DataError, JudgeError, ModelError, PromptsError, WriteError)


@dataclass
class Run:
    """The parts that a script works with: `make(sample)` gives Inputs, and `encoder(inputs)` makes them a Prompt."""

    config: BaseConfig
    device: torch.device
    policy: Policy
    tokenizer: PreTrainedTokenizerBase
    make: InputMaker
    encoder: Encoder
    judge: Judge | None


def start(config: BaseConfig, device: torch.device, trained: bool = True) -> Run:
    """Load everything that `config` names, check that its judge gives a score, and write the resolved config.

    `device` is from `distributed.setup`; `trained` as for `load_policy`. Raises the parts' own errors: ModelError,
    JudgeError, PromptsError; and ConfigError for a step that the processes can't share evenly.
    """
    check_shares(config, distributed.world_size())
    guard.watch(config.hang_minutes)
    prompts = load_prompts(config.prompts)
    judge = Judge(config.judge, prompts) if config.judge else None
    if judge:
        judge.check()
    if distributed.rank() == 0:
        with writing(f"{config.output_dir}/config.json"):
            save_config(config, config.output_dir)
    tokenizer = load_tokenizer(config.model)
    policy = load_policy(config, device, trained)
    encoder = Encoder(policy.thinker, device, config.encoding_cache)
    make = InputMaker(tokenizer, prompts, config.media, config.max_prompt_length, config.on_long_prompt, encoder.known)
    return Run(config, device, policy, tokenizer, make, encoder, judge)


def command(
    main: Callable[[BaseConfig], None],
    config_class: type[BaseConfig],
    default: str | None,
    argv: Sequence[str] | None = None,
) -> None:
    """Run `main(config)` with the config that the command line names; a user's error ends it with one line, code 1.

    `argv`: in place of the arguments of the command line. Of ranks that fail, the first says why. The others end within
    seconds, wherever they are. `--help` only prints.
    """
    if "--help" in sys.argv or "-h" in sys.argv:
        print(help_text(config_class, sys.argv[0], sys.modules[main.__module__].__doc__, default))
        return
    try:
        main(config_from_argv(config_class, sys.argv[1:] if argv is None else argv, default))
        return
    except Exception as error:  # noqa: BLE001, it is shown, and the process ends
        if isinstance(error, (*USER_ERRORS, FloatingPointError)):
            text = f"error: {error}\n"
        else:
            text = traceback.format_exc()
        if guard.first_to_fail(error):
            sys.stderr.write(text)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)  # without waiting for requests to the judge that are still in flight: the other ranks wait for this one


def check_shares(config: BaseConfig, processes: int) -> None:
    """Raise ConfigError for a step that so many processes can't share evenly."""
    for key in ("prompts_per_step", "samples_per_step"):
        per_step = getattr(config, key, processes)
        if per_step % processes:
            raise ConfigError(
                f"{key}: {per_step} can't be shared evenly by {processes} processes; expected a multiple of {processes}"
            )


def report_derived(
    title: str, config: BaseConfig, samples: int, per_step: int, steps: int, more: dict[str, object] | None = None
) -> None:
    """Print the numbers that follow from a config, before the first step, so that a wrong one is seen at once.

    `per_step` is the number of samples a step, of all ranks together; `more` has further numbers, by what they are.
    """
    on_each_rank = per_step // distributed.world_size()
    numbers = {
        "samples": samples,
        "steps": steps,
        "samples a step": f"{per_step} ({on_each_rank} on each rank)",
        "gradient accumulation": math.ceil(on_each_rank / config.prompts_per_forward),
    }
    if more is not None:
        numbers |= more
    lines = [title]
    for name, value in numbers.items():
        lines.append(f"  {name:<26}{value}")
    print0("\n".join(lines))
