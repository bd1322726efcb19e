"""Real ComfyUI models with the block structure of Stable Diffusion XL and 1.5 at a small width, and seeded weights."""

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.samplers
import comfy.supported_models
import pytest
import torch
from whole_layers import weights_from_the_start

CONTEXT, POOLED = 16, 24
SDXL = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "channel_mult": [1, 2, 4],
    "num_res_blocks": [2, 2, 2],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "context_dim": CONTEXT,
    "num_classes": "sequential",
    # What ComfyUI appends to the pooled text: six sizes of 256 channels.
    "adm_in_channels": POOLED + 6 * 256,
    "use_checkpoint": False,
    "legacy": False,
    "dtype": torch.float32,
}
SD15 = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "channel_mult": [1, 2, 4, 4],
    "num_res_blocks": [2, 2, 2, 2],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "context_dim": CONTEXT,
    "use_checkpoint": False,
    "legacy": False,
    "dtype": torch.float32,
}
SIGMAS = torch.tensor([14.6, 6.0, 2.5, 0.0])
FAMILIES = {"sdxl": (comfy.supported_models.SDXL, SDXL, 8), "sd15": (comfy.supported_models.SD15, SD15, -1)}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These networks are too small for more threads, which then only wait for each other. Import it to use it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@weights_from_the_start()
def build(family: str, seed: int = 0, **changes) -> comfy.model_patcher.ModelPatcher:
    """A ModelPatcher of "sdxl" or "sd15"; `changes` are of the network's configuration."""
    kind, config, head_channels = FAMILIES[family]
    settings = kind({**config, **changes})
    settings.unet_config["num_head_channels"] = head_channels
    settings.set_inference_dtype(torch.float32, None)
    settings.custom_operations = comfy.ops.disable_weight_init
    model = settings.get_model({}, device="cpu")
    fill(model.diffusion_model, seed)
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.ModelPatcher(model.eval(), device, torch.device("cpu"))


def fill(network: torch.nn.Module, seed: int) -> None:
    """Give a network seeded weights that keep the size of what passes through it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                drawn *= parameter[0].numel() ** -0.5
            else:
                drawn = 0.1 * drawn + (1.0 if name.endswith("weight") else 0.0)
            parameter.copy_(drawn)
        network.out[-1].weight *= 0.3  # so that the prediction is about as large as noise


def prompt(panels: int, seed: int, tokens: int = 5) -> list:
    """CONDITIONING with a text of its own for every panel."""
    generator = torch.Generator().manual_seed(seed)
    text = 2 * torch.randn(panels, tokens, CONTEXT, generator=generator)
    return [[text, {"pooled_output": torch.randn(panels, POOLED, generator=generator)}]]


def latents(panels: int, height: int = 8, width: int = 8, seed: int = 0) -> torch.Tensor:
    """Noise of a batch of panels."""
    return torch.randn(panels, 4, height, width, generator=torch.Generator().manual_seed(1000 + seed))


def guide(model, positive: list, negative: list, cfg: float = 4.0) -> comfy.samplers.CFGGuider:
    """ComfyUI's guider of two prompts."""
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    return guider


def denoise(guider, noise: torch.Tensor, sampler: str = "euler", sigmas: torch.Tensor = SIGMAS) -> torch.Tensor:
    """Latents of a run."""
    sampler = comfy.samplers.sampler_object(sampler)
    return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, seed=0, disable_pbar=True)


def assert_same(ours: torch.Tensor, expected: torch.Tensor) -> None:
    """Latents of two runs agree to 1e-5 of their range."""
    assert expected.isfinite().all()
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def different(ours: torch.Tensor, other: torch.Tensor) -> bool:
    """Latents of two runs differ by more than a thousandth of their range."""
    return bool((ours - other).abs().max() > 1e-3 * other.abs().max())
