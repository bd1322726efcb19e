"""Consistent self-attention in real ComfyUI models with the blocks of Stable Diffusion XL and 1.5, at a small width."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import comfy.context_windows
import comfy.controlnet
import comfy.model_patcher
import comfy.samplers
import comfy.sd
import pytest
import tiny_unets
import torch
from comfy.ldm.modules.attention import attention_basic, optimized_attention
from comfy_extras.nodes_custom_sampler import Guider_DualCFG
from dense_attention import DenseAttention
from tiny_unets import assert_same, different, latents, one_thread, prompt  # noqa: F401

from consistent_video.patches.consistent_attention import ConsistentAttention, Pass, Run
from consistent_video.patches.shared_layers import shared_layers
from consistent_video.patches.token_sharing import Sharing

PANELS = 3
BRIEF = torch.tensor([6.0, 0.0])
SHARING = Sharing(start_step=1, plain_early=0.3, plain_late=0.1, late_step=2, seed=3, rate_32=0.4, rate_64=0.6)
AT_ONCE = Sharing(start_step=0, plain_early=0.3, seed=5, rate_32=0.4, rate_64=0.6)
# Output blocks whose tokens are 32 pixels or more.
COARSE = {"sdxl": range(0, 3), "sd15": range(0, 6)}
EVERYBODY = [[1, 2], [0, 2], [0, 1]]
POSITIVE, NEGATIVE = prompt(PANELS, 1), prompt(PANELS, 2)

both_families = pytest.mark.parametrize("family", ["sdxl", "sd15"])


@pytest.fixture(scope="module")
def models():
    return {family: tiny_unets.build(family) for family in tiny_unets.FAMILIES}


@pytest.fixture(scope="module")
def sdxl(models):
    return models["sdxl"]


@dataclass
class Evaluated:
    """One forward pass: what went in, and the predicted noise."""

    inputs: torch.Tensor
    timesteps: torch.Tensor
    conds: dict
    kinds: list[int]
    noise: torch.Tensor


def recording(model: comfy.model_patcher.ModelPatcher) -> tuple[comfy.model_patcher.ModelPatcher, list[Evaluated]]:
    """A clone of a model that records its forward passes."""
    found = []

    def wrapper(apply, given):
        output = apply(given["input"], given["timestep"], **given["c"])
        conds = {key: value for key, value in given["c"].items() if key != "transformer_options"}
        noise = (given["input"] - output) / given["timestep"].reshape(-1, 1, 1, 1)
        found.append(Evaluated(given["input"].clone(), given["timestep"], conds, given["cond_or_uncond"], noise))
        return output

    model = model.clone()
    model.set_model_unet_function_wrapper(wrapper)
    return model, found


def guide(model, positive=POSITIVE, negative=NEGATIVE, cfg=4.0) -> comfy.samplers.CFGGuider:
    return tiny_unets.guide(model, positive, negative, cfg)


def denoise(guider, noise=None, **kwargs) -> torch.Tensor:
    return tiny_unets.denoise(guider, latents(PANELS) if noise is None else noise, **kwargs)


def predicted(model, evaluated: Evaluated, sharing: Sharing, family: str, step: int, steps: int = 3, sees=EVERYBODY):
    """The noise that the dense reference predicts for a forward pass, one conditioning at a time."""
    reference = DenseAttention(sharing, COARSE[family], sees, step=step, steps=steps)
    network, rows, outputs = model.model, len(sees), []
    with reference.inside(network.diffusion_model):
        for start in range(0, len(evaluated.inputs), rows):
            part = slice(start, start + rows)
            conds = {key: value[part] for key, value in evaluated.conds.items()}
            x, sigma = evaluated.inputs[part], evaluated.timesteps[part]
            outputs.append((x - network.apply_model(x, sigma, **conds)) / sigma.reshape(-1, 1, 1, 1))
    return torch.cat(outputs)


def assert_as_reference(model, evaluations: list[Evaluated], family: str, steps: list[int], sharing=SHARING) -> None:
    """Every forward pass predicts what the reference predicts at its step.

    Not bit for bit: the reference masks one long row of keys, the patch gathers keys, so sums have another order.
    """
    assert len(evaluations) == len(steps)
    for evaluated, step in zip(evaluations, steps):
        expected = predicted(model, evaluated, sharing, family, step)
        torch.testing.assert_close(evaluated.noise, expected, rtol=0, atol=1e-5)


# Where


def test_36_layers_of_sdxl_are_patched(sdxl):
    expected = [("output", block, index) for block in range(3) for index in range(10)]
    expected += [("output", block, index) for block in range(3, 6) for index in range(2)]
    assert [tuple(layer) for layer in shared_layers(sdxl)] == expected
    patched = ConsistentAttention(SHARING).install(sdxl)
    assert list(patched.model_options["transformer_options"]["patches_replace"]["attn1"]) == expected
    assert "patches_replace" not in sdxl.model_options["transformer_options"]


def test_9_layers_of_sd15_are_patched(models):
    expected = [("output", block, 0) for block in range(3, 12)]
    assert [tuple(layer) for layer in shared_layers(models["sd15"])] == expected


def test_a_network_without_self_attention_is_refused():
    plain = {key: [0] * len(value) for key, value in tiny_unets.SD15.items() if key.startswith("transformer_depth_o")}
    model = tiny_unets.build("sd15", transformer_depth=[0] * 8, **plain, transformer_depth_middle=-1)
    with pytest.raises(
        ValueError, match="works with Stable Diffusion 1.x, 2.x and XL; BaseModel has no UNet with self"
    ):
        ConsistentAttention(SHARING).install(model)


class Noting(Sharing):
    """Keeps the rates that were asked for."""

    def positions(self, step, panel, tokens, rate):
        self.__dict__.setdefault("asked", set()).add((tokens, rate))
        return super().positions(step, panel, tokens, rate)


@pytest.mark.parametrize("height, width", [(16, 16), (20, 28), (26, 18), (17, 13), (9, 10), (12, 17), (8, 33)])
@both_families
def test_every_grid_has_its_rate(models, family, height, width):
    sharing = Noting(start_step=0, plain_early=0, plain_late=0, rate_32=0.25, rate_64=0.75)
    patched = ConsistentAttention(sharing).install(models[family])
    denoise(guide(patched, cfg=1.0), latents(PANELS, height, width), sigmas=torch.tensor([2.0, 0.0]))
    strides = {"sdxl": {4: 0.25, 2: 0.75}, "sd15": {4: 0.25, 2: 0.75, 1: 0.75}}[family]
    assert sharing.asked == {
        (math.ceil(height / stride) * math.ceil(width / stride), rate) for stride, rate in strides.items()
    }


@pytest.mark.parametrize("height, width", [(20, 28), (26, 18), (9, 13)])
@both_families
def test_odd_sizes_agree_with_the_reference(models, family, height, width):
    patched, found = recording(ConsistentAttention(SHARING).install(models[family]))
    denoise(guide(patched, cfg=1.0), latents(PANELS, height, width), sigmas=torch.tensor([6.0, 2.5, 0.0]))
    assert_as_reference(models[family], found[1:], family, [1])


def test_a_model_is_patched_once(sdxl):
    with pytest.raises(ValueError, match="has consistent self-attention already. Connect the model from before it"):
        ConsistentAttention(SHARING).install(ConsistentAttention(SHARING).install(sdxl))


def test_a_sampler_that_hides_its_sigmas_is_refused(sdxl):
    patched = ConsistentAttention(SHARING).install(sdxl)
    patched.set_model_sampler_calc_cond_batch_function(hide_sigmas)
    with pytest.raises(ValueError, match="needs to know the step, but the sampler does not say its sigmas"):
        denoise(guide(patched))


def hide_sigmas(arguments):
    options = arguments["model_options"]
    kept = {key: value for key, value in options["transformer_options"].items() if key != "sample_sigmas"}
    options = {**options, "transformer_options": kept}
    return comfy.samplers.calc_cond_batch(
        arguments["model"], arguments["conds"], arguments["input"], arguments["sigma"], options
    )


# How ComfyUI splits a batch


@both_families
def test_both_conditionings_together(models, family):
    patched, found = recording(ConsistentAttention(SHARING).install(models[family]))
    shared = denoise(guide(patched))
    assert [evaluated.kinds for evaluated in found] == [[1, 0]] * 3
    assert_as_reference(models[family], found, family, [0, 1, 2])
    assert different(shared, denoise(guide(models[family])))


@both_families
def test_both_conditionings_apart(models, family, monkeypatch):
    patched, found = recording(ConsistentAttention(SHARING).install(models[family]))
    together = denoise(guide(patched))
    found.clear()
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "get_free_memory", lambda self, device: 0)
    apart = denoise(guide(patched))
    assert [evaluated.kinds for evaluated in found] == [[1], [0]] * 3 or found[0].kinds == [0]
    assert {len(evaluated.kinds) for evaluated in found} == {1}
    assert_as_reference(models[family], found, family, [0, 0, 1, 1, 2, 2])
    # Not bit for bit: matrix products of more rows sum in another order.
    assert_same(apart, together)


def test_contexts_that_cannot_be_concatenated(sdxl):
    patched, found = recording(ConsistentAttention(SHARING).install(sdxl))
    denoise(guide(patched, negative=prompt(PANELS, 2, tokens=7)))
    assert {len(evaluated.kinds) for evaluated in found} == {1}
    assert_as_reference(sdxl, found, "sdxl", [0, 0, 1, 1, 2, 2])


@pytest.mark.parametrize("apart", [False, True], ids=["together", "apart"])
def test_a_guider_of_three(sdxl, monkeypatch, apart):
    patched, found = recording(ConsistentAttention(SHARING).install(sdxl))
    guider = Guider_DualCFG(patched)
    guider.set_conds(POSITIVE, prompt(PANELS, 5), NEGATIVE)
    guider.set_cfg(3.0, 2.0)
    if apart:
        monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "get_free_memory", lambda self, device: 0)
    denoise(guider)
    assert sorted(kind for evaluated in found for kind in evaluated.kinds) == [0] * 3 + [1] * 3 + [2] * 3
    assert_as_reference(sdxl, found, "sdxl", [0] * 3 + [1] * 3 + [2] * 3 if apart else [0, 1, 2])


@both_families
def test_two_positive_entries(models, family):
    patched, found = recording(ConsistentAttention(SHARING).install(models[family]))
    denoise(guide(patched, positive=[*POSITIVE, *prompt(PANELS, 5)]))
    assert [sorted(evaluated.kinds) for evaluated in found] == [[0, 0, 1]] * 3
    assert_as_reference(models[family], found, family, [0, 1, 2])


def test_cfg_1(sdxl):
    patched, found = recording(ConsistentAttention(SHARING).install(sdxl))
    denoise(guide(patched, cfg=1.0))
    assert [evaluated.kinds for evaluated in found] == [[0]] * 3
    assert_as_reference(sdxl, found, "sdxl", [0, 1, 2])


@pytest.mark.parametrize("sampler", ["heun", "dpm_2"])
@both_families
def test_samplers_that_evaluate_twice(models, family, sampler):
    """Heun's second evaluation is at the next sigma; dpm_2's at the geometric mean, which is nearer to the next."""
    patched, found = recording(ConsistentAttention(SHARING).install(models[family]))
    denoise(guide(patched), sampler=sampler)
    between = [math.sqrt(14.6 * 6.0), math.sqrt(6.0 * 2.5)]
    expected = [14.6, 6.0, 6.0, 2.5, 2.5] if sampler == "heun" else [14.6, between[0], 6.0, between[1], 2.5]
    assert [evaluated.timesteps[0].item() for evaluated in found] == pytest.approx(expected, rel=1e-5)
    assert_as_reference(models[family], found, family, [0, 1, 1, 2, 2])


@pytest.mark.parametrize("sigma, step", [(20.0, 0), (14.599, 0), (10.5, 0), (10.2, 1), (5.9, 1), (2.0, 2), (0.1, 2)])
def test_a_sigma_between_belongs_to_the_nearest_step(sigma, step):
    options = {"sample_sigmas": tiny_unets.SIGMAS, "sigmas": torch.tensor([sigma] * 2), "cond_or_uncond": [0]}
    assert Pass(SHARING, Run({}), options, PANELS).step == step


def test_two_threads_with_two_clones(sdxl):
    """Both runs are at the same evaluation at the same time, and give what each gives alone."""
    other = Sharing(start_step=0, plain_early=0.5, seed=9, rate_32=0.7, rate_64=0.3)
    barrier = threading.Barrier(2, timeout=60)

    def run(sharing, seed, wait):
        with torch.inference_mode():
            patched = ConsistentAttention(sharing).install(sdxl)

            def wrapper(apply, given):
                if wait:
                    barrier.wait()
                return apply(given["input"], given["timestep"], **given["c"])

            patched.set_model_unet_function_wrapper(wrapper)
            return denoise(guide(patched, positive=prompt(PANELS, seed)), latents(PANELS, seed=seed))

    alone = [run(SHARING, 1, False), run(other, 2, False)]
    with ThreadPoolExecutor(2) as threads:
        running = [threads.submit(run, SHARING, 1, True), threads.submit(run, other, 2, True)]
        for future, expected in zip(running, alone):
            assert_same(future.result(), expected)
    assert different(*alone)


# Limits


@pytest.mark.parametrize(
    "sharing",
    [
        Sharing(start_step=0, plain_early=1.0, plain_late=1.0),
        Sharing(start_step=3, plain_early=0.0, plain_late=0.0),
        Sharing(start_step=0, plain_early=0.0, plain_late=0.0, rate_32=0.0, rate_64=0.0),
        Sharing(start_step=0, plain_early=0.0, plain_late=0.0, rate_32=0.0, rate_64=0.0, count="random"),
    ],
    ids=["plain", "warm-up", "rate 0", "rate 0 random"],
)
@both_families
def test_nothing_shared_is_the_unpatched_model_bit_for_bit(models, family, sharing):
    assert torch.equal(
        denoise(guide(ConsistentAttention(sharing).install(models[family]))), denoise(guide(models[family]))
    )


@both_families
def test_one_panel_is_the_unpatched_model_bit_for_bit(models, family):
    sharing = Sharing(start_step=0, plain_early=0.0, plain_late=0.0)
    noise, patched = latents(1), ConsistentAttention(sharing).install(models[family])
    alone = denoise(guide(models[family], prompt(1, 1), prompt(1, 2)), noise)
    assert torch.equal(denoise(guide(patched, prompt(1, 1), prompt(1, 2)), noise), alone)


@pytest.mark.parametrize("plain", [0.0, 0.5])
@pytest.mark.parametrize("count", ["fixed", "random"])
def test_counts_and_gates(sdxl, count, plain):
    sharing = Sharing(start_step=0, plain_early=plain, plain_late=plain, count=count, seed=8)
    patched, found = recording(ConsistentAttention(sharing).install(sdxl))
    denoise(guide(patched, cfg=1.0))
    assert_as_reference(sdxl, found, "sdxl", [0, 1, 2], sharing)


@both_families
def test_rate_1_is_attention_over_all_tokens(models, family):
    sharing = Sharing(start_step=0, plain_early=0.0, plain_late=0.0, rate_32=1.0, rate_64=1.0)
    model = models[family]
    patched, found = recording(ConsistentAttention(sharing).install(model))
    denoise(guide(patched, cfg=1.0))

    def over_all(queries, keys, values, options):
        flat = [part.reshape(1, -1, part.shape[2]) for part in (queries, keys, values)]
        return optimized_attention(*flat, options["n_heads"]).reshape(queries.shape)

    whole = model.clone()
    for layer in shared_layers(model):
        whole.set_model_attn1_replace(over_all, *layer)
    whole, expected = recording(whole)
    denoise(guide(whole, cfg=1.0))
    torch.testing.assert_close(found[0].noise, expected[0].noise, rtol=0, atol=1e-5)


def brief(guider) -> torch.Tensor:
    """Latents of a run of one step, which shares."""
    return denoise(guider, sigmas=BRIEF)


# Others' patches


def test_attn1_patches_before_and_after(sdxl):
    """They see and change the panels' own tokens as without ours; both orders agree, as they only scale."""

    def values_scaled(tokens, context, values, options):
        return tokens, context, values * 1.5

    def tokens_scaled(tokens, context, values, options):
        return tokens * 0.5, context, values

    patched = sdxl.clone()
    patched.set_model_attn1_patch(values_scaled)
    patched = ConsistentAttention(AT_ONCE, written={}).install(patched)
    patched.set_model_attn1_patch(tokens_scaled)
    plain = sdxl.clone()
    plain.set_model_attn1_patch(values_scaled)
    plain.set_model_attn1_patch(tokens_scaled)
    shared = brief(guide(patched))
    with DenseAttention(AT_ONCE, COARSE["sdxl"], EVERYBODY).inside(sdxl.model.diffusion_model):
        assert_same(shared, brief(guide(plain)))
    assert different(shared, brief(guide(ConsistentAttention(AT_ONCE).install(sdxl))))


