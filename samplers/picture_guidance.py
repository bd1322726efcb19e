"""Guidance functions of ComfyUI's nodes that were written for pictures, on clips.

They take (B, C, H, W); with the frames as one more axis some fail, and some do another thing without a word: a
deviation per column instead of per picture, a guidance per clip instead of per frame. Each is called with the clip in
the shape that gives it its meaning.
"""

from collections.abc import Callable

import torch

from ..models.served import node_of

CFG, BEFORE, AFTER = "sampler_cfg_function", "sampler_pre_cfg_function", "sampler_post_cfg_function"


def tall(function: Callable) -> Callable:
    """Call with the frames of each clip one below the other, (B, C, F * h, w): means and norms are of the clip."""

    def called(args: dict):
        shape = args["input"].shape
        found = function(_each(args, shape, lambda tensor: tensor.flatten(2, 3)))
        return _each(found, (*shape[:2], shape[2] * shape[3], shape[4]), lambda tensor: tensor.reshape(shape))

    return called


def single(function: Callable) -> Callable:
    """Call for each clip alone: the function compares one norm with another."""

    def called(args: dict) -> torch.Tensor:
        shape = args["input"].shape
        clips = [function(_each(args, shape, lambda tensor, at=at: tensor[at : at + 1])) for at in range(shape[0])]
        return torch.cat(clips)

    return called


def frames(function: Callable) -> Callable:
    """Call for each clip with its frames as the batch, (F, C, h, w): the function goes along the batch."""

    def called(args: dict) -> torch.Tensor:
        shape = args["input"].shape
        clips = [
            function(_each(args, shape, lambda tensor, at=at: tensor[at].transpose(0, 1))) for at in range(shape[0])
        ]
        return torch.stack(clips).transpose(1, 2)

    return called


# What ComfyUI's nodes put on a model -> how its functions are called with clips.
SHAPES = {
    "APG": tall,
    "RescaleCFG": tall,
    "RenormCFG": single,
    "VideoLinearCFGGuidance": frames,
    "VideoTriangleCFGGuidance": frames,
}


def adapt(model_options: dict) -> None:
    """Wrap the guidance functions of `SHAPES` in a run's own model options."""
    if CFG in model_options:
        model_options[CFG] = _adapted(model_options[CFG])
    for name in (BEFORE, AFTER):
        if name in model_options:
            model_options[name] = [_adapted(function) for function in model_options[name]]


def _adapted(function: Callable) -> Callable:
    shape = SHAPES.get(node_of(function))
    return function if shape is None else shape(function)


def _each(found, shape: tuple[int, ...], change: Callable):
    """A result, or the arguments of a function, with every tensor of a shape in it changed."""
    if isinstance(found, dict):
        changed = {name: value for name, value in found.items() if torch.is_tensor(value) or name == "conds_out"}
        return {**found, **{name: _each(value, shape, change) for name, value in changed.items()}}
    if isinstance(found, list):
        return [_each(value, shape, change) for value in found]
    return change(found) if found.shape == shape else found
