"""How ComfyUI calls the networks of this pack: model configuration and sampling space."""

import math
import re
from collections.abc import Callable, Mapping, Sequence

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_sampling
import comfy.supported_models_base
import torch

from . import network_description
from .clip_latents import check_clip_latents
from .served import Served

# Of what a run keeps for each clip: one that ComfyUI holds for the run, one that it joins for a call of all prompts.
COPIES_OF_KEPT = 2
# Room beside what is counted, for the workspaces of matrix products and convolutions.
ALLOWANCE = 1.06

# Key of a prompt's extras: the sigma that the run starts at, which Image and Text Guider tells its third branch.
FIRST_SIGMA = "consistent_video_first_sigma"

# What a scheduler configuration says that a network predicts -> how ComfyUI makes x0 of it.
PREDICTIONS = {
    "epsilon": comfy.model_sampling.EPS,
    "v_prediction": comfy.model_sampling.V_PREDICTION,
    "sample": comfy.model_sampling.X0,
}

# Layers over time in the published names, and the part of a key by which ComfyUI's nodes tell them from others.
TEMPORAL = re.compile(r"\.(temp_attentions|tempo_attns|transformer_in|image_latents_temporal_encoder)\.")
TEMPORAL_IN_COMFYUI = ".time_stack."


class TemporalKey(str):
    """The published key of a parameter over time; ComfyUI's nodes recognise it as one."""

    def __contains__(self, part: str) -> bool:
        return part == TEMPORAL_IN_COMFYUI or super().__contains__(part)


class VideoModelConfig(comfy.supported_models_base.BASE):
    """What ComfyUI asks about a model.

    Args:
        dtype: type of the stored weights.
        manual_cast_dtype: type of the computation when it differs from `dtype`, else None.
        latent_format: the latent space.
        model_channels: channels of the first block (read by block patches such as FreeU).
        sampling_settings: as of `comfy.model_sampling.ModelSamplingDiscrete`.
    """

    unet_extra_config: dict = {}

    def __init__(
        self,
        dtype: torch.dtype,
        manual_cast_dtype: torch.dtype | None,
        latent_format: comfy.latent_formats.LatentFormat,
        model_channels: int,
        sampling_settings: dict,
    ):
        self.unet_config = {
            "dtype": dtype,
            "model_channels": model_channels,
            "in_channels": latent_format.latent_channels,
        }
        self.manual_cast_dtype = manual_cast_dtype
        self.latent_format = latent_format
        self.sampling_settings = sampling_settings
        self.optimizations = dict(self.optimizations)