@pytest.mark.parametrize("key", [("output", 1, 4), ("output", 4)], ids=["layer", "block"])
def test_an_attn1_replacement_before_ours_computes_the_attention(sdxl, key):
    calls = []

    def softer(queries, keys, values, options):
        calls.append((options["block"], options["block_index"]))
        return optimized_attention(queries * 0.25, keys, values, options["n_heads"])

    replaced = sdxl.clone()
    replaced.set_model_attn1_replace(softer, *key)
    shared = brief(guide(ConsistentAttention(AT_ONCE).install(replaced)))
    layers = [layer for layer in shared_layers(sdxl) if layer[: len(key)] == key]
    assert {("output", layer.block, layer.index) for layer in layers} == {(*block, index) for block, index in calls}
    scales = dict.fromkeys(layers, 0.25)
    with DenseAttention(AT_ONCE, COARSE["sdxl"], EVERYBODY, scales=scales).inside(sdxl.model.diffusion_model):
        assert_same(shared, brief(guide(sdxl)))
    assert different(shared, brief(guide(ConsistentAttention(AT_ONCE).install(sdxl))))


def attn2_patched(model):
    def patch(tokens, context, values, options):
        return tokens, context * 0.5, values * 2.0

    model = model.clone()
    model.set_model_attn2_patch(patch)
    return model


