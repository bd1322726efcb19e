"""Consistent self-attention beside nodes that divide or merge tokens, in parts of a schedule, and without waits."""

import dataclasses
import logging
import types

import comfy.model_management
import comfy.samplers
import pytest
import tiny_unets
import torch
from comfy_extras.nodes_hypertile import HyperTile
from comfy_extras.nodes_tomesd import TomePatchModel
from tiny_unets import SIGMAS, assert_same, different, guide, latents, one_thread, prompt  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode

from consistent_video.patches.attention_pass import KEY, Pass, Run
from consistent_video.patches.bank_origin import origin_of
from consistent_video.patches.character_bank import CharacterBank
from consistent_video.patches.consistent_attention import ConsistentAttention
from consistent_video.patches.schedule_place import Place, place_of
from consistent_video.patches.token_sharing import Layer, Sharing
from consistent_video.samplers.rehearsal import rehearse

pytestmark = pytest.mark.slow

PANELS, SIDE = 3, 16
SHARING = Sharing(start_step=0, plain_early=0.0, plain_late=0.0, seed=3, rate_32=0.5, rate_64=0.5)
NOTHING = dataclasses.replace(SHARING, rate_32=0.0, rate_64=0.0)
BRIEF = torch.tensor([14.6, 2.5, 0.0])


@pytest.fixture(scope="module")
def sd15():
    return tiny_unets.build("sd15")


def hypertile(model):
    return HyperTile.execute(model, 32, 1, 1, False)[0]


def tome(model):
    return TomePatchModel.execute(model, 0.5).result[0]


def draw(model, sigmas=BRIEF, panels=PANELS, latent=None, sampler="euler", noise=None, **kwargs):
    torch.manual_seed(0)  # ToMe and HyperTile draw from the global generator
    noise = latents(panels, SIDE, SIDE) if noise is None else noise
    guider = guide(model, prompt(panels, 1), prompt(1, 2))
    latent = torch.zeros_like(noise) if latent is None else latent
    sampler = comfy.samplers.sampler_object(sampler)
    return guider.sample(noise, latent, sampler, sigmas.clone(), seed=0, disable_pbar=True, **kwargs)


def sharing(model, settings=SHARING):
    return ConsistentAttention(settings).install(model)


# Tiles and merged tokens


@pytest.mark.parametrize("node", [hypertile, tome])
def test_without_shared_tokens_other_nodes_act_as_without_ours(sd15, node):
    alone = draw(node(sd15))
    assert different(alone, draw(sd15))
    assert_same(draw(sharing(node(sd15), NOTHING)), alone)
    assert_same(draw(node(sharing(sd15, NOTHING))), alone)
    shared = draw(sharing(node(sd15)))
    assert different(shared, alone) and torch.equal(draw(node(sharing(sd15))), shared)


