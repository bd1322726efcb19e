"""What a run looks at when it starts: patches, controls, areas, masks, windows, sampling spaces, pictures of clips."""

import logging

import comfy.model_sampling
import comfy.samplers
import native_nodes
import pytest
import torch

from consistent_video.loaders.families import CONSISTI2V, I2VGENXL, MODELSCOPE
from consistent_video.models.base import TEMPORAL_IN_COMFYUI
from consistent_video.models.frame_control import FrameControl
from consistent_video.samplers import clip_numbers, picture_guidance, regions, schedules, self_attention_guidance
from native_sampling import sample

pytestmark = pytest.mark.slow

UNETS = (MODELSCOPE.title, I2VGENXL.title, CONSISTI2V.title)
START = torch.tensor([5.0, 0.0])


@pytest.fixture(scope="module")
def families(models_folder):
    return {loaded.title: loaded for loaded in native_nodes.load(models_folder)}


def noise_of(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def x0(loaded, model=None, positive=None, noise=None, cfg=1.0):
    """Return what the model makes of a noisy clip in one step."""
    noise = noise_of(*loaded.latent["samples"].shape) if noise is None else noise
    model, positive = model or loaded.model, positive or loaded.positive
    return sample(model, positive, loaded.negative, noise, comfy.samplers.sampler_object("euler"), START, cfg)


def gap(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("title", UNETS)
def test_patches_are_told_what_comfyui_tells_them(families, title):
    loaded, told = families[title], []

    def note(q, k, v, extra):
        told.append((*extra["block"], extra["block_index"], extra["transformer_index"], tuple(q.shape), k.shape[1]))
        assert extra["n_heads"] * extra["dim_head"] == q.shape[2] and extra["cond_or_uncond"] == [0]
        assert extra["original_shape"] == [3, 4, 12, 12]
        return q, k, v

    model = loaded.model.clone()
    model.set_model_attn1_patch(note)
    model.set_model_attn2_patch(lambda q, k, v, extra: (q, k, v.clone()))
    for install in (model.set_model_attn1_output_patch, model.set_model_attn2_output_patch):
        install(lambda tokens, extra: tokens)
    assert gap(x0(loaded, model), x0(loaded)) < 1e-5
    assert [entry[:2] for entry in told] == [
        ("input", 1), ("input", 3), ("input", 5), ("middle", 0),
        *(("output", number) for number in range(2, 8)),
    ]  # fmt: skip
    assert [entry[3] for entry in told] == list(range(10)) and not any(entry[2] for entry in told)
    frames, tokens, channels = told[0][4]
    assert (frames, tokens, channels) == (3, 144, 64)
    assert told[0][5] == (288 if title == CONSISTI2V.title else 144)


@pytest.mark.parametrize("title", UNETS)
def test_replacements_get_what_the_attention_has(families, title):
    loaded = families[title]
    model = loaded.model.clone()

    def attention(q, k, v, extra):
        heads = [part.unflatten(-1, (extra["n_heads"], -1)).transpose(1, 2) for part in (q, k, v)]
        return torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)

    model.set_model_attn1_replace(attention, "input", 3)
    model.set_model_attn2_replace(attention, "output", 2, 0)
    assert gap(x0(loaded, model), x0(loaded)) < 1e-5
    model.set_model_attn2_replace(lambda q, k, v, extra: torch.zeros_like(q), "output", 2, 0)
    assert gap(x0(loaded, model), x0(loaded)) > 1e-4


@pytest.mark.parametrize("title", UNETS)
def test_embedding_and_block_patches_act(families, title):
    loaded, channels = families[title], []
    model = loaded.model.clone()
    model.set_model_emb_patch(lambda emb, width, options: channels.append(width) or emb)
    model.set_model_middle_block_after_patch(lambda args: channels.append(tuple(args["h"].shape)) or {"h": args["h"]})
    assert torch.equal(x0(loaded, model), x0(loaded)) or gap(x0(loaded, model), x0(loaded)) < 1e-5
    assert channels[:2] == [64, (3, 128, 2, 2)]
    seen = []
    model.set_model_input_block_patch_after_skip(lambda h, options: seen.append(options["block"]) or h * 0.5)
    assert gap(x0(loaded, model), x0(loaded)) > 1e-3
    assert seen == [("input", number) for number in range(8)]


def test_a_control_net_sees_each_frame_as_a_picture(families):
    loaded = families[MODELSCOPE.title]
    pictures, clip = torch.rand(3, 3, 96, 96, generator=torch.Generator().manual_seed(2)), noise_of(2, 4, 3, 12, 12)
    sigmas, text = torch.full((2,), 3.0), noise_of(2, 7, 64)
    options = {"cond_or_uncond": [0]}

    def features(hint, x, t, context):
        control = native_nodes.tiny_control().copy().set_cond_hint(hint, 0.7)
        frames = FrameControl(control)
        frames.pre_run(loaded.model.model, lambda percent: 1000.0 * (1 - percent))
        return frames.get_control(x, t, {"c_crossattn": context}, 1, options)

    whole = features(pictures, clip, sigmas, text)
    assert [tuple(part.shape) for part in whole["middle"]] == [(6, 128, 2, 2)]
    for row in range(2):
        for frame in range(3):
            part = clip[row : row + 1, :, frame : frame + 1]
            alone = features(pictures[frame : frame + 1], part, sigmas[:1], text[row : row + 1])
            for name in ("middle", "output"):
                for one, many in zip(alone[name], whole[name]):
                    torch.testing.assert_close(one[0], many[3 * row + frame], rtol=0, atol=1e-4)


@pytest.mark.parametrize("title", [I2VGENXL.title, CONSISTI2V.title])
def test_a_sampler_that_changes_the_size_is_named(families, title):
    loaded = families[title]
    twice = comfy.samplers.KSAMPLER(
        lambda model, x, sigmas, extra_args, **_: model(torch.cat((x, x), 4), sigmas[:1], **extra_args)
    )
    with pytest.raises(ValueError, match=r"changed the clip to latents of \(12, 24\).* prepared for \(12, 12\)"):
        sample(loaded.model, loaded.positive, loaded.negative, noise_of(1, 4, 3, 12, 12), twice, START, 1.0)


@pytest.mark.parametrize("title", UNETS)
def test_a_control_net_acts_and_one_that_does_not_fit_is_refused(families, title):
    loaded = families[title]
    picture = torch.rand(1, 96, 96, 3, generator=torch.Generator().manual_seed(3))

    def controlled(control):
        hint = control.copy().set_cond_hint(picture.movedim(-1, 1), 1.0)
        return [[text, {**extra, "control": hint, "control_apply_to_uncond": True}] for text, extra in loaded.positive]

    assert gap(x0(loaded, positive=controlled(native_nodes.tiny_control())), x0(loaded)) > 1e-3
    with pytest.raises(ValueError, match="reads texts of 96 values per token, but those of"):
        x0(loaded, positive=controlled(native_nodes.tiny_control(context=96)))
    with pytest.raises(ValueError, match="has 8 blocks of 128, 256 channels, but .* has 8 blocks of 64, 128"):
        x0(loaded, positive=controlled(native_nodes.tiny_control(width=128)))


def test_areas_and_masks_of_pictures_become_those_of_clips():
    clip = (5, 8, 12)
    assert regions.fit_area((4, 6, 2, 3), clip) == (5, 4, 6, 0, 2, 3)
    assert regions.fit_area((3, 5, 1, 3), clip, patch=2) == (5, 4, 6, 0, 0, 2)
    assert regions.fit_area(("percentage", 0.5, 0.25, 0.5, 0.75), clip) == (5, 4, 3, 0, 4, 9)
    assert regions.fit_area(("percentage", 0.4, 1.0, 0.5, 0.6, 0.0, 0.5), clip) == (2, 8, 6, 3, 0, 6)
    with pytest.raises(ValueError, match="column 12 of the latent, but the clip has 12"):
        regions.fit_area((4, 6, 0, 12), clip)
    shape, pixels = (2, 4, *clip), torch.zeros(5, 64, 96)
    pixels[1] = 1
    assert regions.fit_mask(pixels[:1], shape).shape == (1, 1, 8, 12)
    assert regions.fit_mask(pixels, shape)[0].mean(dim=(1, 2)).tolist() == [0, 1, 0, 0, 0]
    assert regions.fit_mask(pixels[:2], shape)[:, 0].mean(dim=(1, 2)).tolist() == [0, 1]
    later = torch.zeros(17, 64, 96)
    later[3] = 1
    assert regions.fit_mask(later, shape)[0].mean(dim=(1, 2)).tolist() == [0, 0.25, 0, 0, 0]
    with pytest.raises(ValueError, match="3 masks, but there are 2 clips of 5 latent frames"):
        regions.fit_mask(pixels[:3], shape)
    spot = torch.zeros(1, 64, 96)
    spot[:, 56:, 88:] = 1
    cond = {"mask": spot, "set_area_to_bounds": True}
    regions.place(cond, shape)
    assert cond["area"] == (5, 8, 8, 0, 0, 4) and cond["mask"].shape == (1, 5, 8, 12)


def test_a_prompt_for_later_frames_begins_with_the_first_frame(families):
    """What ConsistI2V makes of frames 2 and 3 equals a clip of the first frame and these two."""
    loaded = families[CONSISTI2V.title]
    noise, area = noise_of(*loaded.latent["samples"].shape), (2, 12, 12, 1, 0, 0)
    later = [[text, {**extra, "area": area}] for text, extra in loaded.other]
    found = x0(loaded, positive=loaded.positive + later, noise=noise)
    plain, alone = x0(loaded, noise=noise), x0(loaded, positive=loaded.other, noise=noise)
    assert torch.equal(found[:, :, 0], plain[:, :, 0])
    assert gap(found[:, :, 2], (plain[:, :, 2] + alone[:, :, 2]) / 2) < 1e-4


def test_control_nets_and_windows_of_later_frames_go_together(families):
    """ConsistI2V's windows have the first frame in front, of which a ControlNet knows nothing."""
    loaded, frames = families[CONSISTI2V.title], 3
    window = next(node for node in native_nodes.PATCHES if node.label == "ContextWindowsManual (frames)")
    pictures = torch.rand(frames, 3, 96, 96, generator=torch.Generator().manual_seed(4))
    hint = native_nodes.tiny_control().copy().set_cond_hint(pictures, 1.0)
    prompt = [[text, {**extra, "control": hint}] for text, extra in loaded.positive]
    windowed = window.call(model=loaded.model)[0]
    found, plain = x0(loaded, windowed, prompt), x0(loaded, windowed)
    moved = (found - plain).abs().amax(dim=(0, 1, 3, 4)) / plain.abs().max()
    assert moved[0] == 0 and (moved[1:] > 1e-3).all()


@pytest.mark.parametrize("name", ["uni_pc", "dpm_fast", "euler"])
def test_every_sampler_ends_with_the_first_frame(families, name):
    loaded, sigmas = families[CONSISTI2V.title], torch.tensor([5.0, 2.0, 0.5, 0.0])
    sampler, noise = comfy.samplers.sampler_object(name), noise_of(1, 4, 3, 12, 12)
    clip = sample(loaded.model, loaded.positive, loaded.negative, noise, sampler, sigmas, 3.0)
    assert torch.equal(clip[:, :, :1], loaded.positive[0][1]["consisti2v_first_frame"])


def test_clips_are_known_by_their_noise():
    whole = noise_of(4, 4, 3, 6, 8, seed=9)
    latent = {"samples": torch.zeros(4, 4, 3, 6, 8)}
    drawn = comfy.sample.prepare_noise(latent["samples"], 7)
    assert clip_numbers.clip_numbers(drawn[2:], 7, 16) == [2, 3]
    assert clip_numbers.clip_numbers(drawn[[1]], 7, 16) == [1]
    assert clip_numbers.clip_numbers(drawn[[1]], 8, 16) == [0]
    assert clip_numbers.clip_numbers(drawn[[0, 0]], 7, 16) == [0, 1]
    assert clip_numbers.clip_numbers(clip_numbers.sign(whole[:2], {"batch_index": [5, 3]}), 7, 16) == [5, 3]
    assert clip_numbers.rows_of_clips(torch.arange(3), [5, 3, 1]).tolist() == [2, 0, 1]


def guided(name, function, clips, scale=4.0, **more):
    options = {name: function if name == picture_guidance.CFG else [function]}
    picture_guidance.adapt(options)
    found = options[name] if name == picture_guidance.CFG else options[name][0]
    x, cond, uncond = clips
    sigma = torch.full((x.shape[0],), 3.0)
    common = {"input": x, "sigma": sigma, "timestep": sigma, "cond_scale": scale, "model_options": {}, **more}
    return found({"cond": cond, "uncond": uncond, "cond_denoised": x - cond, "uncond_denoised": x - uncond, **common})


def test_guidance_functions_for_pictures_get_clips_in_their_shape(families):
    clips = [noise_of(2, 4, 3, 6, 8, seed=seed) for seed in range(3)]
    x, cond, uncond = clips

    def patched(node):
        return node.call(model=families[MODELSCOPE.title].model)[0].model_options[picture_guidance.CFG]

    named = {node.name: node for node in native_nodes.GUIDANCE}
    linear = guided(picture_guidance.CFG, patched(named["VideoLinearCFGGuidance"]), clips)
    scale = torch.tensor([1.0, 2.5, 4.0]).view(1, 1, 3, 1, 1)
    torch.testing.assert_close(linear, uncond + scale * (cond - uncond))
    rescale, renorm = patched(named["RescaleCFG"]), patched(named["RenormCFG"])
    single = [part[1:] for part in clips]
    for function in (rescale, renorm):
        both = guided(picture_guidance.CFG, function, clips)
        torch.testing.assert_close(both[1:], guided(picture_guidance.CFG, function, single))
    # a multiplier of 1 brings the deviation of the guided v of a clip to that of its prompt
    full = named["RescaleCFG"].__class__("RescaleCFG", "nodes_model_advanced", dict(multiplier=1.0))
    found = x - guided(picture_guidance.CFG, patched(full), clips)
    sigma = 3.0
    v = (x / (sigma**2 + 1) - found) * (sigma**2 + 1) ** 0.5 / sigma
    v_cond = (x / (sigma**2 + 1) - (x - cond)) * (sigma**2 + 1) ** 0.5 / sigma
    torch.testing.assert_close(v.flatten(1).std(dim=1), v_cond.flatten(1).std(dim=1), rtol=1e-4, atol=1e-5)


def test_received_attention_is_a_mean_of_scores(monkeypatch):
    queries, keys = noise_of(3, 10, 8), noise_of(3, 20, 8, seed=1)
    heads = [part.unflatten(-1, (2, -1)).transpose(1, 2) for part in (queries, keys)]
    scores = (heads[0] @ heads[1].transpose(2, 3) / 2).softmax(dim=-1)
    expected = scores.sum(dim=2).mean(dim=1)[:, ::2] * 2
    for limit in (2**25, 200):
        monkeypatch.setattr(self_attention_guidance, "SCORES", limit)
        torch.testing.assert_close(self_attention_guidance.received_attention(queries, keys, 2), expected)
    picture = noise_of(1, 2, 16, 16)
    assert torch.equal(self_attention_guidance.blurred(picture, 0), picture)
    assert self_attention_guidance.blurred(picture, 2.0).std() < 0.3 * picture.std()


def test_what_nothing_reads_is_said_once_in_a_run(families, caplog):
    loaded = families[I2VGENXL.title]
    model = loaded.model.clone()
    model.set_model_attn1_replace(lambda q, k, v, extra: v, "input", 30)
    prompt = [[text, {**extra, "guidance": 3.5}] for text, extra in loaded.positive]
    with caplog.at_level(logging.WARNING):
        x0(loaded, model, prompt + prompt, cfg=3.0)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2 and "input 30, which this I2VGen-XL does not have" in lines[0]
    assert "'guidance' (written by FluxGuidance), which I2VGen-XL does not read" in lines[1]
    gligen = [[text, {**extra, "gligen": ("position", None, [])}] for text, extra in loaded.positive]
    with pytest.raises(ValueError, match="GLIGEN places objects in pictures"):
        x0(loaded, positive=gligen)


def test_patches_that_come_during_the_run_are_refused_too(families):
    """Skip Layer Guidance puts its patch into the options of a further evaluation."""
    loaded = families[MODELSCOPE.title]
    node = next(node for node in native_nodes.PATCHES if node.name == "SkipLayerGuidanceDiT")
    with pytest.raises(ValueError, match="SkipLayerGuidanceDiT patches 'dit', which ModelScope"):
        x0(loaded, node.call(model=loaded.model)[0], cfg=4.0)


def test_native_sampling_spaces_have_the_checkpoints_noise_levels(families):
    for loaded in families.values():
        config = loaded.model.model.model_config
        table = comfy.model_sampling.ModelSamplingDiscrete(config).sigmas
        own = loaded.model.get_model_object("model_sampling").sigmas
        assert ((table - own).abs() / own)[:-3].max() < 0.01
    scheduler = families[MODELSCOPE.title].model.model.scheduler_config
    steeper = schedules.reference_sigmas(scheduler, 10, table=2 * schedules.table_sigmas(scheduler))
    assert torch.equal(steeper, 2 * schedules.reference_sigmas(scheduler, 10))


def test_layers_over_time_are_known_as_such(families):
    for title in UNETS:
        state = families[title].model.model_state_dict()
        layers = [key for key in state if key.endswith("attn1.to_out.0.weight")]
        over_time = [key for key in layers if TEMPORAL_IN_COMFYUI in key]
        assert over_time == [
            key for key in layers if ".temp" in key or ".transformer_in." in key or "_temporal_" in key
        ]
        assert 0 < len(over_time) < len(layers)


def test_networks_that_predict_the_clip_itself(families):
    loaded = families[MODELSCOPE.title]
    model_class, config = type(loaded.model.model), loaded.model.model.model_config
    scheduler = {**loaded.model.model.scheduler_config, "prediction_type": "sample"}
    network = loaded.model.model.diffusion_model
    model = model_class(config, scheduler, schedules.table_sigmas(scheduler), lambda operations: network)
    output = noise_of(1, 4, 3, 6, 8)
    assert torch.equal(model.model_sampling.calculate_denoised(torch.ones(1), output, output * 3), output)
    with pytest.raises(ValueError, match="prediction_type 'flow'; expected one of epsilon, v_prediction, sample"):
        model_class(config, {**scheduler, "prediction_type": "flow"}, torch.ones(1000), lambda operations: network)
