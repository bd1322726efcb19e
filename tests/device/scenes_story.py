"""Stories: consistent self-attention over a small Stable Diffusion XL, and a clip between two panels."""

import dataclasses
import tempfile
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import tiny_photomaker
import tiny_unets
import torch
from whole_layers import weights_from_the_start

from consistent_video.loaders import checkpoint
from consistent_video.loaders.character_bank import load_bank, save_bank
from consistent_video.loaders.motion_predictor import load_motion_predictor
from consistent_video.models.transition_conditioning import condition_transition
from consistent_video.patches.consistent_attention import ConsistentAttention
from consistent_video.patches.context_windows import slide
from consistent_video.patches.free_u import install_free_u
from consistent_video.story.sampling import Settings, Sharing, StoryRun
from consistent_video.story.script import parse_story

from .scenes import Stage, noise_of, pictures_of, scene

CONTEXT, POOLED = 64, 40
SHALLOW = {
    "transformer_depth": [0, 0, 1, 1, 1, 1],
    "transformer_depth_output": [0, 0, 0, 1, 1, 1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "context_dim": CONTEXT,
    "adm_in_channels": POOLED + 6 * 256,
}
SIGMAS = torch.tensor([14.6, 6.0, 2.5, 0.0])
SHARING = Sharing(start_step=1, plain_early=0.3, plain_late=0.1, late_step=2, seed=3, rate_32=0.5, rate_64=0.6)
SETTINGS = Settings(cfg=4.0, seed=3, width=64, height=64, id_panels=2, sharing=SHARING)
STORY = parse_story(
    "[Ann] a girl with red hair\n[Ben] an old sailor",
    "[Ann] runs\n[Ben] sits\n[NC] a tree\n[Ben] and [Ann] talk\n[Ann] jumps\n[Ben] eats",
    "(No style)",
    "blurry",
)


@scene
def story(stage: Stage) -> None:
    """Characters are written into a bank, read from it, saved, loaded, and one panel is drawn again."""
    base, clip = picture_model(), tiny_photomaker.tiny_clip()
    sampler = comfy.samplers.sampler_object("euler")
    model = install_free_u(base)
    latents, bank = StoryRun(model, clip, STORY, sampler, SIGMAS, SETTINGS).draw()
    stage.keep("story.latents", latents)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bank.safetensors"
        save_bank(bank, file)
        again, _ = StoryRun(model, clip, STORY, sampler, SIGMAS, SETTINGS).draw(load_bank(file), [3, 4])
    stage.keep("story.again", again)
    assert torch.allclose(again, latents[[3, 4]], rtol=0, atol=1e-2 * latents.abs().max().item())
    encoded = [clip.encode_from_tokens_scheduled(clip.tokenize(text))[0] for text in ("a", "b", "c")]
    positive = [
        [torch.cat([text for text, _ in encoded]), {"pooled_output": encoded[0][1]["pooled_output"].repeat(3, 1)}]
    ]
    negative, noise = [encoded[0]], noise_of(3, 4, 8, 8)
    variants = {
        "story.windows": slide(ConsistentAttention(SHARING).install(base), 2),
        "story.random": ConsistentAttention(dataclasses.replace(SHARING, warm_up="full_bank", count="random")).install(
            base
        ),
    }
    for name, patched in variants.items():
        guider = tiny_unets.guide(patched, positive, negative)
        stage.keep(name, tiny_unets.denoise(guider, noise, "euler", SIGMAS))
    comfy.model_management.unload_all_models()


@scene
def transition(stage: Stage) -> None:
    """A clip from one panel to the next, by the motion predictor."""
    model, _, vae = stage.load("i2vgenxl")
    vision = checkpoint.load_folder_vision(stage.folder("i2vgenxl"), stage.mode.weight_dtype)
    predictor = load_motion_predictor(stage.models / "motion_predictors" / "motion_predictor.safetensors")
    picture = pictures_of(1, 80, 90, 3)
    texts = condition_transition(
        *stage.texts("i2vgenxl", "a boat", ""), vae, vision, predictor, picture, 1 - picture, 64, 64, 4, 8
    )
    stage.keep("transition.embedding", texts[0][0][1]["i2vgenxl_image_embedding"])
    stage.sample("transition.latents", model, texts, noise_of(1, 4, 4, 8, 8))


def picture_model() -> comfy.model_patcher.ModelPatcher:
    """Stable Diffusion XL's blocks, few and narrow, in the type and with the patcher that ComfyUI would choose."""
    built = tiny_unets.build("sdxl", **SHALLOW)
    device = comfy.model_management.get_torch_device()
    dtype = comfy.model_management.unet_dtype(device, supported_dtypes=[torch.float16, torch.float32])
    config = built.model.model_config
    config.set_inference_dtype(dtype, None)
    with weights_from_the_start():
        model = type(built.model)(config, device="cpu").eval().requires_grad_(False)
    state = built.model.diffusion_model.state_dict()
    model.diffusion_model.load_state_dict({key: value.to(dtype) for key, value in state.items()}, assign=True)
    offload = comfy.model_management.unet_offload_device()
    if not comfy.model_management.is_device_cpu(offload):
        model.to(offload)
    return comfy.model_patcher.CoreModelPatcher(model, device, offload)
