"""Files that ComfyUI lists by kind, and what to tell a user whose file is not there."""

from dataclasses import dataclass
from pathlib import Path

import folder_paths


@dataclass(frozen=True)
class ListedFiles:
    """The files of one kind.

    Args:
        kind: of `folder_paths`, such as "photomaker".
        title: what one of them is called, the first words of a message.
        remedy: how to get one, with `{folders}` for where it goes.
    """

    kind: str
    title: str
    remedy: str

    def names(self) -> list[str]:
        """Names in all folders of the kind."""
        return folder_paths.get_filename_list(self.kind)

    def find(self, name: str) -> Path:
        """The path of a listed file.

        Raises:
            FileNotFoundError: no folder holds it.
        """
        path = folder_paths.get_full_path(self.kind, name)
        if path is None:
            raise FileNotFoundError(self._missing(name))
        return Path(path)

    def check(self, name: str) -> bool | str:
        """True when the file is there, else a message that says where to get it and where it goes."""
        return True if name in self.names() else self._missing(name)

    def _missing(self, name: str) -> str:
        folders = " or ".join(folder_paths.get_folder_paths(self.kind))
        remedy = self.remedy.format(folders=folders)
        return f"{self.title} '{name}' was not found. {remedy}, then refresh the node list (R)."
