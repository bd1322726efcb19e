"""What ComfyUI's own nodes save of this pack's models loads again and computes the same."""

import logging
from pathlib import Path

import comfy.model_management
import comfy.sd
import comfy_extras.nodes_model_merging as merging
import folder_paths
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors import safe_open

from consistent_video.loaders import assembly, checkpoint, lora, single_file
from consistent_video.loaders.families import CONSISID, CONSISTI2V, I2VGENXL, MODELSCOPE
from consistent_video.loaders.vae import load_vae
from consistent_video.models import network_description

pytestmark = pytest.mark.slow

FOLDERS = {
    "text-to-video-ms-1.7b": MODELSCOPE,
    "i2vgen-xl": I2VGENXL,
    "ConsistI2V": CONSISTI2V,
    "ConsisID-preview": CONSISID,
}


@pytest.fixture
def output(tmp_path, monkeypatch):
    """The folder that ComfyUI's nodes save into."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    return tmp_path


def saved(output: Path, prefix: str) -> Path:
    (path,) = output.rglob(f"{prefix}*.safetensors")
    return path


def assert_same_network(found, expected):
    ours, theirs = found.model.diffusion_model, expected.model.diffusion_model
    state = ours.state_dict()
    assert state.keys() == theirs.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in theirs.state_dict().items())
    plain = [
        {key: value for key, value in vars_of(network.config).items() if not key.startswith("_")}
        for network in (ours, theirs)
    ]
    assert {key: listed(value) for key, value in plain[0].items()} == {k: listed(v) for k, v in plain[1].items()}
    assert found.model.scheduler_config == expected.model.scheduler_config
    assert found.model.latent_format.factors == expected.model.latent_format.factors
    assert torch.equal(found.model.model_sampling.sigmas, expected.model.model_sampling.sigmas)


def vars_of(config):
    return dict(config) if hasattr(config, "keys") else vars(config)


def listed(value):
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("name", FOLDERS)
def test_models_and_checkpoints_load_again(models_folder, output, name, caplog):
    caplog.set_level(logging.INFO)
    torch.use_deterministic_algorithms(True, warn_only=True)  # memory that nobody writes to is NaN
    try:
        model, clip, vae = checkpoint.load_folder(FOLDERS[name], models_folder / "diffusers" / name, "fp32")
    finally:
        torch.use_deterministic_algorithms(False)
    merging.ModelSave().save(model, "model")
    merging.CheckpointSave().save(model, clip, vae, "checkpoint")
    assert_same_network(single_file.load_file(saved(output, "model"), "auto", "default"), model)
    assert "holds a text encoder" not in caplog.text
    again = single_file.load_file(saved(output, "checkpoint"), "auto", "default")
    assert_same_network(again, model)
    assert "holds a text encoder and a VAE too; this loads the network alone" in caplog.text
    assert again.clone().model.description is not None
    with safe_open(saved(output, "checkpoint"), "pt") as file:
        assert all(file.get_tensor(key).isfinite().all() for key in file.keys())  # noqa: SIM118


def test_what_was_put_on_a_model_is_saved(models_folder, output):
    lora.register()
    folder = models_folder / "diffusers" / "ConsistI2V"
    model = assembly.load_folder_network(CONSISTI2V, folder, "fp32")
    layer, alpha = "down_blocks.0.attentions.0.proj_in", "down_blocks.0.conv3ds.0.alpha"
    before = {key: value.clone() for key, value in model.model.diffusion_model.state_dict().items()}
    up, down = torch.randn(64, 2), torch.randn(2, 64)
    tensors = {
        f"unet.{layer}.lora_B.weight": up,
        f"unet.{layer}.lora_A.weight": down,
        f"unet.{alpha}.diff": torch.full((1,), 0.5),
    }
    patched = comfy.sd.load_lora_for_models(model, None, tensors, 0.5, 0)[0]
    merging.ModelSave().save(patched, "with_lora")
    state = single_file.load_file(saved(output, "with_lora"), "auto", "default").model.diffusion_model.state_dict()
    torch.testing.assert_close(state[f"{layer}.weight"], before[f"{layer}.weight"] + 0.5 * up @ down)
    torch.testing.assert_close(state[alpha], before[alpha] + 0.25)
    unchanged = state.keys() - {f"{layer}.weight", alpha}
    assert all(torch.equal(state[key], before[key]) for key in unchanged)
    comfy.model_management.unload_all_models()


@pytest.mark.parametrize("dtype", ["fp16", "fp8_e4m3fn"])
def test_storage_types_are_saved(models_folder, output, dtype):
    model = assembly.load_folder_network(MODELSCOPE, models_folder / "diffusers" / "text-to-video-ms-1.7b", dtype)
    merging.ModelSave().save(model, "small")
    assert_same_network(single_file.load_file(saved(output, "small"), "auto", dtype), model)


def test_a_description_that_cannot_be_read_is_named(models_folder, output):
    model = assembly.load_folder_network(MODELSCOPE, models_folder / "diffusers" / "text-to-video-ms-1.7b", "fp32")
    model.model.description = torch.frombuffer(bytearray(b'{"version": 9}'), dtype=torch.uint8)
    merging.ModelSave().save(model, "newer")
    with pytest.raises(ValueError, match=r"newer.*saved by a newer version of this pack"):
        single_file.load_file(saved(output, "newer"), "auto", "default")
    assert network_description.KEY in model.model.state_dict_for_saving({})


@pytest.mark.parametrize(("groups", "said"), [(32, False), (16, True)])
def test_what_a_saved_vae_does_not_tell_is_said(output, tmp_path, groups, said, caplog):
    write_vae(tmp_path / "checkpoint", block_out_channels=(32, 32, 64, 64), norm_num_groups=groups)
    merging.VAESave().save(load_vae(tmp_path / "checkpoint"), "vae")
    assert ("norms of 16 groups" in caplog.text) is said


def write_vae(folder, **settings):
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    AutoencoderKL(layers_per_block=2, **blocks, **settings).save_pretrained(folder / "vae")
