"""A prompt for the decoder: its media go through the frozen towers once."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hov2.model.versions import media_model_of


@dataclass
class Prompt:
    """A prompt ready for the decoder: token ids, 3-D positions and the towers' outputs for the media tokens among them.

    The token embeddings are looked up at each forward pass, since they are trained; the towers are frozen, so theirs
    are not.
    """

    ids: Tensor  # (P,)
    position_ids: Tensor  # (3, P): temporal, height, width
    visual: Tensor | None  # (visual tokens, D)
    audio: Tensor | None  # (audio tokens, D)

    @property
    def next_position(self) -> Tensor:
        """The position of the first token after the prompt, the same on all three axes."""
        return self.position_ids.max() + 1


class Encoder:
    """Turns `data.Inputs` into a `Prompt`, running each tower once per clip.

    `cache_size` clips' tower outputs are kept (the first ones seen stay), exact because the towers are frozen;
    `known[media_key]` tells `data.InputMaker` that a clip need not be decoded again.
    """

    def __init__(self, thinker: nn.Module, device: torch.device, cache_size: int = 0):
        self.thinker = thinker
        self.device = device
        self.cache_size = cache_size
        self.known = {}
        self._features = {}

    @torch.no_grad()
    def __call__(self, inputs: Any) -> Prompt:
        """Turn `data.Inputs` (CPU tensors) into a Prompt on the device.

        The towers' outputs equal those of transformers' own forward.
        """
        if inputs.media_key in self._features:
            visual, audio = self._features[inputs.media_key]
        else:
            visual = self._visual(inputs)
            audio = self._audio(inputs)
            if len(self._features) < self.cache_size:
                self._features[inputs.media_key] = visual, audio
                self.known[inputs.media_key] = inputs.shape
        return Prompt(self._send(inputs.prompt_ids), self._send(self._positions(inputs)), visual, audio)

    def _send(self, tensor: Tensor) -> Tensor:
        """Return `tensor` on the device; a GPU copies it from pinned memory while this process goes on."""
        pinned = tensor.pin_memory() if self.device.type == "cuda" else tensor
        return pinned.to(self.device, non_blocking=True)

    def _visual(self, inputs: Any) -> Tensor | None:
        """Return the vision tower's outputs for the image or video: (visual tokens, D)."""
        if inputs.pixel_values is None:
            return None
        model = media_model_of(self.thinker)
        run_tower = model.get_image_features if inputs.shape.visual_kind == "image" else model.get_video_features
        output = run_tower(self._send(inputs.pixel_values), inputs.shape.grid_thw.to(self.device))
        return output.pooler_output[0]

    def _audio(self, inputs: Any) -> Tensor | None:
        """Return the audio tower's outputs for the sound: (audio tokens, D)."""
        if inputs.input_features is None:
            return None
        model = media_model_of(self.thinker)
        input_features = self._send(inputs.input_features).to(model.audio_tower.dtype)[None]
        mask = torch.ones(input_features.shape[0], input_features.shape[2], dtype=torch.long, device=self.device)
        return model.get_audio_features(input_features, mask).last_hidden_state

    def _positions(self, inputs: Any) -> Tensor:
        """Return 3-D rotary positions (3, P). On the CPU: transformers walks over the tokens in Python."""
        shape = inputs.shape
        ids = inputs.prompt_ids[None]
        is_video = shape.visual_kind == "video"
        positions, _ = media_model_of(self.thinker).get_rope_index(
            ids,
            shape.grid_thw if shape.visual_kind == "image" else None,
            shape.grid_thw if is_video else None,
            torch.ones_like(ids),
            shape.interleaved,
            torch.tensor([shape.mel_frames]) if shape.mel_frames else None,
            torch.tensor([shape.second_per_grid]) if is_video else None,
        )
        return positions[:, 0]
