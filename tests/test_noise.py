"""Shared noise and FrameInit against the published code's values, ComfyUI's noise and diffusers' scheduler."""

import json
from pathlib import Path

import comfy.model_base
import comfy.model_sampling
import comfy.nested_tensor
import comfy.samplers
import pytest
import torch
from comfy_extras.nodes_custom_sampler import Noise_RandomNoise, SamplerCustomAdvanced
from diffusers import DDIMScheduler
from diffusers.pipelines.free_init_utils import FreeInitMixin
from safetensors.torch import load_file

from consistent_video.loaders import checkpoint
from consistent_video.loaders.families import MODELSCOPE
from consistent_video.nodes import noise as nodes
from consistent_video.samplers import noise, reference, schedules
from native_sampling import conditioning

GOLDENS = Path(__file__).parent / "goldens" / "consisti2v_A"
META = json.loads((GOLDENS / "meta.json").read_text(encoding="utf-8"))
SCALE = 0.18215
SEED = 23


@pytest.fixture(scope="module")
def goldens():
    return load_file(GOLDENS / "tensors.safetensors")


@pytest.fixture(scope="module")
def loaded(modelscope_folder):
    return checkpoint.load_folder(MODELSCOPE, modelscope_folder, "default")


def noise_of(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def latent_of(*shape, **others) -> dict:
    return {"samples": torch.zeros(shape), **others}


def shared(mode: str, alpha: float = 1.0, seed: int = SEED):
    return nodes.SharedNoise.execute(seed, mode, alpha).result[0]


def frame_init(model, static_video, inner=None, noise_level=850, kind="gaussian", stops=(0.25, 0.25)):
    inner = shared("mixed") if inner is None else inner
    return nodes.FrameInitNoise.execute(inner, model, static_video, noise_level, kind, 4, *stops).result[0]


def correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack((first.flatten(), second.flatten())))[0, 1].item()


