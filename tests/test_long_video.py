"""First frames as latents, and clips that continue each other."""

import pytest
import torch
from test_i2vgenxl_parity import picture_of

from consistent_video.loaders import vae as vaes
from consistent_video.models import consisti2v_conditioning as conditioning
from consistent_video.models.consisti2v import FIRST_FRAME, FRAME_STRIDE
from consistent_video.samplers.latents import join_clips, last_frame


@pytest.fixture(scope="module")
def vae(modelscope_folder):
    return vaes.load_vae(modelscope_folder)


def clip_of(frames, seed, batch=1):
    return {"samples": torch.randn(batch, 4, frames, 4, 4, generator=torch.Generator().manual_seed(seed))}


def test_chunks_make_a_long_video_without_repeated_frames():
    chunks = [clip_of(6, seed) for seed in range(3)]
    for before, after in zip(chunks, chunks[1:], strict=False):
        after["samples"][:, :, :1] = last_frame(before)["samples"]
    video = join_clips(join_clips(*chunks[:2]), chunks[2])["samples"]
    assert video.shape[2] == 3 * 6 - 3 + 1
    assert torch.equal(video[:, :, 5], chunks[1]["samples"][:, :, 0])
    assert torch.equal(video[:, :, 6:11], chunks[1]["samples"][:, :, 1:])


def test_clips_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="cannot be joined"):
        join_clips(clip_of(3, 0), clip_of(3, 0, batch=2))
    with pytest.raises(ValueError, match="needs a latent"):
        last_frame({"samples": torch.zeros(1, 4, 8, 8)})


def test_a_picture_stands_still_and_a_moving_crop_moves(vae):
    picture = picture_of(48, 96).unsqueeze(0)
    still = conditioning.static_video_of_picture(vae, picture, "none", 4, 32, 32)
    assert still.shape == (1, 4, 4, 4, 4) and torch.equal(still[:, :, 0], still[:, :, 3])
    moving = conditioning.static_video_of_picture(vae, picture, "pan_right", 4, 32, 32)
    assert moving.shape == still.shape and (moving[:, :, 0] - moving[:, :, 3]).abs().max() > 0.1


def test_both_prompts_get_the_first_frame_and_the_stride(vae):
    still = conditioning.static_video_of_latent(last_frame(clip_of(3, 1))["samples"], 5)
    prompt = [[torch.zeros(1, 77, 64), {}]]
    for found in conditioning.condition_prompts(prompt, prompt, still, 3):
        assert torch.equal(found[0][1][FIRST_FRAME], still[:, :, :1]) and found[0][1][FRAME_STRIDE] == 3
    with pytest.raises(ValueError, match="frame_stride 61 is outside 1..60"):
        conditioning.condition_prompts(prompt, prompt, still, 61)
    with pytest.raises(ValueError, match="expected one frame"):
        conditioning.static_video_of_latent(torch.zeros(1, 4, 3, 4, 4), 5)
