"""The noise level of a step is known on the host, for every sampler of which that can be known."""

import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from toy_video_model import CONSISID, build, noise, prompts

from consistent_video.patches import run_levels
from consistent_video.samplers import free_init, reference, schedules
from consistent_video.samplers.filters import LowPass
from consistent_video.samplers.step_noise import seeded
from native_sampling import sample

STEPS = 8
# Samplers that evaluate the model between the sigmas, or more often than once per step.
THEIR_OWN = ("heun", "dpm_2", "dpmpp_2s_ancestral", "dpmpp_sde", "dpm_adaptive", "uni_pc", "sa_solver_pece")


class Asked:
    """What the patch knows at every call of the network, and what the device knows."""

    def __init__(self, model):
        self.known, self.told, self.actual = [], [], []
        self.model = model.clone()
        run_levels.follow_levels(self.model)
        self.model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "asked", self)

    def __call__(self, executor, x, t, c_concat, c_crossattn, control, transformer_options, **kwargs):
        levels = transformer_options.get(run_levels.KEY)
        self.known.append(levels is not None and levels.known)
        sampling = self.model.model.model_sampling
        timestep = run_levels.timestep_at(transformer_options, sampling, t)
        self.told.append((run_levels.sigma_at(transformer_options, t), timestep))
        self.actual.append((t.max().item(), int(sampling.timestep(t[:1]).item())))
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)


def run(model, sampler, sigmas=None):
    asked = Asked(model)
    sigmas = schedules.reference_sigmas(CONSISID, STEPS) if sigmas is None else sigmas
    sample(asked.model, *prompts(), noise(), sampler, sigmas, cfg=6.0)
    assert asked.told == asked.actual
    assert run_levels.KEY not in asked.model.model_options["transformer_options"]
    return asked


def native(name, **options):
    return comfy.samplers.ksampler(name, options)


@pytest.mark.parametrize("name", sorted(name.removeprefix("sample_") for name in run_levels.ONCE_PER_STEP))
def test_native_samplers_that_evaluate_once_per_step(name):
    asked = run(build(CONSISID), native(name))
    assert all(asked.known) and len(asked.known) == STEPS


def test_noise_for_each_row_changes_nothing():
    asked = run(build(CONSISID), seeded(native("euler_ancestral"), [1, 2]))
    assert all(asked.known) and len(asked.known) == STEPS


@pytest.mark.parametrize("name", THEIR_OWN)
def test_other_samplers_are_asked(name):
    assert not any(run(build(CONSISID), comfy.samplers.sampler_object(name)).known)


def test_churn_leaves_the_schedule():
    assert not any(run(build(CONSISID), native("euler", s_churn=2.0)).known)
    assert all(run(build(CONSISID), native("euler", s_churn=0.0)).known)


@pytest.mark.parametrize("inner", [reference.reference_sampler(), native("euler")])
@pytest.mark.parametrize("fast", [True, False])
def test_every_run_of_freeinit(inner, fast):
    sampler = free_init.FreeInit(inner, 3, fast, LowPass())
    asked = run(build(CONSISID), sampler, torch.linspace(20, 0, STEPS + 1))
    assert all(asked.known) and len(asked.known) == (2 + 5 + 8 if fast else 3 * STEPS)


def test_freeinit_around_a_sampler_that_has_to_be_asked():
    assert not any(run(build(CONSISID), free_init.FreeInit(native("heun"), 2, True, LowPass())).known)


def test_a_node_that_evaluates_twice_does_not_shift_the_count():
    def twice(executor, *args, **kwargs):
        executor(*args, **kwargs)
        return executor(*args, **kwargs)

    model = build(CONSISID)
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "twice", twice)
    asked = run(model, native("euler"))
    assert all(asked.known) and len(asked.known) == 2 * STEPS


def test_what_is_set_on_the_guider_during_a_run_is_the_guiders():
    seen = []

    def change(executor, guider, *args, **kwargs):
        guider.cfg = 2.0
        return executor(guider, *args, **kwargs)

    def look(executor, *args, **kwargs):
        seen.append(executor.class_obj.cfg)
        return executor(*args, **kwargs)

    model = build(CONSISID)
    run_levels.follow_levels(model)
    model.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, "change", change)
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "look", look)
    run(model, native("euler"))
    assert seen == [2.0] * STEPS


def test_two_patches_follow_one_count():
    model = build(CONSISID)
    run_levels.follow_levels(model)
    asked = run(model, native("euler"))
    assert all(asked.known)
    assert len(asked.model.wrappers[WrappersMP.SAMPLER_SAMPLE][run_levels.KEY]) == 1
