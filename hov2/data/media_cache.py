"""Decoded clips kept on disk, for the next epoch, the next run and other ranks (config: media_cache).

All processes that name a folder share it, without locks: a file is written aside and renamed, and who doesn't find what
another has just removed decodes the clip.
"""

import contextlib
import hashlib
import io
import os
import uuid
import warnings
import zlib
from pathlib import Path

import av
import torch

from hov2.data.media import Media, check_file, read_media

SUFFIX = ".clip.pt"  # nothing else in the folder is touched
VERSION = 2  # goes up when read_media makes something else of the same file, or the files are written in another way
CHECK = 4  # bytes at the end of a file: the CRC-32 of those before


class MediaCache:
    """Clips in `folder`, of at most `gib` GiB: the longest unused are removed when another has been written."""

    def __init__(self, folder, gib):
        self.folder, self.limit = Path(folder), gib * 2**30

    def read(self, path, **options):
        """As `read_media`, bit for bit; what goes wrong with the cache itself is a warning, and the clip is decoded."""
        info = check_file(path)
        key = repr((os.path.abspath(path), info.st_size, info.st_mtime_ns, options, VERSION, av.__version__))
        file = self.folder / (hashlib.sha256(key.encode()).hexdigest() + SUFFIX)
        with contextlib.suppress(OSError):  # not kept, or just removed; a bad folder is named when it's written to
            os.utime(file)
            content = file.read_bytes()
            if zlib.crc32(content[:-CHECK]).to_bytes(CHECK) == content[-CHECK:]:
                return Media(**torch.load(io.BytesIO(content), weights_only=True))
            warnings.warn(f"{file}: damaged; the clip is decoded and written anew", stacklevel=3)
        media = read_media(path, **options)
        try:
            self._save(file, media)
        except OSError as error:
            warnings.warn(f"media_cache: a clip isn't kept: {error}", stacklevel=3)
        return media

    def _save(self, file, media):
        buffer = io.BytesIO()
        torch.save(vars(media), buffer)
        content = buffer.getvalue()
        part = self.folder / (uuid.uuid4().hex + SUFFIX)  # room is made of it too, should this process be killed
        self.folder.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content + zlib.crc32(content).to_bytes(CHECK))
        with contextlib.suppress(FileNotFoundError):  # others have just made room
            part.replace(file)
        self._make_room()

    def _make_room(self):
        files = []
        for kept in self.folder.glob("*" + SUFFIX):
            with contextlib.suppress(FileNotFoundError):  # other processes make room too
                files.append((kept.stat().st_mtime_ns, kept.stat().st_size, kept))
        excess = sum(size for _, size, _ in files) - self.limit
        for _, size, kept in sorted(files):
            if excess > 0:
                kept.unlink(missing_ok=True)
                excess -= size
