"""The noise nodes on ComfyUI's own video models: Wan and LTX-Video (flow matching), at a small width."""

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.samplers
import comfy.supported_models
import comfy.utils
import pytest
import torch
from comfy_extras.nodes_custom_sampler import SamplerCustomAdvanced

from consistent_video.nodes.noise import FrameInitNoise, FreeInitSampler, SharedNoise
from consistent_video.samplers import filters, free_init, noise
from consistent_video.samplers.step_noise import RowNoise, row_seeds

SEED = 11
WAN = {
    "image_model": "wan2.1", "model_type": "t2v", "in_dim": 16, "dim": 48, "ffn_dim": 64, "freq_dim": 32,
    "text_dim": 24, "text_len": 8, "out_dim": 16, "num_heads": 4, "num_layers": 2,
}  # fmt: skip
LTX = {
    "image_model": "ltxv", "in_channels": 128, "cross_attention_dim": 64, "attention_head_dim": 32,
    "num_attention_heads": 2, "caption_channels": 24, "num_layers": 2,
}  # fmt: skip
CASES = {"wan": (comfy.supported_models.WAN21_T2V, WAN, 16), "ltx": (comfy.supported_models.LTXV, LTX, 128)}
LOW_PASS = {"filter": "gaussian", "order": 4, "spatial_stop": 0.25, "temporal_stop": 0.25}


@pytest.fixture(scope="module", params=CASES)
def native(request):
    """(ModelPatcher, latent channels) of a native video model with seeded weights."""
    family, config, channels = CASES[request.param]
    settings = family({**config, "dtype": torch.float32})
    settings.set_inference_dtype(torch.float32, None)
    settings.custom_operations = comfy.ops.disable_weight_init
    model = settings.get_model({}, device="cpu")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.ModelPatcher(model, device, torch.device("cpu")), channels


def clip_latent(channels: int, seed: int | None = None) -> torch.Tensor:
    shape = (1, channels, 5, 8, 6)
    return torch.zeros(shape) if seed is None else torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def denoise(model, made, sampler, latent, sigmas):
    guider = comfy.samplers.CFGGuider(model)
    text = torch.randn(1, 8, 24, generator=torch.Generator().manual_seed(2))
    guider.set_conds([[text, {"attention_mask": torch.ones(1, 8)}]], [])
    guider.set_cfg(1.0)
    return SamplerCustomAdvanced.execute(made, guider, sampler, sigmas, {"samples": latent}).result[0]["samples"]


class Fixed:
    """A NOISE that holds a tensor."""

    seed = SEED

    def __init__(self, tensor):
        self.tensor = tensor

    def generate_noise(self, latent):
        return self.tensor


def sigmas_of(model) -> torch.Tensor:
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 4)


def test_shared_noise_starts_a_native_model(native):
    model, channels = native
    latent = clip_latent(channels)
    made = SharedNoise.execute(SEED, "mixed", 2.0).result[0]
    drawn = made.generate_noise({"samples": latent})
    frames = drawn.transpose(1, 2).flatten(2)[0]
    correlation = torch.corrcoef(frames.flatten(1))[0, 1].item()
    assert correlation == pytest.approx(4 / 5, abs=0.05)
    euler = comfy.samplers.sampler_object("euler")
    sampled = denoise(model, made, euler, latent, sigmas_of(model))
    assert torch.equal(sampled, denoise(model, Fixed(drawn), euler, latent, sigmas_of(model)))
    assert sampled.isfinite().all() and sampled.std() > 0.01


def test_frame_init_leads_a_native_model(native):
    model, channels = native
    latent, still = clip_latent(channels), clip_latent(channels, 3)[:, :, :1]
    inner = SharedNoise.execute(SEED, "mixed", 1.0).result[0]
    made = FrameInitNoise.execute(inner, model, {"samples": still}, 850, **LOW_PASS).result[0]
    drawn = inner.generate_noise({"samples": latent})
    level = model.get_model_object("model_sampling").sigmas
    s = level[851 * len(level) // 1000 - 1].item()
    scaled = model.model.process_latent_in(still.clone()).expand_as(drawn)
    noised = ((1 - s) * scaled + s * drawn) / (s**2 + (1 - s) ** 2) ** 0.5
    low = filters.LowPass(*LOW_PASS.values()).mask(drawn.shape[-3:], drawn.device)
    expected = filters.mix_low_high(noised, drawn, low)
    torch.testing.assert_close(made.generate_noise({"samples": latent}), expected, rtol=0, atol=2e-5)
    euler = comfy.samplers.sampler_object("euler")
    assert denoise(model, made, euler, latent, sigmas_of(model)).isfinite().all()


def test_free_init_repeats_a_native_model(native):
    """Two runs are two plain runs, the second from the noise that the formula gives."""
    model, channels = native
    latent, start, sigmas = clip_latent(channels), clip_latent(channels, 5), sigmas_of(model)
    euler = comfy.samplers.sampler_object("euler")
    twice = FreeInitSampler.execute(euler, 2, False, **LOW_PASS).result[0]
    sampled = denoise(model, Fixed(start), twice, latent, sigmas)

    first = model.model.process_latent_in(denoise(model, Fixed(start), euler, latent, sigmas))
    carried = noise.add_noise(first, start, free_init.PUBLISHED_SIGMA)
    fresh = RowNoise(row_seeds(SEED, start, free_init.FRESH_NOISE))(start)
    low = filters.LowPass(*LOW_PASS.values()).mask(start.shape[-3:], start.device)
    second = filters.mix_low_high(carried, fresh, low)
    expected = denoise(model, Fixed(second), euler, latent, sigmas)
    torch.testing.assert_close(sampled, expected, rtol=0, atol=1e-4)
    assert (sampled - denoise(model, Fixed(start), euler, latent, sigmas)).abs().max() > 0.01
