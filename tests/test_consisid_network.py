"""ConsisID's network against diffusers', and the MODEL around it: what is computed once is never stale."""

import comfy.hooks
import comfy.model_management
import comfy.ops
import comfy.samplers
import comfy.sd
import pytest
import tiny_consisid
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.consisid.pipeline_consisid import get_resize_crop_region_for_grid

from consistent_video.loaders import assembly, lora, network
from consistent_video.loaders.families import CONSISID
from consistent_video.models import consisid, consisid_positions, consisid_transformer
from consistent_video.models.adopt import adopt
from consistent_video.models.consisid_transformer import REPLACEMENTS, ConsisIDTransformer, read_fields
from consistent_video.samplers import reference, schedules
from native_sampling import sample

pytestmark = pytest.mark.slow

SIZE = (8, 12)
PUBLISHED = {
    "num_attention_heads": 48,
    "in_channels": 32,
    "num_layers": 42,
    "use_rotary_positional_embeddings": True,
    "use_learned_positional_embeddings": True,
    "is_train_face": True,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_consisid.write_consisid(tmp_path_factory.mktemp("consisid") / "checkpoint")


@pytest.fixture(scope="module")
def model(folder):
    return assembly.load_folder_network(CONSISID, folder, "default")


def noise_of(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ours_of(theirs, **settings):
    ours = ConsisIDTransformer(**{**tiny_consisid.TRANSFORMER, **settings})
    ours.load_state_dict(theirs.state_dict())
    return adopt(ours.eval().requires_grad_(False), comfy.ops.manual_cast, REPLACEMENTS)


def published_call(theirs, x, picture, timesteps, text, identity, vision):
    size = (x.shape[3] // 2, x.shape[4] // 2)
    rotary = None
    if theirs.config.use_rotary_positional_embeddings:
        base = (theirs.config.sample_height // 2, theirs.config.sample_width // 2)
        crop = get_resize_crop_region_for_grid(size, base[1], base[0])
        head = theirs.config.attention_head_dim
        rotary = get_3d_rotary_pos_embed(head, crop, size, x.shape[2], device=x.device)
    output = theirs(
        torch.cat((x, picture), dim=1).transpose(1, 2),
        text,
        timesteps,
        image_rotary_emb=rotary,
        id_cond=identity,
        id_vit_hidden=vision,
        return_dict=False,
    )
    return output[0].transpose(1, 2)


VARIANTS = {
    "published": {},
    "no_learned_positions": {"use_learned_positional_embeddings": False},
    "sines_only": {"use_learned_positional_embeddings": False, "use_rotary_positional_embeddings": False},
    "without_face": {"is_train_face": False},
    "every_block": {"cross_attn_interval": 1, "local_face_scale": 0.4},
    "no_biases": {"attention_bias": False, "norm_elementwise_affine": False},
    "gated_feed_forward": {"activation_fn": "geglu"},
}


@pytest.mark.parametrize("frames", [1, 3, 13])
@pytest.mark.parametrize("variant", VARIANTS)
def test_one_call_equals_diffusers(variant, frames):
    settings = VARIANTS[variant]
    theirs = tiny_consisid.transformer(**settings)
    ours = ours_of(theirs, **settings)
    x, picture = noise_of(2, 16, frames, *SIZE), noise_of(2, 16, frames, *SIZE, seed=1)
    text, timesteps = (
        noise_of(2, tiny_consisid.TEXT_TOKENS, tiny_consisid.TEXT_WIDTH, seed=2),
        torch.tensor([999.0, 37]),
    )
    faces = [tiny_consisid.face(seed) for seed in (0, 1)]
    identity = torch.cat([face[0] for face in faces])
    vision = [torch.cat(states) for states in zip(*(face[1] for face in faces))]
    expected = published_call(theirs, x, picture, timesteps, text, identity, vision)
    found = ours(x, timesteps, text, picture=picture, identity=identity, vision_states=vision)
    assert (found - expected).abs().max() < 1e-5
    known = ours.condition(text, picture, identity, vision)
    once = ours(
        x,
        timesteps,
        text_tokens=known.text,
        picture_tokens=known.picture,
        rotary=(known.rotary,),
        face_keys_values=known.face,
    )
    assert torch.equal(once, found)
    if settings.get("is_train_face", True):
        blank = ours(x, timesteps, text, picture=picture, identity=identity, vision_states=vision, strength=0.0)
        assert (blank - found).abs().max() > 1e-2


@pytest.mark.parametrize("size", [(8, 12), (16, 8), (6, 20), (60, 90)])
def test_clips_of_other_shapes_equal_diffusers_where_positions_rotate(size):
    settings = {"use_learned_positional_embeddings": False}
    theirs = tiny_consisid.transformer(**settings)
    x, picture = noise_of(1, 16, 2, *size), noise_of(1, 16, 2, *size, seed=1)
    text, timesteps = noise_of(1, tiny_consisid.TEXT_TOKENS, tiny_consisid.TEXT_WIDTH, seed=2), torch.tensor([500.0])
    identity, vision = tiny_consisid.face()
    expected = published_call(theirs, x, picture, timesteps, text, identity, vision)
    found = ours_of(theirs, **settings)(x, timesteps, text, picture=picture, identity=identity, vision_states=vision)
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize("grid", [(30, 45), (45, 30), (20, 20), (31, 44), (1, 7)])
def test_the_crop_of_positions_is_the_published_one(grid):
    assert consisid_positions.centred_crop(grid, (30, 45)) == get_resize_crop_region_for_grid(grid, 45, 30)


def test_early_configurations_never_read_their_face_fields():
    early = {"num_layers": 42, "LFE_heads": 12, "LFE_num_tokens": 32, "LFE_output_dim": 768, "unknown": 1}
    assert read_fields(early) == {"num_layers": 42, "unknown": 1}
    built = network.build_on_meta(ConsisIDTransformer, read_fields({**PUBLISHED, **early}), "early")
    assert built.local_facial_extractor.proj_out.shape == (1024, 2048)
    later = {"LFE_output_dim": 64}
    assert read_fields(later) == later


def test_published_size_is_accounted_for_key_by_key():
    state = network.build_on_meta(ConsisIDTransformer, PUBLISHED, "published").state_dict()
    with torch.device("meta"):
        theirs = tiny_consisid.ConsisIDTransformer3DModel(**PUBLISHED).state_dict()
    assert {key: value.shape for key, value in state.items()} == {key: value.shape for key, value in theirs.items()}
    assert (len(state), sum(value.numel() for value in state.values())) == (1344, 6_217_102_912)
    assert state["patch_embed.pos_embedding"].shape == (1, 226 + 13 * 30 * 45, 3072)


def conditioned(seed=0, strength=1.0, frames=3, text_seed=3, **changes):
    """A prompt as ConsisID Conditioning makes it."""
    identity, vision = tiny_consisid.face(seed)
    extra = {
        consisid.PICTURE: noise_of(1, 16, 1, *SIZE, seed=seed + 10),
        consisid.KEY_POINTS: noise_of(1, 16, 1, *SIZE, seed=seed + 20),
        consisid.IDENTITY: identity,
        consisid.VISION: vision,
        consisid.STRENGTH: strength,
    }
    text = noise_of(1, tiny_consisid.TEXT_TOKENS, tiny_consisid.TEXT_WIDTH, seed=text_seed)
    return [[changes.pop("text", text), {**extra, **changes}]]


def run(model, hooks=None, noise=None, steps=2, **kwargs):
    both = [conditioned(text_seed=seed, **kwargs) for seed in (3, 4)]
    if hooks is not None:
        both = [[[text, {**extra, "hooks": hooks}] for text, extra in prompt] for prompt in both]
    noise = noise_of(1, 16, 3, *SIZE) if noise is None else noise
    sigmas = schedules.reference_sigmas(model.model.scheduler_config, steps)
    return sample(model, *both, noise, reference.reference_sampler("cogvideox_ddim"), sigmas, cfg=6.0)


def test_face_text_and_strength_never_come_from_another_run(model):
    first = run(model)
    others = [run(model, seed=1), run(model, strength=0.5), run(model, strength=0.0)]
    assert all((other - first).abs().max() > 1e-2 for other in others)
    assert torch.equal(run(model), first)


@pytest.mark.parametrize("steps", [2, 5])
def test_what_the_face_and_the_text_give_is_computed_once_per_prompt(model, monkeypatch, steps):
    transformer, calls = model.model.diffusion_model, []
    layers = {
        "face": transformer.local_facial_extractor,
        "text": transformer.patch_embed.text_proj,
        "keys": transformer.perceiver_cross_attention[0].to_kv,
    }
    hooks = [layer.register_forward_hook(lambda *_, name=name: calls.append(name)) for name, layer in layers.items()]
    tables = consisid_transformer.rotary_table
    monkeypatch.setattr(consisid_transformer, "rotary_table", lambda *args: (calls.append("rotary"), tables(*args))[1])
    run(model, steps=steps)
    for hook in hooks:
        hook.remove()
    assert sorted(calls) == sorted(2 * [*layers, "rotary"])


def test_adapters_that_bypass_the_weights_are_called():
    theirs = tiny_consisid.transformer()
    ours, called = ours_of(theirs), set()
    x, picture = noise_of(1, 16, 13, *SIZE), noise_of(1, 16, 13, *SIZE, seed=1)
    text, timesteps = noise_of(1, tiny_consisid.TEXT_TOKENS, tiny_consisid.TEXT_WIDTH, seed=2), torch.tensor([500.0])
    identity, vision = tiny_consisid.face()
    block = ours.transformer_blocks[0]
    for name, layer in (("wide", block.ff.net[0].proj), ("narrow", block.ff.net[2]), ("patch", ours.patch_embed.proj)):
        layer.forward = lambda tensor, layer=layer, name=name: (
            called.add(name),
            type(layer).forward(layer, tensor),
        )[1]
    found = ours(x, timesteps, text, picture=picture, identity=identity, vision_states=vision)
    expected = published_call(theirs, x, picture, timesteps, text, identity, vision)
    assert (found - expected).abs().max() < 1e-5
    assert called == {"wide", "narrow", "patch"}


def test_batch_of_clips_is_each_clip_alone(model):
    noise = noise_of(2, 16, 3, *SIZE)
    both = run(model, noise=noise)
    singles = torch.cat([run(model, noise=noise[index : index + 1]) for index in range(2)])
    assert (both - singles).abs().max() < 1e-4


LORA_KEYS = {
    "attention": ("transformer_blocks.1.attn1.to_out.0", 96, 96),
    "face": ("perceiver_cross_attention.1.to_kv", 512, 64),
    "text": ("patch_embed.text_proj", 96, 64),
}


# Trainers of diffusers leave the embeddings alone.
@pytest.mark.parametrize(
    ("style", "layer"),
    [
        ("diffusers", "attention"),
        ("diffusers", "face"),
        ("kohya", "attention"),
        ("kohya", "face"),
        ("kohya", "text"),
    ],
)
def test_lora_applies_to_the_run_and_to_nothing_else(model, folder, layer, style):
    lora.register()
    key, rows, columns = LORA_KEYS[layer]
    up, down = 0.3 * noise_of(rows, 2, seed=8), 0.3 * noise_of(2, columns, seed=9)
    if style == "diffusers":
        file = {f"transformer.{key}.lora_B.weight": up, f"transformer.{key}.lora_A.weight": down}
    else:
        name = f"lora_unet_{key.replace('.', '_')}"
        file = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
    by_hand = assembly.load_folder_network(CONSISID, folder, "default")
    state = dict(by_hand.model.diffusion_model.state_dict())
    state[f"{key}.weight"] = state[f"{key}.weight"] + up @ down
    by_hand.model.diffusion_model.load_state_dict(state, assign=True)
    expected, plain = run(by_hand), run(model)
    assert (expected - plain).abs().max() > 1e-3
    patched = comfy.sd.load_lora_for_models(model, None, file, 1.0, 0)[0]
    assert (run(patched) - expected).abs().max() < 1e-4
    hooked = run(model.clone(), hooks=comfy.hooks.create_hook_lora(file, 1.0, 0.0))
    assert (hooked - expected).abs().max() < 1e-4
    assert torch.equal(run(model), plain)


def test_every_parameter_can_stream_but_three_small_ones(model):
    owners = {
        f"{prefix}.{name}": layer
        for prefix, layer in model.model.diffusion_model.named_modules()
        for name, _ in layer.named_parameters(recurse=False)
    }
    bare = {name for name, layer in owners.items() if not hasattr(layer, "comfy_cast_weights")}
    extractor = {"local_facial_extractor.latents", "local_facial_extractor.proj_out"}
    assert bare == {*extractor, "patch_embed.pos_embedding"}


def test_streamed_weights_with_a_lora_give_the_same_clip(folder):
    lora.register()
    model = assembly.load_folder_network(CONSISID, folder, "default", disable_dynamic=True)
    file = {
        f"transformer.{key}.lora_{part}.weight": 0.3 * noise_of(*size, seed=size[0])
        for key in ("transformer_blocks.1.attn1.to_q", "transformer_blocks.0.attn1.to_out.0")
        for part, size in (("A", (2, 96)), ("B", (96, 2)))
    }
    patched = comfy.sd.load_lora_for_models(model, None, file, 1.0, 0)[0]
    network, results = patched.model.diffusion_model, []
    identity, vision = tiny_consisid.face()
    x, text = noise_of(1, 16, 3, *SIZE), noise_of(1, tiny_consisid.TEXT_TOKENS, tiny_consisid.TEXT_WIDTH, seed=2)
    for budget in (0, 1):
        patched.patch_model(comfy.model_management.get_torch_device(), lowvram_model_memory=budget)
        streamed = [layer for layer in network.modules() if getattr(layer, "comfy_cast_weights", False)]
        assert (len(streamed) > 100) == bool(budget)
        call = network(x, torch.tensor([500.0]), text, picture=x, identity=identity, vision_states=vision)
        results.append(call)
        patched.unpatch_model(patched.offload_device)
    assert (results[0] - results[1]).abs().max() < 1e-5
    plain = network(x, torch.tensor([500.0]), text, picture=x, identity=identity, vision_states=vision)
    assert (results[0] - plain).abs().max() > 1e-3


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "uni_pc"])
def test_native_samplers_work(model, sampler):
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "sgm_uniform", 4)
    clip = sample(
        model,
        conditioned(),
        conditioned(text_seed=4),
        noise_of(1, 16, 3, *SIZE),
        comfy.samplers.sampler_object(sampler),
        sigmas,
        cfg=6.0,
    )
    assert clip.shape == (1, 16, 3, *SIZE) and clip.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "shape", "words"),
    [
        ({"text": torch.zeros(1, 226, 32)}, (3, *SIZE), "32 values per token, but ConsisID needs 64"),
        ({"text": torch.zeros(1, 77, 64)}, (3, *SIZE), "77 tokens, but ConsisID reads exactly 226"),
        ({consisid.PICTURE: torch.zeros(1, 16, 1, 4, 6)}, (3, *SIZE), "prepared as a latent of .16, 1, 4, 6."),
        ({consisid.PICTURE: torch.zeros(1, 4, 1, *SIZE)}, (3, *SIZE), "with the VAE of the checkpoint"),
        ({consisid.IDENTITY: torch.zeros(1, 512)}, (3, *SIZE), "identity of 512 values"),
        ({consisid.VISION: []}, (3, *SIZE), "vision states of ..,"),
        ({}, (3, 9, 12), "patches of 2"),
        ({consisid.PICTURE: torch.zeros(1, 16, 1, 16, 12)}, (3, 16, 12), "clips of 96x64"),
    ],
)
def test_what_does_not_fit_is_named(model, changes, shape, words):
    noise = noise_of(1, 16, *shape)
    prompt = conditioned(**changes)
    sigmas = schedules.reference_sigmas(model.model.scheduler_config, 1)
    with pytest.raises(ValueError, match=words):
        sample(model, prompt, prompt, noise, reference.reference_sampler(), sigmas)


