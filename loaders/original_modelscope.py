"""The original ModelScope text-to-video checkpoint (`text2video_pytorch_model.pth`) under diffusers' key names.

Source of the layout: `UNetSD` in modelscope/modelscope, modelscope/models/multi_modal/video_synthesis/unet_sd.py.
A numbered block there is one layer of one resolution level: its member 0 is the residual block (with the temporal
convolution inside), 1 the spatial and 2 the temporal transformer. Transformers have the same key names in both layouts.
"""

from collections.abc import Iterable, Mapping

import torch

# Only this network and its relatives spell the word so.
MARKER = "input_blocks.1.0.temopral_conv.conv1.0.weight"
# Members of relatives with conditions that the text-to-video network does not have: I2VGen-XL and VideoComposer.
RELATIVES = ("local_image_concat.", "pre_image_condition.")

ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
}
SHORTCUT = {"skip_connection": "conv_shortcut"}
TEMPORAL_CONV = ("conv1.0", "conv1.2", "conv2.0", "conv2.3", "conv3.0", "conv3.3", "conv4.0", "conv4.3")
TRANSFORMER_BLOCK = (
    *("norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2"),
    *(f"attn{number}.{name}" for number in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0")),
)
TRANSFORMER = ("norm", "proj_in", "proj_out", *(f"transformer_blocks.0.{name}" for name in TRANSFORMER_BLOCK))
WITHOUT_BIAS = (".to_q", ".to_k", ".to_v")


def is_original_modelscope(keys: Iterable[str]) -> bool:
    """Whether these are the keys of an original ModelScope text-to-video UNet, with or without a common prefix."""
    keys = list(keys)
    prefix = _prefix(keys)
    return prefix is not None and not any(key.startswith(prefix + name) for key in keys for name in RELATIVES)


def convert(state: Mapping[str, torch.Tensor], source: str = "The state dict") -> dict[str, torch.Tensor]:
    """Rename an original state dict to the keys of `diffusers.UNet3DConditionModel`; depth and widths are read from it.

    The tensors stay the same memory in the same type. Projections stored as convolutions of kernel 1, (out, in, 1) or
    (out, in, 1, 1), become views (out, in). Of missing keys only those that tell the widths are noticed here; loading
    the result finds the others.

    Args:
        state: as published; a prefix that all keys share is taken off.
        source: what to call it in an error, such as the file's path.

    Raises:
        ValueError: the layout is another one, or a key has no place in the network.
    """
    prefix = _prefix(state)
    if prefix is None:
        found = ", ".join(sorted(state)[:3]) or "nothing"
        raise ValueError(
            f"{source} is not an original ModelScope text-to-video network: expected a key {MARKER}, found {found}. "
            "Choose text2video_pytorch_model.pth or a conversion of it."
        )
    bare = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
    names = key_map(**_configuration(bare, source))
    unknown = sorted(key for key in state if not key.startswith(prefix) or key[len(prefix) :] not in names)
    if unknown:
        raise ValueError(
            f"{source} has keys without a place in the ModelScope text-to-video network "
            f"({len(unknown)} of {len(state)}): {', '.join(unknown[:5])}{', ...' if len(unknown) > 5 else ''}. "
            "It is of a related network or holds more than one; choose a file of the text-to-video UNet alone."
        )
    return {names[key]: _as_linear(names[key], value) for key, value in bare.items()}


def key_map(
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280),
    layers_per_block: int = 2,
    down_attention: tuple[bool, ...] = (True, True, True, False),
) -> dict[str, str]:
    """Original key -> diffusers key, for every parameter of a network.

    Args:
        block_out_channels: channels of each resolution level, finest first.
        layers_per_block: layers of a down level; an up level has one more.
        down_attention: which down levels have transformers; the up levels mirror them.
    """
    levels = len(block_out_channels)
    modules = {**ENDS, **_same("input_blocks.0.1", "transformer_in", TRANSFORMER)}
    for level, attention in enumerate(down_attention):
        first, target = 1 + level * (layers_per_block + 1), f"down_blocks.{level}"
        widens = block_out_channels[level] != block_out_channels[max(level - 1, 0)]
        for layer in range(layers_per_block):
            modules |= _layer(f"input_blocks.{first + layer}", target, layer, widens and layer == 0, attention)
        if level < levels - 1:
            modules[f"input_blocks.{first + layers_per_block}.op"] = f"{target}.downsamplers.0.conv"
    modules |= _layer("middle_block", "mid_block", 0, False, True) | _resnet("middle_block.3", "mid_block", 1, False)
    for level, attention in enumerate(reversed(down_attention)):
        first, target = level * (layers_per_block + 1), f"up_blocks.{level}"
        for layer in range(layers_per_block + 1):
            modules |= _layer(f"output_blocks.{first + layer}", target, layer, True, attention)
        if level < levels - 1:
            member = 3 if attention else 1
            modules[f"output_blocks.{first + layers_per_block}.{member}.conv"] = f"{target}.upsamplers.0.conv"
    return {
        f"{old}.{parameter}": f"{new}.{parameter}"
        for old, new in modules.items()
        for parameter in (("weight",) if new.endswith(WITHOUT_BIAS) else ("weight", "bias"))
    }


