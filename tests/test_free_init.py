"""FreeInit under ComfyUI's guider against diffusers' FreeInitMixin: same tiny weights, same noise."""

import comfy.hooks
import comfy.model_base
import comfy.samplers
import pytest
import torch
from comfy.model_management import InterruptProcessingException
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
from diffusers import TextToVideoSDPipeline
from diffusers.pipelines.free_init_utils import FreeInitMixin

from consistent_video.loaders import checkpoint
from consistent_video.loaders.families import MODELSCOPE
from consistent_video.nodes import noise as nodes
from consistent_video.samplers import free_init, reference, schedules
from consistent_video.samplers.step_noise import RowNoise, row_seeds
from native_sampling import conditioning, sample

pytestmark = pytest.mark.slow

PROMPT = "a panda surfing a wave"
NEGATIVE = "blurry, text"
SCALE = 0.18215
SEED = 31
SHAPE = (1, 4, 3, 6, 5)
DEFAULTS = {"iterations": 3, "fast_sampling": False, "filter": "butterworth", "order": 4}
STOPS = {"spatial_stop": 0.25, "temporal_stop": 0.25}


@pytest.fixture(scope="module")
def pipeline(modelscope_folder):
    return TextToVideoSDPipeline.from_pretrained(modelscope_folder)


@pytest.fixture(scope="module")
def loaded(modelscope_folder):
    return checkpoint.load_folder(MODELSCOPE, modelscope_folder, "default")


def noise_of(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def wrapped(sampler=None, **settings):
    sampler = reference.reference_sampler() if sampler is None else sampler
    return nodes.FreeInitSampler.execute(sampler, **{**DEFAULTS, **STOPS, **settings}).result[0]


def reference_sigmas(loaded, steps, denoise=1.0):
    return schedules.reference_sigmas(loaded[0].model.scheduler_config, steps, denoise)


def run(loaded, sampler, steps=4, noise=None, sigmas=None, model=None, cfg=1.0, **kwargs):
    noise = noise_of(*SHAPE) if noise is None else noise
    sigmas = reference_sigmas(loaded, steps) if sigmas is None else sigmas
    prompts = (conditioning(loaded[1], text) for text in (PROMPT, NEGATIVE))
    return sample(loaded[0] if model is None else model, *prompts, noise, sampler, sigmas, cfg, seed=SEED, **kwargs)


def with_sampling(loaded, sampling):
    model = loaded[0].clone()
    model.add_object_patch("model_sampling", sampling)
    return model


class Loop(FreeInitMixin):
    """Diffusers' FreeInit around its DDIM and its network, on scaled latents."""

    def __init__(self, pipeline):
        self.pipeline, self.scheduler = pipeline, pipeline.scheduler

    def run(self, noise, steps, cfg, iterations, fast_sampling, filter, order, spatial_stop, temporal_stop):
        self.enable_free_init(iterations, fast_sampling, filter, order, spatial_stop, temporal_stop)
        texts = self.pipeline.encode_prompt([PROMPT] * len(noise), "cpu", 1, True, [NEGATIVE] * len(noise))
        generator = [torch.Generator().manual_seed(seed) for seed in row_seeds(SEED, noise, free_init.FRESH_NOISE)]
        latents = noise
        for iteration in range(iterations):
            latents, timesteps = self._apply_free_init(
                latents, iteration, steps, torch.device("cpu"), torch.float32, generator
            )
            for timestep in timesteps:
                latents = self.scheduler.step(
                    self.predict(latents, timestep, texts, cfg), timestep, latents
                ).prev_sample
        return latents

    def predict(self, latents, timestep, texts, cfg):
        positive, negative = (self.pipeline.unet(latents, timestep, text).sample for text in texts)
        return negative + cfg * (positive - negative)


@pytest.mark.parametrize(
    "shape, steps, cfg, settings",
    [
        (SHAPE, 2, 1.0, {}),
        ((2, 4, 4, 6, 8), 2, 1.0, {"filter": "gaussian", "iterations": 2, "spatial_stop": 0.5, "temporal_stop": 0.4}),
        (SHAPE, 2, 3.0, {"filter": "ideal"}),
        (SHAPE, 5, 1.0, {"fast_sampling": True}),
        (SHAPE, 2, 1.0, {"fast_sampling": True, "iterations": 4}),
    ],
    ids=["defaults", "gaussian", "ideal", "fast", "fewer_steps_than_runs"],
)
def test_follows_diffusers(pipeline, loaded, shape, steps, cfg, settings):
    noise = noise_of(*shape)
    expected = Loop(pipeline).run(noise, steps, cfg, **{**DEFAULTS, **STOPS, **settings})
    ours = run(loaded, wrapped(**settings), steps, noise, cfg=cfg)
    assert ours.isfinite().all() and ours.std() > 0.01
    assert (ours * SCALE - expected).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["euler", "euler_ancestral", "dpmpp_2m", "uni_pc"])