def test_missing_face_and_too_short_clip_are_named(model, tmp_path):
    sigmas = schedules.reference_sigmas(model.model.scheduler_config, 1)
    plain = [[conditioned()[0][0], {}]]
    with pytest.raises(ValueError, match="through ConsisID Conditioning"):
        sample(model, plain, plain, noise_of(1, 16, 3, *SIZE), reference.reference_sampler(), sigmas)
    with_points = assembly.load_folder_network(
        CONSISID, tiny_consisid.write_consisid(tmp_path / "kps", is_kps=True), "default"
    )
    with pytest.raises(ValueError, match="make 5 frames or more"):
        run(with_points, noise=noise_of(1, 16, 1, *SIZE))


def test_prompt_of_a_part_of_the_clip_leaves_the_rest(model):
    sigmas = schedules.reference_sigmas(model.model.scheduler_config, 1)
    noise, plain = noise_of(1, 16, 3, *SIZE), conditioned()

    def clip(*prompts):
        return sample(model, sum(prompts, []), plain, noise, reference.reference_sampler(), sigmas)

    whole = clip(plain)
    torch.testing.assert_close(clip(conditioned(area=(*SIZE, 0, 0))), whole, rtol=0, atol=1e-5)
    # 3 rows from row 2 on become 4: patches have 2
    part = clip(plain, conditioned(text=torch.ones(1, 226, 64), area=(3, SIZE[1], 2, 0)))
    assert torch.equal(part[..., :2, :], whole[..., :2, :]) and torch.equal(part[..., 6:, :], whole[..., 6:, :])
    assert (part[..., 2:6, :] - whole[..., 2:6, :]).abs().max() > 1e-3
    later = clip(plain, conditioned(text=torch.ones(1, 226, 64), area=(1, *SIZE, 2, 0, 0)))
    assert torch.equal(later[:, :, :2], whole[:, :, :2]) and not torch.equal(later[:, :, 2], whole[:, :, 2])


def test_uneven_face_attentions_are_refused():
    settings = {**tiny_consisid.TRANSFORMER, "num_layers": 3}
    with pytest.raises(ValueError, match="somewhere.json .*num_layers 3 is no multiple of cross_attn_interval 2"):
        network.build_on_meta(ConsisIDTransformer, settings, "somewhere.json")
