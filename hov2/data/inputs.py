"""From a sample to model inputs: token ids, patches and mel frames on the CPU, by `InputMaker`."""

from dataclasses import astuple, dataclass, field, replace

import torch

from hov2.data.formats import DataError
from hov2.data.media import MediaError, read_media
from hov2.data.media_cache import MediaCache
from hov2.data.samples import SkipSample
from hov2.data.sound import log_mel
from hov2.data.video import patchify
from hov2.prompts import render

END_OF_TURN = "<|im_end|>"
POSITIONS_PER_SECOND, SECONDS_PER_CHUNK = 25, 2.0  # of the time-aligned layout; Qwen2.5-Omni's config


@dataclass(frozen=True)
class MediaShape:
    """What a prompt's token ids and positions need to know about its media, without the pixels and the sound."""

    visual_kind: str | None = None  # "video" | "image"
    grid_thw: torch.Tensor | None = None  # (1, 3) int64: frames / 2, height / 14, width / 14
    second_per_grid: float | None = None  # of a video: seconds between two of its grids (2 / sample_fps)
    mel_frames: int = 0  # 100 a second; 0: no sound
    interleaved: bool = False  # the sound is laid between the video's tokens, in time
    audio_cut: float = 0.0  # seconds of sound left out because they are beyond the audio tower's 300

    @property
    def visual_tokens(self):
        """Tokens of the image or video: 2 x 2 patches each."""
        return 0 if self.grid_thw is None else int(self.grid_thw.prod()) // 4

    @property
    def audio_tokens(self):
        """Tokens of the sound, 25 a second, as Qwen2.5-Omni counts them."""
        return max(0, ((self.mel_frames - 1) // 2 + 1 - 2) // 2 + 1)


@dataclass
class Inputs:
    """A prompt as CPU tensors. `pixel_values` and `mel` are None where there is no such medium, or where the model
    already has the encoding of `media_key`."""

    prompt_ids: torch.Tensor  # (P,) int64
    shape: MediaShape
    media_key: tuple  # files and media settings; () for text alone
    pixel_values: torch.Tensor | None = None  # (patches, 1176) float32
    mel: torch.Tensor | None = None  # (128, mel frames) float32


def media_key(sample, media_config):
    """What a clip's encoding depends on: its files and how they are read; () for text alone."""
    return (tuple(sample.paths.items()), *astuple(media_config)) if sample.paths else ()


@dataclass
class InputMaker:
    """Reads a sample's media and writes its prompt, with a run's settings: `maker(sample) -> Inputs`.

    `known` maps a media key to the MediaShape of a clip whose encoding the model keeps: such a clip isn't read again.
    One that `cache` has isn't decoded again.
    """

    tokenizer: object
    prompts: object
    media_config: object
    max_prompt_length: int | None = None
    on_long_prompt: str = "error"
    known: dict = field(default_factory=dict)  # of model.Encoder
    cache: MediaCache | None = None

    def __call__(self, sample):
        """A prompt of more than `max_prompt_length` tokens is, by `on_long_prompt`, a DataError ("error"), a SkipSample
        ("skip"), or tried again with half the frames until it fits and skipped if it never does ("fewer_frames").

        Raises MediaError for a file that can't be used.
        """
        settings, limit = self.media_config, self.max_prompt_length
        while True:
            key = media_key(sample, settings)
            shape, pixel_values, mel = ((self.known[key], None, None) if key in self.known else
                                        load_media(sample.paths, settings, self.cache))
            ids = _prompt_ids(sample, self.tokenizer, self.prompts, shape)
            if limit is None or len(ids) <= limit:
                return Inputs(torch.tensor(ids), shape, key, pixel_values, mel)
            message = f"sample {sample.id}: the prompt has {len(ids)} tokens, max_prompt_length is {limit}"
            if self.on_long_prompt == "error":
                raise DataError(f'{message} (on_long_prompt: "skip" or "fewer_frames" would go on)')
            frames = 2 * int(shape.grid_thw[0, 0]) if shape.visual_kind == "video" else 0
            if self.on_long_prompt == "skip" or frames <= 2 or settings.max_frames <= 2:
                raise SkipSample(message)
            settings = replace(settings, max_frames=max(2, min(frames, settings.max_frames) // 4 * 2))


def load_media(paths, settings, cache=None):
    """(MediaShape, patches or None, mel or None) of a sample's `paths`, read as `settings` (MediaConfig) say,
    or taken from `cache` (a MediaCache).

    Raises MediaError for a file that can't be used, or that holds something else than its place in `paths` says.
    """
    shape, pixel_values, mel = {}, None, None
    for kind, path in paths.items():
        read = cache.read if cache else read_media
        media = read(path, fps=settings.fps, max_frames=settings.max_frames, min_pixels=settings.min_pixels,
                     max_pixels=settings.max_pixels)
        found = kind_of(media)
        if kind != found and not (kind == "audio" and media.audio is not None):
            raise MediaError(path, f"expected {kind}, found {found}")
        if kind != "audio":
            pixel_values, grid_thw = patchify(media.frames)
            shape |= {"visual_kind": kind, "grid_thw": grid_thw}
        if kind == "video":
            shape["second_per_grid"] = 2 / media.sample_fps
        if kind != "image" and media.audio is not None:
            mel = log_mel(media.audio)
            shape |= {"mel_frames": mel.shape[1], "audio_cut": media.audio_cut}
        if kind == "audio" and MediaShape(**shape).audio_tokens == 0:
            raise MediaError(path, "the sound is shorter than one token of the audio tower (0.03 s)")
    if not MediaShape(**shape).audio_tokens:  # a video's blip too short for the tower is no sound
        shape["mel_frames"], mel = 0, None
    interleaved = settings.interleave_audio and "video" in paths and mel is not None
    return MediaShape(**shape, interleaved=interleaved), pixel_values, mel


def kind_of(media):
    """"video", "image" or "audio": what a Media is, by itself."""
    return "audio" if media.frames is None else "image" if media.sample_fps is None else "video"


def _prompt_ids(sample, tokenizer, prompts, shape):
    """Token ids of the chat up to the assistant's turn, each media placeholder once per token of its medium."""
    sample = replace(sample, has_sound="video" in sample.paths and shape.audio_tokens > 0)
    try:
        text = render(prompts.chat(sample), interleave_audio=shape.interleaved)
    except ValueError as error:  # a control token among the words
        raise DataError(f"sample {sample.id}: {error}") from None
    video, image, audio = (tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("VIDEO", "IMAGE", "AUDIO"))
    counts = {video: shape.visual_tokens, image: shape.visual_tokens, audio: shape.audio_tokens}
    runs = {token_id: [token_id] * count for token_id, count in counts.items()}
    if shape.interleaved:  # the one placeholder stands for both
        runs[video] = interleave(shape, video, audio)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return [i for token_id in ids for i in runs.get(token_id, [token_id])]


def interleave(shape, video_id, audio_id):
    """Token ids of a video with its sound in time order: for each 2 s the video's tokens, then the sound's.

    The chunks are those of transformers' Qwen2_5OmniProcessor.get_chunked_index and of the thinker's get_rope_index,
    computed with the latter's float32 numbers, so that tokens and positions agree: a chunk ends before the first token
    at or after its time, and where frames are more than 2 s apart that rule leaves chunks of a single token.
    """
    grids, height, width = shape.grid_thw[0].tolist()
    times = torch.arange(grids) * torch.tensor(shape.second_per_grid) * POSITIONS_PER_SECOND
    limit, chunk = int(POSITIONS_PER_SECOND * SECONDS_PER_CHUNK), 0
    tokens = [(i // limit, True) for i in range(shape.audio_tokens)]  # (chunk, whether it's sound)
    for at in times.long().repeat_interleave(height * width // 4).tolist():
        chunk += at >= (chunk + 1) * limit
        tokens.append((chunk, False))
    return [audio_id if sound else video_id for _, sound in sorted(tokens)]


def encode_solution(sample, tokenizer):
    """Token ids (C,) of what the assistant says in the cold start: the solution as it is written, then the end of turn.

    They decode to exactly that text, up to the Unicode normalisation (NFC) of Qwen's tokenizer.
    """
    ids = tokenizer(sample.solution, add_special_tokens=False).input_ids
    return torch.tensor([*ids, tokenizer.convert_tokens_to_ids(END_OF_TURN)])
