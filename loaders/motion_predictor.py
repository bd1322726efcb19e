"""Motion predictor files: safetensors with the sizes of the network in their metadata.

Their description is {"version": 1, "config": {constructor arguments of `MotionPredictor`}}.
"""

from collections.abc import Mapping
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.utils
import folder_paths
import torch

from ..models.motion_predictor import MotionPredictor, MotionPredictorModel
from .described_file import DescribedFile
from .listed_files import ListedFiles
from .network import build_on_meta, compare, load_network
from .weights import check_tensors, read_file

FOLDER = "motion_predictors"
FILES = ListedFiles(FOLDER, "Motion predictor", "Train one with this pack's trainer, and put the file into {folders}")
FORMAT = DescribedFile(
    "consistent_video.motion_predictor",
    1,
    "motion predictor",
    "this pack's trainer",
    "train one again",
)


def register_folder() -> None:
    """Let ComfyUI list the files of `models/motion_predictors`."""
    folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))
    folder_paths.folder_names_and_paths[FOLDER][1].add(".safetensors")


def save_motion_predictor(network_state: Mapping[str, torch.Tensor], config: dict, path: Path) -> None:
    """Write a file that `load_motion_predictor` reads.

    Args:
        network_state: state dict of a `MotionPredictor`, on any device.
        config: its `config`; settings left out are written as the defaults they are.
        path: a .safetensors file in a folder that exists.

    Raises:
        ValueError: the tensors do not fit the configuration.
    """
    network = build_network(config, "The configuration to save")
    difference = compare(network_state, network)
    if difference:
        raise ValueError(f"The tensors to save in {path} do not fit their configuration: {difference.summary()}.")
    state = {key: tensor.detach().contiguous() for key, tensor in network_state.items()}
    comfy.utils.save_torch_file(state, str(path), metadata=FORMAT.metadata(config=network.config))


def load_motion_predictor(
    path: Path, dtype: torch.dtype | None = None, disable_dynamic: bool = False
) -> MotionPredictorModel:
    """Load a motion predictor.

    Args:
        path: a file that `save_motion_predictor` wrote.
        dtype: storage type of the weights; None is ComfyUI's choice for encoders on this machine.
        disable_dynamic: ComfyUI asks so for a patcher that does not stream weights on demand.

    Raises:
        ValueError: the file is damaged, no motion predictor, of another version of the format, or has missing,
            unexpected or misshapen keys.
    """
    config = read_config(path)
    state = read_file(path)
    check_tensors(path, state)
    load_device = comfy.model_management.text_encoder_device()
    dtype = dtype or comfy.model_management.text_encoder_dtype(load_device)
    network = load_network(build_network(config, str(path)), state, dtype, comfy.ops.manual_cast, {}, str(path))
    comfy.model_management.archive_model_dtypes(network)
    patcher_class = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = patcher_class(network, load_device, comfy.model_management.text_encoder_offload_device())
    patcher.cached_patcher_init = (load_motion_predictor_patcher, (path, dtype))
    return MotionPredictorModel(patcher)


def load_motion_predictor_patcher(path: Path, dtype: torch.dtype | None = None, disable_dynamic: bool = False):
    """Load the network again for ComfyUI's own use (other devices, other memory modes); returns its patcher."""
    return load_motion_predictor(path, dtype, disable_dynamic).patcher


def build_network(config: dict, source: str) -> MotionPredictor:
    """The network of a configuration, without weights (on the meta device).

    Args:
        source: what to call the configuration in an error.

    Raises:
        ValueError: it does not describe a network.
    """
    return build_on_meta(MotionPredictor, config, source)


def read_config(path: Path) -> dict:
    """The configuration in a file's metadata.

    Raises:
        ValueError: the file is damaged, no motion predictor, or of another version of the format.
    """
    config = FORMAT.read(path).get("config")
    if not isinstance(config, dict):
        raise ValueError(FORMAT.unreadable(path, f"its config is {config!r}, expected settings"))
    return config
