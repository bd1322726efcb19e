"""What belongs to one clip of a batch stays with it (pictures, draws, guidance); lengths of clips; rewritten files."""

import os

import comfy.hooks
import comfy.sd
import pytest
import tiny_consisid
import torch
from test_i2vgenxl_parity import noise_of, picture_of

import tiny_checkpoints
from consistent_video.loaders import checkpoint, fingerprint
from consistent_video.loaders.families import CONSISID, CONSISTI2V, I2VGENXL
from consistent_video.models import consisti2v_conditioning, i2vgenxl_conditioning
from consistent_video.samplers import schedules
from consistent_video.samplers.guidance import ImageTextGuider
from consistent_video.samplers.latents import empty_latent
from consistent_video.samplers.reference import ReferenceSampler
from native_sampling import conditioning, sample

FRAMES = 4


@pytest.fixture(scope="module")
def consisti2v(models_folder):
    return checkpoint.load_folder(CONSISTI2V, models_folder / "diffusers" / tiny_checkpoints.CONSISTI2V_NAME, "default")


@pytest.fixture(scope="module")
def i2vgenxl(i2vgenxl_folder):
    parts = checkpoint.load_folder(I2VGENXL, i2vgenxl_folder, "default")
    return (*parts, checkpoint.load_folder_vision(i2vgenxl_folder, "default"))


def pictures_of(*seeds):
    return torch.stack([picture_of(64, 64, seed=seed) for seed in seeds])


def sigmas_of(model):
    return schedules.reference_sigmas(model.model.scheduler_config, 2)


def close(found, expected):
    return (found - expected).abs().max() < 1e-4 * expected.abs().max()


def consisti2v_clips(loaded, static, noise, hooks=None, **guidance):
    model, clip, _ = loaded
    prompts = [conditioning(clip, text) for text in ("a boat", "")]
    prompts = consisti2v_conditioning.condition_prompts(*prompts, static, 3)
    if hooks is not None:
        prompts = [[[text, {**extra, "hooks": hooks}] for text, extra in prompt] for prompt in prompts]
        model = model.clone()
    guider = ImageTextGuider(model, 7.5, **guidance)
    guider.set_conds(*prompts)
    return guider.sample(
        noise, torch.zeros_like(noise), ReferenceSampler(), sigmas_of(model), seed=0, disable_pbar=True
    )


def i2vgenxl_clips(loaded, pictures, noise):
    model, clip, vae, vision = loaded
    prompts = i2vgenxl_conditioning.condition_prompts(
        conditioning(clip, "a boat"), conditioning(clip, ""), vae, vision, pictures, 64, 64, 16, encoding="mode"
    )
    return sample(model, *prompts, noise, ReferenceSampler(), sigmas_of(model))


def test_each_clip_of_consisti2v_has_its_own_picture(consisti2v):
    latents = torch.cat([picture_latent(consisti2v, seed) for seed in (0, 3)])  # (2, 4, 1, h, w)
    noise = noise_of(2, 4, FRAMES, 8, 8)
    both = consisti2v_clips(consisti2v, latents, noise)
    alone = [consisti2v_clips(consisti2v, latents[index : index + 1], noise[index : index + 1]) for index in (0, 1)]
    assert close(both, torch.cat(alone))
    swapped = consisti2v_clips(consisti2v, latents.flip(0), noise)
    assert not close(swapped[:, :, 1:], both[:, :, 1:])


def test_each_clip_of_i2vgenxl_has_its_own_picture(i2vgenxl):
    pictures, noise = pictures_of(0, 3), noise_of(2, 4, FRAMES, 8, 8)
    both = i2vgenxl_clips(i2vgenxl, pictures, noise)
    alone = [i2vgenxl_clips(i2vgenxl, pictures[index : index + 1], noise[index : index + 1]) for index in (0, 1)]
    assert close(both, torch.cat(alone))
    assert not close(i2vgenxl_clips(i2vgenxl, pictures.flip(0), noise), both)


@pytest.mark.parametrize("cfg_image", [1.0, 2.0])
def test_guidance_is_rescaled_for_each_clip_alone(consisti2v, cfg_image):
    static = torch.cat([picture_latent(consisti2v, seed) * scale for seed, scale in ((0, 1.0), (3, 6.0))])
    noise = noise_of(2, 4, FRAMES, 8, 8)
    both = consisti2v_clips(consisti2v, static, noise, cfg_image=cfg_image, rescale=0.8)
    alone = [
        consisti2v_clips(
            consisti2v, static[index : index + 1], noise[index : index + 1], cfg_image=cfg_image, rescale=0.8
        )
        for index in (0, 1)
    ]
    assert close(both, torch.cat(alone))