def test_wraps_native_samplers(loaded, name):
    native = comfy.samplers.sampler_object(name)
    sigmas = comfy.samplers.calculate_sigmas(loaded[0].get_model_object("model_sampling"), "normal", 3)
    plain = run(loaded, native, sigmas=sigmas)
    assert torch.equal(run(loaded, wrapped(native, iterations=1), sigmas=sigmas), plain)
    first, again = (run(loaded, wrapped(native, iterations=2), sigmas=sigmas) for _ in range(2))
    assert first.isfinite().all() and torch.equal(first, again)
    assert (first - plain).abs().max() > 0.1


def test_each_run_has_fresh_noise_and_a_seed_of_its_own(loaded):
    """A filter that keeps nothing shows the fresh noise."""
    seen = []

    class Recorder(reference.ReferenceDDIM):
        def sample(self, model_wrap, sigmas, extra_args, callback, noise, *args, **kwargs):
            seen.append((noise.clone(), extra_args["seed"]))
            return super().sample(model_wrap, sigmas, extra_args, callback, noise, *args, **kwargs)

    run(loaded, wrapped(Recorder(), temporal_stop=0.0), 1)
    starts, seeds = zip(*seen)
    draw = RowNoise(row_seeds(SEED, noise_of(*SHAPE), free_init.FRESH_NOISE))
    assert torch.equal(starts[0], noise_of(*SHAPE))
    assert all(torch.equal(start, draw(start)) for start in starts[1:])
    assert seeds == (SEED, SEED + 1, SEED + 2)


def test_a_sampler_that_changes_its_inputs_does_not_change_the_next_run(loaded):
    class Careless(reference.ReferenceDDIM):
        def sample(self, model_wrap, sigmas, extra_args, callback, noise, *args, **kwargs):
            result = super().sample(model_wrap, sigmas, extra_args, callback, noise, *args, **kwargs)
            sigmas.zero_(), noise.zero_(), extra_args.clear()
            return result

    sigmas = reference_sigmas(loaded, 2)
    ours = run(loaded, wrapped(Careless()), sigmas=sigmas)
    assert torch.equal(ours, run(loaded, wrapped(), 2))
    assert torch.equal(sigmas, reference_sigmas(loaded, 2))


def test_steps_are_counted_over_all_runs(loaded):
    calls = []
    run(loaded, wrapped(fast_sampling=True), 6, callback=lambda *values: calls.append(values))
    assert [step for step, *_ in calls] == list(range(2 + 4 + 6))
    assert {total for *_, total in calls} == {12}
    assert all(clean.shape == SHAPE and state.shape == SHAPE for _, clean, state, _ in calls)


def test_samplers_that_count_on_stay_within_their_run(loaded):
    class Counting(reference.ReferenceDDIM):
        def sample(self, model_wrap, sigmas, extra_args, callback, noise, *args, **kwargs):
            for step in range(5):
                callback(step, noise, noise, 99)
            return noise

    calls = []
    run(loaded, wrapped(Counting(), iterations=2), 3, callback=lambda *values: calls.append((values[0], values[3])))
    assert calls == [(step, 6) for step in (0, 1, 2, 2, 2, 3, 4, 5, 5, 5)]


def test_an_interrupt_ends_all_runs(loaded):
    seen = []

    def interrupt(step, *_):
        seen.append(step)
        if step == 5:
            raise InterruptProcessingException

    with pytest.raises(InterruptProcessingException):
        run(loaded, wrapped(), 4, callback=interrupt)
    assert seen == [0, 1, 2, 3, 4, 5]


def test_the_model_sees_the_sigmas_of_its_run(loaded):
    seen = []

    def record(apply_model, arguments):
        options = arguments["c"]["transformer_options"]
        seen.append(len(options["sample_sigmas"]) - 1)
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    model = loaded[0].clone()
    model.set_model_unet_function_wrapper(record)
    run(loaded, wrapped(fast_sampling=True), 6, model=model)
    assert seen == [2] * 2 + [4] * 4 + [6] * 6


