"""ConsistI2V in ComfyUI: latents carry all frames, and the first is the clean one in every prediction."""

import comfy.conds
import comfy.model_management
import comfy.utils
import torch

from .base import FIRST_SIGMA
from .clip_latents import check_clip_count, check_picture_latent
from .consisti2v_conditioning import FIRST_FRAME, FRAME_STRIDE
from .frame_control import with_frame_before
from .parts import FrameNumbers, OneFrame, Whole
from .served import Served
from .unet3d_model import Peak, UNet3DModel

NOISY = "consisti2v_noisy_first_frame"


class ConsistI2VModel(UNet3DModel):
    """`ConsistI2VUNet`, which predicts frames 2..F from a clean first frame.

    The prediction of the clean clip holds the first frame itself at index 0, so that every sampler ends with it there.
    """

    first_predicted_frame = 1
    # rotation and windows of attention over frames; the feed-forward layers of the first level
    peaks = (Peak(4970), Peak(3215, 1, 5120))
    served = Served("ConsistI2V", pictures=(FIRST_FRAME,), reads=(FRAME_STRIDE, NOISY, FIRST_SIGMA))

    @staticmethod
    def without_picture(extra: dict) -> dict:
        """A prompt's extras for the guidance branch that sees no picture: its first frame is the initial noise."""
        return {**extra, NOISY: True}

    def extra_conds(self, **kwargs) -> dict:
        """Conditioning of one prompt, made by the conditioning node.

        Raises:
            ValueError: the conditioning lacks the first frame, or was made for clips of another size.
        """
        conds = super().extra_conds(**kwargs)
        first = self._first_frame(**kwargs)
        conds["clean_first_frame"] = OneFrame(first)
        seen = self._noisy_first_frame(first, **kwargs) if kwargs.get(NOISY) else first
        conds["first_frame_latents"] = OneFrame(seen.to(first))
        conds["frame_numbers"] = FrameNumbers((tuple(range(kwargs["noise"].shape[2])), False))
        stride = torch.full((first.shape[0],), float(kwargs[FRAME_STRIDE]), device=first.device)
        conds["frame_stride"] = Whole(stride)
        text = self.text_states(**kwargs)
        if kwargs.get("hooks") is None:
            conds["text_keys_values"] = comfy.conds.CONDCrossAttn(self.diffusion_model.project_text(text))
        return conds

    def _noisy_first_frame(self, first: torch.Tensor, **kwargs) -> torch.Tensor:
        """The initial noise (B, 4, 1, h, w) of the first frame.

        A run that goes on with an unfinished clip has no noise. Its first frame then holds it: with the clean one as
        the prediction of every step, the state that began as noise at sigma s0 is first + sigma * (noise - first / s0).
        The highest sigma of the model stands for s0, which this run cannot know.
        """
        noise, latent, sigma = kwargs["noise"][:, :, :1], kwargs.get("latent_image"), kwargs.get(FIRST_SIGMA)
        if latent is None or sigma is None or noise.any() or not latent.any():
            return noise
        first = comfy.utils.repeat_to_batch_size(first, len(noise))
        return (latent[:, :, :1] - first) / sigma + first / self.model_sampling.sigma_max

    def _first_frame(self, **kwargs) -> torch.Tensor:
        """The scaled latent (N, 4, 1, h, w) of the first frame."""
        if FIRST_FRAME not in kwargs:
            raise ValueError("ConsistI2V needs a first frame: connect both prompts through ConsistI2V Conditioning.")
        noise, first = kwargs["noise"], self.process_latent_in(kwargs[FIRST_FRAME])
        check_picture_latent("first frame", first, noise, "ConsistI2V Conditioning")
        if noise.shape[2] < 2:
            raise ValueError("ConsistI2V continues a first frame: sample a latent of 2 frames or more.")
        check_clip_count(first.shape[0], noise.shape[0])
        return comfy.model_management.cast_to_device(first, kwargs["device"], torch.float32)

    def _apply_model(self, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs):
        """ComfyUI's. A part of a clip that does not begin with it is predicted with the first frame in front."""
        numbers, spare = kwargs.get("frame_numbers", ((0,), False))
        added = numbers[0] != 0 and not spare
        self.check_size(kwargs["clean_first_frame"], x)
        if added:
            x, control = torch.cat((x[:, :, :1], x), dim=2), with_frame_before(control, x.shape[0])
        clean = super()._apply_model(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
        first = comfy.model_management.cast_to_device(kwargs["clean_first_frame"], clean.device, clean.dtype)
        if added:
            clean = clean[:, :, 1:]
        for place, number in enumerate(numbers):
            if number == 0 or (spare and place == 0):
                clean[:, :, place : place + 1] = first
        return clean

    def after_guidance(self, denoised: torch.Tensor, conds: dict) -> torch.Tensor:
        """The first frame is the clean one, whatever a node's guidance has made of it."""
        first = next(cond for prompt in conds.values() for cond in prompt)["model_conds"]["clean_first_frame"].cond
        first = comfy.utils.repeat_to_batch_size(first.to(denoised), denoised.shape[0])
        return torch.cat((first, denoised[:, :, 1:]), dim=2)

    def after_run(self, clip: torch.Tensor, conds: dict, denoise_mask: torch.Tensor | None) -> torch.Tensor:
        """The first frame as it was given, also by samplers that end at another noise level than 0."""
        first = next(cond for prompt in conds.values() for cond in prompt)[FIRST_FRAME]
        first = comfy.utils.repeat_to_batch_size(first.to(clip), clip.shape[0])
        if denoise_mask is not None:
            first = torch.lerp(clip[:, :, :1], first, denoise_mask[:, :, :1].to(clip))
        return torch.cat((first, clip[:, :, 1:]), dim=2)
