"""What the boxes of a HEIC or AVIF file say of its picture: its tiles, its transparency, its turns.

FFmpeg gives every coded item of such a file as a stream of its own and leaves it to its user to put them together.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_ALPHA = (b"urn:mpeg:mpegB:cicp:systems:auxiliary:alpha", b"urn:mpeg:hevc:2015:auxid:1")
_DERIVED = (b"iovl", b"iden")  # pictures made of others in ways that aren't followed here


@dataclass
class Grid:
    """One picture: items laid out row by row and cut to a size."""

    items: list[int]  # their ids, which are those of FFmpeg's streams
    columns: int = 1
    size: tuple[int, int] | None = None  # (height, width); None: that of the one item


@dataclass
class Layout:
    """The main picture of a file."""

    picture: Grid
    alpha: Grid | None  # its transparency
    turns: int  # quarter turns counterclockwise


def read_layout(path: str) -> Layout | None:
    """Return how the main picture is made up, None for a file that says nothing of it.

    Raises ValueError for a picture that is made up in another way than as a grid, and for boxes that make no sense.
    """
    content = Path(path).read_bytes()
    try:
        meta = dict(_boxes(content)).get(b"meta")
        return _Meta(content, meta).layout() if meta else None
    except (struct.error, IndexError, KeyError) as error:
        raise ValueError(f"its boxes make no sense ({error!r})") from None


def _boxes(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Give (kind, content) of the boxes that follow one another in `content`."""
    at = 0
    while at + 8 <= len(content):
        size, kind = struct.unpack_from(">I4s", content, at)
        head = 8
        if size == 1:
            size = struct.unpack_from(">Q", content, at + 8)[0]
            head = 16
        if size == 0:  # to the end
            size = len(content) - at
        if size < head:
            return
        yield kind, content[at + head : at + size]
        at += size


class _Fields:
    """Reads numbers out of a full box, one after the other."""

    def __init__(self, content: bytes):
        self.content = content
        self.version = content[0]
        self.flags = int.from_bytes(content[1:4], "big")
        self.at = 4

    def number(self, size: int) -> int:
        """The next `size` bytes as a number; 0 for none."""
        if self.at + size > len(self.content):
            raise IndexError("a box ends early")
        self.at += size
        return int.from_bytes(self.content[self.at - size : self.at], "big")


class _Meta:
    """The meta box of a file."""

    def __init__(self, content: bytes, meta: bytes):
        self.content = content
        self.boxes = dict(_boxes(meta[4:]))
        self.types = self._types()

    def layout(self) -> Layout:
        """Return how the primary picture and its alpha are put together."""
        fields = _Fields(self.boxes[b"pitm"])
        primary = fields.number(4 if fields.version else 2)
        alpha = None
        for item in self.types:
            urn = self._properties(item).get(b"auxC", b"")[4:]
            if urn.startswith(_ALPHA) and primary in self._references(b"auxl", item):
                alpha = self._grid(item)
        turn = self._properties(primary).get(b"irot", b"\0")
        return Layout(self._grid(primary), alpha, turn[0] & 3)

    def _types(self) -> dict[int, bytes]:
        """Return the type of each item by its id."""
        fields = _Fields(self.boxes[b"iinf"])
        start = 8 if fields.version else 6
        types = {}
        for kind, content in _boxes(self.boxes[b"iinf"][start:]):
            if kind == b"infe":
                entry = _Fields(content)
                item = entry.number(4 if entry.version == 3 else 2)
                types[item] = content[entry.at + 2 : entry.at + 6]
        return types

    def _grid(self, item: int) -> Grid:
        """Return an item's picture as a grid, of one if it is a coded picture itself."""
        kind = self.types[item]
        if kind in _DERIVED:
            raise ValueError(f"its picture is made of others as {kind.decode()}, which isn't supported")
        if kind != b"grid":
            return Grid([item])
        data = self._data(item)
        tiles = self._references(b"dimg", item)
        rows = data[2] + 1
        columns = data[3] + 1
        width, height = struct.unpack_from(">II" if data[1] & 1 else ">HH", data, 4)
        if not width or not height:
            raise ValueError(f"a picture of {width} x {height} pixels")
        if rows * columns != len(tiles):
            raise ValueError(f"a grid of {rows} x {columns} tiles has {len(tiles)}")
        return Grid(tiles, columns, (height, width))

    def _references(self, kind: bytes, item: int) -> list[int]:
        """Return the items that one refers to in this way."""
        content = self.boxes.get(b"iref", bytes(4))
        size = 4 if content[0] else 2
        found = []
        for box, entry in _boxes(content[4:]):
            fields = _Fields(b"\0\0\0\0" + entry)
            if box == kind and fields.number(size) == item:
                for _ in range(fields.number(2)):
                    found.append(fields.number(size))
        return found

    def _properties(self, item: int) -> dict[bytes, bytes]:
        """Return an item's properties, {kind: content}."""
        boxes = dict(_boxes(self.boxes[b"iprp"]))
        known = list(_boxes(boxes[b"ipco"]))
        fields = _Fields(boxes[b"ipma"])
        found = {}
        for _ in range(fields.number(4)):
            owner = fields.number(4 if fields.version else 2)
            for _ in range(fields.number(1)):
                index = fields.number(2) & 0x7FFF if fields.flags & 1 else fields.number(1) & 0x7F
                if owner == item and index:
                    kind, content = known[index - 1]
                    found[kind] = content
        return found

    def _data(self, item: int) -> bytes:
        """Return the bytes of an item, out of the file or the idat box."""
        fields = _Fields(self.boxes[b"iloc"])
        sizes = fields.number(2)
        offset_size, length_size, base_size, index_size = sizes >> 12, sizes >> 8 & 15, sizes >> 4 & 15, sizes & 15
        data = b""
        for _ in range(fields.number(4 if fields.version == 2 else 2)):
            owner = fields.number(4 if fields.version == 2 else 2)
            method = fields.number(2) & 15 if fields.version else 0
            fields.number(2)  # which file: this one
            base = fields.number(base_size)
            source = self.boxes.get(b"idat", b"") if method == 1 else self.content
            for _ in range(fields.number(2)):
                if fields.version:
                    fields.number(index_size)
                start = base + fields.number(offset_size)
                length = fields.number(length_size)
                if owner == item:
                    data += source[start : start + length]
        return data
