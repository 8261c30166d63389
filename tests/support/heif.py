"""HEIC and AVIF files, written box by box: one picture or a grid of tiles, with or without transparency."""

import struct
from fractions import Fraction

import av
import numpy as np

CODECS = {  # of a brand: encoder, its options, item type, configuration box
    "heic": ("libx265", {"x265-params": "log-level=none:bframes=0:lossless=1"}, b"hvc1", b"hvcC"),
    "avif": ("libsvtav1", {"crf": "1", "preset": "8"}, b"av01", b"av1C"),
}
ALPHA = b"urn:mpeg:mpegB:cicp:systems:auxiliary:alpha\0"


def box(kind, *parts):
    content = b"".join(parts)
    return struct.pack(">I", 8 + len(content)) + kind + content


def full_box(kind, version, flags, *parts):
    return box(kind, struct.pack(">I", version << 24 | flags), *parts)


def encode(path, brand, pixels):
    """(the frame's bytes, its configuration box) of RGB or grey pixels."""
    codec, options, _, config = CODECS[brand]
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=1, options=options)
        stream.height, stream.width = pixels.shape[:2]
        stream.pix_fmt = "yuv420p"
        if pixels.ndim == 2:  # grey as the brightness of colours: libsvtav1 has no grey
            planes = [pixels, np.full((pixels.shape[0] // 2, pixels.shape[1]), 128, np.uint8)]
            frame = av.VideoFrame.from_ndarray(np.concatenate(planes), "yuv420p")
        else:
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
        frame.pts, frame.time_base = 0, Fraction(1, 1)
        container.mux([*stream.encode(frame), *stream.encode(None)])
    content = path.read_bytes()
    at = content.index(config) - 4
    size = struct.unpack_from(">I", content, at)[0]
    with av.open(str(path)) as container:
        data = bytes(next(container.demux(video=0)))
    path.unlink()
    return data, content[at : at + size]


def write_heif(path, brand, pixels, tile=None, alpha=None, turns=0):
    """Write RGB `pixels`, in tiles of (height, width) if given, with 8-bit `alpha` and quarter turns counterclockwise.

    Tiles at the right and the bottom that stand out are filled up with black.
    """
    item_type = CODECS[brand][2]
    items, places, references, properties, links = [], [], [], [], []  # of the boxes iinf, iloc, iref, ipco, ipma
    media, inline = [], b""

    def add_property(content):
        properties.append(content)
        return len(properties)

    def add_item(kind, data, number_of_properties):
        nonlocal inline
        item = len(items) + 1
        hidden = 1 if places and kind != b"grid" else 0
        items.append(full_box(b"infe", 2, hidden, struct.pack(">HH", item, 0), kind, b"\0"))
        if kind == b"grid":
            places.append((item, 1, len(inline), len(data)))
            inline += data
        else:
            places.append((item, 0, sum(map(len, media)), len(data)))
            media.append(data)
        links.append((item, number_of_properties))
        return item

    def add_picture(pixels, extra):
        height, width = pixels.shape[:2]
        size = add_property(full_box(b"ispe", 0, 0, struct.pack(">II", width, height)))
        if tile is None:
            data, config = encode(path, brand, pixels)
            return add_item(item_type, data, [size, add_property(config), *extra])
        rows, columns = -(-height // tile[0]), -(-width // tile[1])
        padding = [(0, rows * tile[0] - height), (0, columns * tile[1] - width), (0, 0)][: pixels.ndim]
        padded = np.pad(pixels, padding)
        grid = add_item(b"grid", struct.pack(">BBBBHH", 0, 0, rows - 1, columns - 1, width, height), [size, *extra])
        tile_size = add_property(full_box(b"ispe", 0, 0, struct.pack(">II", tile[1], tile[0])))
        tiles = []
        for row in range(rows):
            for column in range(columns):
                part = padded[row * tile[0] :, column * tile[1] :][: tile[0], : tile[1]]
                data, config = encode(path, brand, np.ascontiguousarray(part))
                tiles.append(add_item(item_type, data, [tile_size, add_property(config)]))
        references.append(box(b"dimg", struct.pack(f">HH{len(tiles)}H", grid, len(tiles), *tiles)))
        return grid

    extra = [add_property(box(b"irot", bytes([turns])))] if turns else []
    primary = add_picture(pixels, extra)
    if alpha is not None:
        mask = add_picture(alpha, [add_property(full_box(b"auxC", 0, 0, ALPHA))])
        references.append(box(b"auxl", struct.pack(">HHH", mask, 1, primary)))

    def meta(start):
        locations = b""
        for item, method, offset, length in places:
            where = offset if method else start + offset
            locations += struct.pack(">HHHHII", item, method, 0, 1, where, length)
        associations = b""
        for item, numbers in links:
            associations += struct.pack(">HB", item, len(numbers)) + bytes(numbers)
        return full_box(
            b"meta",
            0,
            0,
            full_box(b"hdlr", 0, 0, bytes(4), b"pict", bytes(13)),
            full_box(b"pitm", 0, 0, struct.pack(">H", primary)),
            full_box(b"iloc", 1, 0, struct.pack(">HH", 0x4400, len(places)), locations),
            full_box(b"iinf", 0, 0, struct.pack(">H", len(items)), *items),
            full_box(b"iref", 0, 0, *references) if references else b"",
            box(
                b"iprp",
                box(b"ipco", *properties),
                full_box(b"ipma", 0, 0, struct.pack(">I", len(links)), associations),
            ),
            box(b"idat", inline) if inline else b"",
        )

    head = box(b"ftyp", brand.encode(), bytes(4), b"mif1", brand.encode())
    start = len(head) + len(meta(0)) + 8
    path.write_bytes(head + meta(start) + box(b"mdat", *media))
    return path
