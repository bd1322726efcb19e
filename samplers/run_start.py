"""What happens when a run with a model of this pack starts: everything that was put on it is looked at once.

`look` is a wrapper of ComfyUI's guiders. It sees the model with its patches, the prompts, the latent and the noise
levels before any weights are loaded, serves what has to be brought into the form of a clip, and refuses what could only
fail or do nothing.
"""

import functools
from collections.abc import Callable

import comfy.model_patcher
import comfy.model_sampling
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP

from ..models.base import VideoModel
from ..models.clip_latents import check_clip_count, check_clip_latents
from ..models.frame_control import FrameControl, check_control
from ..models.served import SAID, Served, node_of, say
from . import frames_in_batch, picture_guidance, self_attention_guidance
from .clip_numbers import clip_numbers, rows_of_clips
from .regions import place

KEY = "consistent_video"

# Keys of a prompt that ComfyUI itself reads, or that text encoders add for networks with more than one text.
KNOWN_KEYS = frozenset(
    "cross_attn model_conds uuid hooks default prompt_type pooled_output attention_mask additional_models "
    "area strength mask mask_strength set_area_to_bounds start_percent end_percent clip_start_percent clip_end_percent "
    "control control_apply_to_uncond cross_attn_controlnet pooled_output_controlnet "
    "width height crop_w crop_h target_width target_height".split()
)

# Node that writes a key which other networks read.
WRITERS = {
    "guidance": "FluxGuidance",
    "concat_latent_image": "InpaintModelConditioning or a conditioning node of another video model",
    "concat_mask": "InpaintModelConditioning or a conditioning node of another video model",
    "reference_latents": "ReferenceLatent",
    "unclip_conditioning": "unCLIPConditioning",
    "clip_vision_output": "a conditioning node of another video model",
}

# Below this signal-to-noise level a clip cannot begin from nothing: the network takes what is there for content.
LOWEST_FIRST_SIGMA = 3.0


def install(model: comfy.model_patcher.ModelPatcher) -> None:
    """Have every run with a model and its clones looked at."""
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, look)
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, after_guidance)


def look(
    executor: Callable,
    noise: torch.Tensor,
    latent_image: torch.Tensor,
    sampler: comfy.samplers.Sampler,
    sigmas: torch.Tensor,
    denoise_mask: torch.Tensor | None = None,
    callback: Callable | None = None,
    disable_pbar: bool = False,
    seed: int | None = None,
    **kwargs,
) -> torch.Tensor:
    """Wrapper of a sampling run (`OUTER_SAMPLE`); `executor.class_obj` is the guider.

    Raises:
        ValueError: something on the model or in a prompt that the model's family cannot serve.
    """
    guider = executor.class_obj
    model, options = guider.model_patcher.model, guider.model_options
    if isinstance(model, VideoModel):
        if frames_in_batch.are_frames(noise, options):
            run = functools.partial(look, executor)
            settings = (callback, disable_pbar, seed)
            return frames_in_batch.sample_as_clip(
                run, noise, latent_image, sampler, sigmas, denoise_mask, *settings, **kwargs
            )
        told = options["transformer_options"]
        told[SAID] = set()
        check_clip_latents(noise, model.latent_format)
        check_sampling(guider.model_patcher)
        check_sigmas(model.served, sigmas, noise, latent_image, told)
        model.served.check_patches(told)
        check_places(model, told)
        check_windows(model.served, options.get("context_handler"))
        self_attention_guidance.adapt(options)
        picture_guidance.adapt(options)
        prepare_prompts(guider, noise, seed)
    # before the run: ComfyUI's uni_pc writes into the sigmas
    finished = isinstance(model, VideoModel) and bool(sigmas[-1] == 0)
    clip = executor(noise, latent_image, sampler, sigmas, denoise_mask, callback, disable_pbar, seed, **kwargs)
    return model.after_run(clip, guider.conds, denoise_mask) if finished else clip


def after_guidance(executor: Callable, *args, **kwargs) -> torch.Tensor:
    """Wrapper of a prediction (`PREDICT_NOISE`): what a family keeps whatever the guidance does to it."""
    denoised = executor(*args, **kwargs)
    guider = executor.class_obj
    model = guider.inner_model
    return model.after_guidance(denoised, guider.conds) if isinstance(model, VideoModel) else denoised


def check_sampling(patcher: comfy.model_patcher.ModelPatcher) -> None:
    """Refuse a sampling space the network was not trained in; say where its noise levels are not the checkpoint's."""
    model, sampling = patcher.model, patcher.get_model_object("model_sampling")
    node, title = node_of(type(sampling)), model.served.title
    unknown = comfy.model_sampling.ModelSamplingDiscreteEDM | comfy.model_sampling.StableCascadeSampling
    if (
        not isinstance(sampling, comfy.model_sampling.EPS)
        or isinstance(sampling, comfy.model_sampling.IMG_TO_IMG)
        or not isinstance(sampling, comfy.model_sampling.ModelSamplingDiscrete)
        or isinstance(sampling, unknown)
    ):
        kinds = ", ".join(base.__name__ for base in type(sampling).__bases__)
        raise ValueError(
            f"{node} makes the model sample as {kinds}, but {title} knows {len(model.trained_sigmas)} training "
            "timesteps of noise that is added to a clip. Remove that node from this model."
        )
    if len(sampling.sigmas) != len(model.trained_sigmas):
        return  # a distilled model's own steps
    options = patcher.model_options["transformer_options"]
    trained = model.trained_sigmas.to(sampling.sigmas)
    off = ((sampling.sigmas - trained).abs() / trained)[:-3].max().item()
    if off > 0.01:
        say(
            options,
            f"{node} gives {title} other noise levels than its checkpoint was trained on, up to {off:.0%} off: choose "
            f"zsnr {'on' if model.scheduler_config.get('rescale_betas_zero_snr') else 'off'} to keep them.",
        )
    if model.prediction_of(sampling) != model.prediction:
        say(
            options,
            f"{node} makes {title} predict {model.prediction_of(sampling)}, but its checkpoint predicts "
            f"{model.prediction}: only weights trained so make clips with it.",
        )


