"""The picture of an image file, whole and on white."""

import re
import struct
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import torch
from av.error import FFmpegError
from torch import Tensor

from hov2.data.errors import MediaError
from hov2.data.heif import Grid, read_layout
from hov2.data.video import Resizer

BAND = 1 << 20  # pixels whose transparency is worked out at a time

_STRICT = {"err_detect": "explode"}  # or half a JPEG is an image without a word
_UNREADABLE_TIFF = {6: "JPEG", 7: "JPEG"}  # compressions of which FFmpeg makes a black picture without an error


def read_image(path: str, container: av.container.InputContainer, stream: av.VideoStream, resize: Resizer) -> Tensor:
    """Return the picture of an image file, resized: uint8 (1, 3, H, W); of an animation, the first."""
    if container.format.name.startswith("mov"):
        pixels = _read_heif(path, container, stream)
    else:
        _refuse_black_tiff(path, stream)
        pixels = _image_pixels(_first_frame(path, container, _largest(container, stream)))
    return resize(torch.from_numpy(pixels).permute(2, 0, 1))[None]


def _largest(container: av.container.InputContainer, stream: av.VideoStream) -> av.VideoStream:
    """Return the largest picture of an icon, which holds the same one in several sizes."""
    if container.format.name != "ico":
        return stream
    return max(container.streams.video, key=lambda one: one.codec_context.width * one.codec_context.height)


def _first_frame(path: str, container: av.container.InputContainer, stream: av.VideoStream) -> av.VideoFrame:
    """Return the first frame of a stream. Raises MediaError if there is none, or what there is of it is damaged."""
    if stream.codec_context.name != "tiff":  # whose decoder would refuse any file with a tag that it doesn't know
        stream.codec_context.options = _STRICT
    try:
        packets = [packet for packet in container.demux(stream) if packet.size]
        frame = _decode_one(stream.codec_context, packets[0]) if packets else None
    except FFmpegError as error:
        if _is_animated_webp(path):
            raise MediaError(path, "an animated WebP, which FFmpeg can't decode") from None
        reason = f"corrupt image, or one of a kind that FFmpeg can't decode ({error.strerror})"
        raise MediaError(path, reason) from None
    if frame is None:
        raise MediaError(path, "the image holds no pixels")
    return frame


def _decode_one(codec: av.VideoCodecContext, packet: av.Packet) -> av.VideoFrame | None:
    """Return the picture of a packet, None if it holds none. Raises FFmpegError."""
    frames = codec.decode(packet)
    if not frames:  # decoders with threads hold it back
        frames = codec.decode(None)
    return frames[0] if frames else None


def _is_animated_webp(path: str) -> bool:
    """Whether the header of a WebP file says that it is an animation."""
    with Path(path).open("rb") as file:
        head = file.read(21)
    return head[8:16] == b"WEBPVP8X" and bool(head[20] & 2)


def _refuse_black_tiff(path: str, stream: av.VideoStream) -> None:
    """Raise MediaError for a TIFF file of which FFmpeg would make a black picture without an error."""
    if stream.codec_context.name != "tiff":
        return
    content = Path(path).read_bytes()
    order = "<" if content[:2] == b"II" else ">"
    tags = {}
    try:
        start = struct.unpack_from(f"{order}I", content, 4)[0]
        count = struct.unpack_from(f"{order}H", content, start)[0]
        for place in range(start + 2, start + 2 + 12 * count, 12):
            tag, _, _, value = struct.unpack_from(f"{order}HHIH", content, place)
            tags[tag] = value
    except struct.error:
        return  # FFmpeg will say what is wrong
    name = _UNREADABLE_TIFF.get(tags.get(259))
    is_raw = 50706 in tags  # a camera's raw file (DNG): those, FFmpeg decodes
    if name and not is_raw:
        raise MediaError(path, f"a TIFF with {name} compression, which FFmpeg can't decode")


# --- HEIC and AVIF ----------------------------------------------------------------------------------------------------


def _read_heif(path: str, container: av.container.InputContainer, stream: av.VideoStream) -> np.ndarray:
    """Return the main picture of a HEIC or AVIF file: uint8 (H, W, 3)."""
    try:
        layout = read_layout(path)
    except ValueError as error:
        raise MediaError(path, f"a HEIC or AVIF file that can't be read: {error}") from None
    if layout is None:  # a sequence without a still
        return _image_pixels(_first_frame(path, container, stream))
    wanted = set(layout.picture.items)
    if layout.alpha:
        wanted.update(layout.alpha.items)
    parts = _decode_items(path, container, wanted)
    # colour is scaled up as by libheif and by libavif
    to_rgb = _plain_pixels if stream.codec_context.name == "hevc" else _image_pixels
    pixels = _join(path, layout.picture, parts, to_rgb)
    if layout.alpha:
        alpha = _join(path, layout.alpha, parts, _grey_pixels)
        if alpha.shape != pixels.shape[:2]:
            raise MediaError(path, "the picture and its transparency differ in size")
        _lay_on_white(pixels, alpha)
    if stream.codec_context.name == "hevc":  # turned as by pillow-heif; an AVIF's turn is left out as by Pillow
        pixels = np.rot90(pixels, layout.turns).copy()
    return pixels


