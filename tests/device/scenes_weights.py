"""Changes of parameters that no layer holds: ComfyUI patches those of layers itself."""

import comfy.sd
import torch

from consistent_video.models import consisti2v_conditioning

from .scenes import Stage, noise_of, pictures_of, scene
from .scenes_video import consisid_texts


@scene
def bare_parameters(stage: Stage) -> None:
    model, _, vae = stage.load("consisti2v")
    still = consisti2v_conditioning.static_video(vae, pictures_of(1, 64, 64, 3), None, "none", 4, 64, 64, 2)
    texts = consisti2v_conditioning.condition_prompts(*stage.texts("consisti2v", "a boat", ""), still, 3)
    changed = with_changes(model, "alpha", "freqs")
    stage.sample("bare_parameters.consisti2v", changed, texts, noise_of(1, 4, 4, 8, 8), cfg=7.5)
    changed = with_changes(stage.load("consisid")[0], "latents", "proj_out")
    start = noise_of(1, 16, 3, 8, 12)
    stage.sample("bare_parameters.consisid", changed, consisid_texts(stage), start, cfg=6.0)


def with_changes(model, *names: str):
    """A MODEL whose parameters with one of `names` are changed."""
    generator = torch.Generator().manual_seed(0)
    changes = {
        f"diffusion_model.{key}.diff": -0.3 * torch.rand(value.shape, generator=generator)
        for key, value in model.model.diffusion_model.named_parameters()
        if key.rpartition(".")[2] in names
    }
    return comfy.sd.load_lora_for_models(model, None, changes, 0.7, 0)[0]
