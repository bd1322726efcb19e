"""A face and two prompts to ConsisID's conditioning: pictures scaled as published, bad input named."""

import comfy.sd
import pytest
import tiny_consisid
import torch
from diffusers.video_processor import VideoProcessor
from test_i2vgenxl_parity import picture_of, pillow

from consistent_video.loaders import checkpoint
from consistent_video.loaders.families import CONSISID
from consistent_video.models import consisid, consisid_conditioning

TEXT = [[torch.zeros(1, 226, 64), {"pooled_output": None}]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_consisid.write_consisid(tmp_path_factory.mktemp("consisid") / "checkpoint")


@pytest.fixture(scope="module")
def vae(folder):
    return checkpoint.load_folder_vae(CONSISID, folder)


def condition(vae, picture=None, encoding="sample", seed=0, size=(96, 64)):
    picture = picture_of(50, 40).unsqueeze(0) if picture is None else picture
    return consisid_conditioning.condition_prompts(
        TEXT, TEXT, vae, picture, picture.flip(1), *tiny_consisid.face(), *size, 0.7, encoding, seed
    )


@pytest.mark.parametrize("size", [(96, 64), (64, 96), (48, 48), (200, 104)])
def test_pictures_are_stretched_as_published(size):
    picture = picture_of(50, 40)
    expected = VideoProcessor(vae_scale_factor=8).preprocess(pillow(picture), height=size[1], width=size[0])
    found = consisid_conditioning.stretch(picture.unsqueeze(0), *size)
    assert found.shape == (1, size[1], size[0], 3)
    assert (found.movedim(-1, 1) * 2 - 1 - expected).abs().max() < 1e-6


def test_alpha_is_dropped_and_gray_repeated():
    picture = picture_of(20, 20, 4).unsqueeze(0)
    stretched = consisid_conditioning.stretch(picture[..., :3], 32, 16)
    assert torch.equal(consisid_conditioning.stretch(picture, 32, 16), stretched)
    gray = consisid_conditioning.stretch(picture[..., :1], 32, 16)
    assert torch.equal(gray[..., :1].expand(-1, -1, -1, 3), gray)


def test_both_prompts_get_the_same_face_and_keep_what_they_had(vae):
    both = condition(vae)
    identity, vision = tiny_consisid.face()
    for text, extra in (prompt[0] for prompt in both):
        assert text is TEXT[0][0] and "pooled_output" in extra
        assert torch.equal(extra[consisid.IDENTITY], identity) and extra[consisid.STRENGTH] == 0.7
        assert all(torch.equal(a, b) for a, b in zip(extra[consisid.VISION], vision, strict=True))
    assert set(TEXT[0][1]) == {"pooled_output"}
    assert torch.equal(both[0][0][1][consisid.PICTURE], both[1][0][1][consisid.PICTURE])


def test_seed_draws_and_mode_does_not(vae):
    def picture(**kwargs):
        return condition(vae, **kwargs)[0][0][1][consisid.PICTURE]

    assert torch.equal(picture(seed=1), picture(seed=1))
    assert (picture(seed=1) - picture(seed=2)).abs().max() > 1e-2
    assert torch.equal(picture(encoding="mode", seed=1), picture(encoding="mode", seed=2))


def test_picture_and_key_points_lie_in_the_first_two_frames():
    picture, points = torch.full((1, 2, 1, 3, 4), 5.0), torch.full((1, 2, 1, 3, 4), 7.0)
    clip = consisid.picture_latents(picture, points, 4)
    assert clip.shape == (1, 2, 4, 3, 4) and clip[0, 0, :, 0, 0].tolist() == [5, 7, 0, 0]
    assert consisid.picture_latents(picture, None, 3)[0, 0, :, 0, 0].tolist() == [5, 0, 0]


@pytest.mark.parametrize(
    ("clip", "words"),
    [
        ((720, 480, 49), None),
        ((16, 16, 1), None),
        ((728, 480, 49), "width 728 is not a multiple of 16. Use 720 or 736."),
        ((720, 8, 49), "height 8 is not a multiple of 16. Use 16 or 32."),
        ((720, 480, 48), "frames 48 is not 1 more than a multiple of 4. Use 45 or 49."),
        ((720, 480, 0), "Use 1 or 5."),
        ((720, 480, -3), "Use 1 or 5."),
    ],
)
def test_sizes_that_cannot_be_made_are_named_with_those_that_can(clip, words):
    if words is None:
        return consisid_conditioning.check_clip(*clip)
    with pytest.raises(ValueError, match=words):
        consisid_conditioning.check_clip(*clip)


def test_pictures_encodings_and_autoencoders_that_do_not_fit_are_named(vae):
    with pytest.raises(ValueError, match="NaN or infinite"):
        condition(vae, torch.full((1, 20, 20, 3), float("nan")))
    with pytest.raises(ValueError, match="Unknown encoding 'draw'. Choose one of: sample, mode."):
        condition(vae, encoding="draw")
    for encoding in consisid_conditioning.ENCODINGS:
        with pytest.raises(ValueError, match="needs the CogVideoX VAE that Load ConsisID returns"):
            condition(ImageVAE.__new__(ImageVAE), encoding=encoding)


class ImageVAE(comfy.sd.VAE):
    """An autoencoder without an axis of frames, as far as it is asked."""

    latent_dim = 2
