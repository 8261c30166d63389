"""What differs between transformers 5.17 and 5.23, and nothing else of hov2 knows.

Since 5.21 decoder and towers are in `thinker.model`; before that the thinker has the towers itself, and its `model` is
the decoder. The names of parameters differ likewise: `weights.thinker_name` gives the newer ones.
"""


def decoder_of(thinker):
    """The decoder: embeddings, layers and final norm, without the head."""
    return getattr(thinker.model, "language_model", thinker.model)


def media_model_of(thinker):
    """The module that has the towers (`visual`, `audio_tower`) and the functions that use them."""
    return thinker.model if hasattr(thinker.model, "visual") else thinker


def checkpoint_activations(thinker, on):
    """Whether the decoder's layers compute their activations again in the backward pass instead of keeping them."""
    kind = "activation" if hasattr(thinker, "activation_checkpointing_enable") else "gradient"
    if on:
        getattr(thinker, f"{kind}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(thinker, f"{kind}_checkpointing_disable")()