def attn2_replaced(model):
    def replacement(queries, keys, values, options):
        return optimized_attention(queries * 0.25, keys, values, options["n_heads"]) * 1.5

    model = model.clone()
    model.set_model_attn2_replace(replacement, "output", 1, 3)
    model.set_model_attn2_replace(replacement, "input", 4)
    return model


def input_and_output_patched(model):
    model = model.clone()
    model.set_model_input_block_patch(lambda h, options: h * 1.1)
    model.set_model_output_block_patch(lambda h, skip, options: (h * 0.9, skip * 1.2))
    return model


def with_lora(model):
    generator = torch.Generator().manual_seed(4)
    lora = {}
    for name, module in model.model.diffusion_model.named_modules():
        if name.endswith(("attn1.to_k", "attn1.to_v", "attn1.to_q", "attn2.to_k")):
            key = "lora_unet_" + name.replace(".", "_")
            rows, columns = module.weight.shape
            lora[f"{key}.lora_up.weight"] = torch.randn(rows, 2, generator=generator)
            lora[f"{key}.lora_down.weight"] = torch.randn(2, columns, generator=generator) / columns
    return comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0]


@pytest.mark.parametrize("change", [attn2_patched, attn2_replaced, input_and_output_patched, with_lora])
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_other_changes_of_a_model_act_as_without_ours(sdxl, change, first):
    ours = ConsistentAttention(AT_ONCE)
    patched = ours.install(change(sdxl)) if first else change(ours.install(sdxl))
    shared = brief(guide(patched))
    with DenseAttention(AT_ONCE, COARSE["sdxl"], EVERYBODY).inside(sdxl.model.diffusion_model):
        assert_same(shared, brief(guide(change(sdxl))))
    assert different(shared, brief(guide(ours.install(sdxl))))


