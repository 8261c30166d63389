"""The optimiser and its learning rate: AdamW, a schedule by name, gradients clipped over all ranks."""

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from hov2.config import TrainConfig
from hov2.distributed import local


def make_optimizer(policy: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over the parameters that are trained, with the config's betas and weight decay."""
    trained = trained_parameters(policy)
    settings = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.weight_decay,
    }
    if config.optimizer_states == "cpu":
        return CPUStatesAdamW(trained, **settings)
    on_cuda = trained[0].device.type == "cuda"  # one kernel: the others take copies of all weights for a moment
    return torch.optim.AdamW(trained, fused=on_cuda, **settings)


def trained_parameters(policy: nn.Module) -> list[nn.Parameter]:
    """The parameters that get gradients."""
    return [parameter for parameter in policy.parameters() if parameter.requires_grad]


class CPUStatesAdamW(torch.optim.Optimizer):
    """AdamW with moments stored on the CPU, which visit the device while their own parameter is updated.

    The numbers are those of torch's AdamW, but each step moves 16 bytes a parameter between host and device. Beside a
    GPU the moments are in pinned memory, which it copies faster, and which PyTorch rounds up to a power of two.
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float, betas: tuple[float, float], weight_decay: float):
        super().__init__(parameters, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient; `closure` must be None."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: nn.Parameter, group: dict) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            for name in ("exp_avg", "exp_avg_sq"):  # torch's names for AdamW's moments
                state[name] = torch.zeros_like(parameter, device="cpu", pin_memory=parameter.is_cuda)
        weight = local(parameter)
        first_at_rest = local(state["exp_avg"])
        second_at_rest = local(state["exp_avg_sq"])
        first = first_at_rest.to(weight.device)  # on a CPU the same tensor
        second = second_at_rest.to(weight.device)
        beta1, beta2 = group["betas"]
        adamw(
            [weight],
            [local(parameter.grad)],
            [first],
            [second],
            [],
            [state["step"]],
            foreach=False,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=1e-8,
            maximize=False,
        )
        first_at_rest.copy_(first)
        second_at_rest.copy_(second)

    def load_state_dict(self, state_dict: dict) -> None:
        """Take the moments as they are; torch's own would move them to the parameters' device."""
        for group, saved_group in zip(self.param_groups, state_dict["param_groups"]):
            for parameter, number in zip(group["params"], saved_group["params"]):
                if number in state_dict["state"]:
                    self.state[parameter] = state_dict["state"][number]


def learning_rate(
    update: int, total_updates: int, peak: float, schedule: str = "linear", warmup_steps: int = 0
) -> float:
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
    if schedule == "constant":
        return peak
    raise ValueError(f"unknown schedule {schedule!r}; known: linear, cosine, constant")


def clip_gradients(policy: nn.Module, max_norm: float) -> Tensor:
    """Clip the gradients' global norm to `max_norm`; return the norm before clipping, a plain tensor."""
    norm = nn.utils.clip_grad_norm_(trained_parameters(policy), max_norm)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    return norm


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give all parameters the learning rate of the update that comes next."""
    for group in optimizer.param_groups:
        group["lr"] = rate
