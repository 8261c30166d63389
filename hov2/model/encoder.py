"""A prompt for the decoder: its media go through the frozen towers once."""

from dataclasses import dataclass

import torch

from hov2.model.versions import media_model_of


@dataclass
class Prompt:
    """A prompt ready for the decoder: token ids, 3-D positions and the towers' outputs for the media tokens among them.

    The token embeddings are looked up at each forward pass, since they are trained; the towers are frozen, so theirs
    are not.
    """

    ids: torch.Tensor  # (P,)
    position_ids: torch.Tensor  # (3, P): temporal, height, width
    visual: torch.Tensor | None  # (visual tokens, D)
    audio: torch.Tensor | None  # (audio tokens, D)

    @property
    def next_position(self):
        """The position of the first token after the prompt, the same on all three axes."""
        return self.position_ids.max() + 1


class Encoder:
    """Turns `data.Inputs` into a `Prompt`, running each tower once per clip.

    `cache_size` clips' tower outputs are kept (the first ones seen stay), exact because the towers are frozen;
    `known[media_key]` tells `data.InputMaker` that a clip need not be decoded again.
    """

    def __init__(self, thinker, device, cache_size=0):
        self.thinker, self.device, self.cache_size = thinker, device, cache_size
        self.known, self._features = {}, {}

    @torch.no_grad()
    def __call__(self, inputs):
        """Inputs (CPU tensors) -> Prompt on the device. Tower outputs equal those of transformers' own forward."""
        if inputs.media_key in self._features:
            visual, audio = self._features[inputs.media_key]
        else:
            visual, audio = self._visual(inputs), self._audio(inputs)
            if len(self._features) < self.cache_size:
                self._features[inputs.media_key] = visual, audio
                self.known[inputs.media_key] = inputs.shape
        return Prompt(self._send(inputs.prompt_ids), self._send(self._positions(inputs)), visual, audio)

    def _send(self, tensor):
        """`tensor` on the device; a GPU copies it from pinned memory while this process goes on."""
        pinned = tensor.pin_memory() if self.device.type == "cuda" else tensor
        return pinned.to(self.device, non_blocking=True)

    def _visual(self, inputs):
        if inputs.pixel_values is None:
            return None
        model = media_model_of(self.thinker)
        features = model.get_image_features if inputs.shape.visual_kind == "image" else model.get_video_features
        output = features(self._send(inputs.pixel_values), inputs.shape.grid_thw.to(self.device))
        return output.pooler_output[0]

    def _audio(self, inputs):
        if inputs.mel is None:
            return None
        model = media_model_of(self.thinker)
        mel = self._send(inputs.mel).to(model.audio_tower.dtype)[None]
        mask = torch.ones(mel.shape[0], mel.shape[2], dtype=torch.long, device=self.device)
        return model.get_audio_features(mel, mask).last_hidden_state

    def _positions(self, inputs):
        """3-D rotary positions (3, P). On the CPU: transformers walks over the tokens in Python."""
        shape, ids = inputs.shape, inputs.prompt_ids[None]
        video = shape.grid_thw if shape.visual_kind == "video" else None
        positions, _ = media_model_of(self.thinker).get_rope_index(
            ids,
            shape.grid_thw if shape.visual_kind == "image" else None,
            video,
            torch.ones_like(ids),
            shape.interleaved,
            torch.tensor([shape.mel_frames]) if shape.mel_frames else None,
            torch.tensor([shape.second_per_grid]) if video is not None else None,
        )
        return positions[:, 0]
