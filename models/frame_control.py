"""ControlNets for pictures on the frames of a clip."""

import logging
from types import SimpleNamespace

import comfy.cldm.cldm
import comfy.controlnet
import comfy.model_sampling
import torch
from comfy.ldm.modules.attention import SpatialTransformer

from .temporal import as_frames

# Conditions of a prompt that ControlNets read, one row per picture.
PER_PICTURE = ("c_crossattn", "crossattn_controlnet", "y")


class _PictureSampling(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.EPS):
    """The noise levels of Stable Diffusion 1.x and 2.x, which their ControlNets know by timestep."""


class FrameControl(comfy.controlnet.ControlBase):
    """A ControlNet, or several in a row, that sees every frame of a clip as a picture.

    Its pictures go with the frames: one with all of them, as many as there are frames each with its own.
    """

    def __init__(self, control: comfy.controlnet.ControlBase):
        super().__init__()
        self.control = control

    def chain(self) -> list[comfy.controlnet.ControlBase]:
        """The ControlNets, the last one first."""
        return chain(self.control)

    def pre_run(self, model, percent_to_timestep_function, **options) -> None:
        sampling = _PictureSampling().to(model.model_sampling.sigmas.device)
        known = SimpleNamespace(model_sampling=sampling, diffusion_model=model.diffusion_model)
        self.control.pre_run(known, percent_to_timestep_function, **options)

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        """What ComfyUI's `get_control` returns, for the frames (B * F, C, h, w) of clips x_noisy (B, C, F, h, w)."""
        frames = x_noisy.shape[2]
        repeated = {name: cond[name].repeat_interleave(frames, dim=0) for name in PER_PICTURE if name in cond}
        window = transformer_options.get("context_window")
        with _PicturesOf(self.chain(), frames, window):
            return self.control.get_control(
                as_frames(x_noisy),
                t.repeat_interleave(frames),
                {**cond, **repeated},
                batched_number,
                transformer_options,
            )

    def inference_memory_requirements(self, dtype, **options):
        return self.control.inference_memory_requirements(dtype, **options)

    def get_models(self, **options) -> list:
        return super().get_models(**options) + self.control.get_models(**options)

    def get_extra_hooks(self, **options) -> list:
        return self.control.get_extra_hooks(**options)

    def cleanup(self, **options) -> None:
        super().cleanup(**options)
        self.control.cleanup(**options)

    def deepclone_multigpu(self, load_device, autoregister: bool = False, **options) -> "FrameControl":
        copies = [control.deepclone_multigpu(load_device, **options) for control in self.chain()]
        for copy, previous in zip(copies, [*copies[1:], None]):
            copy.set_previous_controlnet(previous)
        clone = FrameControl(copies[0])
        if autoregister:
            self.multigpu_clones[load_device] = clone
        return clone


class _PicturesOf:
    """Gives ControlNets the pictures of a context window's frames while it lasts."""

    def __init__(self, controls: list, frames: int, window):
        self.controls, self.originals = controls, []
        indices = [] if window is None or window.dim != 2 else window.index_list
        anchor = getattr(window, "causal_anchor_index", None)
        if anchor is not None and anchor >= 0:
            indices = [anchor, *indices]
        self.indices = indices if len(indices) == frames else []

    def __enter__(self) -> None:
        for control in self.controls if self.indices else ():
            pictures = control.cond_hint_original
            self.originals.append((control, pictures))
            if len(pictures) > max(self.indices):
                control.cond_hint_original, control.cond_hint = pictures[self.indices], None

    def __exit__(self, *_) -> None:
        for control, pictures in self.originals:
            control.cond_hint_original = pictures


def with_frame_before(control: dict | None, clips: int) -> dict | None:
    """The features of frames (B * F, C, h, w) of B clips, with none for a frame in front: (B * (F + 1), C, h, w)."""
    if control is None:
        return None

    def widened(features: torch.Tensor | None) -> torch.Tensor | None:
        if features is None or features.shape[0] % clips:
            return features
        frames = features.unflatten(0, (clips, -1))
        return torch.cat((torch.zeros_like(frames[:, :1]), frames), dim=1).flatten(0, 1)

    return {part: [widened(features) for features in listed] for part, listed in control.items()}


def chain(control: comfy.controlnet.ControlBase) -> list[comfy.controlnet.ControlBase]:
    """A ControlNet and those before it."""
    found = []
    while control is not None:
        found.append(control)
        control = control.previous_controlnet
    return found


def check_control(
    control: comfy.controlnet.ControlBase, title: str, skips: list[int], context: int, frames: int, own_text: bool
) -> None:
    """Raise ValueError for a ControlNet whose features do not fit a network.

    Args:
        title: of the network's family.
        skips: channels of what the network keeps on the way down.
        context: width of its text.
        frames: of the clip.
        own_text: the prompt has a text for ControlNets beside the network's.
    """
    for link in chain(control):
        network = getattr(link, "control_model", None)
        kind = type(link).__name__
        if isinstance(link, comfy.controlnet.ControlLora):
            raise ValueError(
                f"A Control-LoRA takes its weights from a UNet of Stable Diffusion, and {title} is none. Use a full "
                "ControlNet of Stable Diffusion 2.1, or remove it."
            )
        if network is not None and not isinstance(network, comfy.cldm.cldm.ControlNet):
            raise ValueError(
                f"This ControlNet ({kind}) belongs to another kind of network than {title}. Use one of Stable "
                "Diffusion 2.1, or remove it."
            )
        if network is not None:
            _check_widths(network, title, skips, context, own_text)
        pictures = link.cond_hint_original
        if pictures is not None and len(pictures) not in (1, frames):
            logging.warning(
                "A ControlNet has %d pictures for a clip of %d frames: %s.",
                len(pictures),
                frames,
                "the last ones are left out" if len(pictures) > frames else "they are repeated",
            )


def _check_widths(network, title: str, skips: list[int], context: int, own_text: bool) -> None:
    widths = [convolution[0].out_channels for convolution in network.zero_convs]
    if widths != skips:
        raise ValueError(
            f"This ControlNet has {_short(widths)}, but {title} has {_short(skips)}. Use one of "
            "Stable Diffusion 2.1, whose layers it shares, or remove it."
        )
    reads = next(
        block.attn2.to_k.in_features
        for module in network.modules()
        if isinstance(module, SpatialTransformer)
        for block in module.transformer_blocks
    )
    if reads != context and not own_text:
        raise ValueError(
            f"This ControlNet reads texts of {reads} values per token, but those of {title} have {context}. Give both "
            "prompts a text for it with CLIP Text Encode (ControlNet) and the CLIP of its own Stable Diffusion, or use "
            "a ControlNet of Stable Diffusion 2.1."
        )


def _short(widths: list[int]) -> str:
    return f"{len(widths)} blocks of {', '.join(str(width) for width in dict.fromkeys(widths))} channels"
