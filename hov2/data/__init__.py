"""From published files to a step's share of inputs: samples, formats, media, model inputs, loading."""

from hov2.data.formats import DataError
from hov2.data.media import MediaError, read_media
from hov2.data.samples import read_samples

__all__ = ["DataError", "MediaError", "read_media", "read_samples"]
