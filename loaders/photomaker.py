"""PhotoMaker files -> PHOTOMAKER and the LoRA that belongs to it.

A published file holds `id_encoder` and `lora_weights`: as two dictionaries in a .bin file, as key prefixes in
safetensors. Files made for ComfyUI's own loader hold the id encoder alone.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import torch
from comfy.weight_adapter.lora import LoRAAdapter

from ..models.photomaker import IdEncoderV1, IdEncoderV2, PhotoMaker
from .listed_files import ListedFiles
from .network import build_on_meta, load_network
from .weights import NoNamedTensorsError, check_tensors, read_file

REPOSITORIES = "TencentARC/PhotoMaker (v1) and TencentARC/PhotoMaker-V2 (v2)"
FILES = ListedFiles(
    "photomaker",
    "PhotoMaker file",
    f"Download photomaker-v1.bin or photomaker-v2.bin, published as {REPOSITORIES}, into {{folders}}",
)
ENCODER, LORA = "id_encoder", "lora_weights"
MARKER_V1 = "visual_projection_2.weight"
MARKER_V2 = "qformer_perceiver.token_norm.weight"
# v2 files carry v1's projections, which the v2 network does not read.
UNREAD_V2 = ("visual_projection.weight", MARKER_V1)
# Older libraries keep the numbers 0, 1, ... of the positions beside the weights.
POSITION_IDS = "position_ids"
# Widths of one attention head as published; shapes do not tell them.
VISION_HEAD, RESAMPLER_HEAD = 64, 128


def load_photomaker(
    path: Path, dtype: torch.dtype | None = None, disable_dynamic: bool = False
) -> tuple[PhotoMaker, dict[str, torch.Tensor]]:
    """Load a v1 or v2 file, recognised by its keys.

    Args:
        path: a .bin, .pt or .safetensors file.
        dtype: storage type of the weights; None is ComfyUI's choice for encoders on this machine.
        disable_dynamic: ComfyUI asks so for a patcher that does not stream weights on demand.

    Returns:
        The id encoder, and the tensors of its LoRA, for `apply_lora`; no tensors when the file has no LoRA.

    Raises:
        ValueError: the file is damaged, no PhotoMaker file, or has missing, unexpected or misshapen keys.
    """
    encoder, lora = read_parts(path)
    network_class, config = describe(encoder, str(path))
    if network_class is IdEncoderV2:
        encoder = {key: value for key, value in encoder.items() if key not in UNREAD_V2}
    load_device = comfy.model_management.text_encoder_device()
    dtype = dtype or comfy.model_management.text_encoder_dtype(load_device)
    network = build_on_meta(network_class, config, str(path))
    # The published kernel is small: ComfyUI's own convolution will do.
    layers = {torch.nn.Conv2d: comfy.ops.manual_cast.Conv2d}
    network = load_network(network, encoder, dtype, comfy.ops.manual_cast, layers, str(path))
    comfy.model_management.archive_model_dtypes(network)
    patcher_class = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = patcher_class(network, load_device, comfy.model_management.text_encoder_offload_device())
    patcher.cached_patcher_init = (load_photomaker_patcher, (path, dtype))
    return PhotoMaker(patcher), lora


def load_photomaker_patcher(path: Path, dtype: torch.dtype | None = None, disable_dynamic: bool = False):
    """Load the id encoder again for ComfyUI's own use (other devices, other memory modes); returns its patcher."""
    return load_photomaker(path, dtype, disable_dynamic)[0].patcher