def test_a_latent_and_its_mask_apply_to_every_run(loaded):
    latent, mask = noise_of(*SHAPE, seed=4), torch.zeros(1, 1, *SHAPE[2:])
    mask[..., 3:] = 1.0
    ours = run(loaded, wrapped(iterations=2), latent=latent, denoise_mask=mask)
    torch.testing.assert_close(ours[..., :3], latent[..., :3], rtol=0, atol=1e-5)
    assert (ours[..., 3:] - latent[..., 3:]).abs().mean() > 0.1
    # A run over the last steps stays near the latent it starts from, in the second round too.
    sigmas = reference_sigmas(loaded, 10, 0.2)
    near = run(loaded, wrapped(iterations=2), sigmas=sigmas, latent=latent)
    plain = run(loaded, reference.reference_sampler(), sigmas=sigmas, latent=latent)
    assert (near - latent).abs().mean() < 1.5 * (plain - latent).abs().mean()


def test_a_reference_schedule_is_shortened_to_a_reference_schedule(loaded):
    config = loaded[0].model.scheduler_config
    for steps in (1, 16, 33):
        shorter = free_init.shorten(schedules.reference_sigmas(config, 50), steps, config)
        assert torch.equal(shorter, schedules.reference_sigmas(config, steps))


@pytest.mark.parametrize("config", [None, {}, {"_class_name": "Unknown"}, {"num_train_timesteps": 2}])
def test_other_schedules_are_read_off_between_their_sigmas(config):
    sigmas = torch.tensor([14.0, 10.0, 6.0, 4.0, 2.0, 1.0, 0.0])
    assert free_init.shorten(sigmas, 3, config).tolist() == [14.0, 6.0, 2.0, 0.0]
    assert free_init.shorten(sigmas, 4, config).tolist() == [14.0, 8.0, 4.0, 1.5, 0.0]
    assert free_init.shorten(sigmas, 1, config).tolist() == [14.0, 0.0]
    assert torch.equal(free_init.shorten(sigmas, 6, config), sigmas)


def test_the_published_noise_level_is_that_of_stable_diffusion():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = (1 - betas).prod()
    assert free_init.PUBLISHED_SIGMA == pytest.approx(((1 - kept) / kept).sqrt().item(), abs=1e-4)


def test_models_that_keep_nothing_at_the_last_timestep_take_the_published_noise_level(loaded):
    config = loaded[0].model.model_config
    flow = comfy.model_base.model_sampling(config, comfy.model_base.ModelType.FLOW)
    zero_snr = type(loaded[0].get_model_object("model_sampling"))(config, zsnr=True)
    assert free_init.carried_sigma(flow) == free_init.carried_sigma(zero_snr) == free_init.PUBLISHED_SIGMA
    usual = loaded[0].get_model_object("model_sampling")
    assert free_init.carried_sigma(usual) == pytest.approx(usual.sigma_max.item())


def test_models_that_add_no_noise_are_refused(loaded):
    config = loaded[0].model.model_config
    still = comfy.model_base.model_sampling(config, comfy.model_base.ModelType.IMG_TO_IMG_FLOW)
    with pytest.raises(ValueError, match="IMG_TO_IMG_FLOW.* adds no noise"):
        free_init.carried_sigma(still)
    with pytest.raises(ValueError, match="sample as .*IMG_TO_IMG_FLOW, but ModelScope"):
        run(loaded, wrapped(), model=with_sampling(loaded, still))


def test_runs_that_cannot_be_repeated_are_refused(loaded):
    with pytest.raises(ValueError, match="there is none.*RandomNoise"):
        run(loaded, wrapped(), noise=torch.zeros(SHAPE))
    with pytest.raises(ValueError, match="sigmas end at .*end at 0"):
        run(loaded, wrapped(), sigmas=reference_sigmas(loaded, 4)[:3])
    with pytest.raises(ValueError, match="iterations is 0.*1 "):
        wrapped(iterations=0)


def test_latents_without_frames_are_refused():
    sampling = comfy.model_base.model_sampling(None, comfy.model_base.ModelType.EPS)
    guider = type("Guider", (), {"inner_model": type("Model", (), {"model_sampling": sampling})})
    with pytest.raises(ValueError, match=r"FreeInit needs a clip latent.*\(1, 4, 8, 8\)"):
        wrapped().sample(guider, torch.tensor([14.0, 0.0]), {}, None, noise_of(1, 4, 8, 8))


