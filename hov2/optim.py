"""The optimiser and its learning rate: AdamW, a schedule by name, gradients clipped over all ranks."""

import math

import torch
from torch.distributed.tensor import DTensor


def make_optimizer(policy, config):
    """AdamW over the parameters that are trained, with the config's betas and weight decay."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=config.learning_rate, betas=(config.adam_beta1, config.adam_beta2),
                             weight_decay=config.weight_decay)


def learning_rate(update, total_updates, peak, schedule="linear", warmup_steps=0):
    """Learning rate of update number `update` (from 0) of `total_updates`.

    Linear warm-up over `warmup_steps` updates, then `linear` to 0, `cosine` to 0, or `constant`.
    """
    if update < warmup_steps:
        return peak * (update + 1) / (warmup_steps + 1)
    progress = (update - warmup_steps) / max(1, total_updates - warmup_steps)
    if schedule == "linear":
        return peak * (1.0 - progress)
    if schedule == "cosine":
        return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak


def clip_gradients(policy, max_norm):
    """Clips the gradients' global norm to `max_norm`; returns the norm before clipping, a plain tensor."""
    norm = torch.nn.utils.clip_grad_norm_([p for p in policy.parameters() if p.requires_grad], max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def update(policy, optimizer, rate, max_grad_norm):
    """Clips, steps and clears the gradients; returns the norm before clipping, a float.

    A norm that is not finite, the same on all ranks, skips the step: weights and optimiser stay as they are.
    """
    norm = clip_gradients(policy, max_grad_norm).item()  # the update's one wait for the device
    if math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
