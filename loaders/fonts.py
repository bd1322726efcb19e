"""Where ComfyUI keeps fonts."""

from pathlib import Path

import folder_paths

FOLDER = "fonts"


def register_folder() -> None:
    """Let `extra_model_paths.yaml` and other packs add to `models/fonts`."""
    folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))


def folders() -> list[Path]:
    """The folders of fonts."""
    return [Path(folder) for folder in folder_paths.get_folder_paths(FOLDER)]
