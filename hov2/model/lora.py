"""Adapters of low rank on the decoder's linear layers, trained instead of its weights (Hu et al., 2021)."""

from contextlib import contextmanager

import torch
from torch import nn

from hov2.config import ConfigError
from hov2.model.versions import decoder_of
from hov2.model.weights import fill, whole


class LoRALinear(nn.Module):
    """A frozen linear layer with a trained correction of low rank: W x + b + alpha / rank * B A x (Hu et al., 2021).

    It has the names of the layer that it replaces, `weight` and `bias`, and adds `lora_a` (rank, in), `lora_b` (out,
    rank), float32. B begins at 0: the layer then does what it did before.
    """

    on = True  # of all layers alike: `adapters_off`

    def __init__(self, linear, config):
        super().__init__()
        self.weight, self.bias, device = linear.weight, linear.bias, linear.weight.device
        self.lora_a = nn.Parameter(torch.empty(config.rank, linear.in_features, device=device))
        self.lora_b = nn.Parameter(torch.empty(linear.out_features, config.rank, device=device))
        self.scale = config.alpha / config.rank

    def forward(self, x):
        """(..., in) -> (..., out)."""
        rows = x.flatten(0, -2)
        out = nn.functional.linear(rows, self.weight, self.bias)
        self.correct(out, rows)
        return out.view(*x.shape[:-1], -1)

    def correct(self, out, rows):
        """Adds the correction for `rows` (N, in) to `out` (N, out), in place: two kernels."""
        if self.on:
            out.addmm_(rows @ self.lora_a.T, self.lora_b.T, alpha=self.scale)

    def merged_weight(self):
        """The weight with the correction in it, whole, in float32; all ranks call it."""
        return whole(self.weight).float() + self.scale * (whole(self.lora_b) @ whole(self.lora_a))

    def start(self, generator):
        """A as torch begins a linear layer, drawn whole on every rank, so that all agree on it; B is 0."""
        first = torch.empty(self.lora_a.shape)
        fill(self.lora_a, nn.init.kaiming_uniform_(first, a=5**0.5, generator=generator))
        nn.init.zeros_(self.lora_b)


def add_lora(thinker, config):
    """Freezes the thinker and gives the decoder's linear layers named in `config.target_modules` their LoRALinear."""
    thinker.requires_grad_(False)
    layers = [(parent, name, child) for parent in decoder_of(thinker).layers.modules()
              for name, child in parent.named_children() if isinstance(child, nn.Linear)]
    known = {name for _, name, _ in layers}
    if not known.issuperset(config.target_modules):
        raise ConfigError(f"lora.target_modules: expected some of {sorted(known)}, got {config.target_modules}")
    for parent, name, child in layers:
        if name in config.target_modules:
            setattr(parent, name, LoRALinear(child, config))


@contextmanager
def adapters_off():
    """Inside, a model with LoRA is the one that it began as; nothing changes for one without."""
    LoRALinear.on = False
    try:
        yield
    finally:
        LoRALinear.on = True
