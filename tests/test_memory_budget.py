"""One graph that chains SDXL and I2VGen-XL on a device that cannot hold both: model management makes the room."""

import comfy.model_management
import comfy.sample
import comfy.sd
import pytest
import torch
from test_i2vgenxl_model import prompts
from test_i2vgenxl_parity import noise_of, picture_of

import tiny_checkpoints
from consistent_video.loaders import checkpoint
from consistent_video.loaders.families import I2VGENXL
from consistent_video.samplers import reference, schedules
from native_sampling import conditioning, sample

pytestmark = pytest.mark.slow

# To ComfyUI another device than "cpu", hence one with memory to manage.
DEVICE = torch.device("cpu:0")
SMALL_GRAPH = 8 * 2**20


@pytest.fixture
def budget(monkeypatch):
    """A function that gives the device so many bytes, of which loaded models take their share."""
    comfy.model_management.unload_all_models()
    monkeypatch.setattr(comfy.model_management, "minimum_inference_memory", lambda: SMALL_GRAPH)
    monkeypatch.setattr(comfy.model_management, "extra_reserved_memory", lambda: 0)

    def set_budget(size):
        def free(device=None, torch_free_too=False):
            left = size - held()
            return (left, left) if torch_free_too else left

        monkeypatch.setattr(comfy.model_management, "get_free_memory", free)

    yield set_budget
    comfy.model_management.unload_all_models()


def held():
    return sum(
        entry.model_loaded_memory() for entry in comfy.model_management.current_loaded_models if entry.device == DEVICE
    )


def test_the_second_network_takes_the_room_of_the_first_and_the_first_comes_back(
    models_folder, i2vgenxl_folder, budget
):
    file = models_folder / "checkpoints" / tiny_checkpoints.SDXL_NAME
    sdxl, sdxl_clip = comfy.sd.load_checkpoint_guess_config(str(file), output_vae=False)[:2]
    text = conditioning(sdxl_clip, "a lighthouse")
    model, clip, vae = checkpoint.load_folder(I2VGENXL, i2vgenxl_folder, "default")
    loaded = (model, clip, vae, checkpoint.load_folder_vision(i2vgenxl_folder, "default"))
    both = prompts(loaded, torch.stack([picture_of(64, 64)]))
    comfy.model_management.unload_all_models()
    for patcher in (sdxl, model):
        patcher.load_device = DEVICE
    size = sdxl.model_size() + model.model_size() // 2 + SMALL_GRAPH
    budget(size)

    def picture():
        noise, latent = noise_of(1, 4, 8, 8), torch.zeros(1, 4, 8, 8)
        return comfy.sample.sample(
            sdxl, noise, 1, 2.0, "euler", "normal", text, text, latent, seed=0, disable_pbar=True
        )

    def clip_of():
        sigmas = schedules.reference_sigmas(model.model.scheduler_config, 2)
        return sample(model, *both, noise_of(1, 4, 4, 8, 8), reference.reference_sampler(), sigmas)

    first = picture()
    assert sdxl.loaded_size() == sdxl.model_size()
    moving = clip_of()
    assert model.loaded_size() > 0 and sdxl.loaded_size() < sdxl.model_size()
    assert held() <= size < sdxl.model_size() + model.model_size()
    assert (picture() - first).abs().max() < 1e-4 * first.abs().max()
    assert sdxl.loaded_size() > model.loaded_size()
    assert (clip_of() - moving).abs().max() < 1e-4 * moving.abs().max()
