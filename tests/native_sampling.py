"""What SamplerCustomAdvanced does, in a few lines: a guider over a fixed noise tensor."""

import comfy.sample
import comfy.samplers
import torch


def conditioning(clip, text: str) -> list:
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def sample(model, positive, negative, noise, sampler, sigmas, cfg=9.0, latent=None, seed=0, **kwargs) -> torch.Tensor:
    """Latents as SamplerCustomAdvanced returns them (unscaled)."""
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    latent = torch.zeros_like(noise) if latent is None else latent
    return guider.sample(noise, latent, sampler, sigmas, seed=seed, disable_pbar=True, **kwargs)