@pytest.mark.parametrize("tiles", [1, 4])
def test_a_tile_sees_its_own_tokens_and_the_shared_ones_of_all_panels(tiles):
    """By masked attention over everything; queries are tiled by HyperTile, keys divided by ComfyUI's attention."""
    layer, grid, width = Layer("output", 3, 0), 4, 8
    options = {"cond_or_uncond": [1, 0], "sample_sigmas": SIGMAS, "sigmas": SIGMAS[1:2], "n_heads": 2}
    options |= {"original_shape": [6, 4, 8, 8], "activations_shape": [6, width, grid, grid], "attn_precision": None}
    tokens, generator = grid * grid, torch.Generator().manual_seed(1)
    queries, keys, values = (torch.randn(6, tokens, width, generator=generator) for _ in range(3))
    queries = queries.reshape(6 * tiles, -1, width)
    options[KEY] = current = Pass(SHARING, Run({}), options, 6)
    found = ConsistentAttention(SHARING).mix_panels(layer, None)(queries.clone(), keys, values, options)
    shown = torch.stack([torch.zeros(tokens).index_fill_(0, seen, 1) for seen in current.positions(16, options, "cpu")])
    for row in range(6 * tiles):
        panel, tile, group = row // tiles % 3, row % tiles, row // (3 * tiles)
        seen = shown.clone().bool()
        seen[panel, tile * tokens // tiles : (tile + 1) * tokens // tiles] = True
        part = slice(3 * group, 3 * group + 3)
        split = [one.reshape(1, -1, 2, width // 2).transpose(1, 2) for one in (queries[row], keys[part], values[part])]
        split[1:] = [one[:, :, seen.flatten()] for one in split[1:]]
        expected = torch.nn.functional.scaled_dot_product_attention(*split).transpose(1, 2).reshape(-1, width)
        torch.testing.assert_close(found[row], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("node", [hypertile, tome])
@pytest.mark.parametrize("panels", [1, 2])
def test_a_bank_is_written_and_read_beside_other_nodes(sd15, node, panels):
    """What is written are all parts of the picture, and it does not matter which node comes first."""
    banks = []
    for first in (True, False):
        tokens = {}
        patch = ConsistentAttention(SHARING, written=tokens)
        draw(patch.install(node(sd15)) if first else node(patch.install(sd15)))
        banks.append(CharacterBank(origin_of(sd15, SHARING, BRIEF, SIDE, SIDE), {"A": tokens}))
    assert banks[0].size == banks[1].size == 2 * 2 * PANELS * 4 * 3 * (8 * 128 + 32 * 64 + 128 * 32)
    read = ConsistentAttention(SHARING, None, banks[0], ("A",))
    before, after = draw(read.install(node(sd15)), panels=panels), draw(node(read.install(sd15)), panels=panels)
    assert_same(before, after)
    assert different(before, draw(node(sd15), panels=panels))


def test_a_node_that_divides_the_batch_is_refused(sd15):
    model = sharing(sd15)

    def one_by_one(apply, given):
        rows = range(len(given["input"]))
        conds = [{key: value[row : row + 1] for key, value in tensors(given["c"]).items()} for row in rows]
        options = {"transformer_options": given["c"]["transformer_options"]}
        parts = [
            apply(given["input"][row : row + 1], given["timestep"][row : row + 1], **conds[row], **options)
            for row in rows
        ]
        return torch.cat(parts)

    model.set_model_unet_function_wrapper(one_by_one)
    with pytest.raises(ValueError, match="finds 1 pictures where the model should see 3 for each of 2 prompts"):
        draw(model)


def tensors(conds):
    return {key: value for key, value in conds.items() if isinstance(value, torch.Tensor)}


def test_more_prompts_than_pictures_are_said(sd15, caplog):
    noise = latents(1, SIDE, SIDE)
    guide(sharing(sd15), prompt(PANELS, 1), prompt(1, 2)).sample(
        noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), BRIEF, seed=0, disable_pbar=True
    )
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [line for line in said if "prompts of 3 pictures, but the latent has 1" in line]


# Parts of a schedule


@pytest.mark.parametrize("scheduler", [*comfy.samplers.SCHEDULER_HANDLERS])
def test_a_whole_schedule_has_nothing_before_it(sd15, scheduler):
    sampling = sd15.get_model_object("model_sampling")
    for steps in (1, 2, 3, 4, 7, 20, 50):
        sigmas = comfy.samplers.calculate_sigmas(sampling, scheduler, steps)
        if len(sigmas) > 2 or scheduler != "ddim_uniform":  # its single step is the last timestep
            assert place_of(sampling, sigmas.tolist()) == Place(0, len(sigmas) - 1)


@pytest.mark.parametrize("scheduler", ["normal", "karras", "exponential", "simple", "ddim_uniform", "sgm_uniform"])
def test_parts_of_a_schedule_know_their_place(sd15, scheduler):
    sampling = sd15.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, scheduler, 50).tolist()
    steps = len(sigmas) - 1
    for first, end in ((0, 10), (5, steps), (10, 30), (25, steps), (40, 45)):
        before, whole = place_of(sampling, sigmas[first : end + 1])
        assert abs(before - first) <= 1 and abs(whole - steps) <= 2
        assert scheduler in ("simple", "ddim_uniform", "sgm_uniform") or (before, whole) == (first, steps)


def test_sigmas_that_rise_or_say_nothing_are_a_whole_run(sd15):
    sampling = sd15.get_model_object("model_sampling")
    assert place_of(sampling, [0.0, 1.0, 2.0]) == Place(0, 2)
    assert place_of(sampling, [14.6, 14.6, 0.0]) == Place(0, 2)
    assert place_of(sampling, [1.0]) == Place(0, 0)


@pytest.mark.parametrize("unit", ["steps", "fractions"])
def test_two_halves_of_a_run_are_the_whole(sd15, unit):
    """Panels see each other from step 3 of 6 on, which is the first step of the second half."""
    start, late = (3, 5) if unit == "steps" else (25, 42)
    settings = Sharing(start_step=start, plain_early=0.3, plain_late=0.0, late_step=late, seed=3, unit=unit)
    sampling = sd15.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", 6)
    noise = latents(PANELS, 8, 8)
    whole = draw(sharing(sd15, settings), sigmas, noise=noise)
    half = draw(sharing(sd15, settings), sigmas[:4], noise=noise)
    # Without panels that see each other the first half is the plain one, to the bit.
    assert torch.equal(half, draw(sd15, sigmas[:4], noise=noise))
    halves = draw(sharing(sd15, settings), sigmas[3:], noise=torch.zeros_like(noise), latent=half)
    torch.testing.assert_close(halves, whole, rtol=0, atol=1e-4 * whole.abs().max().item())
    assert different(halves, draw(sd15, sigmas, noise=noise))


# What a sampler will do


@pytest.mark.parametrize(
    "name, calls",
    [("euler", 5), ("ddim", 5), ("uni_pc", 5), ("heun", 9), ("dpm_2", 9), ("dpmpp_sde", 9), ("seeds_3", 13)],
)
def test_the_calls_of_a_sampler_are_known_before_the_run(sd15, name, calls):
    seen, model = [], sd15.clone()
    model.set_model_unet_function_wrapper(
        lambda apply, given: (
            seen.append(given["timestep"][0].item()) or apply(given["input"], given["timestep"], **given["c"])
        )
    )
    sigmas = torch.tensor([14.6, 8.0, 5.0, 2.5, 1.0, 0.0])
    state = torch.random.get_rng_state()
    found = rehearse(comfy.samplers.sampler_object(name), sigmas, sd15.get_model_object("model_sampling"))
    assert torch.equal(torch.random.get_rng_state(), state) and sigmas[-1] == 0
    draw(model, sigmas, panels=1, sampler=name, noise=latents(1, 8, 8))
    assert len(found.sigmas) == calls and not found.without_shortcut
    assert found.sigmas == pytest.approx(seen, rel=1e-5)


def test_samplers_that_go_by_what_they_see_cannot_be_rehearsed(sd15):
    sampling = sd15.get_model_object("model_sampling")
    adaptive = comfy.samplers.sampler_object("dpm_adaptive")
    assert rehearse(adaptive, torch.tensor([3.0, 2.0, 1.0]), sampling) is None
    assert rehearse(types.SimpleNamespace(sample=lambda *_: 1 / 0), BRIEF, sampling) is None
    assert rehearse(comfy.samplers.sampler_object("euler_cfg_pp"), BRIEF, sampling).without_shortcut


def test_a_bank_that_outgrows_the_memory_while_it_is_written_says_so(sd15, monkeypatch):
    tokens, free = {}, iter([10**9, 1000])
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_: next(free, 1000))
    model = ConsistentAttention(SHARING, written=tokens).install(sd15)
    monkeypatch.setattr(model, "get_free_memory", lambda *_: 10**12, raising=False)
    monkeypatch.setattr(comfy.model_management, "load_models_gpu", lambda *_, **__: None)
    with pytest.raises(ValueError, match="holds .* GB, and the next .* do not fit into .* Lower id_panels"):
        draw(model)


# Waits


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device, and sorts."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        self.counts[name] = self.counts.get(name, 0) + 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("writes", [False, True])
def test_a_step_does_not_wait_for_the_device(sd15, writes):
    """Positions are sorted once per grid and panel, not in every layer."""
    patch = ConsistentAttention(SHARING, written={} if writes else None)
    marks, waits = [], Waits()
    with waits:
        draw(
            patch.install(sd15),
            torch.tensor([14.6, 6.0, 2.5, 0.0]),
            callback=lambda *_: marks.append(dict(waits.counts)),
        )
    step = {name: count - marks[1].get(name, 0) for name, count in marks[2].items()}
    assert not any(step.get(name) for name in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal"))
    grids = 3
    assert step["argsort"] == grids * PANELS
