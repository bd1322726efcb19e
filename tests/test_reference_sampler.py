"""The reference sampler, under ComfyUI's guider, against a loop over diffusers' scheduler."""

from types import SimpleNamespace

import comfy.latent_formats
import comfy.model_base
import comfy.model_patcher
import comfy.model_sampling
import comfy.samplers
import pytest
import torch
from comfy.model_management import InterruptProcessingException
from diffusers import DDIMScheduler

from consistent_video.samplers import reference, schedules
from consistent_video.samplers.step_noise import RowNoise, row_seeds

SHAPE = (2, 4, 3, 5, 6)
CPU = torch.device("cpu")
SEED = 11

MODELSCOPE = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "epsilon",
}
I2VGEN_XL = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "squaredcos_cap_v2",
    "clip_sample": False,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "set_alpha_to_one": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "thresholding": False,
}
# Timestep 999, the one without signal, is only visited with trailing spacing.
ZERO_SNR = I2VGEN_XL | {"timestep_spacing": "trailing"}
CONFIGS = {
    "modelscope": MODELSCOPE,
    "i2vgen_xl": I2VGEN_XL,
    "zero_snr": ZERO_SNR,
    "zero_snr_final_alpha": ZERO_SNR | {"set_alpha_to_one": False},
    "zero_snr_sample": ZERO_SNR | {"prediction_type": "sample"},
    "class_defaults": {"_class_name": "DDIMScheduler"},
    "no_offset": MODELSCOPE | {"steps_offset": 0},
    "clip": MODELSCOPE | {"clip_sample": True, "clip_sample_range": 0.7},
    "clip_v": ZERO_SNR | {"clip_sample": True},
    "threshold": MODELSCOPE | {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5},
    "threshold_v": ZERO_SNR | {"thresholding": True, "clip_sample": True, "sample_max_value": 3.0},
}
MODEL_TYPES = {
    "epsilon": comfy.model_base.ModelType.EPS,
    "v_prediction": comfy.model_base.ModelType.V_PREDICTION,
    "sample": comfy.model_base.ModelType.IMG_TO_IMG,
}


class Network(torch.nn.Module):
    """Something smooth that mixes channels and depends on the timestep and the text."""

    dtype = torch.float32

    def __init__(self):
        super().__init__()
        weights = torch.randn(4, 4, generator=torch.Generator().manual_seed(5))
        self.mix = torch.nn.Parameter(weights * 0.4, requires_grad=False)

    def forward(self, latent, timestep, context, **_):
        mixed = torch.einsum("oc,bcfhw->bofhw", self.mix, latent)
        level = (timestep / 1000).view(-1, 1, 1, 1, 1)
        shift = 2 * level - 1 + context.mean(dim=(1, 2)).view(-1, 1, 1, 1, 1)
        return 0.2 * torch.tanh(mixed + shift) + level.sqrt() * latent


class X0Sampling(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.X0):
    """A model that predicts x0."""


def build(config: dict | None) -> comfy.model_patcher.ModelPatcher:
    """A ComfyUI model over `Network` with a scheduler configuration; None: a foreign model with ComfyUI's own table."""
    prediction = "epsilon" if config is None else config.get("prediction_type", "epsilon")
    model_config = SimpleNamespace(
        unet_config={},
        latent_format=comfy.latent_formats.LatentFormat(),
        manual_cast_dtype=None,
        custom_operations=object(),
        optimizations={},
        sampling_settings={},
        memory_usage_factor=1.0,
    )
    model = comfy.model_base.BaseModel(
        model_config, MODEL_TYPES[prediction], device=CPU, unet_model=lambda **_: Network()
    )
    if prediction == "sample":
        model.model_sampling = X0Sampling(model_config)
    if config is not None:
        model.scheduler_config = config
        model.model_sampling.set_sigmas(schedules.table_sigmas(config))
    return comfy.model_patcher.ModelPatcher(model, load_device=CPU, offload_device=CPU)


def text(value: float) -> torch.Tensor:
    return torch.full((1, 3, 8), value)


def noise(seed: int = 0) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def run(model, sigmas, start, latent=None, eta=0.0, cfg=1.0, mask=None, callback=None, seed=SEED) -> torch.Tensor:
    """Sample with the reference sampler through ComfyUI's guider."""
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds([[text(0.2), {}]], [[text(-0.3), {}]])
    guider.set_cfg(cfg)
    latent = torch.zeros_like(start) if latent is None else latent
    sampler = reference.reference_sampler("auto", eta)
    return guider.sample(
        start, latent, sampler, sigmas, denoise_mask=mask, callback=callback, disable_pbar=True, seed=seed
    )


