"""A small smooth network in the sampling space of the pack's models, and the published sampling loop over it."""

import math

import comfy.latent_formats
import comfy.model_patcher
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler

import native_sampling
from consistent_video.models.base import VideoModel, VideoModelConfig
from consistent_video.samplers import reference, schedules
from consistent_video.samplers.step_noise import row_seeds

SHAPE = (2, 4, 3, 5, 6)  # (B, C, F, H, W)
CPU = torch.device("cpu")
SEED = 11
SCHEDULERS = {"CogVideoXDDIMScheduler": CogVideoXDDIMScheduler, "CogVideoXDPMScheduler": CogVideoXDPMScheduler}

# The published configuration of CogVideoX 5B, which ConsisID's checkpoints have too.
CONSISID = {
    "_class_name": "CogVideoXDPMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "sample_max_value": 1.0,
    "set_alpha_to_one": True,
    "snr_shift_scale": 1.0,
    "steps_offset": 0,
    "timestep_spacing": "trailing",
    "trained_betas": None,
}


class Network(torch.nn.Module):
    """Something smooth that mixes channels and depends on the timestep and the text."""

    dtype = torch.float32

    def __init__(self):
        super().__init__()
        weights = torch.randn(4, 4, generator=torch.Generator().manual_seed(5))
        self.mix = torch.nn.Parameter(weights * 0.4, requires_grad=False)

    def forward(self, latent, timestep, context, **_):
        mixed = torch.einsum("oc,bcfhw->bofhw", self.mix, latent)
        level = (timestep / 1000).view(-1, 1, 1, 1, 1)
        return 0.8 * torch.tanh(mixed + 2 * level - 1 + context.mean(dim=(1, 2)).view(-1, 1, 1, 1, 1))


class ToyVideoModel(VideoModel):
    """`VideoModel` with what every family says of its own; messages name it as one that users have."""

    def call_elements(self, input_shape) -> float:
        return float(4 * math.prod(input_shape))


def build(config: dict) -> comfy.model_patcher.ModelPatcher:
    """The network in the sampling space that the pack's loaders give to every model."""
    model_config = VideoModelConfig(torch.float32, None, comfy.latent_formats.LatentFormat(), 4, {})
    model = ToyVideoModel(model_config, config, schedules.table_sigmas(config), lambda operations: Network())
    return comfy.model_patcher.ModelPatcher(model, load_device=CPU, offload_device=CPU)


def text(value: float) -> torch.Tensor:
    """A prompt's states."""
    return torch.full((1, 3, 8), value)


def prompts() -> list[list]:
    """The positive and the negative prompt as CONDITIONING."""
    return [[[text(value), {}]] for value in (0.2, -0.3)]


def noise(seed: int = 0) -> torch.Tensor:
    """Unit noise of `SHAPE`."""
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def run(model, sigmas, start, algorithm="auto", cfg=1.0, seed=SEED, sampler=None, eta=0.0, **kwargs) -> torch.Tensor:
    """Sample through ComfyUI's guider, with the reference sampler unless there is another."""
    sampler = sampler or reference.reference_sampler(algorithm, eta)
    return native_sampling.sample(model, *prompts(), start, sampler, sigmas, cfg=cfg, seed=seed, **kwargs)


def published(config, steps, start, cfgs=1.0, seed=SEED) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The loop of diffusers' ConsisIDPipeline over the same network, frames before channels.

    Args:
        cfgs: guidance, one number or one for each step.

    Returns:
        The latent, and the x0 after each step.
    """
    scheduler = SCHEDULERS[config["_class_name"]].from_config(config)
    scheduler.set_timesteps(steps)
    cfgs = [cfgs] * steps if isinstance(cfgs, float) else cfgs
    network, generator = Network(), [torch.Generator().manual_seed(row) for row in row_seeds(seed, start)]
    state, clean, predictions = start.transpose(1, 2), None, []
    for index, (timestep, cfg) in enumerate(zip(scheduler.timesteps, cfgs, strict=True)):
        latent, batch = state.transpose(1, 2), timestep.expand(len(state)).float()
        positive, negative = (network(latent, batch, text(value).expand(len(state), -1, -1)) for value in (0.2, -0.3))
        output = (negative + cfg * (positive - negative)).transpose(1, 2)
        history = ()
        if isinstance(scheduler, CogVideoXDPMScheduler):
            history = (scheduler.timesteps[index - 1] if index > 0 else None,)
            output = (output, clean)
        else:
            output = (output,)
        state, clean = scheduler.step(*output, timestep, *history, state, generator=generator, return_dict=False)
        predictions.append(clean.transpose(1, 2))
    return state.transpose(1, 2), predictions
