"""What a run says about itself before it starts: the origin of its bank, and the bank's size."""

import hashlib
import math
from collections.abc import Sequence

import comfy.model_patcher
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import Upsample

from .character_bank import Origin
from .schedule_place import Place
from .shared_layers import shared_layers
from .token_sharing import Layer, Sharing


def origin_of(
    model: comfy.model_patcher.ModelPatcher, sharing: Sharing, sigmas: torch.Tensor, width: int, height: int
) -> Origin:
    """The origin of a bank.

    Args:
        sigmas: (steps + 1,) of the run.
        width, height: in latent pixels.
    """
    return Origin(fingerprint(model), tuple(sigmas.float().tolist()), width, height, sharing)


def fingerprint(model: comfy.model_patcher.ModelPatcher) -> str:
    """Tells checkpoints apart by the norms before the shared attentions; LoRA do not change it."""
    digest = hashlib.sha256()
    for block in shared_layers(model).values():
        digest.update(block.norm1.weight.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def bank_size(
    model: comfy.model_patcher.ModelPatcher,
    sharing: Sharing,
    steps: int,
    width: int,
    height: int,
    panels: int,
    prompts: int = 2,
    evaluations: Sequence[int] | None = None,
    place: Place | None = None,
) -> int:
    """Bytes of a bank.

    Args:
        steps: of the run.
        width, height: of the pictures, in latent pixels.
        panels: reference panels, of all characters.
        prompts: 2 with a negative prompt, 1 without.
        evaluations: the step of each call of the model; None for one call per step.
        place: of the run in its schedule; None for one that is the whole of it.
    """
    layers, grids = shared_layers(model), layer_grids(model, width, height)
    item = model.model.get_dtype_inference().itemsize
    before, whole = place or Place(0, steps)
    numbers = [before + step for step in (range(steps) if evaluations is None else evaluations)]
    total = 0
    for layer, block in layers.items():
        apart, tokens = grids[layer]
        kept = round(sharing.rate(apart) * tokens)
        shared = sum(sharing.shares(step, whole, layer) for step in numbers)
        full = sum(sharing.warming_up(step, whole) for step in numbers) if sharing.warm_up == "full_bank" else 0
        total += (kept * shared + tokens * full) * block.n_heads * block.d_head
    return total * item * panels * prompts


def layer_grids(model: comfy.model_patcher.ModelPatcher, width: int, height: int) -> dict[Layer, tuple[int, int]]:
    """Of each shared layer: how many latent pixels its tokens are apart, and how many tokens a picture has."""
    network, layers = model.model.diffusion_model, shared_layers(model)
    apart = 2 ** (len(network.channel_mult) - 1)
    grids = {}
    for number, block in enumerate(network.output_blocks):
        size = apart, math.ceil(width / apart) * math.ceil(height / apart)
        grids |= {layer: size for layer in layers if layer.block == number}
        if any(isinstance(module, Upsample) for module in block):
            apart //= 2
    return grids
