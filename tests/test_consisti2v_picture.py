"""First frames and moving crops against torchvision, which the original code uses."""

import pytest
import torch
import torchvision.transforms.functional as published
from test_i2vgenxl_parity import picture_of

from consistent_video.models.consisti2v_picture import first_frames, moving_crops


def channels_first(picture):
    return picture.movedim(-1, 0)


def resized(picture, side):
    return published.resize(channels_first(picture), side, antialias=False)


@pytest.mark.parametrize("size", [(90, 160), (160, 90), (64, 64), (101, 77)])
def test_a_square_first_frame_is_the_published_one(size):
    picture = picture_of(*size)
    expected = published.center_crop(resized(picture, 64), [64, 64])
    found = first_frames(picture.unsqueeze(0), 64, 64)[0]
    assert found.shape == (64, 64, 3)
    assert (channels_first(found) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("motion", ["pan_left", "pan_right"])
def test_pans_are_the_published_crops(motion):
    picture, frames = picture_of(90, 200), 5
    scaled = resized(picture, 64)
    room = scaled.shape[-1] - 64
    clip = moving_crops(picture.unsqueeze(0), motion, frames, 64, 64)[0]
    for index in range(frames):
        start = int(room * (index / frames if motion == "pan_right" else 1 - index / frames))
        assert (channels_first(clip[index]) - published.crop(scaled, 0, start, 64, 64)).abs().max() < 1e-5


@pytest.mark.parametrize("motion", ["zoom_in", "zoom_out"])
def test_zooms_are_the_published_crops(motion):
    picture, frames = picture_of(150, 150), 4
    scaled = resized(picture, 128)
    clip = moving_crops(picture.unsqueeze(0), motion, frames, 64, 64)[0]
    for index in range(frames):
        grown = int((128 - 128 // 1.5) * index / frames)
        side = int(128 - grown if motion == "zoom_in" else 128 // 1.5 + grown)
        start = (128 - side) // 2
        expected = published.resize(published.crop(scaled, start, start, side, side), [64, 64], antialias=False)
        assert (channels_first(clip[index]) - expected).abs().max() < 1e-5


def test_without_motion_the_first_frame_stands_still():
    picture = picture_of(90, 160).unsqueeze(0)
    clip = moving_crops(picture, "none", 3, 48, 32)
    assert clip.shape == (1, 3, 32, 48, 3)
    assert torch.equal(clip[0, 2], first_frames(picture, 48, 32)[0])


def test_pictures_without_room_and_unknown_motions_are_named():
    with pytest.raises(ValueError, match="no room to pan in: scaled to 64x64"):
        moving_crops(picture_of(64, 64).unsqueeze(0), "pan_left", 4, 64, 64)
    with pytest.raises(ValueError, match="Unknown camera motion 'spin'"):
        moving_crops(picture_of(64, 64).unsqueeze(0), "spin", 4, 64, 64)
