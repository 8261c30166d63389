"""The optimiser and its learning rate: AdamW, a schedule by name, gradients clipped over all ranks."""

import math

import torch
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from hov2.distributed import local

MOMENTS = ("exp_avg", "exp_avg_sq")  # torch's names for AdamW's two states


def make_optimizer(policy, config):
    """AdamW over the parameters that are trained, with the config's betas and weight decay."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    settings = {"lr": config.learning_rate, "betas": (config.adam_beta1, config.adam_beta2),
                "weight_decay": config.weight_decay}
    if config.optimizer_states == "float32":
        on_cuda = trained[0].device.type == "cuda"  # one kernel: the others take copies of all weights for a moment
        return torch.optim.AdamW(trained, fused=on_cuda, **settings)
    return RestingAdamW(trained, rest=config.optimizer_states, **settings)


class RestingAdamW(torch.optim.Optimizer):
    """AdamW whose moments rest in little memory, and are float32 only while their own parameter is updated.

    `rest` "cpu": float32 in the host's memory. The same numbers as torch's AdamW, but each step moves 16 bytes a
    parameter between host and device.
    `rest` "bfloat16": half the memory, approximate. A moment is kept to 8 bits; which way it is rounded is drawn, so
    that it is right on average (rounded to the nearest, a second moment at beta2 0.999 could never fall). The draws
    come from the update's number alone; sharded otherwise, a weight gets other draws.
    """

    def __init__(self, parameters, rest, **settings):
        super().__init__(parameters, settings)
        self.rest = rest

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient; `closure` must be None."""
        for group in self.param_groups:
            for number, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    self._update(parameter, group, number)

    def _update(self, parameter, group, number):
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        if not state:
            kind = {"device": "cpu"} if self.rest == "cpu" else {"dtype": torch.bfloat16}
            state |= {"step": torch.tensor(0.0), **{name: torch.zeros_like(parameter, **kind) for name in MOMENTS}}
        weight = local(parameter)
        first, second = (local(state[name]).to(weight.device, weight.dtype) for name in MOMENTS)
        adamw([weight], [local(parameter.grad)], [first], [second], [], [state["step"]], foreach=False, amsgrad=False,
              beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=1e-8, maximize=False)
        generator = torch.Generator(weight.device).manual_seed(int(state["step"]) << 20 | number)
        for name, moment in zip(MOMENTS, (first, second)):
            local(state[name]).copy_(moment if self.rest == "cpu" else round_at_random(moment, generator))

    def load_state_dict(self, state_dict):
        """Takes the moments as they rest; torch's own would make them float32 on the parameters' device."""
        places = [i for group in state_dict["param_groups"] for i in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.state.update({p: state_dict["state"][i] for i, p in zip(places, parameters) if i in state_dict["state"]})


def round_at_random(values, generator):
    """float32 -> bfloat16, up or down with the chances that make it right on average; infinities and NaN stay."""
    noise = torch.randint(0, 1 << 16, values.shape, generator=generator, device=values.device, dtype=torch.int32)
    rounded = (values.view(torch.int32) + noise & -1 << 16).view(torch.float32)  # bfloat16 is float32's upper half
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)


def learning_rate(update, total_updates, peak, schedule="linear", warmup_steps=0):
    """Learning rate of update number `update` (from 0) of `total_updates`.

    Linear warm-up over `warmup_steps` updates, then `linear` to 0, `cosine` to 0, or `constant`.
    """
    if update < warmup_steps:
        return peak * (update + 1) / (warmup_steps + 1)
    progress = (update - warmup_steps) / max(1, total_updates - warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak * {"linear": 1.0 - progress, "cosine": cosine, "constant": 1.0}[schedule]


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
