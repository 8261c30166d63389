"""The error that a media file raises; here, because both the reading of files and of their streams need it."""


class MediaError(ValueError):
    """A media file that can't be used: `path` and `reason`."""

    def __init__(self, path: str, reason: str):
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"
