"""Decoded clips kept on disk, for the next epoch, the next run and other ranks (config: media_cache).

All processes that name a folder share it, without locks: a file is written aside and renamed, and who doesn't find what
another has just removed decodes the clip.
"""

import contextlib
import hashlib
import os
import uuid
import warnings
import zlib
from pathlib import Path

import av
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from hov2.media import Media, check_file, read_media

SUFFIX = ".clip.safetensors"  # nothing else in the folder is touched
VERSION = 1  # goes up when read_media makes something else of the same file


class MediaCache:
    """Clips in `folder`, of at most `gib` GiB: the longest unused are removed when another has been written."""

    def __init__(self, folder, gib):
        self.folder, self.limit = Path(folder), gib * 2**30

    def read(self, path, **options):
        """As `read_media`, bit for bit; what goes wrong with the cache itself is a warning, and the clip is decoded."""
        info = check_file(path)
        key = repr((os.path.abspath(path), info.st_size, info.st_mtime_ns, options, VERSION, av.__version__))
        file = self.folder / (hashlib.sha256(key.encode()).hexdigest() + SUFFIX)
        media = self._load(file)
        if media is None:
            media = read_media(path, **options)
            self._save(file, media)
        return media

    def _load(self, file):
        """The Media in `file`, which is used now; None if there is none, or none that is whole."""
        try:
            os.utime(file)
            tensors = load(file.read_bytes())
            if tensors.pop("checksum").item() != zlib.crc32(save(tensors)):
                raise ValueError("wrong checksum")
            fps, audio_cut = tensors["numbers"].tolist()
        except OSError:  # not kept, or just removed; what is wrong with the folder is said when it's written to
            return None
        except (SafetensorError, KeyError, ValueError) as error:
            warnings.warn(f"{file}: {error}; the clip is decoded and written anew", stacklevel=4)
            return None
        return Media(tensors.get("frames"), fps or None, tensors.get("audio"), audio_cut)

    def _save(self, file, media):
        numbers = torch.tensor([media.sample_fps or 0, media.audio_cut], dtype=torch.float64)
        tensors = {"numbers": numbers, "frames": media.frames, "audio": media.audio}
        tensors = {name: value for name, value in tensors.items() if value is not None}
        part = self.folder / (uuid.uuid4().hex + SUFFIX)  # room is made of it too, should this process be killed
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            part.write_bytes(save(tensors | {"checksum": torch.tensor(zlib.crc32(save(tensors)))}))
            with contextlib.suppress(FileNotFoundError):  # others have just made room
                part.replace(file)
            self._make_room()
        except OSError as error:
            warnings.warn(f"media_cache: a clip isn't kept: {error}", stacklevel=4)

    def _make_room(self):
        files = []
        for file in self.folder.glob("*" + SUFFIX):
            with contextlib.suppress(FileNotFoundError):  # other processes make room too
                files.append((file.stat().st_mtime_ns, file.stat().st_size, file))
        excess = sum(size for _, size, _ in files) - self.limit
        for _, size, file in sorted(files):
            if excess > 0:
                file.unlink(missing_ok=True)
                excess -= size
