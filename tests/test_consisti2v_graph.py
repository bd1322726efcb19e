"""ConsistI2V from a folder through the nodes: loader, conditioning, guider, long video."""

import comfy.samplers
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_i2vgenxl_parity import noise_of, picture_of

import tiny_checkpoints
from consistent_video.loaders import assembly, audit, checkpoint, network, single_file
from consistent_video.loaders.families import CONSISTI2V
from consistent_video.models import consisti2v_conditioning as conditioning_of
from consistent_video.models.consisti2v_unet import ConsistI2VUNet
from consistent_video.samplers import reference, schedules
from consistent_video.samplers.guidance import ImageTextGuider
from consistent_video.samplers.latents import empty_latent, last_frame
from native_sampling import conditioning, sample


@pytest.fixture(scope="module")
def folder(models_folder):
    return models_folder / "diffusers" / tiny_checkpoints.CONSISTI2V_NAME


@pytest.fixture(scope="module")
def loaded(folder):
    return checkpoint.load_folder(CONSISTI2V, folder, "default")


def run(loaded, static_video, cfg_image=1.0, stride=3, frames=4):
    model, clip, vae = loaded
    prompts = [conditioning(clip, text) for text in ("a boat", "")]
    guider = ImageTextGuider(model, 7.5, cfg_image)
    guider.set_conds(*conditioning_of.condition_prompts(*prompts, static_video, stride))
    noise = noise_of(1, 4, frames, 8, 8)
    sigmas = schedules.reference_sigmas(model.model.scheduler_config, 2)
    latent = empty_latent(vae, 64, 64, frames)["samples"]
    return guider.sample(noise, latent, reference.reference_sampler(), sigmas, seed=0, disable_pbar=True)


def test_a_chunk_starts_with_the_frame_it_was_given(loaded):
    picture = picture_of(64, 64).unsqueeze(0)
    static = conditioning_of.static_video(loaded[2], picture, None, "none", 4, 64, 64)
    first = run(loaded, static)
    assert (first[:, :, 0] - static[:, :, 0]).abs().max() < 1e-5 * static.abs().max()
    following = conditioning_of.static_video(loaded[2], None, last_frame({"samples": first}), "none", 4, 64, 64)
    second = run(loaded, following)
    assert (second[:, :, 0] - first[:, :, -1]).abs().max() < 1e-5 * first.abs().max()


@pytest.mark.parametrize("name", ["euler", "uni_pc"])
def test_native_samplers_end_with_the_first_frame(loaded, name):
    """ComfyUI's uni_pc ends at another noise level than 0, which it writes into the sigmas it was given."""
    model, clip, vae = loaded
    static = conditioning_of.static_video(vae, picture_of(64, 64).unsqueeze(0), None, "none", 4, 64, 64)
    prompts = conditioning_of.condition_prompts(conditioning(clip, "a boat"), conditioning(clip, ""), static, 3)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 4)
    latents = sample(model, *prompts, noise_of(1, 4, 4, 8, 8), comfy.samplers.sampler_object(name), sigmas, cfg=4.0)
    assert (latents[:, :, 0] - static[:, :, 0]).abs().max() < 1e-5 * static.abs().max()


def test_picture_stride_and_image_guidance_change_the_clip(loaded):
    pictures = [picture_of(64, 64, seed=seed).unsqueeze(0) for seed in (0, 3)]
    videos = [conditioning_of.static_video(loaded[2], picture, None, "none", 4, 64, 64) for picture in pictures]
    plain = run(loaded, videos[0])
    for other in (run(loaded, videos[1]), run(loaded, videos[0], stride=9), run(loaded, videos[0], cfg_image=2.0)):
        assert (other - plain)[:, :, 1:].abs().max() > 1e-3
    assert torch.equal(run(loaded, videos[0]), plain)


def test_dead_keys_are_dropped_and_others_are_errors(folder, models_folder):
    state = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert "down_blocks.0.conv3ds.0.time_emb_proj.weight" in state
    assert "Missing keys: none\nUnexpected keys: none" in audit.report(tiny_checkpoints.CONSISTI2V_NAME)
    path = models_folder / "diffusion_models" / "consisti2v.safetensors"
    save_file({**state, "conv_in.scale": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="1 unexpected keys \\(conv_in.scale\\)"):
        single_file.load_file(path, "auto", "default")
    path.unlink()
    assert assembly.load_folder_network(CONSISTI2V, folder, "default").model.get_dtype() == torch.float32


def test_a_single_file_of_published_size_is_recognised():
    with torch.device("meta"):
        state = ConsistI2VUNet().state_dict()
    assert single_file.detect_family(state) is CONSISTI2V
    config = single_file.network_config(CONSISTI2V, state)
    assert config["attention_head_dim"] == [5, 10, 20, 20]
    assert not network.compare(state, network.build_on_meta(ConsistI2VUNet, config, ""))


def test_missing_or_double_first_frames_are_named(loaded):
    picture, latent = picture_of(64, 64).unsqueeze(0), {"samples": torch.zeros(1, 4, 1, 8, 8)}
    cases = [
        ((None, None, "none"), "Connect either first_frame"),
        ((picture, latent, "none"), "only one of the two"),
        ((None, latent, "zoom_in"), "camera_motion zoom_in needs a picture"),
        ((None, {"samples": torch.zeros(1, 4, 1, 4, 4)}, "none"), "32x32 pixels, but the clip is 64x64"),
        ((picture * float("nan"), None, "none"), "NaN"),
    ]
    for arguments, words in cases:
        with pytest.raises(ValueError, match=words):
            conditioning_of.static_video(loaded[2], *arguments, 4, 64, 64)
