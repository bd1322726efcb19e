"""Frames as the batch of an image latent: graphs of AnimateDiff's kind and of the older ModelScope loader."""

import folder_paths
import pytest
import torch

import nodes as core
import tiny_checkpoints
from consistent_video.loaders import single_file
from consistent_video.loaders.checkpoint import load_folder_clip, load_folder_vae
from consistent_video.loaders.families import MODELSCOPE
from consistent_video.nodes.loaders import DiffusionModelLoader
from consistent_video.samplers import reference, schedules
from native_sampling import conditioning, sample

FRAMES = 5


@pytest.fixture(scope="module")
def parts(models_folder):
    folder = models_folder / "diffusers" / tiny_checkpoints.MODELSCOPE_NAME
    clip = load_folder_clip(MODELSCOPE, folder)
    return [conditioning(clip, text) for text in ("a boat", "")], load_folder_vae(MODELSCOPE, folder)


def load(latent_batch):
    return DiffusionModelLoader.execute(tiny_checkpoints.ORIGINAL_NAME, "auto", "default", latent_batch).result[0]


def run(model, prompts, noise, **settings):
    sigmas = schedules.reference_sigmas(model.model.scheduler_config, 2)
    return sample(model, *prompts, noise, reference.reference_sampler(), sigmas, **settings)


def test_a_batch_of_frames_is_sampled_as_one_clip(parts):
    prompts, _ = parts
    clip = torch.randn(1, 4, FRAMES, 8, 8, generator=torch.Generator().manual_seed(0))
    frames = clip[0].transpose(0, 1).unsqueeze(2)
    expected = run(load("clips"), prompts, clip)
    model = load("frames")
    found = run(model, prompts, frames)
    assert found.shape == (FRAMES, 4, 1, 8, 8)
    assert torch.equal(found.transpose(0, 2), expected)
    assert torch.equal(run(model, prompts, clip), expected)
    with pytest.raises(ValueError, match=f"{FRAMES} clips of 1 frame each.*Empty Clip Latent"):
        run(load("clips"), prompts, frames)


def test_masks_of_frames_hold_their_frames(parts):
    prompts, _ = parts
    noise = torch.randn(FRAMES, 4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(FRAMES, 1, 1, 8, 8)
    mask[2:] = 1
    latent = torch.ones_like(noise)
    found = run(load("frames"), prompts, noise, latent=latent, denoise_mask=mask)
    assert torch.equal(found[:2], latent[:2]) and (found[2:] - 1).abs().mean() > 0.1


def test_the_native_graph_gives_as_many_pictures(parts):
    prompts, vae = parts
    latent = core.EmptyLatentImage().generate(64, 64, FRAMES)[0]
    found = core.KSampler().sample(load("frames"), 0, 2, 5.0, "euler", "normal", *prompts, latent, 1.0)[0]
    pictures = core.VAEDecode().decode(vae, found)[0]
    assert pictures.shape == (FRAMES, 64, 64, 3) and pictures.std() > 0.01
    with pytest.raises(ValueError, match="Empty Clip Latent"):
        core.KSampler().sample(load("clips"), 0, 2, 5.0, "euler", "normal", *prompts, latent, 1.0)


def test_the_older_loader_s_folder_is_listed(models_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    monkeypatch.delitem(folder_paths.folder_names_and_paths, "text2video", raising=False)
    monkeypatch.delitem(folder_paths.filename_list_cache, "text2video", raising=False)
    before = single_file.list_files()
    single_file.register_folder()
    (tmp_path / "text2video").mkdir()
    for name in ("mine.pth", "readme.txt", tiny_checkpoints.ORIGINAL_NAME):
        (tmp_path / "text2video" / name).write_bytes(b"")
    assert single_file.list_files() == [*before, "mine.pth"]
    assert single_file.find_file("mine.pth") == tmp_path / "text2video" / "mine.pth"
    assert single_file.find_file(tiny_checkpoints.ORIGINAL_NAME).parent == models_folder / "diffusion_models"
    with pytest.raises(FileNotFoundError, match="Choose a file that the node lists"):
        single_file.find_file("readme.txt")
    folder_paths.filename_list_cache.pop("text2video", None)