@pytest.mark.parametrize("run", META["runs"])
def test_frames_mix_as_published(goldens, run):
    method = META["runs"][run]["method"]
    mode = {"vanilla": "independent", "pyoco_mixed": "mixed", "pyoco_progressive": "progressive"}[method]
    drawn = {name.split(".draw_")[1]: goldens[name] for name in goldens if name.startswith(f"{run}.draw_")}
    independent = drawn["noise"] if mode == "independent" else drawn["independent"]
    base = drawn.get("base", drawn.get("start", independent))
    mixed = noise.mix_frames(mode, 1.0, base, independent)
    torch.testing.assert_close(mixed, goldens[f"{run}.initial_noise"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("mode", ["mixed", "progressive"])
def test_frames_have_unit_variance_and_the_stated_correlation(mode, alpha):
    frames = shared(mode, alpha).generate_noise(latent_of(2, 4, 5, 64, 64))
    assert abs(frames.std() - 1) < 0.02
    # Progressive: each frame is the one before times this root, so two frames apart it is the share itself.
    share = alpha**2 / (1 + alpha**2)
    next_frame = share if mode == "mixed" else share**0.5
    assert abs(correlation(frames[:, :, 1], frames[:, :, 2]) - next_frame) < 0.03
    assert abs(correlation(frames[:, :, 1], frames[:, :, 3]) - share) < 0.03


def test_independent_noise_is_comfyuis():
    for latent in (latent_of(2, 4, 3, 5, 6), latent_of(1, 4, 8, 8), latent_of(2, 4, 3, 5, 6, batch_index=[3, 1])):
        assert torch.equal(shared("independent").generate_noise(latent), Noise_RandomNoise(SEED).generate_noise(latent))
    assert shared("independent").seed == SEED


def test_mixed_noise_draws_the_base_frame_first():
    generator = torch.Generator().manual_seed(SEED)
    base = torch.randn(1, 4, 1, 6, 8, generator=generator)
    independent = torch.randn(1, 4, 5, 6, 8, generator=generator)
    drawn = shared("mixed", 2.0).generate_noise(latent_of(1, 4, 5, 6, 8))
    torch.testing.assert_close(drawn, (2 * base + independent) / 5**0.5)


def test_progressive_noise_draws_the_base_clip_first():
    generator = torch.Generator().manual_seed(SEED)
    base = torch.randn(1, 4, 3, 6, 8, generator=generator)
    independent = torch.randn(1, 4, 3, 6, 8, generator=generator)
    drawn = shared("progressive").generate_noise(latent_of(1, 4, 3, 6, 8))
    second = (base[:, :, 0] + independent[:, :, 1]) / 2**0.5
    third = (second + independent[:, :, 2]) / 2**0.5
    torch.testing.assert_close(drawn, torch.stack((base[:, :, 0], second, third), dim=2))


@pytest.mark.parametrize("mode", noise.MODES)
def test_noise_is_the_seeds_and_of_the_latents_dtype(mode):
    latent = {"samples": torch.zeros(1, 4, 3, 8, 8, dtype=torch.float16)}
    first, again, other = (shared(mode, seed=seed).generate_noise(latent) for seed in (4, 4, 2**64 - 1))
    assert first.dtype == torch.float16 and first.device.type == "cpu"
    assert torch.equal(first, again) and not torch.equal(first, other)
    # Native samplers that draw from the global generator rely on the noise for their seed.
    shared(mode, seed=4).generate_noise(latent)
    state = torch.random.get_rng_state()
    shared(mode, seed=4).generate_noise(latent)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("mode", ["mixed", "progressive"])
def test_a_clip_of_a_batch_can_be_made_again(mode):
    batch = shared(mode).generate_noise(latent_of(3, 4, 3, 8, 8))
    assert abs(correlation(batch[0], batch[1])) < 0.1
    for indices in ([2], [2, 0], [1, 1]):
        again = shared(mode).generate_noise(latent_of(len(indices), 4, 3, 8, 8, batch_index=indices))
        assert torch.equal(again, batch[indices])


@pytest.mark.parametrize("mode", ["mixed", "progressive"])
def test_latents_without_frames_are_refused(mode):
    with pytest.raises(ValueError, match=rf"mode {mode} needs a clip latent.*\(1, 4, 8, 8\).*mode independent"):
        shared(mode).generate_noise(latent_of(1, 4, 8, 8))
    several = comfy.nested_tensor.NestedTensor([torch.zeros(1, 4, 3, 8, 8), torch.zeros(1, 8, 20)])
    with pytest.raises(ValueError, match="several parts"):
        shared(mode).generate_noise({"samples": several})


def test_unknown_choices_are_refused():
    with pytest.raises(ValueError, match="'shared'.*independent, mixed, progressive"):
        shared("shared")
    for alpha in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="alpha is"):
            shared("mixed", alpha)


def with_schedule(model, config: dict):
    """The model with another table of noise levels, as a ModelSampling node makes one."""
    sampling = type(model.get_model_object("model_sampling"))()
    sampling.set_sigmas(schedules.table_sigmas(config))
    model = model.clone()
    model.add_object_patch("model_sampling", sampling)
    return model


def published_frame_init(video, drawn, config, noise_level, kind="gaussian", stops=(0.25, 0.25)) -> torch.Tensor:
    """FrameInit of diffusers' parts; the video is scaled."""
    scheduler, free_init = DDIMScheduler.from_config(config), FreeInitMixin()
    noised = scheduler.add_noise(video, drawn, torch.tensor([noise_level] * len(video)))
    mask = free_init._get_free_init_freq_filter(drawn.shape, "cpu", kind, 4, *stops)
    return free_init._apply_freq_filter(noised, drawn, mask)


@pytest.mark.parametrize("noise_level", [0, 850, 999])
@pytest.mark.parametrize(
    "kind, stops", [("gaussian", (0.25, 0.25)), ("butterworth", (0.5, 0.3)), ("ideal", (0.3, 1.0))]
)
def test_frame_init_follows_diffusers_scheduler_and_filters(loaded, noise_level, kind, stops):
    for model, config in (
        (loaded[0], loaded[0].model.scheduler_config),
        (with_schedule(loaded[0], META["scheduler"]), META["scheduler"]),
    ):
        video, latent = noise_of(2, 4, 5, 7, 6) * 4, latent_of(2, 4, 5, 7, 6)
        made = frame_init(model, {"samples": video}, None, noise_level, kind, stops).generate_noise(latent)
        drawn = shared("mixed").generate_noise(latent)
        expected = published_frame_init(video * SCALE, drawn, config, noise_level, kind, stops)
        torch.testing.assert_close(made, expected, rtol=0, atol=2e-5)


def test_frame_init_equals_the_published_mix(goldens, loaded):
    class Drawn:
        seed = 5

        def generate_noise(self, input_latent):
            return goldens["text_mixed_frameinit.initial_noise"]

    frame = goldens["pipe.first_frame_latent"]
    made = frame_init(
        with_schedule(loaded[0], META["scheduler"]),
        {"samples": frame / SCALE},
        Drawn(),
        META["frameinit_noise_level"],
    )
    video = frame.unsqueeze(2).expand(-1, -1, META["frames"], -1, -1)
    expected = published_frame_init(video, Drawn().generate_noise({}), META["scheduler"], META["frameinit_noise_level"])
    assert made.seed == 5
    torch.testing.assert_close(made.generate_noise(latent_of(*video.shape)), expected, rtol=0, atol=2e-5)


def test_one_frame_and_one_clip_are_repeated(loaded):
    frame, latent = noise_of(1, 4, 1, 6, 8), latent_of(2, 4, 3, 6, 8)
    whole = frame_init(loaded[0], {"samples": frame.repeat(2, 1, 3, 1, 1)}).generate_noise(latent)
    for video in (frame, frame[:, :, 0], frame.repeat(1, 1, 3, 1, 1), frame.repeat(2, 1, 1, 1, 1)):
        assert torch.equal(frame_init(loaded[0], {"samples": video}).generate_noise(latent), whole)


def test_inputs_of_frame_init_stay_as_they_are(loaded):
    video, latent = noise_of(1, 4, 3, 6, 8), latent_of(1, 4, 3, 6, 8)
    node = frame_init(loaded[0], {"samples": video})
    first = node.generate_noise(latent)
    assert torch.equal(video, noise_of(1, 4, 3, 6, 8)) and not latent["samples"].any()
    assert torch.equal(node.generate_noise(latent), first)


def test_frame_init_samples_under_the_native_node(loaded):
    model, clip, _ = loaded
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(conditioning(clip, "a panda"), conditioning(clip, ""))
    guider.set_cfg(1.0)
    latent = latent_of(1, 4, 4, 8, 8)
    made = frame_init(model, {"samples": noise_of(1, 4, 1, 8, 8)})
    sigmas = schedules.reference_sigmas(model.model.scheduler_config, 2)
    sampled = SamplerCustomAdvanced.execute(made, guider, reference.reference_sampler(), sigmas, latent).result[0]
    expected = guider.sample(made.generate_noise(latent), latent["samples"], reference.reference_sampler(), sigmas)
    assert torch.equal(sampled["samples"], expected)
    assert expected.std() > 0.01


@pytest.mark.parametrize(
    "shape", [(1, 4, 2, 6, 8), (1, 4, 3, 6, 6), (1, 4, 3, 8, 8), (1, 16, 3, 6, 8), (3, 4, 3, 6, 8), (4, 6, 8)]
)
def test_static_videos_of_another_size_are_refused(loaded, shape):
    made = frame_init(loaded[0], {"samples": torch.zeros(shape)})
    with pytest.raises(ValueError, match=r"static video is \(.*latent to sample is \(2, 4, 3, 6, 8\).*Encode") as error:
        made.generate_noise(latent_of(2, 4, 3, 6, 8))
    assert str(shape) in str(error.value)


def test_frame_init_refuses_what_it_cannot_do(loaded):
    video = {"samples": torch.zeros(1, 4, 3, 6, 8)}
    with pytest.raises(ValueError, match="FrameInit needs a clip latent"):
        frame_init(loaded[0], video).generate_noise(latent_of(1, 4, 6, 8))
    for level in (-1, 1000):
        with pytest.raises(ValueError, match=f"noise_level is {level}.*0 to 999"):
            frame_init(loaded[0], video, noise_level=level).generate_noise(latent_of(1, 4, 3, 6, 8))
    still = with_sampling(loaded[0], comfy.model_base.ModelType.IMG_TO_IMG_FLOW)
    with pytest.raises(ValueError, match="IMG_TO_IMG_FLOW.* adds no noise.*Leave this node out"):
        frame_init(still, video).generate_noise(latent_of(1, 4, 3, 6, 8))


def with_sampling(model, kind):
    model = model.clone()
    model.add_object_patch("model_sampling", comfy.model_base.model_sampling(model.model.model_config, kind))
    return model


@pytest.mark.parametrize("noise_level", [0, 300, 850, 999])
def test_frame_init_noises_for_flow_models_along_their_path(loaded, noise_level):
    """A flow model's state (1 - s) x + s n at unit variance, whatever its table's length."""
    flow = with_sampling(loaded[0], comfy.model_base.ModelType.FLOW)
    fine = with_sampling(loaded[0], comfy.model_base.ModelType.FLUX)
    video, latent = noise_of(1, 4, 5, 6, 8) * 4, latent_of(1, 4, 5, 6, 8)
    drawn = shared("mixed").generate_noise(latent)
    for model, last in ((flow, 1000), (fine, 10000)):
        level = (noise_level + 1) * last // 1000 - 1
        s = model.get_model_object("model_sampling").sigmas[level].double()
        noised = ((1 - s) * video * SCALE + s * drawn) / (s**2 + (1 - s) ** 2).sqrt()
        mask = FreeInitMixin()._get_free_init_freq_filter(drawn.shape, "cpu", "gaussian", 4, 0.25, 0.25)
        expected = FreeInitMixin()._apply_freq_filter(noised.float(), drawn, mask)
        made = frame_init(model, {"samples": video}, None, noise_level).generate_noise(latent)
        torch.testing.assert_close(made, expected, rtol=0, atol=2e-5)


def test_levels_of_short_tables_stay_inside(loaded):
    sampling = with_sampling(loaded[0], comfy.model_base.ModelType.EPS).get_model_object("model_sampling")
    sampling.set_sigmas(sampling.sigmas[19::20])
    levels = [noise.level_sigma(sampling, level) for level in (0, 19, 20, 999)]
    assert levels == pytest.approx([sampling.sigmas[index].item() for index in (0, 0, 1, 49)])