def _layer(old: str, new: str, index: int, shortcut: bool, attention: bool) -> dict[str, str]:
    """The modules of a residual block and of the transformers that follow it."""
    modules = _resnet(f"{old}.0", new, index, shortcut)
    if attention:
        modules |= _same(f"{old}.1", f"{new}.attentions.{index}", TRANSFORMER)
        modules |= _same(f"{old}.2", f"{new}.temp_attentions.{index}", TRANSFORMER)
    return modules


def _resnet(old: str, new: str, index: int, shortcut: bool) -> dict[str, str]:
    names = {**RESNET, **SHORTCUT} if shortcut else RESNET
    spatial = {f"{old}.{name}": f"{new}.resnets.{index}.{renamed}" for name, renamed in names.items()}
    return spatial | _same(f"{old}.temopral_conv", f"{new}.temp_convs.{index}", TEMPORAL_CONV)


def _same(old: str, new: str, names: Iterable[str]) -> dict[str, str]:
    return {f"{old}.{name}": f"{new}.{name}" for name in names}


def _prefix(keys: Iterable[str]) -> str | None:
    """What stands before the network's own key names ("" for nothing), None when the network is not there."""
    marked = (key for key in keys if key == MARKER or key.endswith("." + MARKER))
    return next((key.removesuffix(MARKER) for key in marked), None)


def _configuration(state: Mapping[str, torch.Tensor], source: str) -> dict[str, tuple | int]:
    """The arguments of `key_map` for a state dict without prefix."""
    present = {key.split(".")[1] for key in state if key.startswith("input_blocks.")}
    blocks = next(number for number in range(len(present) + 1) if str(number) not in present)
    # A level is its layers and a downsampler, which the last level lacks; block 0 comes before the first level.
    downsampler = next((n for n in range(1, blocks) if f"input_blocks.{n}.op.weight" in state), blocks)
    firsts = range(1, blocks, downsampler)
    widths = [f"input_blocks.{first}.0.out_layers.0.weight" for first in firsts]
    missing = [key for key in widths if key not in state]
    if missing:
        raise ValueError(f"{source} is incomplete: it lacks the keys {', '.join(missing[:3])}. Download it again.")
    return {
        "block_out_channels": tuple(state[key].shape[0] for key in widths),
        "layers_per_block": downsampler - 1,
        "down_attention": tuple(f"input_blocks.{first}.1.norm.weight" in state for first in firsts),
    }


def _as_linear(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A view of a kernel-1 projection without its trailing axes of length 1; other tensors as they are."""
    if name.endswith((".proj_in.weight", ".proj_out.weight")):
        while tensor.ndim > 2 and tensor.shape[-1] == 1:
            tensor = tensor.squeeze(-1)
    return tensor
