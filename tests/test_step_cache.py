"""Step caching on a tiny ConsisID: what is computed, what is reused, and that no run leaves anything behind."""

import comfy.model_management
import comfy.samplers
import pytest
import tiny_consisid
import torch
import toy_video_model
from comfy.patcher_extension import WrappersMP

from consistent_video.loaders import assembly
from consistent_video.loaders.families import CONSISID
from consistent_video.models import consisid
from consistent_video.nodes.consisid import StepCache
from consistent_video.patches.step_cache import KEY, install_step_cache, moved
from consistent_video.samplers import reference, schedules
from native_sampling import sample

pytestmark = pytest.mark.slow

SHAPE = (16, 3, 8, 12)
STEPS = 20


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tiny_consisid.write_consisid(tmp_path_factory.mktemp("consisid") / "checkpoint")
    return assembly.load_folder_network(CONSISID, folder, "default")


@pytest.fixture
def calls(model, monkeypatch):
    """How many clips each call of the network gets."""
    network, counted = model.model.diffusion_model, []
    forward = network._forward

    def count(x, *args, **kwargs):
        counted.append(len(x))
        return forward(x, *args, **kwargs)

    monkeypatch.setattr(network, "_forward", count)
    return counted


def noise_of(clips=1, seed=0):
    return torch.randn(clips, *SHAPE, generator=torch.Generator().manual_seed(seed))


def prompt(text_seed: int, face_seed: int = 0) -> list:
    """A prompt as ConsisID Conditioning makes it."""
    generator = torch.Generator().manual_seed(text_seed)
    identity, vision = tiny_consisid.face(face_seed)
    extra = {
        consisid.PICTURE: noise_of(seed=face_seed + 10)[:, :, :1],
        consisid.KEY_POINTS: noise_of(seed=face_seed + 20)[:, :, :1],
        consisid.IDENTITY: identity,
        consisid.VISION: vision,
        consisid.STRENGTH: 1.0,
    }
    return [[torch.randn(1, tiny_consisid.TEXT_TOKENS, tiny_consisid.TEXT_WIDTH, generator=generator), extra]]


def run(model, noise=None, steps=STEPS, sampler="cogvideox_ddim", face_seed=0, sigmas=None):
    sigmas = schedules.reference_sigmas(model.model.scheduler_config, steps) if sigmas is None else sigmas
    noise = noise_of() if noise is None else noise
    both = (prompt(3, face_seed), prompt(4, face_seed))
    return sample(model, *both, noise, reference.reference_sampler(sampler), sigmas, cfg=6.0)


def distance(clip, other) -> float:
    return ((clip - other).abs().mean() / other.abs().mean()).item()


def test_threshold_zero_is_the_model_as_it_was(model, calls):
    off = install_step_cache(model, 0.0)
    assert off is not model and KEY not in off.wrappers.get(WrappersMP.APPLY_MODEL, {})
    assert torch.equal(run(off), run(model))
    assert len(calls) == 2 * STEPS


def test_a_threshold_that_no_change_stays_below_computes_every_step(model, calls):
    assert torch.equal(run(install_step_cache(model, 1e-9, 0.0, 1.0)), run(model))
    assert len(calls) == 2 * STEPS


# The DPM sampler extrapolates from the last two predictions.
@pytest.mark.parametrize(("sampler", "near"), [("cogvideox_ddim", 0.05), ("cogvideox_dpm", 0.15)])
def test_fewer_calls_and_a_clip_that_stays_near(model, calls, sampler, near):
    full = run(model, sampler=sampler)
    counts, distances = [], []
    for threshold in (0.1, 0.3, 1.0):
        calls.clear()
        clip = run(install_step_cache(model, threshold), sampler=sampler)
        counts.append(len(calls))
        distances.append(distance(clip, full))
    assert counts == [11, 6, 4]
    assert 0 < distances[0] < distances[2] and distances[0] < near


def test_first_and_last_steps_and_those_outside_the_percents_are_computed(model, monkeypatch):
    network, seen = model.model.diffusion_model, []
    forward = network._forward
    monkeypatch.setattr(network, "_forward", lambda x, t, *a, **k: (seen.append(int(t[0])), forward(x, t, *a, **k))[1])
    run(install_step_cache(model, 1.0, 0.0, 1.0), sampler="cogvideox_ddim", steps=10)
    assert (seen[0], seen[-1]) == (999, 99) and len(seen) < 10
    seen.clear()
    run(install_step_cache(model, 1.0, 0.35, 0.75), steps=10)
    assert seen[:4] == [999, 899, 799, 699] and seen[-2:] == [199, 99] and len(seen) < 10


