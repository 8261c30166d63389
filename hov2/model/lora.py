"""Adapters of low rank on the decoder's linear layers, trained instead of its weights (Hu et al., 2021)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hov2.config import ConfigError, LoRAConfig
from hov2.model.versions import decoder_of
from hov2.model.weights import fill, whole


class LoRALinear(nn.Module):
    """A frozen linear layer with a trained correction of low rank: W x + b + alpha / rank * B A x (Hu et al., 2021).

    It has the names of the layer that it replaces, `weight` and `bias`, and adds `lora_a` (rank, in), `lora_b` (out,
    rank), float32. B begins at 0: the layer then does what it did before.
    """

    on = True  # of all layers alike: `adapters_off`

    def __init__(self, linear: nn.Linear, config: LoRAConfig):
        super().__init__()
        device = linear.weight.device
        self.weight = linear.weight
        self.bias = linear.bias
        self.lora_a = nn.Parameter(torch.empty(config.rank, linear.in_features, device=device))
        self.lora_b = nn.Parameter(torch.empty(linear.out_features, config.rank, device=device))
        self.scale = config.alpha / config.rank

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        rows = hidden.flatten(0, -2)
        out = nn.functional.linear(rows, self.weight, self.bias)
        self.correct(out, rows)
        return out.view(*hidden.shape[:-1], -1)

    def correct(self, out: Tensor, rows: Tensor) -> None:
        """Add the correction for `rows` (N, in) to `out` (N, out), in place: two kernels."""
        if self.on:
            out.addmm_(rows @ self.lora_a.T, self.lora_b.T, alpha=self.scale)

    def merged_weight(self) -> Tensor:
        """Return the weight with the correction in it, whole, in float32; all ranks call it."""
        return whole(self.weight).float() + self.scale * (whole(self.lora_b) @ whole(self.lora_a))

    def start(self, generator: torch.Generator) -> None:
        """Set A as torch begins a linear layer, drawn whole on every rank, so that all agree on it, and B to 0."""
        first = torch.empty(self.lora_a.shape)
        fill(self.lora_a, nn.init.kaiming_uniform_(first, a=5**0.5, generator=generator))
        nn.init.zeros_(self.lora_b)


def add_lora(thinker: nn.Module, config: LoRAConfig) -> None:
    """Freeze the thinker and give the decoder's linear layers named in `config.target_modules` their LoRALinear."""
    thinker.requires_grad_(False)
    layers = []  # (module, the name in it, linear layer)
    for parent in decoder_of(thinker).layers.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                layers.append((parent, name, child))
    known = {name for _, name, _ in layers}
    if not known.issuperset(config.target_modules):
        raise ConfigError(f"lora.target_modules: expected some of {sorted(known)}, got {config.target_modules}")
    for parent, name, child in layers:
        if name in config.target_modules:
            setattr(parent, name, LoRALinear(child, config))


@contextmanager
def adapters_off() -> Iterator[None]:
    """Inside, a model with LoRA is the one that it began as; nothing changes for one without."""
    LoRALinear.on = False
    try:
        yield
    finally:
        LoRALinear.on = True