def test_an_attention_override_computes_ours_too(sdxl):
    """The user's attention backend gets the gathered keys as well."""
    lengths = set()

    def override(function, queries, keys, values, heads, *args, **kwargs):
        if queries.shape[0] == 1:
            lengths.add((queries.shape[1], keys.shape[1]))
        return attention_basic(queries * 0.5, keys, values, heads, *args, **kwargs)

    patched = ConsistentAttention(AT_ONCE).install(sdxl)
    patched.model_options["transformer_options"]["optimized_attention_override"] = override
    shared = brief(guide(patched))
    # 8x8 latents: 4 tokens of 32 pixels and 16 of 16, of which 40 % and 60 % of two others are seen.
    assert lengths == {(4, 4 + 2 * 2), (16, 16 + 2 * 10)}
    plain = sdxl.clone()
    plain.model_options["transformer_options"]["optimized_attention_override"] = override
    halved = dict.fromkeys(shared_layers(sdxl), 0.5)
    with DenseAttention(AT_ONCE, COARSE["sdxl"], EVERYBODY, scales=halved).inside(sdxl.model.diffusion_model):
        assert_same(shared, brief(guide(plain)))


class Residuals(comfy.controlnet.ControlBase):
    """A ControlNet that adds seeded residuals to the outputs and the middle."""

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        generator = torch.Generator().manual_seed(6)
        middle = torch.randn(1, 128, *(math.ceil(side / 4) for side in x_noisy.shape[2:]), generator=generator)
        return {"input": [], "middle": [middle.repeat(len(x_noisy), 1, 1, 1)], "output": []}

    def copy(self):
        return self


