"""From a sample to model inputs: token ids, patches and mel frames on the CPU, by `InputMaker`."""

from collections import Counter
from dataclasses import astuple, dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hov2.config import SENSES, MediaConfig
from hov2.data.formats import DataError
from hov2.data.media import Media, MediaError, read_media
from hov2.data.samples import Sample, SkipSample
from hov2.data.sound import log_mel
from hov2.data.video import patchify
from hov2.prompts import Prompts, render

END_OF_TURN = "<|im_end|>"
POSITIONS_PER_SECOND, SECONDS_PER_CHUNK = 25, 2.0  # of the time-aligned layout; Qwen2.5-Omni's config


@dataclass(frozen=True)
class MediaShape:
    """What a prompt's token ids and positions need to know about its media, without the pixels and the sound."""

    visual_kind: str | None = None  # "video" | "image"
    grid_thw: Tensor | None = None  # (1, 3) int64: frames / 2, height / 14, width / 14
    second_per_grid: float | None = None  # of a video: seconds between two of its grids (2 / sample_fps)
    mel_frames: int = 0  # 100 a second; 0: no sound
    interleaved: bool = False  # the sound is laid between the video's tokens, in time
    audio_cut: float = 0.0  # seconds of sound left out because they are beyond the audio tower's 300
    audio_lost: bool = False  # the video has sound, none of which can be decoded

    @property
    def video_frames(self) -> int:
        """Frames of the video; 0 if there is none."""
        if self.visual_kind != "video":
            return 0
        return 2 * int(self.grid_thw[0, 0])

    @property
    def visual_tokens(self) -> int:
        """Tokens of the image or video: 2 x 2 patches each."""
        if self.grid_thw is None:
            return 0
        return int(self.grid_thw.prod()) // 4

    @property
    def audio_tokens(self) -> int:
        """Tokens of the sound, 25 a second, as Qwen2.5-Omni counts them."""
        after_convolution = (self.mel_frames - 1) // 2 + 1
        after_pooling = (after_convolution - 2) // 2 + 1
        return max(0, after_pooling)


@dataclass
class Inputs:
    """A prompt as CPU tensors. `pixel_values` and `input_features` are None where there is no such medium, or where
    the model already has the encoding of `media_key`."""

    prompt_ids: Tensor  # (P,) int64
    shape: MediaShape
    media_key: tuple  # files and media settings; () for text alone
    pixel_values: Tensor | None = None  # (patches, 1176) float32
    input_features: Tensor | None = None  # (128, mel frames) float32


def media_key(sample: Sample, settings: MediaConfig, senses: tuple[str, ...] = SENSES) -> tuple:
    """What a clip's encoding depends on: its files, how they are read and what is kept of them; () for text alone."""
    if not sample.paths:
        return ()
    return (tuple(sample.paths.items()), astuple(settings), senses)


@dataclass
class InputMaker:
    """Reads a sample's media and writes its prompt, with a run's settings: `maker(sample) -> Inputs`.

    `known` maps a media key to the MediaShape of a clip whose encoding the model keeps: such a clip isn't read again.
    `senses`: without "video" no picture, without "audio" no sound reaches the prompt, whatever the clip has.
    """

    tokenizer: PreTrainedTokenizerBase
    prompts: Prompts
    media_config: MediaConfig
    max_prompt_length: int | None = None
    on_long_prompt: str = "error"
    known: dict[tuple, MediaShape] = field(default_factory=dict)  # of model.Encoder
    senses: tuple[str, ...] = SENSES

    def __call__(self, sample: Sample) -> Inputs:
        """Return the sample's inputs, at most `max_prompt_length` tokens long.

        A longer prompt is, by `on_long_prompt`, a DataError ("error"), a SkipSample ("skip"), or tried again with half
        the frames until it fits and skipped if it never does ("fewer_frames"). Raises MediaError for a file that can't
        be used.
        """
        settings = self.media_config
        while True:
            inputs = self._inputs(sample, settings)
            length = len(inputs.prompt_ids)
            if self.max_prompt_length is None or length <= self.max_prompt_length:
                return inputs
            message = (
                f"sample {sample.id}: the prompt has {length} tokens, max_prompt_length is {self.max_prompt_length}"
            )
            if self.on_long_prompt == "error":
                raise DataError(f'{message} (on_long_prompt: "skip" or "fewer_frames" would go on)')
            frames = min(inputs.shape.video_frames, settings.max_frames)
            if self.on_long_prompt == "skip" or frames <= 2:
                raise SkipSample(message)
            half = frames // 4 * 2  # an even number
            settings = replace(settings, max_frames=max(2, half))

    def _inputs(self, sample: Sample, settings: MediaConfig) -> Inputs:
        """The sample's inputs, however long."""
        key = media_key(sample, settings, self.senses)
        if key in self.known:
            shape, pixel_values, input_features = self.known[key], None, None
        else:
            shape, pixel_values, input_features = load_media(sample.paths, settings, self.senses)
        prompt_ids = _prompt_ids(sample, self.tokenizer, self.prompts, shape)
        return Inputs(torch.tensor(prompt_ids), shape, key, pixel_values, input_features)