def test_a_clip_of_a_batch_is_made_again_alone(loaded):
    """Fresh noise, and what the wrapped sampler draws, go by the clip."""
    noise = noise_of(3, *SHAPE[1:])
    sampler = wrapped(reference.reference_sampler("ddim", 1.0), iterations=2)
    batch = run(loaded, sampler, 2, noise)
    for clip in (0, 2):
        alone = run(loaded, sampler, 2, noise[clip : clip + 1])
        assert (alone - batch[clip]).abs().max() < 1e-3 * batch.abs().max()


@pytest.mark.parametrize("node", [EasyCacheNode, LazyCacheNode])
@pytest.mark.parametrize("fast_sampling", [False, True])
def test_what_a_cache_remembers_ends_with_each_run(loaded, node, fast_sampling):
    """The second run is a run of its own over the noise that the first left."""
    model = node.execute(loaded[0], 0.3, 0.15, 0.95, False).result[0]
    starts, steps = [], 8

    class Recorder(reference.ReferenceDDIM):
        def sample(self, model_wrap, sigmas, extra_args, callback, noise, *args, **kwargs):
            starts.append((noise.clone(), sigmas))
            return super().sample(model_wrap, sigmas, extra_args, callback, noise, *args, **kwargs)

    both = run(loaded, wrapped(Recorder(), iterations=2, fast_sampling=fast_sampling), steps, model=model)
    assert len(starts) == 2 and len(starts[0][1]) == (5 if fast_sampling else 9)
    noise, sigmas = starts[1]
    once = run(loaded, reference.ReferenceDDIM(), model=model, noise=noise, sigmas=sigmas)
    assert torch.equal(both, once)
    assert not torch.equal(once, run(loaded, reference.ReferenceDDIM(), noise=noise, sigmas=sigmas))


def test_hooks_start_again_with_each_run(loaded):
    """A LoRA that is scheduled for the first half of a run acts in the first half of every run."""
    weight = loaded[0].model.state_dict()["diffusion_model.conv_in.weight"]
    hooks = comfy.hooks.create_hook_lora({"diffusion_model.conv_in.diff": torch.ones_like(weight)}, 1.0, 0.0)
    frames = comfy.hooks.HookKeyframeGroup()
    for strength, start in ((1.0, 0.0), (0.0, 0.5)):
        frames.add(comfy.hooks.HookKeyframe(strength, start))
    hooks.set_keyframes_on_hooks(frames)
    seen = []

    def record(apply_model, arguments):
        seen.append(not torch.equal(loaded[0].model.diffusion_model.conv_in.weight, weight_before))
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    weight_before = weight.clone()
    model = loaded[0].clone()
    model.set_model_unet_function_wrapper(record)
    prompts = [
        [[text, {**extra, "hooks": hooks}] for text, extra in conditioning(loaded[1], words)]
        for words in (PROMPT, NEGATIVE)
    ]
    sample(model, *prompts, noise_of(*SHAPE), wrapped(iterations=2), reference_sigmas(loaded, 4), 1.0, seed=SEED)
    assert seen == [True, True, False, False] * 2


def test_fresh_noise_is_shuffled_over_context_windows_as_the_first(loaded):
    seen = []

    class Recorder(reference.ReferenceDDIM):
        def sample(self, model_wrap, sigmas, extra_args, callback, noise, *args, **kwargs):
            seen.append(noise.clone())
            return super().sample(model_wrap, sigmas, extra_args, callback, noise, *args, **kwargs)

    model = ContextWindowsManualNode.execute(
        loaded[0], 4, 1, "standard_static", 1, False, "pyramid", 2, True, "", False
    ).result[0]
    noise = noise_of(1, 4, 8, 6, 5)
    run(loaded, wrapped(Recorder(), iterations=2, temporal_stop=0.0), 1, noise, model=model)
    for start in seen:
        for frame in range(4, 8):
            assert any(torch.equal(start[:, :, frame], start[:, :, earlier]) for earlier in range(frame))


def test_the_prompts_are_looked_at_once_for_all_runs(loaded, caplog):
    prompts = [[[text, {**extra, "guidance": 3.5}] for text, extra in conditioning(loaded[1], PROMPT)]] * 2
    sample(loaded[0], *prompts, noise_of(*SHAPE), wrapped(iterations=2), reference_sigmas(loaded, 2), seed=SEED)
    said = [record.getMessage() for record in caplog.records]
    assert len([line for line in said if "carries 'guidance'" in line]) == 1