def _decode_items(path: str, container: av.container.InputContainer, wanted: set[int]) -> dict[int, av.VideoFrame]:
    """Return the frame of each item `wanted`."""
    streams = {}  # of each item; the tracks of an animation come after the items, and may have the same ids
    for stream in container.streams.video:
        if stream.id in wanted and stream.codec_context and stream.id not in streams:
            stream.codec_context.options = _STRICT
            streams[stream.id] = stream
    if len(streams) < len(wanted):
        raise MediaError(
            path, f"{len(wanted) - len(streams)} of its {len(wanted)} parts are of no kind that FFmpeg decodes"
        )
    frames = {}
    try:
        for packet in container.demux(list(streams.values())):
            item = packet.stream.id
            if packet.size and item not in frames:
                frames[item] = _decode_one(packet.stream.codec_context, packet)
    except FFmpegError as error:
        raise MediaError(path, f"corrupt image ({error.strerror})") from None
    if len(frames) < len(wanted) or None in frames.values():
        raise MediaError(path, "corrupt image: parts of it are missing")
    return frames


def _join(
    path: str, grid: Grid, parts: dict[int, av.VideoFrame], to_pixels: Callable[[av.VideoFrame], np.ndarray]
) -> np.ndarray:
    """Return the picture of a grid, whose tiles' pixels `to_pixels` gives: uint8 (H, W, 3) or (H, W)."""
    first = to_pixels(parts[grid.items[0]])
    if grid.size is None:
        return first
    height, width = first.shape[:2]
    rows = len(grid.items) // grid.columns
    if grid.size[0] > rows * height or grid.size[1] > grid.columns * width:
        raise MediaError(path, "corrupt image: its tiles don't cover it")
    canvas = np.empty((*grid.size, *first.shape[2:]), np.uint8)
    for place, item in enumerate(grid.items):
        tile = to_pixels(parts[item])
        if tile.shape != first.shape:
            raise MediaError(path, "corrupt image: its tiles differ in size")
        top = place // grid.columns * height
        left = place % grid.columns * width
        part = canvas[top : top + height, left : left + width]  # less than a tile at the right and the bottom
        part[:] = tile[: part.shape[0], : part.shape[1]]
    return canvas


# --- Pixels -----------------------------------------------------------------------------------------------------------


def _image_pixels(frame: av.VideoFrame) -> np.ndarray:
    """Return an image's pixels as Pillow gives them, RGBA on white: uint8 (H, W, 3)."""
    # colour halved by JPEG or WebP, scaled up as libjpeg does it: 56 dB from Pillow, where RGB at once has 24-46
    full_colour = re.sub(r"^(yuva?j?)4\d\d", r"\g<1>444", frame.format.name)
    frame = frame.reformat(format=full_colour, interpolation="BILINEAR")
    has_alpha = any(component.is_alpha for component in frame.format.components)
    # RGBA goes on white; alpha of grey or palette images is dropped as by Pillow; a CMYK JPEG has one that's always 255
    if not has_alpha or len(frame.format.components) != 4:
        return _plain_pixels(frame)
    plane = frame.reformat(format="rgba").planes[0]
    rows = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)  # not copied: pictures can be large
    used = 4 * plane.width
    pixels = np.stack([rows[:, channel:used:4] for channel in range(3)], axis=-1)
    _lay_on_white(pixels, rows[:, 3:used:4])
    return pixels


def _plain_pixels(frame: av.VideoFrame) -> np.ndarray:
    """Return a frame's pixels without its transparency: uint8 (H, W, 3)."""
    return frame.to_ndarray(format="rgb24")


def _grey_pixels(frame: av.VideoFrame) -> np.ndarray:
    """Return a frame's brightness: uint8 (H, W)."""
    return frame.to_ndarray(format="gray")


def _lay_on_white(pixels: np.ndarray, alpha: np.ndarray) -> None:
    """Blend uint8 `pixels` (H, W, 3) with white, in place, as `alpha` (H, W) says; some rows at a time, for memory."""
    rows = max(1, BAND // pixels.shape[1])
    for top in range(0, len(pixels), rows):
        band = pixels[top : top + rows]
        opacity = alpha[top : top + rows, :, None].astype(np.uint32)
        blend = band * opacity + 255 * (255 - opacity) + 128
        band[:] = ((blend >> 8) + blend) >> 8  # Pillow's rounded division by 255
