"""Files that ComfyUI lists by kind, and what to tell a user whose file is not there."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import folder_paths

from . import fingerprint


def as_listed(name: str, names: Sequence[str]) -> str:
    """Return the one of `names` that `name` means, whether its folders are separated as on Windows or not."""
    if name in names:
        return name
    return next((each for each in names if each.replace("\\", "/") == str(name).replace("\\", "/")), name)


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
        path = folder_paths.get_full_path(self.kind, as_listed(name, self.names()))
        if path is None:
            raise FileNotFoundError(self._missing(name))
        return Path(path)

    def check(self, name: str | None) -> bool | str:
        """True when the file is there, else a message that says where to get it and where it goes.

        Also True for None, which ComfyUI says in place of a name that comes over a wire: `find` then tells.
        """
        return True if name is None or as_listed(name, self.names()) in self.names() else self._missing(name)

    def fingerprint(self, name: str | None) -> str:
        """Changes with the file; see `fingerprint.of_choice`."""
        return fingerprint.of_choice(name, self.names, lambda each: fingerprint.of_file(self.find(each)))

    def _missing(self, name: str) -> str:
        folders = " or ".join(folder_paths.get_folder_paths(self.kind))
        remedy = self.remedy.format(folders=folders)
        return f"{self.title} '{name}' was not found. {remedy}, then refresh the node list (R)."
