"""The four video networks from checkpoint to pixels."""

import comfy.sample
import tiny_faces
import torch

from consistent_video.loaders import checkpoint
from consistent_video.models import consisid_conditioning, consisti2v_conditioning, i2vgenxl_conditioning
from consistent_video.samplers import filters, free_init, guidance, noise, reference, schedules
from native_sampling import sample

from .scenes import STEPS, Stage, noise_of, pictures_of, scene


@scene
def modelscope(stage: Stage) -> None:
    model, _, vae = stage.load("modelscope")
    texts = stage.texts("modelscope", "a boat on a lake", "")
    start = noise_of(1, 4, 4, 8, 8)
    latents = stage.sample("modelscope.reference", model, texts, start)
    stage.sample("modelscope.eta", model, texts, start, reference.reference_sampler("ddim", 1.0))
    stage.keep("modelscope.native", native(model, texts, start, "dpmpp_2m", "karras"))
    stage.keep("modelscope.decoded", vae.decode(latents))
    stage.keep("modelscope.tiles", vae.decode_tiled(latents, tile_x=8, tile_y=8, overlap=2, tile_t=4, overlap_t=1))
    encoded = stage.keep("modelscope.encoded", vae.encode(pictures_of(4, 64, 64, 3)))
    again = schedules.reference_sigmas(model.model.scheduler_config, 4, 0.5)
    stage.keep("modelscope.from_video", stage_run(model, texts, start, again, latent=encoded))
    mask = torch.zeros(1, 1, 4, 8, 8)
    mask[..., 4:] = 1
    stage.keep(
        "modelscope.masked",
        comfy.sample.sample(
            model, start, STEPS, 9.0, "euler", "normal", *texts, encoded, seed=0, noise_mask=mask, disable_pbar=True
        ),
    )


@scene
def noises(stage: Stage) -> None:
    """FreeInit, FrameInit and Shared Noise."""
    model, _, vae = stage.load("modelscope")
    texts = stage.texts("modelscope", "a boat on a lake", "")
    empty = {"samples": torch.zeros(1, 4, 4, 8, 8)}
    first = {"samples": vae.encode(pictures_of(1, 64, 64, 3))}
    mixed = noise.SharedNoise(3, "mixed")
    frame_init = noise.FrameInitNoise(mixed, model, first, 850, filters.LowPass())
    start = stage.keep("noises.frame_init", frame_init.generate_noise(empty))
    stage.keep("noises.progressive", noise.SharedNoise(3, "progressive").generate_noise(empty))
    sampler = free_init.FreeInit(reference.reference_sampler(), 2, True, filters.LowPass("butterworth"))
    stage.sample("noises.free_init", model, texts, start.to("cpu", torch.float32), sampler)


@scene
def i2vgenxl(stage: Stage) -> None:
    model, _, vae = stage.load("i2vgenxl")
    vision = checkpoint.load_folder_vision(stage.folder("i2vgenxl"), stage.mode.weight_dtype)
    texts = i2vgenxl_conditioning.condition_prompts(
        *stage.texts("i2vgenxl", "a boat", ""), vae, vision, pictures_of(1, 80, 90, 3), 64, 64, 16, "sample", 3
    )
    start = noise_of(1, 4, 4, 8, 8)
    latents = stage.sample("i2vgenxl.reference", model, texts, start)
    stage.keep("i2vgenxl.native", native(model, texts, start, "euler", "ddim_uniform"))
    stage.keep("i2vgenxl.guided", guided(model, texts, start))
    stage.keep("i2vgenxl.decoded", vae.decode(latents))


@scene
def consisti2v(stage: Stage) -> None:
    model, _, vae = stage.load("consisti2v")
    still = consisti2v_conditioning.static_video(vae, pictures_of(1, 80, 130, 3), None, "pan_right", 4, 64, 64, 2)
    stage.keep("consisti2v.static", still)
    texts = consisti2v_conditioning.condition_prompts(*stage.texts("consisti2v", "a boat", ""), still, 3)
    start = noise_of(1, 4, 4, 8, 8)
    latents = stage.sample("consisti2v.reference", model, texts, start, cfg=7.5)
    stage.keep("consisti2v.native", native(model, texts, start, "euler", "normal"))
    stage.keep("consisti2v.guided", guided(model, texts, start))
    stage.keep("consisti2v.decoded", vae.decode(latents))


@scene
def consisid(stage: Stage) -> None:
    model, _, vae = stage.load("consisid")
    texts = consisid_texts(stage, sampled=True)
    stage.keep("consisid.picture", texts[0][0][1]["consisid_picture"])
    start = noise_of(1, 16, 3, 8, 12)
    latents = stage.sample("consisid.ddim", model, texts, start, reference.reference_sampler("cogvideox_ddim"), cfg=6.0)
    stage.sample("consisid.dpm", model, texts, start, reference.reference_sampler("cogvideox_dpm"), cfg=6.0)
    stage.keep("consisid.native", native(model, texts, start, "euler", "simple"))
    stage.keep("consisid.decoded", vae.decode(latents))
    stage.keep("consisid.tiles", vae.decode_tiled(latents, tile_x=6, tile_y=6, overlap=2))
    clip = pictures_of(9, 64, 96, 3)
    stage.keep("consisid.encoded", vae.encode(clip))
    stage.keep("consisid.encoded_tiles", vae.encode_tiled(clip, tile_x=48, tile_y=48, overlap=16))


def consisid_texts(stage: Stage, sampled: bool = False) -> tuple[list, list]:
    """Prompts of ConsisID with a face of random numbers."""
    picture = pictures_of(1, 60, 60, 3)
    identity = noise_of(1, 512 + tiny_faces.EVA_OUTPUT, seed=4)
    vision = [noise_of(1, 577, tiny_faces.EVA_WIDTH, seed=5 + index) for index in range(5)]
    how = {"encoding": "sample", "seed": 5} if sampled else {"encoding": "mode"}
    return consisid_conditioning.condition_prompts(
        *stage.texts("consisid", "a woman waves", ""),
        stage.load("consisid")[2],
        picture,
        1 - picture,
        identity,
        vision,
        96,
        64,
        1.0,
        **how,
    )


def native(model, texts, start: torch.Tensor, sampler: str, scheduler: str) -> torch.Tensor:
    """What KSampler returns for an empty latent."""
    empty = torch.zeros_like(start)
    return comfy.sample.sample(model, start, STEPS, 7.0, sampler, scheduler, *texts, empty, seed=0, disable_pbar=True)


def guided(model, texts, start: torch.Tensor) -> torch.Tensor:
    """Latents under guidance by text and picture."""
    guider = guidance.ImageTextGuider(model, 7.5, 1.5, 0.5)
    guider.set_conds(*texts)
    sigmas = schedules.reference_sigmas(model.model.scheduler_config, STEPS)
    return guider.sample(
        start, torch.zeros_like(start), reference.reference_sampler(), sigmas, seed=0, disable_pbar=True
    )


def stage_run(model, texts, start: torch.Tensor, sigmas: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
    """Latents of a run that starts from a clip."""
    return sample(model, *texts, start, reference.reference_sampler(), sigmas, latent=latent)
