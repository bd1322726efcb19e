"""Small PhotoMaker files with the published key names, and a small CLIP with SDXL's two text encoders.

The files fit the text width of SDXL (2048) and the network of `tiny_sdxl`, so that a whole graph can run.
"""

from pathlib import Path

import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.utils
import tiny_sdxl
import torch
from safetensors.torch import save_file
from whole_layers import weights_from_the_start

from consistent_video.models.photomaker import IdEncoderV1, IdEncoderV2

SDXL_WIDTH = 2048
VISION = {
    "model_type": "clip_vision_model",
    "hidden_act": "quick_gelu",
    "num_channels": 3,
    "hidden_size": 64,
    "image_size": 224,
    "intermediate_size": 64,
    "num_attention_heads": 1,
    "num_hidden_layers": 2,
    "patch_size": 56,
}
PERCEIVER = {
    "tokens": 2,
    "face_width": 512,
    "face_hidden": 16,
    "inner": 128,
    "heads": 1,
    "feed_forward": 16,
    "depth": 1,
}
RANK = 2


def encoder_state(version: str, width: int = SDXL_WIDTH, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors of an id encoder, with the keys of v2 files that nothing reads."""
    with torch.device("meta"):
        narrow = width * 3 // 8
        v1 = IdEncoderV1(VISION, width, (8, 8), (narrow, width - narrow)).state_dict()
        v2 = IdEncoderV2(VISION, width, (8, 8), PERCEIVER).state_dict()
    shapes = v1 if version == "v1" else {**v2, **{key: v1[key] for key in v1 if key.startswith("visual_projection")}}
    return _random({key: value.shape for key, value in shapes.items()}, seed)


def lora_state(unet: dict = tiny_sdxl.UNET, seed: int = 1) -> dict[str, torch.Tensor]:
    """A LoRA over every attention projection of a U-Net, under the published (old diffusers) names."""
    widths = _attention_shapes(unet)
    shapes = {}
    for key, (outputs, inputs) in widths.items():
        parent, layer = key.removesuffix(".weight").removesuffix(".0").rsplit(".", 1)
        name = f"unet.{parent}.processor.{layer}_lora"
        shapes[f"{name}.down.weight"] = torch.Size((RANK, inputs))
        shapes[f"{name}.up.weight"] = torch.Size((outputs, RANK))
    return _random(shapes, seed)


def write_photomaker(path: Path, version: str, width: int = SDXL_WIDTH, lora: bool = True, seed: int = 0) -> Path:
    """Write a file as published: two dictionaries in a pickle, or one dictionary with prefixes in safetensors."""
    parts = {"id_encoder": encoder_state(version, width, seed)}
    if lora:
        parts["lora_weights"] = lora_state()
    if path.suffix == ".safetensors":
        save_file({f"{part}.{key}": value for part, state in parts.items() for key, value in state.items()}, path)
    else:
        torch.save(parts, path)
    return path


@weights_from_the_start()
def tiny_clip(widths: tuple[int, int] = (24, 40), seed: int = 0) -> comfy.sd.CLIP:
    """SDXL's pair of text encoders with 3 layers each; `widths` are those of CLIP-L and CLIP-G."""
    clip = comfy.sd.CLIP(_Target(widths))
    generator = torch.Generator().manual_seed(seed)
    for parameter in clip.cond_stage_model.parameters():
        values = 0.3 * torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(values)
    return clip


class _Target:
    """What `comfy.sd.CLIP` builds."""

    def __init__(self, widths: tuple[int, int]) -> None:
        self.params = {}
        self.tokenizer = comfy.sdxl_clip.SDXLTokenizer
        self.clip = _text_encoder_class(widths)


def _text_encoder_class(widths: tuple[int, int]) -> type:
    def tower(width: int, pad: int, device, dtype, model_options) -> comfy.sd1_clip.SDClipModel:
        return comfy.sd1_clip.SDClipModel(
            device=device,
            dtype=dtype,
            layer="hidden",
            layer_idx=-2,
            layer_norm_hidden_state=False,
            special_tokens={"start": 49406, "end": 49407, "pad": pad},
            textmodel_json_config={
                "hidden_size": width,
                "intermediate_size": 2 * width,
                "num_attention_heads": 2,
                "num_hidden_layers": 3,
                "max_position_embeddings": 77,
                "hidden_act": "gelu",
                "eos_token_id": 49407,
            },
            model_options=model_options,
        )

    class TinyClip(comfy.sdxl_clip.SDXLClipModel):
        def __init__(self, device="cpu", dtype=None, model_options={}):
            torch.nn.Module.__init__(self)
            self.clip_l = tower(widths[0], 49407, device, torch.float32, model_options)
            self.clip_g = tower(widths[1], 0, device, torch.float32, model_options)
            self.dtypes = {torch.float32}

    return TinyClip


@weights_from_the_start()
def _attention_shapes(unet: dict) -> dict[str, torch.Size]:
    """Diffusers' key -> shape of the projections of both kinds of attention."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    with torch.device("meta"):
        network = UNetModel(**unet, device="meta", operations=comfy.ops.disable_weight_init).state_dict()
    names = comfy.utils.unet_to_diffusers(unet)
    wanted = (".to_q.weight", ".to_k.weight", ".to_v.weight", ".to_out.0.weight")
    return {name: network[key].shape for name, key in names.items() if name.endswith(wanted) and key in network}


def _random(shapes: dict[str, torch.Size], seed: int) -> dict[str, torch.Tensor]:
    """Values that keep activations at their size, so that a picture shows in the result."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape in shapes.items():
        scale = shape[1:].numel() ** -0.5 if len(shape) > 1 else 0.1
        is_norm = len(shape) == 1 and key.endswith(".weight")
        state[key] = (is_norm + scale * torch.randn(shape, generator=generator)).half()
    return state
