"""Checkpoints to resume from, and exports to use elsewhere.

`checkpoint-N/` holds the trained weights and the optimiser's state, sharded (torch.distributed.checkpoint), and
`state.json` with what the loop needs to go on: the number of steps done and the loader's position. Random numbers need
no state: they come from (seed, step, sample). A checkpoint is written under another name and renamed when it is
complete.
"""

import json
import shutil
from pathlib import Path

import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

from hov2.distributed import barrier, rank
from hov2.model import source_folder

UNFINISHED = ".unfinished"  # ending of what is being written
TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)


def save_checkpoint(output_dir, step, policy, optimizer, state):
    """Writes `output_dir/checkpoint-{step}`; all ranks call it. `state` is a small JSON-able dict."""
    folder = Path(output_dir) / f"checkpoint-{step}"
    unfinished = folder.with_name(folder.name + UNFINISHED)
    if rank() == 0:
        for old in (folder, *Path(output_dir).glob(f"checkpoint-*{UNFINISHED}")):
            shutil.rmtree(old, ignore_errors=True)
        unfinished.mkdir(parents=True)
        (unfinished / "state.json").write_text(json.dumps(state))
    barrier()
    model, optim = get_state_dict(policy, optimizer, options=TRAINED)
    dcp.save({"model": model, "optim": optim}, checkpoint_id=unfinished)
    barrier()
    if rank() == 0:
        unfinished.rename(folder)
    barrier()


def newest_checkpoint(output_dir):
    """The finished checkpoint with the most steps in `output_dir`, or None."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return max(found, key=lambda p: int(p.name.split("-")[1]), default=None)


def load_checkpoint(folder, policy, optimizer):
    """Loads weights and optimiser state in place, on any number of ranks; returns the saved `state`."""
    model, optim = get_state_dict(policy, optimizer, options=TRAINED)  # also makes the optimiser's state to load into
    dcp.load({"model": model, "optim": optim}, checkpoint_id=folder)
    set_state_dict(policy, optimizer, model_state_dict=model, optim_state_dict=optim, options=TRAINED)
    return json.loads((Path(folder) / "state.json").read_text())


def save_if_due(config, steps_done, steps, policy, optimizer, loader, held_out, stopping=False):
    """A checkpoint after every `save_steps` steps, after the last one, and where the run stops early."""
    if stopping or steps_done == steps or (config.save_steps and steps_done % config.save_steps == 0):
        state = {"step": steps_done, "loader": loader.state_dict(), "best": held_out.best}
        save_checkpoint(config.output_dir, steps_done, policy, optimizer, state)


def resume(config, policy, optimizer, loader, held_out):
    """With `config.resume`, takes up the newest checkpoint of `output_dir`; returns the number of steps done.

    Without it, or where there is none, the run begins anew, and what an earlier one left there is set aside.
    """
    folder = newest_checkpoint(config.output_dir) if config.resume else None
    if folder is None:
        if rank() == 0:
            set_aside(config.output_dir)
        barrier()
        return 0
    state = load_checkpoint(folder, policy, optimizer)
    loader.load_state_dict(state["loader"])
    held_out.best = state["best"]
    if rank() == 0:
        print(f"resumed from {folder}", flush=True)
    return state["step"]


def set_aside(output_dir):
    """Moves an earlier run's checkpoints and logs to `output_dir/earlier-N`, so that two runs never mix."""
    output_dir = Path(output_dir)
    found = [path for pattern in ("checkpoint-*", "best", "*.jsonl") for path in output_dir.glob(pattern)]
    if found:
        number = 1 + sum(1 for _ in output_dir.glob("earlier-*"))
        target = output_dir / f"earlier-{number}"
        target.mkdir()
        for path in found:
            path.rename(target / path.name)
        print(f"an earlier run's checkpoints and logs are now in {target}", flush=True)


def export(policy, folder, name, dtype):
    """Writes the policy as a Hugging Face folder like the one it came from: what went in comes out.

    `name` is the model that the run began with. A thinker gives a thinker's folder; a full Qwen2.5-Omni checkpoint
    gives a full one, its talker and vocoder copied. Weights are written as `dtype`; tokenizer and other small files are
    copied. All ranks call it.
    """
    folder, source = Path(folder), source_folder(name)
    full = get_model_state_dict(policy, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank() == 0:
        weights = {key.removeprefix("thinker."): value.to(dtype) for key, value in full.items()}
        unfinished = folder.with_name(folder.name + UNFINISHED)
        shutil.rmtree(unfinished, ignore_errors=True)
        if is_full_omni(source):
            _write_into_full(weights, unfinished, source)
        else:
            policy.thinker.save_pretrained(unfinished, state_dict=weights)
            _edit_json(unfinished / "config.json", dtype=str(dtype).removeprefix("torch."))
        for path in source.iterdir():
            weights_file = path.name.endswith((".safetensors", ".index.json", ".bin"))
            if path.is_file() and not weights_file and not (unfinished / path.name).exists():
                shutil.copy(path, unfinished / path.name)
        shutil.rmtree(folder, ignore_errors=True)  # only now: it may be the very folder that the run began with
        unfinished.rename(folder)
    barrier()


def is_full_omni(folder):
    """Whether the folder holds a full Qwen2.5-Omni (thinker, talker, vocoder) rather than a thinker."""
    return json.loads((Path(folder) / "config.json").read_text())["model_type"] == "qwen2_5_omni"


def hub_key(name):
    """A thinker parameter's name in the published checkpoints: `model.language_model.X` is `model.X` there, etc."""
    for inside, outside in (("model.language_model.", "model."), ("model.visual.", "visual."),
                            ("model.audio_tower.", "audio_tower.")):
        if name.startswith(inside):
            return outside + name.removeprefix(inside)
    return name


def _edit_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values, indent=2) + "\n")


def _write_into_full(weights, folder, source):
    """Copies the full checkpoint file by file, with the thinker's tensors replaced."""
    folder.mkdir(parents=True)
    left = {f"thinker.{hub_key(name)}": value for name, value in weights.items()}
    for path in sorted(source.glob("*.safetensors")):
        tensors = load_file(path)
        tensors.update({key: left.pop(key).contiguous() for key in list(left) if key in tensors})
        save_file(tensors, folder / path.name, metadata={"format": "pt"})
    if left:
        raise ValueError(f"{source}: the checkpoint has no place for {next(iter(left))}")
    for index in source.glob("*.index.json"):
        shutil.copy(index, folder / index.name)
