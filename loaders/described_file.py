"""Safetensors files of this pack's own formats, which say about themselves what they are, in JSON."""

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open


@dataclass(frozen=True)
class DescribedFile:
    """One such format.

    Args:
        key: of the description in the file's metadata.
        version: of the format.
        title: what such a file is called in a message, such as "character bank".
        writer: who writes them.
        renewal: how to get a new one, after "or".
    """

    key: str
    version: int
    title: str
    writer: str
    renewal: str

    def metadata(self, **content) -> dict[str, str]:
        """Metadata of a file, with a description that JSON can hold."""
        return {self.key: json.dumps({"version": self.version, **content})}

    def read(self, path: Path) -> dict:
        """What a file says about itself.

        Raises:
            ValueError: the file is damaged, of another kind, or of another version of the format.
        """
        try:
            with safe_open(path, framework="pt") as file:
                described = (file.metadata() or {}).get(self.key)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} ({path.stat().st_size:,} bytes) is damaged or no safetensors file: {error}. Choose a file "
                f"that {self.writer} wrote, or {self.renewal}."
            ) from error
        if described is None:
            raise ValueError(f"{path} is no {self.title}. Choose a file that {self.writer} wrote.")
        try:
            content = dict(json.loads(described))
        except (TypeError, ValueError) as error:
            raise ValueError(self.unreadable(path, error)) from error
        if content.get("version") != self.version:
            raise ValueError(
                f"{path} has version {content.get('version')} of the format, expected {self.version}. Update this "
                f"pack, or {self.renewal}."
            )
        return content

    def unreadable(self, path: Path, problem: object) -> str:
        """The message of a file whose description makes no sense."""
        return (
            f"{path} is not a {self.title} that this version can read ({problem}). Choose a file that {self.writer} "
            "wrote."
        )