def test_with_ddim_the_reused_steps_are_one_large_step(model, monkeypatch):
    network, seen = model.model.diffusion_model, []
    forward = network._forward
    monkeypatch.setattr(network, "_forward", lambda x, t, *a, **k: (seen.append(int(t[0])), forward(x, t, *a, **k))[1])
    cached = run(install_step_cache(model, 0.3))
    kept = [STEPS - 1 - step // (1000 // STEPS) for step in seen]
    assert 2 < len(kept) < STEPS
    sigmas = schedules.reference_sigmas(model.model.scheduler_config, STEPS)
    direct = run(model, sigmas=torch.cat((sigmas[kept], sigmas[-1:])))
    assert distance(cached, direct) < 1e-4


@pytest.mark.parametrize("name", ["euler", "euler_ancestral", "heun", "dpmpp_2m", "uni_pc"])
def test_native_samplers_work(model, calls, name):
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "sgm_uniform", STEPS)
    results = []
    for runner in (model, install_step_cache(model, 0.3)):
        calls.clear()
        clip = sample(runner, prompt(3), prompt(4), noise_of(), comfy.samplers.sampler_object(name), sigmas, cfg=6.0)
        assert clip.isfinite().all()
        results.append(len(calls))
    assert results[1] < results[0] / 2


def test_the_node_installs_it(model):
    cached = StepCache.execute(model, 0.3, 0.1, 0.95).result[0]
    assert torch.equal(run(cached), run(install_step_cache(model, 0.3)))


def test_nothing_is_left_for_another_run(model):
    cached = install_step_cache(model, 0.3)
    first = run(cached)
    assert torch.equal(run(cached), first)
    other = run(cached, noise_of(seed=5), steps=7, face_seed=1)
    assert torch.equal(run(cached), first)
    assert torch.equal(run(install_step_cache(model, 0.3), noise_of(seed=5), steps=7, face_seed=1), other)
    assert KEY not in cached.model_options["transformer_options"]


def test_an_interrupted_run_leaves_nothing(model, monkeypatch):
    cached = install_step_cache(model, 0.3)
    first, network = run(cached), model.model.diffusion_model
    forward, countdown = network._forward, iter(range(3))

    def interrupt(*args, **kwargs):
        if next(countdown, None) is None:
            raise comfy.model_management.InterruptProcessingException
        return forward(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(network, "_forward", interrupt)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            run(cached, noise_of(seed=5))
    assert torch.equal(run(cached), first)


@pytest.mark.parametrize("clips", [1, 2])
def test_prompts_together_and_apart_give_the_same(model, calls, monkeypatch, clips):
    cached, noise = install_step_cache(model, 0.3), noise_of(clips)
    together = run(cached, noise)
    assert set(calls) == {2 * clips} and len(calls) < STEPS
    count = len(calls)
    calls.clear()
    monkeypatch.setattr(model.model, "memory_required", lambda *args, **kwargs: 1e18)
    apart = run(cached, noise)
    assert set(calls) == {clips} and len(calls) == 2 * count
    assert (together - apart).abs().max() < 1e-4


def test_clips_of_a_batch_are_each_clip_alone(model):
    cached, noise = install_step_cache(model, 0.3), noise_of(2)
    alone = torch.cat([run(cached, noise[index : index + 1]) for index in range(2)])
    assert (run(cached, noise) - alone).abs().max() < 1e-4


def test_the_move_is_the_distance_of_a_clip_of_unit_variance():
    clip, noise = torch.randn(2, 1_000_000, generator=torch.Generator().manual_seed(0))
    for sigma, previous in ((0.9, 1.0), (0.05, 0.1), (20.0, 50.0)):
        now, before = ((clip + level * noise) / (1 + level**2) ** 0.5 for level in (sigma, previous))
        assert moved(sigma, previous) == pytest.approx(distance(now, before), rel=0.01)
    assert moved(1.0, 0.9) == moved(0.9, 1.0)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((-0.1, 0.1, 0.9), "threshold is -0.1. Choose a value from 0 to 1"),
        ((1.5, 0.1, 0.9), "threshold is 1.5"),
        ((float("nan"), 0.1, 0.9), "threshold is nan"),
        ((0.1, -1, 0.9), "start_percent is -1"),
        ((0.1, 0.1, 2), "end_percent is 2"),
        ((0.1, 0.9, 0.5), "start_percent 0.9 is not below end_percent 0.5"),
        ((0.0, 0.5, 0.5), "start_percent 0.5 is not below end_percent 0.5"),
    ],
)
def test_values_out_of_range_are_named(model, values, words):
    with pytest.raises(ValueError, match=words):
        install_step_cache(model, *values)


def test_other_models_and_second_caches_are_refused(model):
    with pytest.raises(ValueError, match="made for ConsisID, and this is a "):
        install_step_cache(toy_video_model.build(toy_video_model.CONSISID))
    with pytest.raises(ValueError, match="a Step Cache already"):
        install_step_cache(install_step_cache(model))