def picture_latent(loaded, seed):
    return loaded[2].encode(pictures_of(seed))


def test_clips_of_pictures_are_encoded_in_their_order(consisti2v):
    vae = consisti2v[2]
    clips = torch.stack([pictures_of(0, 1, 2), pictures_of(3, 4, 5)])  # (2, 3, H, W, C)
    latents = vae.encode(clips)
    assert latents.shape == (2, 4, 3, 8, 8)
    for clip in (0, 1):
        for frame in range(3):
            assert close(latents[clip, :, frame], vae.encode(clips[clip, frame : frame + 1])[0, :, 0])
    assert close(vae.decode(latents)[1, 2], vae.decode(latents[1:, :, 2:])[0, 0])


def test_moving_crops_of_several_pictures_keep_their_order(consisti2v):
    pictures = pictures_of(0, 3)
    both = consisti2v_conditioning.static_video(consisti2v[2], pictures, None, "zoom_in", FRAMES, 64, 64)
    first = consisti2v_conditioning.static_video(consisti2v[2], pictures[:1], None, "zoom_in", FRAMES, 64, 64)
    still = consisti2v[2].encode(pictures)[0].transpose(0, 1)  # (2, 4, h, w)
    assert both.shape == (2, 4, FRAMES, 8, 8) and close(both[:1], first)
    # the first crop is the whole picture: a draw of the posterior lies nearer to its own mean than to the other's
    for clip in (0, 1):
        own, other = ((both[clip, :, 0] - still[index]).square().mean() for index in (clip, 1 - clip))
        assert own < other


def test_the_posterior_is_drawn_by_the_seed(consisti2v):
    vae, pictures = consisti2v[2], pictures_of(0, 3)
    draws = [vae.encode_sample(pictures, seed) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and (draws[0] - draws[2]).abs().max() > 1e-3


def test_a_scheduled_lora_reaches_the_text_that_consisti2v_projects_once(consisti2v):
    key = next(name for name in consisti2v[0].model.diffusion_model.state_dict() if name.endswith("attn2.to_k.weight"))
    width = consisti2v[0].model.diffusion_model.state_dict()[key].shape
    generator = torch.Generator().manual_seed(2)
    up, down = (torch.randn(*shape, generator=generator) for shape in ((width[0], 2), (2, width[1])))
    name = f"lora_unet_{key.removesuffix('.weight').replace('.', '_')}"
    lora = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
    static, noise = picture_latent(consisti2v, 0), noise_of(1, 4, FRAMES, 8, 8)
    plain = consisti2v_clips(consisti2v, static, noise)
    patched = comfy.sd.load_lora_for_models(consisti2v[0], None, lora, 1.0, 0)[0]
    expected = consisti2v_clips((patched, *consisti2v[1:]), static, noise)
    hooked = consisti2v_clips(consisti2v, static, noise, hooks=comfy.hooks.create_hook_lora(lora, 1.0, 0.0))
    assert (expected - plain).abs().max() > 1e-3 * plain.abs().max()
    assert close(hooked, expected)


def test_a_file_rewritten_with_the_same_size_is_another_file(tmp_path):
    file = tmp_path / "folder" / "model.safetensors"
    file.parent.mkdir()
    file.write_bytes(b"first")
    before = fingerprint.of_file(file), fingerprint.of_folder(file.parent)
    assert before == (fingerprint.of_file(file), fingerprint.of_folder(file.parent))
    written = file.stat().st_mtime_ns
    file.write_bytes(b"other")
    os.utime(file, ns=(written, written + 1_000_000))
    after = fingerprint.of_file(file), fingerprint.of_folder(file.parent)
    assert before[0] != after[0] and before[1] != after[1]


def test_empty_latents_have_the_frames_of_the_vae(models_folder, consisti2v):
    image = [empty_latent(consisti2v[2], 64, 64, frames)["samples"].shape[2] for frames in (1, 2, 16)]
    assert image == [1, 2, 16]
    folder = models_folder / "diffusers" / tiny_consisid.CONSISID_NAME
    video = checkpoint.load_folder_vae(CONSISID, folder)
    lengths = [empty_latent(video, 64, 64, frames)["samples"].shape[2] for frames in (1, 5, 9, 13, 49)]
    assert lengths == [1, 2, 3, 4, 13]
