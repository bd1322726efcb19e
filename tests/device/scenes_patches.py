"""What is put on a MODEL: caches, guidance, LoRA, hooks, and ComfyUI's delegates without dynamic VRAM."""

import comfy.hooks
import comfy.model_management
import comfy.model_patcher
import torch

from consistent_video.loaders import single_file
from consistent_video.patches.dynamic_cfg import install_dynamic_cfg
from consistent_video.patches.step_cache import install_step_cache
from consistent_video.samplers import reference

from .scenes import Stage, noise_of, scene
from .scenes_video import consisid_texts

HOOKED = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


@scene
def caches(stage: Stage) -> None:
    """Step Cache and Dynamic CFG, both on ConsisID."""
    model = stage.load("consisid")[0]
    texts, start = consisid_texts(stage), noise_of(1, 16, 3, 8, 12)
    sampler = reference.reference_sampler("cogvideox_ddim")
    patched = install_step_cache(install_dynamic_cfg(model, "progress"), 0.6, 0.0, 0.99)
    stage.sample("caches.both", patched, texts, start, sampler, steps=5, cfg=6.0)


@scene
def lora(stage: Stage) -> None:
    """Weights changed on every kind of layer, and not changed any more in the next run."""
    for family, shape in (("modelscope", (1, 4, 4, 8, 8)), ("consisid", (1, 16, 3, 8, 12))):
        model = stage.load(family)[0]
        texts = consisid_texts(stage) if family == "consisid" else stage.texts(family, "a boat", "")
        sampler = reference.reference_sampler("cogvideox_ddim" if family == "consisid" else "ddim")
        patched = model.clone()
        patched.add_patches(changes(model), 1.0)
        stage.sample(f"lora.{family}", patched, texts, noise_of(*shape), sampler)
        stage.sample(f"lora.{family}.without", model, texts, noise_of(*shape), sampler)


@scene
def hooks(stage: Stage) -> None:
    """A LoRA that hangs on a prompt."""
    model = stage.load("modelscope")[0]
    up, down = noise_of(64, 2, seed=2), noise_of(2, 64, seed=3)
    weights = {f"{HOOKED}.lora_up.weight": 0.3 * up, f"{HOOKED}.lora_down.weight": 0.3 * down}
    hook = comfy.hooks.create_hook_lora(lora=weights, strength_model=1.0, strength_clip=0.0)
    positive, negative = stage.texts("modelscope", "a boat", "")
    positive = [[text, {**options, "hooks": hook}] for text, options in positive]
    stage.sample("hooks.modelscope", model.clone(), (positive, negative), noise_of(1, 4, 4, 8, 8))


@scene
def delegates(stage: Stage) -> None:
    """ComfyUI loads a network again, without dynamic VRAM, for what dynamic VRAM cannot do."""
    for family in ("modelscope", "consisid"):
        model, clip, vae = stage.load(family)
        for patcher in (model, clip.patcher, vae.patcher):
            load, arguments = patcher.cached_patcher_init
            again = load(*arguments, disable_dynamic=True)
            assert type(again) is comfy.model_patcher.ModelPatcher, f"{family}: {type(again)}"
    model = stage.load("modelscope")[0].clone(disable_dynamic=True)
    assert not model.is_dynamic()
    stage.sample("delegates.modelscope", model, stage.texts("modelscope", "a boat", ""), noise_of(1, 4, 4, 8, 8))
    comfy.model_management.unload_all_models()


@scene
def single(stage: Stage) -> None:
    """The original ModelScope file."""
    file = stage.models / "diffusion_models" / "text2video_pytorch_model.pth"
    model = single_file.load_file(file, "auto", stage.mode.weight_dtype)
    texts = [[[noise_of(1, 77, 64, seed=seed), {}]] for seed in (7, 8)]
    stage.sample("single.modelscope", model, texts, noise_of(1, 4, 4, 8, 8))


def changes(model) -> dict:
    """Differences for a third of the matrices and kernels of a network, by name."""
    generator = torch.Generator().manual_seed(1)
    found = {}
    for key, parameter in sorted(model.model.diffusion_model.named_parameters()):
        if parameter.ndim >= 2 and key.endswith("weight") and sum(map(ord, key)) % 3 == 0:
            found[f"diffusion_model.{key}"] = ("diff", (0.05 * torch.randn(parameter.shape, generator=generator),))
    return found
