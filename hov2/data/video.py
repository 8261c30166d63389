"""The pictures of a file: which frames to decode, at what size, and the patches that the vision tower takes."""

import itertools
import math
import warnings
from collections.abc import Iterable, Iterator

import av
import torch
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter
from torch import Tensor
from torch.nn.functional import interpolate

from hov2.data.errors import MediaError

PATCH = 14  # pixels, each way
MERGE = 2  # patches, each way, that become one token
TEMPORAL = 2  # frames in a patch
MIN_FRAMES = 4  # frames taken of a clip that has them, however short it is
MAX_ASPECT = 200
MAX_LOST = 0.01  # share of a video's packets that may be undecodable
MAX_REORDER = 16  # frames that a decoder may hold back to show others first, at most

_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
_STD = (0.26862954, 0.26130258, 0.27577711)

_NO_STAMPS = {
    "avi",
    "asf",
}  # containers without the times of showing: FFmpeg makes them up out of the order in the file


# --- sizes, choice of frames, patches ---------------------------------------------------------------------------------


def smart_resize(height: int, width: int, *, factor: int = 28, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Return the size (height, width), in multiples of `factor`, nearest to this one with `min_pixels` to `max_pixels`.

    From Qwen2-VL, where a thin picture can get a side of 0; here it gets `factor`, and may so be above `max_pixels`.
    Raises ValueError if one side is more than 200 times the other.
    """
    if max(height, width) / min(height, width) > MAX_ASPECT:
        raise ValueError(f"{width}x{height} pixels: one side is more than {MAX_ASPECT} times the other")
    new_height = max(factor, round(height / factor) * factor)
    new_width = max(factor, round(width / factor) * factor)
    if new_height * new_width > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / scale / factor) * factor)
        new_width = max(factor, math.floor(width / scale / factor) * factor)
    elif new_height * new_width < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * scale / factor) * factor
        new_width = math.ceil(width * scale / factor) * factor
    return new_height, new_width


def frame_indices(total: int, video_fps: float, fps: float, max_frames: int) -> list[int]:
    """Choose which of `total` frames at `video_fps` to keep for `fps` frames a second.

    An even number of indices, first and last frame included: at least 4 (if there are that many), at most `max_frames`.
    As qwen-omni-utils, but for a single frame, which it refuses and which gives [0, 0] here. Raises ValueError if
    `total` is less than 1 or `max_frames` less than 2.
    """
    if total < 1 or max_frames < TEMPORAL:
        raise ValueError(f"can't choose frames: {total} in the video, at most {max_frames} wanted")
    if total == 1:
        return [0] * TEMPORAL
    count = min(max(total / video_fps * fps, MIN_FRAMES), max_frames, total)
    count = math.floor(count / TEMPORAL) * TEMPORAL
    return torch.linspace(0, total - 1, count).round().long().tolist()  # rounds half to even


def patchify(frames: Tensor) -> tuple[Tensor, Tensor]:
    """Return frames, uint8 (T, 3, H, W) with sides in multiples of 28, as the vision tower takes them.

    These are patches, float32 (N, 3*2*14*14), and grid_thw, int64 (1, 3): N = t*h*w with t frame pairs of h rows and w
    columns of patches, the 2x2 patches of one token next to each other. An odd T (an image) gets its last frame twice.
    The same numbers, bit for bit, as transformers' Qwen2VLVideoProcessor without its resizing.
    """
    height, width = frames.shape[2:]
    if height % (PATCH * MERGE) or width % (PATCH * MERGE):
        raise ValueError(f"frames of {width}x{height} pixels: sides must be multiples of 28")
    if len(frames) % TEMPORAL:
        frames = torch.cat([frames, frames[-1:]])
    # transformers folds the scaling by 1/255 into mean and std; its rounding is part of being bit-exact
    mean = torch.tensor(_MEAN).mul(1 / (1 / 255)).view(3, 1, 1)
    std = torch.tensor(_STD).mul(1 / (1 / 255)).view(3, 1, 1)
    values = (frames.float() - mean) / std
    pairs = len(frames) // TEMPORAL
    rows = height // PATCH
    columns = width // PATCH
    values = values.view(pairs, TEMPORAL, 3, rows // MERGE, MERGE, PATCH, columns // MERGE, MERGE, PATCH)
    values = values.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)  # pair, the token's place, the patch's place in it; the pixels
    patches = values.reshape(pairs * rows * columns, 3 * TEMPORAL * PATCH * PATCH)
    return patches, torch.tensor([[pairs, rows, columns]])


class Resizer:
    """Resizes the pictures of one file, all to the size that suits its first one."""

    def __init__(self, path: str, min_pixels: int, max_pixels: int):
        self.path = path
        self.min_pixels = min_pixels
        self.max_pixels = max_pixels
        self.size = None  # (height, width), from the first picture seen

    def __call__(self, picture: Tensor) -> Tensor:
        """uint8 (3, H, W) -> uint8 (3, new H, new W). Raises MediaError for a picture that is far too thin."""
        if self.size is None:
            height, width = picture.shape[1:]
            try:
                self.size = smart_resize(height, width, min_pixels=self.min_pixels, max_pixels=self.max_pixels)
            except ValueError as error:
                raise MediaError(self.path, str(error)) from None
        return _resize(picture, self.size)


def _resize(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring uint8 (3, H, W) to `size`; on uint8, five times as fast as on float32 and at least 50 dB from it."""
    return interpolate(picture[None], size, mode="bicubic", antialias=True)[0].contiguous()


# --- decoding ---------------------------------------------------------------------------------------------------------


class VideoReader:
    """The frames of one video stream, out of its packets."""

    def __init__(self, path: str, stream: av.VideoStream, packets: list[av.Packet], resize: Resizer):
        self.path = path
        self.packets = packets
        self.resize = resize
        self.stream = stream
        self.codec = stream.codec_context
        self.codec.thread_count = 1  # clips are read side by side anyway; and threads by frame would hide errors
        self.to_rgb = VideoReformatter()
        self.shown = []  # the places in the file of the packets that are shown: not those cut off by an edit list
        for place, packet in enumerate(packets):
            if not packet.is_discard:
                self.shown.append(place)
        self.by_time = self._sort_by_time()
        self.has_made_up_stamps = self._are_stamps_made_up()

    def read(self, fps: float, max_frames: int) -> tuple[Tensor, float]:
        """Return the chosen frames, uint8 (T, 3, H, W), and the true frames per second of these T."""
        if not self.packets:
            raise MediaError(self.path, "the video holds no frames")
        if self.by_time and not self.has_made_up_stamps:
            video_fps = self._rate(len(self.shown))
            chosen = frame_indices(len(self.shown), video_fps, fps, max_frames)
            frames = self._seek([self.by_time[index] for index in chosen])
            if frames:
                return torch.stack(frames), len(chosen) / len(self.shown) * video_fps
        return self._decode_through(fps, max_frames)

    def _sort_by_time(self) -> list[int] | None:
        """Return the places of the packets that are shown, in the order of their time stamps.

        None if the stamps give no order, because one is absent or stands twice or they start anew on the way.
        """
        stamps = [self.packets[place].pts for place in self.shown]
        if None in stamps or len(set(stamps)) < len(stamps):
            return None
        by_time = sorted(self.shown, key=lambda place: self.packets[place].pts)
        for early, late in zip(by_time, self.shown):
            if abs(early - late) > MAX_REORDER:
                return None
        return by_time

    def _are_stamps_made_up(self) -> bool:
        """Whether FFmpeg made the stamps up, which then aren't in the order in which the decoder shows the frames.

        They rise with the packets, or come from a container without such stamps, though the decoder reorders.
        """
        if not self.codec.has_b_frames:
            return False
        return self.stream.container.format.name in _NO_STAMPS or self.by_time == self.shown

    def _rate(self, total: int) -> float:
        """Return the frames a second of the `total` frames that there are.

        That is the declared rate where the time stamps agree with it to within a frame (and a tenth), and else theirs:
        outside MP4 the declared one may be a guess of FFmpeg's out of the first frames, or a limit. Raises MediaError
        if there is neither.
        """
        declared = self.stream.average_rate
        ticks, steps = self._length(total)
        if not ticks:  # what the stream itself declares comes before FFmpeg's 25 for want of anything
            declared = self.stream.guessed_rate or declared
            if not declared:
                raise MediaError(self.path, "the video has no frame rate")
            return float(declared)
        seconds = ticks * self.stream.time_base
        if declared and abs(seconds * declared - steps) <= min(1, steps / 10):
            return float(declared)
        return float(steps / seconds)

    def _length(self, total: int) -> tuple[int, int]:
        """Return the time from the first frame to the last, in time stamps, and the steps between frames in it.

        (0, 1) if that isn't known. A single frame has its own length.
        """
        if not self.by_time:
            return 0, 1
        first = self.packets[self.by_time[0]]
        last = self.packets[self.by_time[-1]]
        if total == 1:
            return last.duration or 0, 1
        if not self.has_made_up_stamps:
            return last.pts - first.pts, total - 1
        stamps = [self.packets[place].dts for place in self.shown]  # those, the container has
        if None in stamps:
            return 0, 1
        return max(stamps) - min(stamps), total - 1

    def _seek(self, wanted: list[int]) -> list[Tensor] | None:
        """Return the frames of the packets `wanted` (places in the file), decoding as little as that takes.

        None if one doesn't come out, they aren't shown in the order of their stamps, or anything goes wrong: then the
        packets don't tell what frames there are.
        """
        wanted_stamps = [self.packets[place].pts for place in wanted]
        errors = []
        found = {}  # the picture for each time stamp
        for start, stop in _runs(self.packets, set(wanted)):
            needed = self._needed(range(start, stop), set(wanted))
            came = []
            for frame in _decode(self.codec, needed, errors):
                came.append(frame.pts)
                if frame.pts in wanted_stamps:
                    found[frame.pts] = self._picture(frame)
            if None in came or came != sorted(came):
                return None
        if errors or len(found) < len(set(wanted_stamps)):
            return None
        return [found[stamp] for stamp in wanted_stamps]

    def _needed(self, run: range, wanted: set[int]) -> Iterator[av.Packet]:
        """Give the packets numbered `run`; the decoder is to pass over those that are neither wanted nor leant on.

        Only H.264 says of a frame that no other at all leans on it. HEVC says it of those of the same temporal layer;
        VP9 and AV1 adapt their probabilities by every frame.
        """
        can_skip = self.codec.name == "h264"
        for place in run:
            self.codec.skip_frame = "NONREF" if can_skip and place not in wanted else "DEFAULT"
            yield self.packets[place]
        self.codec.skip_frame = "DEFAULT"

    def _decode_through(self, fps: float, max_frames: int) -> tuple[Tensor, float]:
        """The slow and sure way: everything is decoded, once more if there aren't as many frames as packets."""
        total = max(1, len(self.shown))
        errors = []
        for _ in range(3):
            video_fps = self._rate(total + len(errors))  # lost frames had their time too
            chosen = frame_indices(total, video_fps, fps, max_frames)
            errors = []
            count = 0
            found = {}
            for frame in _decode(self.codec, self.packets, errors):
                if count in chosen:
                    found[count] = self._picture(frame)
                count += 1
            lost = f"{len(errors)} of {len(self.packets)} video packets can't be decoded"
            if not count or len(errors) > max(1, MAX_LOST * len(self.packets)):
                raise MediaError(self.path, f"corrupt: {lost}")
            if count == total:
                break
            total = count
        else:
            raise MediaError(self.path, "corrupt: other frames each time that it is decoded")
        if errors:
            warnings.warn(f"{self.path}: {lost}; using the other frames", stacklevel=4)
        return torch.stack([found[index] for index in chosen]), len(chosen) / total * video_fps

    def _picture(self, frame: av.VideoFrame) -> Tensor:
        """Return a frame as RGB, turned and resized: uint8 (3, H, W)."""
        pixels = self.to_rgb.reformat(frame, format="rgb24", threads=1).to_ndarray()
        picture = torch.from_numpy(pixels).permute(2, 0, 1)
        quarters = round(frame.rotation / 90) % 4  # counterclockwise, as the display matrix and rot90 turn
        if quarters:
            picture = picture.rot90(quarters, (1, 2))
        return self.resize(picture)


def _decode(
    codec: av.VideoCodecContext, packets: Iterable[av.Packet], errors: list[FFmpegError]
) -> Iterator[av.VideoFrame]:
    """Give the frames of `packets`, in the order shown; what can't be decoded goes to `errors`. Empties the decoder."""
    for packet in itertools.chain(packets, [None]):  # None: whatever the decoder still holds back
        try:
            yield from codec.decode(packet)
        except FFmpegError as error:
            errors.append(error)
    codec.flush_buffers()


def _runs(packets: list[av.Packet], wanted: set[int]) -> list[tuple[int, int]]:
    """Return the ranges (start, stop) of `packets` to decode for those `wanted`, in order and not overlapping.

    Each starts at a keyframe that's neither decoded nor shown after the wanted frame: an open group of pictures has
    frames that come after its keyframe in the file, are shown before it and lean on the group before.
    """
    runs = []
    for place in sorted(wanted):
        start = _keyframe_before(packets, place)
        while runs and runs[-1][1] >= start:
            start = min(start, runs.pop()[0])
        runs.append((start, place + 1))
    return runs


def _keyframe_before(packets: list[av.Packet], place: int) -> int:
    """Return the last keyframe that is neither decoded nor shown after the packet at `place`; 0 if there is none."""
    for key in range(place, -1, -1):
        packet = packets[key]
        if packet.is_keyframe and packet.pts is not None and packet.pts <= packets[place].pts:
            return key
    return 0