def read_parts(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The tensors of the id encoder and of the LoRA (none: empty), from any of the file layouts.

    Raises:
        ValueError: the file is damaged, or not laid out as a PhotoMaker file.
    """
    try:
        flat = _flatten(read_file(path))
    except NoNamedTensorsError as error:
        raise ValueError(_not_photomaker(path, error.found)) from error
    check_tensors(path, flat)
    parts = {
        part: {key[len(part) + 1 :]: value for key, value in flat.items() if key.startswith(f"{part}.")}
        for part in (ENCODER, LORA)
    }
    strangers = [key for key in flat if not key.startswith((f"{ENCODER}.", f"{LORA}."))]
    if not any(parts.values()):
        return flat, {}
    if strangers or not parts[ENCODER]:
        found = f"also {', '.join(strangers[:3])}" if strangers else f"only {LORA}"
        raise ValueError(_not_photomaker(path, found))
    return parts[ENCODER], parts[LORA]


def _flatten(content: dict) -> dict:
    """Two levels of dictionaries as one, with dotted keys; position ids are not weights."""
    flat = {}
    for key, value in content.items():
        inner = value if isinstance(value, dict) else None
        flat |= {key: value} if inner is None else {f"{key}.{name}": part for name, part in inner.items()}
    return {key: value for key, value in flat.items() if not str(key).endswith(POSITION_IDS)}


def describe(state: Mapping[str, torch.Tensor], source: str) -> tuple[type, dict]:
    """The network class of an id encoder and its settings, read from the shapes.

    Settings that a missing or odd tensor leaves open are as published, so that comparing keys and shapes with the
    network names what is wrong.

    Args:
        source: what to call the file in an error.

    Raises:
        ValueError: this is no id encoder of PhotoMaker.
    """
    if MARKER_V1 not in state and MARKER_V2 not in state:
        raise ValueError(_not_photomaker(source, f"keys such as {', '.join(sorted(state)[:3]) or 'none'}"))
    width = _size(state, "fuse_module.layer_norm.weight", 0, 2048)
    vision = vision_config(state)
    common = {
        "vision": vision,
        "width": width,
        "fuse_hidden": tuple(_size(state, f"fuse_module.mlp{index}.fc1.weight", 0, width) for index in (1, 2)),
    }
    if MARKER_V2 in state:
        return IdEncoderV2, {**common, "perceiver": perceiver_config(state, width)}
    projections = _size(state, "visual_projection.weight", 0, 768), _size(state, MARKER_V1, 0, 1280)
    if sum(projections) != width:
        raise ValueError(
            f"{source} has projections of {projections[0]} and {projections[1]} values, expected a sum of {width}. "
            f"Download a published file again ({REPOSITORIES})."
        )
    return IdEncoderV1, {**common, "projections": projections}


def vision_config(state: Mapping[str, torch.Tensor]) -> dict:
    """Configuration of the vision tower (published: CLIP ViT-L/14 at 224 pixels)."""
    prefix = "vision_model."
    hidden = _size(state, f"{prefix}embeddings.class_embedding", 0, 1024)
    patch = _size(state, f"{prefix}embeddings.patch_embedding.weight", 2, 14)
    positions = _size(state, f"{prefix}embeddings.position_embedding.weight", 0, 257)
    return {
        "model_type": "clip_vision_model",
        "hidden_act": "quick_gelu",
        "num_channels": 3,
        "hidden_size": hidden,
        "image_size": math.isqrt(positions - 1) * patch,
        "intermediate_size": _size(state, f"{prefix}encoder.layers.0.mlp.fc1.weight", 0, 4096),
        "num_attention_heads": max(1, hidden // VISION_HEAD),
        "num_hidden_layers": _depth(state, f"{prefix}encoder.layers."),
        "patch_size": patch,
    }


def perceiver_config(state: Mapping[str, torch.Tensor], width: int) -> dict:
    """Settings of v2's `FacePerceiver`."""
    prefix = "qformer_perceiver."
    layer = f"{prefix}perceiver_resampler.layers."
    inner = _size(state, f"{layer}0.0.to_q.weight", 0, 2048)
    return {
        "tokens": max(1, _size(state, f"{prefix}token_proj.2.weight", 0, 2 * width) // width),
        "face_width": _size(state, f"{prefix}token_proj.0.weight", 1, 512),
        "face_hidden": _size(state, f"{prefix}token_proj.0.weight", 0, 2048),
        "inner": inner,
        "heads": max(1, inner // RESAMPLER_HEAD),
        "feed_forward": _size(state, f"{layer}0.1.1.weight", 0, 8192),
        "depth": _depth(state, layer),
    }


def _size(state: Mapping[str, torch.Tensor], key: str, axis: int, default: int) -> int:
    return state[key].shape[axis] if key in state and state[key].ndim > axis else default


def _depth(state: Mapping[str, torch.Tensor], prefix: str) -> int:
    """How many layers the keys `<prefix><index>.` count."""
    numbers = [key[len(prefix) :].split(".")[0] for key in state if key.startswith(prefix)]
    return 1 + max((int(number) for number in numbers if number.isdecimal()), default=-1)


def _not_photomaker(source: Path | str, found: str) -> str:
    return (
        f"{source} is not a PhotoMaker file: expected the parts {ENCODER} and {LORA}, or an id encoder alone; found "
        f"{found}. Choose a file published as {REPOSITORIES}."
    )


def apply_lora(
    model: comfy.model_patcher.ModelPatcher, lora: dict[str, torch.Tensor], strength: float, source: str
) -> comfy.model_patcher.ModelPatcher:
    """A clone of the MODEL with PhotoMaker's LoRA (published strength: 1.0, in all steps); 0 leaves it out.

    Args:
        lora: as returned by `load_photomaker`.
        source: what to call the file in an error.

    Raises:
        ValueError: there is no LoRA, or it does not fit the MODEL.
    """
    if strength == 0:
        return model.clone()
    if not lora:
        raise ValueError(
            f"{source} holds the id encoder without its LoRA, and PhotoMaker needs both. Use the published file "
            f"({REPOSITORIES}), or set the LoRA strength to 0 and add the LoRA with another node."
        )
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    loaded = comfy.lora.load_lora(lora, keys, log_missing=False)
    unplaced = sorted(lora.keys() - {key for adapter in loaded.values() for key in getattr(adapter, "loaded_keys", ())})
    problem = f"no layer of it is named as {unplaced[0]}" if unplaced else _misfit(model, loaded)
    if problem:
        raise ValueError(
            f"The LoRA of {source} does not fit the MODEL ({type(model.model).__name__}): {problem}. "
            "PhotoMaker needs an SDXL checkpoint."
        )
    return comfy.sd.load_lora_for_models(model, None, lora, strength, 0)[0]


def _misfit(model: comfy.model_patcher.ModelPatcher, loaded: dict) -> str | None:
    """The first layer whose shape differs from its LoRA's, in words."""
    state = model.model.state_dict()
    for key, adapter in loaded.items():
        if not isinstance(adapter, LoRAAdapter):
            return f"{key} has a {type(adapter).__name__}, expected a LoRA"
        up, down = adapter.weights[:2]
        found, expected = (up.shape[0], *down.shape[1:]), tuple(state[key].shape)
        if found != expected or up.shape[1:] != down.shape[:1]:
            return f"{key} is {expected}, its LoRA {tuple(up.shape)} x {tuple(down.shape)}"
    return None