def load_media(
    paths: dict[str, str], settings: MediaConfig, senses: tuple[str, ...] = SENSES
) -> tuple[MediaShape, Tensor | None, Tensor | None]:
    """Read a sample's `paths` and return their shape, patches (or None) and mel frames (or None).

    Only what `senses` has, "video" (of an image, too) and "audio", is kept. Raises MediaError for a file that can't be
    used, or that holds something else than its place in `paths` says.
    """
    shape = MediaShape()
    pixel_values = None
    input_features = None
    for kind, path in paths.items():
        media = read_media(
            path,
            fps=settings.fps,
            max_frames=settings.max_frames,
            min_pixels=settings.min_pixels,
            max_pixels=settings.max_pixels,
        )
        _check_kind(kind, path, media)
        if kind != "audio" and "video" in senses:
            pixel_values, grid_thw = patchify(media.frames)
            shape = replace(shape, visual_kind=kind, grid_thw=grid_thw)
            if kind == "video":
                shape = replace(shape, second_per_grid=2 / media.sample_fps)
        if kind != "image" and "audio" in senses and media.audio is not None:
            input_features = log_mel(media.audio)
            shape = replace(shape, mel_frames=input_features.shape[1], audio_cut=media.audio_cut)
        if "audio" in senses and media.audio_lost:
            shape = replace(shape, audio_lost=True)
    if settings.interleave_audio and shape.visual_kind == "video" and input_features is not None:
        shape = replace(shape, interleaved=True)
    return shape, pixel_values, input_features


def _check_kind(kind: str, path: str, media: Media) -> None:
    """Raise MediaError unless the file holds a `kind`; a film will do where sound is wanted."""
    found = kind_of(media)
    has_the_sound = kind == "audio" and media.audio is not None
    if found != kind and not has_the_sound:
        raise MediaError(path, f"expected {kind}, found {found}")


def kind_of(media: Media) -> str:
    """What a Media is, by itself: "video", "image" or "audio"."""
    if media.frames is None:
        return "audio"
    if media.sample_fps is None:
        return "image"
    return "video"


def _prompt_ids(sample: Sample, tokenizer: PreTrainedTokenizerBase, prompts: Prompts, shape: MediaShape) -> list[int]:
    """Token ids of the chat up to the assistant's turn, each media placeholder once per token of its medium."""
    has_sound = "video" in sample.paths and shape.audio_tokens > 0
    present = [shape.visual_kind]  # what the senses have left
    if shape.audio_tokens > 0:
        present.append("audio")
    paths = {kind: path for kind, path in sample.paths.items() if kind in present}
    sample = replace(sample, paths=paths, has_sound=has_sound)
    try:
        text = render(prompts.chat(sample), interleave_audio=shape.interleaved)
    except ValueError as error:  # a control token among the words
        raise DataError(f"sample {sample.id}: {error}") from None
    video = tokenizer.convert_tokens_to_ids("<|VIDEO|>")
    image = tokenizer.convert_tokens_to_ids("<|IMAGE|>")
    audio = tokenizer.convert_tokens_to_ids("<|AUDIO|>")
    runs = {
        video: [video] * shape.visual_tokens,
        image: [image] * shape.visual_tokens,
        audio: [audio] * shape.audio_tokens,
    }
    if shape.interleaved:  # the one placeholder stands for both
        runs[video] = interleave(shape, video, audio)
    prompt_ids = []
    for token_id in tokenizer(text, add_special_tokens=False).input_ids:
        prompt_ids.extend(runs.get(token_id, [token_id]))
    return prompt_ids


def interleave(shape: MediaShape, video_id: int, audio_id: int) -> list[int]:
    """Token ids of a video with its sound in time order: for each 2 s the video's tokens, then the sound's.

    The chunks are those of transformers' Qwen2_5OmniProcessor.get_chunked_index and of the thinker's get_rope_index,
    computed with the latter's float32 numbers, so that tokens and positions agree: a chunk ends before the first token
    at or after its time, and where frames are more than 2 s apart that rule leaves chunks of a single token.
    """
    grids, height, width = shape.grid_thw[0].tolist()
    chunk_length = int(POSITIONS_PER_SECOND * SECONDS_PER_CHUNK)
    grid_positions = torch.arange(grids) * torch.tensor(shape.second_per_grid) * POSITIONS_PER_SECOND
    token_positions = grid_positions.long().repeat_interleave(height * width // 4)

    video_tokens = Counter()  # chunk -> how many
    chunk = 0
    for position in token_positions.tolist():
        if position >= (chunk + 1) * chunk_length:
            chunk += 1
        video_tokens[chunk] += 1
    audio_tokens = Counter(position // chunk_length for position in range(shape.audio_tokens))

    token_ids = []
    for chunk in range(max([*video_tokens, *audio_tokens]) + 1):
        token_ids += [video_id] * video_tokens[chunk]
        token_ids += [audio_id] * audio_tokens[chunk]
    return token_ids


def encode_solution(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Token ids (C,) of what the assistant says in the cold start: the solution as it is written, then the end of turn.

    They decode to exactly that text, up to the Unicode normalisation (NFC) of Qwen's tokenizer.
    """
    ids = tokenizer(sample.solution, add_special_tokens=False).input_ids
    return torch.tensor([*ids, tokenizer.convert_tokens_to_ids(END_OF_TURN)])
