"""What comes over the sockets of this pack's nodes, checked before a node begins to work.

ComfyUI compares the names of sockets, not what comes over them: another pack may use the same name for objects of its
own, an API client may write a value where a link belongs, and a combo over a wire may hold anything. `checked` puts the
check in front of a node's `execute`.
"""

import functools
import inspect
import logging
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module

import torch
from comfy_api.latest import io

from ..models.pictures import picture_flaw

# Combos that list what is on the disk: what they load says which file is missing, and where it goes.
LISTED_FILES = ("checkpoint", "file", "font", "source")
SHOWN = 40
HALVES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Socket:
    """What a socket carries.

    Args:
        fits: whether a value is of the kind.
        source: what to connect.
        flaw: what is wrong with a value of the kind, as a sentence; None if nothing is.
    """

    fits: Callable[[object], bool]
    source: str
    flaw: Callable[[object], str | None] = lambda value: None


def checked(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """Class decorator: `execute` raises ValueError, with the input's name, for values that do not fit their sockets.

    Texts reach it without halves of characters; see `without_halves`.
    """
    execute = vars(node)["execute"].__func__
    signature = inspect.signature(execute)

    @functools.cache
    def inputs() -> tuple[Mapping[str, io.Input], bool]:
        schema = node.define_schema()
        return {entry.id: entry for entry in schema.inputs}, schema.is_input_list

    @functools.wraps(execute)
    def check_and_execute(cls, *args, **kwargs):
        entries, as_list = inputs()
        given = signature.bind(cls, *args, **kwargs)
        for name, value in given.arguments.items():
            if name in entries:
                check_input(entries[name], value, as_list)
            if isinstance(value, str):
                given.arguments[name] = without_halves(name, value)
        return execute(*given.args, **given.kwargs)

    node.execute = classmethod(check_and_execute)
    return node


def check_input(entry: io.Input, value: object, as_list: bool = False) -> None:
    """Raise ValueError when a value does not fit an input of a schema.

    Args:
        as_list: whether the node takes the values of its inputs as lists.
    """
    if isinstance(entry, io.Combo.Input):
        _check_choice(entry, value)
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{entry.id} is {value}, not a finite number. Check the node that it comes from.")
    socket = SOCKETS.get(entry.get_io_type())
    if socket is None or (value is None and entry.optional):
        return
    if as_list and not value:
        raise ValueError(f"{entry.id}: an empty list came over the wire. Connect {socket.source}.")
    for one in value if as_list else [value]:
        if not socket.fits(one):
            raise ValueError(
                f"{entry.id}: expected {entry.get_io_type()}, found {describe(one)}. Connect {socket.source}."
            )
        flaw = socket.flaw(one)
        if flaw:
            raise ValueError(f"{entry.id}: {flaw}")


def without_halves(name: str, text: str) -> str:
    """A text without halves of characters (surrogates), with a warning.

    A cut emoji leaves them. Neither text encoders nor files take them.
    """
    whole = HALVES.sub("", text)
    if whole != text:
        logging.warning("%s: %d half characters are left out, such as of a cut emoji.", name, len(text) - len(whole))
    return whole


def describe(value: object) -> str:
    """A value in a few words, for a message."""
    if value is None:
        return "nothing"
    if isinstance(value, str):
        text = value if len(value) <= SHOWN else f"{value[:SHOWN]}..."
        return f"the text {text!r} in place of a link"
    if isinstance(value, int | float):
        return f"the value {value} in place of a link"
    if isinstance(value, torch.Tensor):
        return f"a tensor {tuple(value.shape)} of type {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, list | tuple | dict):
        kind = "dictionary" if isinstance(value, dict) else "list"
        return f"a {kind} of {len(value)} entries" if len(value) != 1 else f"a {kind} of 1 entry"
    kind = type(value)
    return f"an object {kind.__qualname__} of {kind.__module__.partition('.')[0]}"


def _check_choice(entry: io.Combo.Input, value: object) -> None:
    options = entry.options or []
    if entry.id in LISTED_FILES:
        if not isinstance(value, str):
            raise ValueError(f"{entry.id}: expected a name, found {describe(value)}. Choose one that the node lists.")
    elif value not in options:
        choices = ", ".join(map(str, options))
        raise ValueError(f"{entry.id}: {value!r} is not one of the choices. Choose one of: {choices}.")


def _has(*names: str) -> Callable[[object], bool]:
    """Whether a value has methods and attributes, whatever pack its class comes from."""
    return lambda value: all(hasattr(value, name) for name in names)


def _is(kind: type) -> Callable[[object], bool]:
    return lambda value: isinstance(value, kind)


def _is_ours(module: str, kind: str) -> Callable[[object], bool]:
    """Whether a value is of a class of this pack, whose module is imported at the first check: sockets need none."""
    return lambda value: isinstance(value, getattr(import_module(f"..{module}", __package__), kind))


def _conditioning_flaw(value: list) -> str | None:
    if not value:
        return "the conditioning is an empty list. Connect CLIP Text Encode."
    whole = all(isinstance(entry, list | tuple) and len(entry) == 2 and isinstance(entry[1], dict) for entry in value)
    return None if whole else "the list does not hold pairs of text states and settings. Connect CLIP Text Encode."


def _latent_flaw(value: dict) -> str | None:
    samples = value.get("samples")
    if not isinstance(samples, torch.Tensor):
        return f"the latent holds {describe(samples)} as samples. Connect a node that makes latents."
    if samples.ndim < 3 or 0 in samples.shape or not samples.is_floating_point():
        return f"the latent holds {describe(samples)}, expected (batch, channels, frames, height, width)."
    if not all(bool(clip.isfinite().all()) for clip in samples):
        return "the latent holds NaN or infinite values. Check the node that made it."
    return None


def _sigmas_flaw(value: torch.Tensor) -> str | None:
    if value.ndim != 1 or not bool(value.isfinite().all()):
        return f"the schedule is {describe(value)}, expected a row of finite noise levels. Connect Reference Scheduler."
    return None


SOCKETS = {
    "MODEL": Socket(_has("model", "clone", "model_options"), "a node that loads or patches models"),
    "CLIP": Socket(_has("tokenize", "encode_from_tokens_scheduled"), "a node that loads text encoders"),
    "VAE": Socket(_has("decode", "encode", "latent_channels", "spacial_compression_decode"), "a node that loads VAEs"),
    "CLIP_VISION": Socket(_has("encode_image", "image_size"), "the loader of the checkpoint, or Load CLIP Vision"),
    "CONDITIONING": Socket(_is(list), "CLIP Text Encode", _conditioning_flaw),
    "LATENT": Socket(_is(dict), "a node that makes latents", _latent_flaw),
    "IMAGE": Socket(_is(torch.Tensor), "Load Image, or a node that makes pictures", picture_flaw),
    "NOISE": Socket(_has("generate_noise"), "RandomNoise or Shared Noise"),
    "SAMPLER": Socket(_has("sample"), "KSamplerSelect or Reference Sampler"),
    "SIGMAS": Socket(_is(torch.Tensor), "Reference Scheduler or Basic Scheduler", _sigmas_flaw),
    "STORY": Socket(_is_ours("story.script", "Story"), "Story Script"),
    "CHARACTER_BANK": Socket(
        _is_ours("patches.character_bank", "CharacterBank"), "Story Sampler or Load Character Bank"
    ),
    "PHOTOMAKER": Socket(callable, "Load PhotoMaker"),
    "FACE_MODEL": Socket(_is_ours("faces.face_model", "FaceModel"), "Load Face Model of this pack"),
    "FACE_EMBEDS": Socket(_is_ours("faces.embeddings", "FaceEmbeds"), "Face Encode of this pack"),
    "MOTION_PREDICTOR": Socket(_is_ours("models.motion_predictor", "MotionPredictorModel"), "Load Motion Predictor"),
}