def published(config, steps, start, latent=None, denoise=1.0, eta=0.0, cfg=1.0, seed=SEED) -> tuple[torch.Tensor, list]:
    """What diffusers makes of the same network and noise; also its x0 after each step."""
    scheduler = DDIMScheduler.from_config(config)
    scheduler.set_timesteps(steps)
    visited = scheduler.timesteps[steps - min(int(steps * denoise), steps) :]
    network, draw, predictions = Network(), RowNoise(row_seeds(seed, start)), []
    state = start if latent is None else scheduler.add_noise(latent, start, visited[:1])
    for timestep in visited:
        batch = timestep.expand(len(state)).float()
        output = network(state, batch, text(0.2).expand(len(state), -1, -1))
        if cfg != 1.0:
            negative = network(state, batch, text(-0.3).expand(len(state), -1, -1))
            output = negative + cfg * (output - negative)
        fresh = draw(start) if eta > 0 else None
        step = scheduler.step(output, timestep, state, eta=eta, variance_noise=fresh)
        state = step.prev_sample
        predictions.append(step.pred_original_sample)
    return state, predictions


def assert_agrees(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.dtype == torch.float32 and ours.isfinite().all()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", CONFIGS)
def test_follows_ddim(name, eta):
    config = CONFIGS[name]
    sigmas = schedules.reference_sigmas(config, 10)
    ours = run(build(config), sigmas, noise(), eta=eta)
    assert_agrees(ours, published(config, 10, noise(), eta=eta)[0])


@pytest.mark.parametrize("steps", [1, 25, 50])
@pytest.mark.parametrize("config", [MODELSCOPE, I2VGEN_XL, ZERO_SNR], ids=["modelscope", "i2vgen_xl", "zero_snr"])
def test_follows_ddim_with_guidance_for_any_number_of_steps(config, steps):
    ours = run(build(config), schedules.reference_sigmas(config, steps), noise(), cfg=2.0)
    assert_agrees(ours, published(config, steps, noise(), cfg=2.0)[0])


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("denoise", [0.02, 0.6, 1.0])
@pytest.mark.parametrize("config", [MODELSCOPE, I2VGEN_XL, ZERO_SNR], ids=["modelscope", "i2vgen_xl", "zero_snr"])
def test_starts_from_a_noised_latent(config, denoise, eta):
    latent = 0.5 * noise(3)
    ours = run(build(config), schedules.reference_sigmas(config, 50, denoise), noise(), latent, eta=eta)
    assert_agrees(ours, published(config, 50, noise(), latent, denoise, eta=eta)[0])


@pytest.mark.parametrize("config", [MODELSCOPE, ZERO_SNR], ids=["modelscope", "zero_snr"])
@pytest.mark.parametrize("cut", [1, 4, 9])
def test_two_halves_equal_the_whole(config, cut):
    model, sigmas = build(config), schedules.reference_sigmas(config, 10)
    half = run(model, sigmas[: cut + 1], noise())
    ours = run(model, sigmas[cut:], torch.zeros(SHAPE), half)
    assert_agrees(ours, published(config, 10, noise())[0])


def test_an_unfinished_run_returns_the_exploding_state():
    sigmas = schedules.reference_sigmas(MODELSCOPE, 10)
    states = []
    run(build(MODELSCOPE), sigmas, noise(), callback=lambda step, clean, state, total: states.append(state))
    half = run(build(MODELSCOPE), sigmas[:5], noise())
    torch.testing.assert_close(half, states[4], rtol=1e-6, atol=1e-6)


def test_a_noisy_latent_at_zero_snr_is_continued():
    sigmas = schedules.reference_sigmas(ZERO_SNR, 10)
    ours = run(build(ZERO_SNR), sigmas, torch.zeros(SHAPE), noise() * (1 + sigmas[0] ** 2) ** 0.5)
    assert_agrees(ours, published(ZERO_SNR, 10, noise())[0])


def test_nothing_and_no_noise_starts_from_zero():
    ours = run(build(MODELSCOPE), schedules.reference_sigmas(MODELSCOPE, 10), torch.zeros(SHAPE))
    assert_agrees(ours, published(MODELSCOPE, 10, torch.zeros(SHAPE))[0])


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("name", ["modelscope", "zero_snr", "clip", "threshold"])
def test_a_mask_keeps_its_region(name, eta):
    config, latent = CONFIGS[name], noise(3)
    mask = torch.zeros(SHAPE)
    mask[..., 3:] = 1.0
    ours = run(build(config), schedules.reference_sigmas(config, 10), noise(), latent, eta=eta, mask=mask)
    assert torch.equal(ours[..., :3], latent[..., :3])
    # The network works pixel by pixel, so the other region is what it would be without a mask.
    whole = run(build(config), schedules.reference_sigmas(config, 10), noise(), latent, eta=eta)
    if name != "threshold":  # its bound looks at the whole sample
        torch.testing.assert_close(ours[..., 3:], whole[..., 3:], rtol=0, atol=1e-6)
    assert (ours[..., 3:] - latent[..., 3:]).abs().mean() > 0.1


@pytest.mark.parametrize("name", ["modelscope", "clip", "zero_snr", "threshold"])
def test_callback_sees_each_prediction(name):
    calls = []
    sigmas = schedules.reference_sigmas(CONFIGS[name], 10)
    run(build(CONFIGS[name]), sigmas, noise(), callback=lambda *values: calls.append(values))
    assert [step for step, *_ in calls] == list(range(10))
    assert {total for *_, total in calls} == {10}
    torch.testing.assert_close(calls[0][2], noise() * (1 + sigmas[0] ** 2) ** 0.5)
    _, predictions = published(CONFIGS[name], 10, noise())
    for (_, clean, _, _), expected in zip(calls, predictions, strict=True):
        torch.testing.assert_close(clean, expected, rtol=0, atol=5e-5)


def test_an_exception_of_the_callback_ends_the_run():
    seen = []

    def interrupt(step, *_):
        seen.append(step)
        if step == 2:
            raise InterruptProcessingException

    with pytest.raises(InterruptProcessingException):
        run(build(MODELSCOPE), schedules.reference_sigmas(MODELSCOPE, 10), noise(), callback=interrupt)
    assert seen == [0, 1, 2]


def test_noise_of_eta_is_the_seeds():
    model, sigmas = build(MODELSCOPE), schedules.reference_sigmas(MODELSCOPE, 10)
    first, again, other = (run(model, sigmas, noise(), eta=1.0, seed=seed) for seed in (4, 4, 5))
    assert torch.equal(first, again)
    assert (first - other).abs().mean() > 0.1
    torch.random.manual_seed(4)
    before = torch.random.get_rng_state()
    run(model, sigmas, noise(), eta=1.0, seed=4)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_noise_of_eta_differs_from_comfyuis_initial_noise():
    initial = torch.randn(SHAPE, generator=torch.Generator().manual_seed(SEED))
    drawn = RowNoise(row_seeds(SEED, initial))(initial)
    assert abs(torch.corrcoef(torch.stack((initial.flatten(), drawn.flatten())))[0, 1]) < 0.15


def test_a_foreign_model_ends_at_its_prediction():
    model, last = build(None), []
    sigmas = torch.tensor([14.0, 6.0, 2.0, 0.5, 0.0])
    ours = run(model, sigmas, noise(), callback=lambda step, clean, state, total: last.append(clean))
    assert torch.equal(ours, last[-1])
    assert ours.abs().max() > 1.0  # not clipped, which DDIMScheduler would do by default


def test_an_inverted_schedule_takes_no_fresh_noise_and_comes_back():
    model, latent, nothing = build(MODELSCOPE), 0.5 * noise(3), torch.zeros(SHAPE)
    rising = schedules.table_sigmas(MODELSCOPE)[1:400:2]
    noised = run(model, rising, nothing, latent)
    assert torch.equal(run(model, rising, nothing, latent, eta=1.0), noised)
    returned = run(model, rising.flip(0), nothing, noised)
    assert (noised - latent).abs().mean() > 0.2
    assert (returned - latent).abs().mean() < 0.02


def test_flow_models_are_refused():
    model = build(None)
    model.model.model_sampling = comfy.model_base.model_sampling(
        model.model.model_config, comfy.model_base.ModelType.FLOW
    )
    with pytest.raises(ValueError, match="samples as ModelSamplingDiscreteFlow, CONST.*native sampler"):
        run(model, torch.tensor([1.0, 0.5, 0.0]), noise())


def test_unknown_choices_are_refused():
    with pytest.raises(ValueError, match="'dpm'.*auto, ddim"):
        reference.reference_sampler("dpm")
    for eta in (-0.1, 1.1):
        with pytest.raises(ValueError, match="eta is .* 0 .* to 1 "):
            reference.reference_sampler("ddim", eta)


def test_the_largest_seed_of_the_widget_draws_noise_too():
    assert RowNoise(row_seeds(2**64 - 1, noise()))(noise()).std() > 0.1


def test_a_clip_of_a_batch_is_drawn_again_alone():
    """Its initial noise, which ComfyUI draws by its index in the batch, tells the sampler which clip it is."""
    model, sigmas = build(MODELSCOPE), schedules.reference_sigmas(MODELSCOPE, 6)
    start = torch.cat([noise(seed)[:1] for seed in range(3)])
    batch = run(model, sigmas, start, eta=1.0)
    for clip in (0, 2):
        alone = run(model, sigmas, start[clip : clip + 1], eta=1.0)
        torch.testing.assert_close(alone, batch[clip : clip + 1], rtol=0, atol=1e-5)


def test_clips_that_go_on_without_noise_differ_from_each_other():
    model, sigmas = build(MODELSCOPE), schedules.reference_sigmas(MODELSCOPE, 6)
    latent = noise(3)[:1].repeat(2, *[1] * (len(SHAPE) - 1))
    first, second = run(model, sigmas[2:], torch.zeros_like(latent), latent, eta=1.0)
    assert (first - second).abs().mean() > 0.05
