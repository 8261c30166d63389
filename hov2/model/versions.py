"""What differs between transformers 5.17 and 5.23, and nothing else of hov2 knows.

Since 5.21 decoder and towers are in `thinker.model`; before that the thinker has the towers itself, and its `model` is
the decoder. The names of parameters differ likewise: `weights.thinker_name` gives the newer ones.
"""

from torch import nn


def decoder_of(thinker: nn.Module) -> nn.Module:
    """Return the decoder: embeddings, layers and final norm, without the head."""
    return getattr(thinker.model, "language_model", thinker.model)


def media_model_of(thinker: nn.Module) -> nn.Module:
    """Return the module that has the towers (`visual`, `audio_tower`) and the functions that use them."""
    return thinker.model if hasattr(thinker.model, "visual") else thinker


def checkpoint_activations(thinker: nn.Module, on: bool) -> None:
    """Set whether the decoder's layers compute their activations again in the backward pass instead of keeping them."""
    kind = "activation" if hasattr(thinker, "activation_checkpointing_enable") else "gradient"
    if on:
        enable = getattr(thinker, f"{kind}_checkpointing_enable")
        enable({"use_reentrant": False})
    else:
        disable = getattr(thinker, f"{kind}_checkpointing_disable")
        disable()
