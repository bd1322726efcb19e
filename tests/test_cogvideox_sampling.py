"""CogVideoX's schedules and samplers, under ComfyUI's guider, against loops over diffusers' schedulers."""

import comfy.samplers
import pytest
import torch
from toy_video_model import CONSISID, SCHEDULERS, SHAPE, build, noise, published, run

from consistent_video.samplers import cogvideox, reference, schedules

DDIM = CONSISID | {"_class_name": "CogVideoXDDIMScheduler"}
ALGORITHMS = {"CogVideoXDDIMScheduler": "cogvideox_ddim", "CogVideoXDPMScheduler": "cogvideox_dpm"}
COGVIDEOX_2B = CONSISID | {"snr_shift_scale": 3.0}
CONFIGS = {
    "consisid": CONSISID,
    "2b": COGVIDEOX_2B,
    "final_alpha": CONSISID | {"set_alpha_to_one": False},
    "signal_at_the_end": CONSISID | {"rescale_betas_zero_snr": False},
    "leading": CONSISID | {"timestep_spacing": "leading"},
    "linspace": CONSISID | {"timestep_spacing": "linspace"},
    "leading_final_alpha": CONSISID | {"timestep_spacing": "leading", "set_alpha_to_one": False, "steps_offset": 1},
    "epsilon": CONSISID | {"prediction_type": "epsilon", "rescale_betas_zero_snr": False},
    "clips_nothing": CONSISID | {"clip_sample": True, "clip_sample_range": 0.1},
    "cosine": CONSISID | {"beta_schedule": "squaredcos_cap_v2"},
    "defaults": {"prediction_type": "v_prediction"},
}
each_class = pytest.mark.parametrize("name", SCHEDULERS)


def assert_agrees(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal within 1e-5, at values around 1: an epsilon model's toy results reach 40."""
    assert ours.dtype == torch.float32 and ours.isfinite().all()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1.0, theirs.abs().max().item() / 10))


def native_sigmas(model, scheduler: str, steps: int) -> torch.Tensor:
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps)


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@each_class
@pytest.mark.parametrize("name_of_config", CONFIGS)
def test_alphas_are_the_schedulers_bits(name, name_of_config):
    config = CONFIGS[name_of_config] | {"_class_name": name}
    alphas = schedules.alphas_cumprod(config)
    theirs = SCHEDULERS[name].from_config(config)
    assert alphas.dtype == theirs.alphas_cumprod.dtype and torch.equal(alphas, theirs.alphas_cumprod)
    assert schedules.final_alpha(config) == theirs.final_alpha_cumprod.item()


@each_class
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("steps", [1, 6, 8, 30, 50])
def test_timesteps_are_the_schedulers(name, spacing, steps):
    config = CONSISID | {"_class_name": name, "timestep_spacing": spacing}
    scheduler = SCHEDULERS[name].from_config(config)
    scheduler.set_timesteps(steps)
    assert schedules.timesteps(config, steps) == scheduler.timesteps.tolist()


def test_table_ascends_to_the_stand_in_for_pure_noise():
    for config in (CONSISID, COGVIDEOX_2B):
        assert schedules.alphas_cumprod(config)[-1] == 0
        table = schedules.table_sigmas(config)
        assert table.dtype == torch.float32 and torch.all(table.diff() > 0)
        assert table[-1].item() == pytest.approx(schedules.ZERO_SNR_SIGMA, rel=1e-6)


def test_the_shift_lowers_the_signal_to_noise_ratio_by_its_scale():
    plain, shifted = (
        schedules.alphas_cumprod(CONSISID | {"rescale_betas_zero_snr": False, "snr_shift_scale": scale})
        for scale in (1.0, 3.0)
    )
    torch.testing.assert_close(plain / (1 - plain), 3 * shifted / (1 - shifted))


@each_class
@pytest.mark.parametrize("name_of_config", CONFIGS)
def test_follows_the_scheduler_over_eight_steps(name, name_of_config):
    config = CONFIGS[name_of_config] | {"_class_name": name}
    ours = run(build(config), schedules.reference_sigmas(config, 8), noise())
    assert_agrees(ours, published(config, 8, noise())[0])


@each_class
@pytest.mark.parametrize("steps", [1, 2, 6, 7, 30, 50])
def test_follows_the_scheduler_with_guidance_for_any_number_of_steps(name, steps):
    config = CONSISID | {"_class_name": name}
    calls = []
    ours = run(
        build(config),
        schedules.reference_sigmas(config, steps),
        noise(),
        cfg=6.0,
        callback=lambda step, clean, state, total: calls.append(clean),
    )
    theirs, predictions = published(config, steps, noise(), 6.0)
    assert_agrees(ours, theirs)
    for clean, expected in zip(calls, predictions, strict=True):
        torch.testing.assert_close(clean, expected, rtol=0, atol=1e-4)


def test_six_steps_end_before_the_last_alpha_as_published():
    targets = _targets(CONSISID, 6)
    alphas = schedules.alphas_cumprod(CONSISID)
    assert schedules.timesteps(CONSISID, 6)[1:] == [832, 666, 499, 332, 166]
    assert [target.alpha for target in targets] == [alphas[at].item() for at in (833, 666, 500, 333, 166, 0)]
    assert not any(target.final for target in targets)


def test_fifty_steps_go_from_one_timestep_to_the_next():
    targets, visited = _targets(CONSISID, 50), schedules.timesteps(CONSISID, 50)
    alphas = schedules.alphas_cumprod(CONSISID)
    assert [target.alpha for target in targets[:-1]] == alphas[visited[1:]].tolist()
    assert targets[-1] == (1.0, True)