class VideoModel(comfy.model_base.BaseModel):
    """A published video network in ComfyUI's sampling space.

    Classes of a family say in `served` what they make of other nodes' patches and prompts.

    Args:
        model_config: see `VideoModelConfig`.
        scheduler_config: the checkpoint's diffusers scheduler configuration; kept for the reference schedule and
            sampler.
        sigmas: (T,), sigma of each training timestep of that scheduler.
        network: builds the network from a `comfy.ops` namespace.

    Raises:
        ValueError: the scheduler configuration names another kind of prediction than `PREDICTIONS`.
    """

    served = Served("this model")

    def __init__(
        self,
        model_config: VideoModelConfig,
        scheduler_config: dict,
        sigmas: torch.Tensor,
        network: Callable[[type], torch.nn.Module],
    ):
        self.prediction = scheduler_config.get("prediction_type", "epsilon")
        if self.prediction not in PREDICTIONS:
            raise ValueError(
                f"The scheduler configuration has prediction_type {self.prediction!r}; expected one of "
                f"{', '.join(PREDICTIONS)}. Correct scheduler_config.json."
            )
        predicts_v = self.prediction == "v_prediction"
        kind = comfy.model_base.ModelType.V_PREDICTION if predicts_v else comfy.model_base.ModelType.EPS
        super().__init__(model_config, kind, unet_model=lambda operations, **_: network(operations))
        if self.prediction == "sample":  # ComfyUI has the sampling space, but no model type of it
            space = (comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.X0)
            self.model_sampling = type("ModelSampling", space, {})(model_config)
        self.scheduler_config = scheduler_config
        self.description: torch.Tensor | None = None
        self.trained_sigmas = sigmas
        self.model_sampling.set_sigmas(sigmas)

    @staticmethod
    def prediction_of(sampling: torch.nn.Module) -> str:
        """What a network is taken to predict in a sampling space, a key of `PREDICTIONS`."""
        kinds = reversed(PREDICTIONS.items())
        return next(name for name, kind in kinds if isinstance(sampling, kind))

    def get_dtype(self, **options) -> torch.dtype:
        """Type of the stored weights (diffusers networks answer with the type of whatever layer comes first)."""
        return self.model_config.unet_config["dtype"]

    def state_dict_for_saving(self, *args, **kwargs) -> dict:
        """What Save Model and Save Checkpoint write, with the network's description; see `network_description`."""
        state = super().state_dict_for_saving(*args, **kwargs)
        if self.description is not None:
            state[network_description.KEY] = self.description
        return state

    def extra_conds(self, **kwargs) -> dict:
        """Conditioning of one prompt.

        Raises:
            ValueError: the latent to sample is not a clip of this model's latents.
        """
        check_clip_latents(kwargs["noise"], self.latent_format)
        return super().extra_conds(**kwargs)

    def memory_required(self, input_shape: Sequence[int], cond_shapes: Mapping = {}, **kwargs) -> float:
        """Bytes that a call needs beside the weights, with what is kept through the run.

        Args:
            input_shape: of the latents, (B, C, F, h, w); B counts a clip once for each prompt.
            cond_shapes: shapes (B, ...) of the run's conditioning by name. What is not in it is taken as published.
            kwargs: what other versions of ComfyUI say beside; the estimate does not depend on it.
        """
        elements = self.call_elements(input_shape)
        for name, published in self.kept_elements(input_shape).items():
            of_clip = max((math.prod(shape[1:]) for shape in cond_shapes.get(name, ())), default=published)
            elements += COPIES_OF_KEPT * input_shape[0] * of_clip
        return ALLOWANCE * elements * comfy.model_management.dtype_size(self.get_dtype_inference())

    def call_elements(self, input_shape: Sequence[int]) -> float:
        """Elements of activations at the peak of a call for latents of `input_shape`.

        ComfyUI's guess for a network that has not been measured.
        """
        guess = super().memory_required(list(input_shape))
        return guess / comfy.model_management.dtype_size(self.get_dtype_inference())

    def kept_elements(self, input_shape: Sequence[int]) -> dict[str, float]:
        """Elements that a run keeps for each clip, by the name of the conditioning, at its published size."""
        return {}

    def state_dict(self, *args, **kwargs) -> dict[str, torch.Tensor]:
        """torch's; the keys of layers over time are `TemporalKey`."""
        state = super().state_dict(*args, **kwargs)
        return {TemporalKey(key) if TEMPORAL.search(key) else key: tensor for key, tensor in state.items()}

    def _apply_model(self, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs):
        """ComfyUI's; refuses patches that were put on the model during the run and that no layer calls."""
        self.served.check_patches(transformer_options)
        return super()._apply_model(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)

    def check_size(self, prepared: torch.Tensor, x: torch.Tensor) -> None:
        """Raise ValueError when a sampler has changed the size of the clip x that a picture was prepared for."""
        if prepared.shape[-2:] != x.shape[-2:]:
            raise ValueError(
                f"The sampler has changed the clip to latents of {tuple(x.shape[-2:])} (height, width), but the "
                f"picture for {self.served.title} was prepared for {tuple(prepared.shape[-2:])}. Use a sampler that "
                "keeps the size, and scale the finished clip up."
            )

    def resize_cond_for_context_window(
        self, cond_key, cond_value, window, x_in, device, retain_index_list=[], **options
    ):
        """The part of a condition for a context window; None lets ComfyUI cut along the batch."""
        if window.dim == 0:
            return None
        return cond_value.in_window(window) if hasattr(cond_value, "in_window") else cond_value

    def after_guidance(self, denoised: torch.Tensor, conds: dict) -> torch.Tensor:
        """The guided x0 (B, C, F, h, w) as samplers get it; `conds` are the prompts that the guider holds."""
        return denoised

    def after_run(self, clip: torch.Tensor, conds: dict, denoise_mask: torch.Tensor | None) -> torch.Tensor:
        """The unscaled clip (B, C, F, h, w) that a finished run returns; `denoise_mask` is 1 where it was drawn."""
        return clip

    def text_states(self, **kwargs) -> torch.Tensor:
        """The prompt's text states (B, S, D) on the device and in the type of the computation.

        Args:
            cross_attn, device: what ComfyUI hands to `extra_conds`.

        Raises:
            ValueError: there is no prompt, or another text encoder made it.
        """
        text = kwargs.get("cross_attn")
        width = self.diffusion_model.config.cross_attention_dim
        found = None if text is None else text.shape[-1]
        if found != width:
            raise ValueError(
                f"The prompt has {found or 'no'} values per token, but this network needs {width}. "
                "Encode it with the CLIP that the checkpoint's loader returns."
            )
        return comfy.model_management.cast_to_device(text, kwargs["device"], self.get_dtype_inference())