def test_a_control_net_acts_as_without_ours(sdxl):
    control = Residuals()
    controlled = [[text, {**extra, "control": control}] for text, extra in POSITIVE]
    patched = ConsistentAttention(AT_ONCE).install(sdxl)
    shared = brief(guide(patched, positive=controlled))
    with DenseAttention(AT_ONCE, COARSE["sdxl"], EVERYBODY).inside(sdxl.model.diffusion_model):
        assert_same(shared, brief(guide(sdxl, positive=controlled)))
    assert different(shared, brief(guide(patched)))


# Windows over the batch


def windows_of(length: int, overlap: int = 0, anchored: bool = False) -> comfy.context_windows.IndexListContextHandler:
    """What ComfyUI's node for context windows over the batch makes."""
    return comfy.context_windows.IndexListContextHandler(
        context_schedule=comfy.context_windows.get_matching_context_schedule("standard_static"),
        fuse_method=comfy.context_windows.get_matching_fuse_method("flat"),
        context_length=length,
        context_overlap=overlap,
        dim=0,
        causal_window_fix=anchored,
    )


@pytest.mark.parametrize("anchored", [False, True], ids=["plain", "causal_window_fix"])
def test_context_windows_keep_the_panel_numbers(sdxl, anchored):
    """Panels 2 and 3 of the second window draw what they draw in any other window."""
    sharing = Sharing(start_step=0, plain_early=0.0, plain_late=0.0)
    patched, found = recording(ConsistentAttention(sharing).install(sdxl))
    patched.model_options["context_handler"] = windows_of(3, 1, anchored)
    sigmas = torch.tensor([6.0, 0.0])
    denoise(guide(patched, prompt(5, 1), prompt(5, 2), cfg=1.0), latents(5), sigmas=sigmas)
    windows = [[0, 1, 2], [1, 2, 3, 4] if anchored else [2, 3, 4]]
    assert [len(evaluated.inputs) for evaluated in found] == [len(window) for window in windows]
    for evaluated, window in zip(found, windows):
        others = [[row for row in range(len(window)) if row != own] for own in range(len(window))]
        reference = DenseAttention(sharing, COARSE["sdxl"], others, window, step=0, steps=1)
        with reference.inside(sdxl.model.diffusion_model):
            denoised = sdxl.model.apply_model(evaluated.inputs, evaluated.timesteps, **evaluated.conds)
        expected = (evaluated.inputs - denoised) / evaluated.timesteps.reshape(-1, 1, 1, 1)
        torch.testing.assert_close(evaluated.noise, expected, rtol=0, atol=1e-5)
