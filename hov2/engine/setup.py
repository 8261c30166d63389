"""What the three scripts have in common before their loops begin: processes, model, words, judge, samples to inputs."""

import os
import sys
import traceback
from dataclasses import dataclass

import torch

from hov2 import distributed
from hov2.config import BaseConfig, ConfigError
from hov2.config_help import help_text
from hov2.config_io import config_from_argv, save_config
from hov2.data.formats import DataError
from hov2.data.inputs import InputMaker
from hov2.distributed import print0
from hov2.engine import guard
from hov2.engine.checkpoint import CheckpointError
from hov2.judge import Judge, JudgeError
from hov2.model.encoder import Encoder
from hov2.model.thinker import Policy, load_policy, load_tokenizer
from hov2.model.weights import ModelError
from hov2.prompts import PromptsError, load_prompts

# each says by itself what would be right
USER_ERRORS = (CheckpointError, ConfigError, DataError, JudgeError, ModelError, PromptsError)


@dataclass
class Run:
    """The parts that a script works with. `make(sample) -> Inputs`; `encoder(inputs) -> Prompt`."""

    config: BaseConfig
    device: torch.device
    policy: Policy
    tokenizer: object
    make: InputMaker
    encoder: Encoder
    judge: Judge | None


def start(config, device, trained=True):
    """Loads everything that `config` names, checks that its judge can be reached, and writes the resolved config.

    `device` is from `distributed.setup`; `trained` as for `load_policy`. Raises the parts' own
    errors: ModelError, JudgeError, PromptsError.
    """
    guard.watch(config.hang_minutes)
    prompts = load_prompts(config.prompts)
    judge = Judge(config.judge, prompts) if config.judge else None
    if judge:
        judge.check()
    if distributed.rank() == 0:
        save_config(config, config.output_dir)
    tokenizer = load_tokenizer(config.model)
    policy = load_policy(config, device, trained)
    encoder = Encoder(policy.thinker, device, config.encoding_cache)
    make = InputMaker(tokenizer, prompts, config.media, config.max_prompt_length, config.on_long_prompt, encoder.known)
    return Run(config, device, policy, tokenizer, make, encoder, judge)


def command(main, config_class, default):
    """Runs `main(config)` with the config that the command line names; a user's error ends it with one line, code 1.

    Of ranks that fail, the first says why. The others end within seconds, wherever they are. `--help` only prints.
    """
    if "--help" in sys.argv or "-h" in sys.argv:
        print(help_text(config_class, sys.argv[0], sys.modules[main.__module__].__doc__, default))
        return
    try:
        main(config_from_argv(config_class, sys.argv[1:], default))
        return
    except Exception as error:  # noqa: BLE001, it is shown, and the process ends
        text = f"error: {error}\n" if isinstance(error, (*USER_ERRORS, FloatingPointError)) else traceback.format_exc()
        if guard.first_to_fail(error):
            sys.stderr.write(text)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)  # without waiting for requests to the judge that are still in flight: the other ranks wait for this one


def report_derived(title, config, samples, per_step, steps, more=None):
    """Prints the numbers that follow from a config, before the first step, so that a wrong one is seen at once."""
    ranks = distributed.world_size()
    numbers = {"samples": samples, "steps": steps, "samples a step": f"{per_step} ({per_step // ranks} on each rank)",
               "gradient accumulation": -(-per_step // ranks // config.per_device_train_batch_size)} | (more or {})
    print0("\n".join([title, *(f"  {name:<26}{value}" for name, value in numbers.items())]))