def check_sigmas(served: Served, sigmas, noise, latent_image, options: dict) -> None:
    """Say where a clip is to come out of noise that is too weak for it."""
    first = sigmas[0].item()
    if first < LOWEST_FIRST_SIGMA and noise.any() and not latent_image.any() and first > 0:
        say(
            options,
            f"The noise levels begin at {first:.3g}, but the latent is empty: {served.title} needs a start above "
            f"{LOWEST_FIRST_SIGMA:g} to make a clip of noise. Give a scheduler this model, with denoise 1.",
        )


def check_places(model: VideoModel, options: dict) -> None:
    """Say which replacements are for layers that the network does not have."""
    served, found = model.served, model.diffusion_model.places()
    for name, functions in options.get("patches_replace", {}).items():
        for place_, function in functions.items():
            if tuple(place_[:2]) not in found.get(name, ()):
                say(
                    options,
                    f"{node_of(function)} is for {name} of {place_[0]} {place_[1]}, which this {served.title} does not "
                    "have: it has no effect there.",
                )


def check_windows(served: Served, handler: object) -> None:
    """Refuse context windows along an axis in which the network cannot be cut."""
    axis = getattr(handler, "dim", None)
    if axis is not None and axis not in served.windows:
        raise ValueError(
            f"Context windows along dimension {axis} cannot cut a clip of {served.title}. Set dim to 2, the frames."
        )


def prepare_prompts(guider: comfy.samplers.CFGGuider, noise: torch.Tensor, seed: int | None) -> None:
    """Bring what is in the prompts into the form of the clips, in the guider's copies of them."""
    model, options = guider.model_patcher.model, guider.model_options
    served, windowed = model.served, options.get("context_handler") is not None
    controls: dict[int, FrameControl] = {}
    numbers = None
    for cond in (cond for conds in guider.conds.values() for cond in conds):
        _check_keys(served, cond, options["transformer_options"])
        place(cond, noise.shape, served.patch)
        if windowed and "mask" in cond and cond["mask"].shape[1] > 1:
            raise ValueError("Context windows cannot cut masks of frames. Remove the area of the mask, or the windows.")
        if "control" in cond:
            cond["control"] = _control(model, cond, noise, controls)
        for key in served.pictures:
            if torch.is_tensor(cond.get(key)) and cond[key].shape[0] > 1:
                count = cond[key].shape[0]
                numbers = clip_numbers(noise, seed, 16 * max(count, len(noise))) if numbers is None else numbers
                _check_count(count, numbers, options["transformer_options"])
                cond[key] = rows_of_clips(cond[key], numbers)


def _check_count(pictures: int, numbers: list[int], options: dict) -> None:
    """Refuse clips that do not share the pictures evenly; say which pictures fewer clips go with."""
    clips = len(numbers)
    if numbers == list(range(clips)):
        check_clip_count(pictures, clips)
    if clips < pictures:
        chosen = ", ".join(str(number % pictures + 1) for number in numbers)
        say(options, f"There are {pictures} pictures for {clips} clip(s), made with picture {chosen}.")


def _check_keys(served: Served, cond: dict, options: dict) -> None:
    if "gligen" in cond:
        raise ValueError(
            f"GLIGEN places objects in pictures of Stable Diffusion, not in clips of {served.title}. Remove it, and "
            "use Conditioning (Set Area) instead."
        )
    for key in sorted(cond.keys() - KNOWN_KEYS - {*served.pictures, *served.reads}):
        node = f" (written by {WRITERS[key]})" if key in WRITERS else ""
        say(options, f"A prompt carries {key!r}{node}, which {served.title} does not read: it has no effect.")


def _control(model: VideoModel, cond: dict, noise: torch.Tensor, controls: dict[int, FrameControl]) -> FrameControl:
    """The ControlNet of a prompt for clips; one object for all prompts that share it, or they are not batched."""
    control, served, network = cond["control"], model.served, model.diffusion_model
    if id(control) not in controls:
        if not served.controls:
            raise ValueError(
                f"ControlNets are made for UNets, and {served.title} is a transformer: remove Apply ControlNet from "
                "its prompts."
            )
        own_text = "cross_attn_controlnet" in cond
        width = network.config.cross_attention_dim
        check_control(control, served.title, network.skip_channels(), width, noise.shape[2], own_text)
        controls[id(control)] = FrameControl(control)
    return controls[id(control)]