def _targets(config: dict, steps: int) -> list[cogvideox.Target]:
    sigmas = schedules.reference_sigmas(config, steps)
    return cogvideox.step_targets(config, sigmas, [1 / (1 + level**2) for level in sigmas.tolist()])


def test_auto_goes_by_the_scheduler_class():
    for name, algorithm in ALGORITHMS.items():
        model, sigmas = build(CONSISID | {"_class_name": name}), schedules.reference_sigmas(CONSISID, 8)
        results = {choice: run(model, sigmas, noise(), choice) for choice in reference.CHOICES}
        assert torch.equal(results["auto"], results[algorithm])
        assert (results["cogvideox_ddim"] - results["cogvideox_dpm"]).abs().mean() > 0.1
        # Where the steps divide the training timesteps, both kinds of DDIM are one.
        assert_agrees(results["ddim"], results["cogvideox_ddim"])


def test_runs_do_not_remember_each_other():
    model, sigmas = build(CONSISID), schedules.reference_sigmas(CONSISID, 8)
    sampler = reference.reference_sampler("auto")
    first, other, again = (run(model, sigmas, noise(at), sampler=sampler) for at in (0, 1, 0))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert (run(model, sigmas, noise(), seed=4) - first).abs().mean() > 0.1


def test_the_noise_is_the_seeds_and_leaves_the_global_generator_alone():
    torch.random.manual_seed(4)
    before = torch.random.get_rng_state()
    run(build(CONSISID), schedules.reference_sigmas(CONSISID, 8), noise())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_an_eta_is_refused():
    for algorithm in ("auto", "cogvideox_ddim", "cogvideox_dpm"):
        with pytest.raises(ValueError, match=r"eta is 0\.5.*Set eta to 0"):
            run(build(CONSISID), schedules.reference_sigmas(CONSISID, 8), noise(), algorithm, eta=0.5)


def test_rising_sigmas_are_refused_by_dpm_and_inverted_by_ddim():
    model, latent = build(CONSISID), 0.5 * noise(3)
    rising, nothing = schedules.table_sigmas(CONSISID)[1:600:2], torch.zeros(SHAPE)
    with pytest.raises(ValueError, match=r"needs sigmas that fall; step 0.*cogvideox_ddim"):
        run(model, rising, nothing, "cogvideox_dpm", latent=latent)
    noised = run(model, rising, nothing, "cogvideox_ddim", latent=latent)
    returned = run(model, rising.flip(0), nothing, "cogvideox_ddim", latent=noised)
    assert (noised - latent).abs().mean() > 0.2
    assert (returned - latent).abs().mean() < 0.02


@each_class
@pytest.mark.parametrize("cut", [1, 4, 7])
def test_an_unfinished_run_continues(name, cut):
    config = CONSISID | {"_class_name": name}
    model, sigmas = build(config), schedules.reference_sigmas(config, 8)
    half = run(model, sigmas[: cut + 1], noise())
    ours = run(model, sigmas[cut:], torch.zeros(SHAPE), latent=half)
    whole = run(model, sigmas, noise())
    if name == "CogVideoXDDIMScheduler":
        assert_agrees(ours, whole)
    else:  # begins anew, with fresh noise
        assert ours.isfinite().all() and 0.5 < ours.std() / whole.std() < 2


@each_class
def test_a_mask_keeps_its_region(name):
    config, latent, mask = CONSISID | {"_class_name": name}, noise(3), torch.zeros(SHAPE)
    mask[..., 3:] = 1.0
    sigmas = schedules.reference_sigmas(config, 8)
    ours = run(build(config), sigmas, noise(), latent=latent, denoise_mask=mask)
    assert torch.equal(ours[..., :3], latent[..., :3])
    whole = run(build(config), sigmas, noise(), latent=latent)
    torch.testing.assert_close(ours[..., 3:], whole[..., 3:], rtol=0, atol=1e-6)


@each_class
@pytest.mark.parametrize("scheduler", ["karras", "simple", "normal"])
def test_native_schedules_work_too(name, scheduler):
    model = build(CONSISID | {"_class_name": name})
    ours = run(model, native_sigmas(model, scheduler, 40), noise())
    theirs = run(model, schedules.reference_sigmas(CONSISID, 200), noise())
    assert ours.isfinite().all() and 0.7 < ours.std() / theirs.std() < 1.4


@pytest.mark.parametrize(
    "scheduler, bound",
    {
        "reference": 3e-4,
        "simple": 3e-4,
        "sgm_uniform": 6e-4,
        "normal": 2e-3,
        "ddim_uniform": 2e-3,
        "beta": 2e-3,
    }.items(),
)
def test_native_euler_converges_to_the_reference(scheduler, bound):
    model, exact = build(DDIM), published(DDIM, 200, noise())[0]

    def error(steps: int) -> float:
        if scheduler == "reference":
            sigmas = schedules.reference_sigmas(DDIM, steps)
        else:
            sigmas = native_sigmas(model, scheduler, steps)
        return distance(run(model, sigmas, noise(), sampler=comfy.samplers.sampler_object("euler")), exact)

    assert error(200) < min(bound, error(25) / 20)


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "uni_pc"])
def test_native_samplers_of_second_order_converge_faster_to_the_same(sampler):
    model, exact = build(DDIM), published(DDIM, 1000, noise())[0]
    sigmas = native_sigmas(model, "simple", 100)
    ours = run(model, sigmas, noise(), sampler=comfy.samplers.sampler_object(sampler))
    first_order = run(model, sigmas, noise(), "cogvideox_ddim")
    assert distance(ours, exact) < min(3e-3, distance(first_order, exact) / 4)
