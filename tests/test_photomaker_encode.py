"""Pictures and a text -> CONDITIONING: the person in the class word, from a chosen step on, with any sampler."""

import comfy.clip_model
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.samplers
import comfy.supported_models_base
import pytest
import tiny_photomaker
import torch
from comfy_extras import nodes_photomaker as core
from test_i2vgenxl_parity import picture_of
from test_photomaker_network import GOLDENS, golden_network, load_file

from consistent_video.faces.class_tokens import read_prompt, without_triggers
from consistent_video.faces.delayed_merge import delayed, last_text_sigma
from consistent_video.faces.photomaker import encode, encode_tensors
from consistent_video.loaders.photomaker import load_photomaker
from consistent_video.models.photomaker import PhotoMaker
from consistent_video.models.photomaker_picture import normalise
from native_sampling import sample

WIDTH = 64
CPU = torch.device("cpu")
TEXT = "a photo of a man img, in a park"
SIGMAS = torch.tensor([14.6146, 8.0, 4.0, 2.0, 1.0, 0.5, 0.0])


@pytest.fixture(scope="module")
def clip():
    return tiny_photomaker.tiny_clip()


@pytest.fixture(scope="module", params=["v1", "v2"])
def photomaker(request, tmp_path_factory):
    return load_version(request.param, tmp_path_factory)


@pytest.fixture(scope="module")
def v1(tmp_path_factory):
    return load_version("v1", tmp_path_factory)


@pytest.fixture(scope="module")
def v2(tmp_path_factory):
    return load_version("v2", tmp_path_factory)


def load_version(version, tmp_path_factory):
    path = tmp_path_factory.mktemp("photomaker") / f"{version}.safetensors"
    return load_photomaker(tiny_photomaker.write_photomaker(path, version, WIDTH, lora=False), torch.float32)[0]


@pytest.fixture(scope="module")
def images():
    return torch.stack([picture_of(90, 130, seed=seed) for seed in range(3)])


@pytest.fixture(scope="module")
def faces():
    return torch.randn(3, 512, generator=torch.Generator().manual_seed(5))


def manual_tokens(clip, text, position, repeats):
    """Tokens of a plain text with the token at a position repeated, start token included."""
    tokens = clip.tokenize(text)
    return {
        key: [[*batch[:position], *[batch[position]] * repeats, *batch[position + 1 : 78 - repeats]]]
        for key, (batch,) in tokens.items()
    }


def test_the_class_word_becomes_the_person(photomaker, clip, images, faces):
    found = encode_tensors(photomaker, clip, images, TEXT, face_embeds=faces)
    repeats = 3 * photomaker.tokens_per_picture
    embeds, pooled = clip.encode_from_tokens(
        manual_tokens(clip, "a photo of a man, in a park", 5, repeats), return_pooled=True
    )
    mask = torch.zeros(1, 77, dtype=torch.bool)
    mask[:, 5 : 5 + repeats] = True
    expected = photomaker.patcher.model(
        normalise(images).unsqueeze(0), embeds, mask, faces.unsqueeze(0) if photomaker.version == "v2" else None
    )
    assert found.merged.shape == (1, 77, WIDTH)
    assert (found.merged - expected).abs().max() < 1e-5
    assert torch.equal(found.merged[~mask], embeds[~mask])
    assert (found.merged[mask] - embeds[mask]).abs().max() > 0.1
    assert torch.equal(found.merged_options["pooled_output"], pooled)


def test_the_text_alone_is_the_native_encoding(v1, clip, images):
    found = encode_tensors(v1, clip, images, TEXT)
    expected, pooled = clip.encode_from_tokens(clip.tokenize("a photo of a man, in a park"), return_pooled=True)
    assert torch.equal(found.text_only, expected)
    assert torch.equal(found.text_only_options["pooled_output"], pooled)
    assert (found.merged_options["pooled_output"] - pooled).abs().max() > 1e-3


def test_weights_reach_the_encoder(v1, clip, images):
    weighted = encode_tensors(v1, clip, images[:1], "a photo of a man img, in a (park:1.5)")
    expected = clip.encode_from_tokens(clip.tokenize("a photo of a man, in a (park:1.5)"))
    assert torch.equal(weighted.text_only, expected)


def test_any_size_and_alpha(v1, clip):
    wide = picture_of(60, 200, channels=4).unsqueeze(0)
    before = wide.clone()
    found = encode_tensors(v1, clip, wide, TEXT)
    assert torch.equal(found.merged, encode_tensors(v1, clip, wide[..., :3], TEXT).merged)
    assert torch.equal(wide, before)


def test_several_persons_take_their_own_pictures(v1, clip, images):
    text = "a man img and a woman img"
    found = encode_tensors(v1, clip, images, text, counts=[2, 1])
    prompt = read_prompt(clip.tokenizer, text, several=True)
    assert torch.equal(found.text_only, clip.encode_from_tokens(without_triggers(clip.tokenizer, prompt)))
    swapped = encode_tensors(v1, clip, images[[1, 0, 2]], text, counts=[2, 1])
    changed = (found.merged - swapped.merged).abs().amax(dim=(0, 2)) > 1e-4
    assert changed.nonzero().flatten().tolist() == [2, 3]
    other = encode_tensors(v1, clip, torch.cat([images[:2], 1 - images[2:]]), text, counts=[2, 1])
    changed = (found.merged - other.merged).abs().amax(dim=(0, 2)) > 1e-4
    assert changed.nonzero().flatten().tolist() == [6]
    shared = encode_tensors(v1, clip, images, text, several=True)
    assert (shared.merged[0, 2:5] - found.merged[0, 2:5]).abs().max() > 1e-3


def test_pictures_without_a_face_leave_with_their_embedding(v2, clip, images, faces):
    has_face = torch.tensor([True, False, True])
    found = encode_tensors(v2, clip, images, TEXT, face_embeds=faces, has_face=has_face)
    expected = encode_tensors(v2, clip, images[[0, 2]], TEXT, face_embeds=faces[[0, 2]])
    assert (found.merged - expected.merged).abs().max() < 1e-6
    text = "a man img and a woman img"
    found = encode_tensors(v2, clip, images, text, face_embeds=faces, has_face=has_face, counts=[2, 1])
    expected = encode_tensors(v2, clip, images[[0, 2]], text, face_embeds=faces[[0, 2]], counts=[1, 1])
    assert (found.merged - expected.merged).abs().max() < 1e-6
    with pytest.raises(ValueError, match="No face was found in any picture. PhotoMaker v2 needs at least one"):
        encode_tensors(v2, clip, images, TEXT, face_embeds=faces, has_face=torch.zeros(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="No face was found in any picture of person 2"):
        encode_tensors(
            v2, clip, images, text, face_embeds=faces, has_face=torch.tensor([True, True, False]), counts=[2, 1]
        )


def test_v1_needs_no_faces(v1, clip, images, faces):
    found = encode_tensors(v1, clip, images, TEXT, face_embeds=faces, has_face=torch.zeros(3, dtype=torch.bool))
    assert torch.equal(found.merged, encode_tensors(v1, clip, images, TEXT).merged)


def test_unusable_inputs_are_named(v1, v2, clip, images, faces):
    with pytest.raises(ValueError, match="v2 file, which needs a face recognition embedding.*face model"):
        encode(v2, clip, images, TEXT)
    with pytest.raises(ValueError, match=r"There are 3 pictures, but the face embeddings have the shape \(2, 512\)"):
        encode(v2, clip, images, TEXT, face_embeds=faces[:2])
    with pytest.raises(ValueError, match="expected 3 rows of 512 values"):
        encode(v2, clip, images, TEXT, face_embeds=faces[:, :100])
    with pytest.raises(ValueError, match=r"has_face has the shape \(2,\), expected \(3,\)"):
        encode(v2, clip, images, TEXT, face_embeds=faces, has_face=torch.ones(2, dtype=torch.bool))
    many = images[:1].expand(38, -1, -1, -1)
    with pytest.raises(ValueError, match="38 pictures need 76 tokens, but a text has room for 75. At most 37 pictures"):
        encode(v2, clip, many, TEXT, face_embeds=faces[:1].expand(38, -1))
    with pytest.raises(
        ValueError, match=r"76 pictures need 76 tokens.*At most 75 pictures fit \(2 persons, so 37 each"
    ):
        encode(v1, clip, many, "a man img, a woman img", several=True)
    with pytest.raises(ValueError, match="pictures per person are 2, 2, but there are 3 pictures and 2 trigger words"):
        encode(v1, clip, images, "a man img, a woman img", counts=[2, 2])
    with pytest.raises(ValueError, match="image batch is empty"):
        encode(v1, clip, images[:0], TEXT)
    with pytest.raises(ValueError, match="are 60 wide, but this PhotoMaker file expects 64"):
        encode(v1, tiny_photomaker.tiny_clip((20, 40)), images, TEXT)
    with pytest.raises(ValueError, match="Unknown size options height_target"):
        encode(v1, clip, images, TEXT, size_options={"width": 1024, "height_target": 3})
    with pytest.raises(ValueError, match="PHOTOMAKER input is a builtins.str, which this node cannot use"):
        encode("photomaker-v1", clip, images, TEXT)


def test_other_text_encoders_are_refused(v1, clip, images):
    other = clip.clone()
    other.tokenizer = comfy.sd1_clip.SD1Tokenizer()
    with pytest.raises(ValueError, match="CLIP of an SDXL checkpoint.*found one with a SD1Tokenizer"):
        encode(v1, other, images, TEXT)


def test_size_conditioning_is_passed_through(v1, clip, images):
    sizes = {"width": 1024, "height": 768, "crop_w": 0, "crop_h": 0, "target_width": 1024, "target_height": 768}
    merged, text_only = encode(v1, clip, images, TEXT, size_options=sizes, sigmas=SIGMAS)
    for _, options in [*merged, *text_only]:
        assert options.items() >= sizes.items()
    assert "width" not in encode(v1, clip, images, TEXT)[1][0][1]


# ComfyUI's own nodes


def core_photomaker(state):
    """The object of ComfyUI's own loader, at the size of the goldens; its forward and fuse module are ComfyUI's."""
    network = core.PhotoMakerIDEncoder.__new__(core.PhotoMakerIDEncoder)
    config = {
        **core.VISION_CONFIG_DICT,
        "hidden_size": 32,
        "image_size": 56,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "projection_dim": 24,
    }
    operations = comfy.ops.manual_cast
    comfy.clip_model.CLIPVisionModelProjection.__init__(network, config, torch.float32, CPU, operations)
    network.load_device = CPU
    network.visual_projection_2 = operations.Linear(32, 40, bias=False)
    network.fuse_module = core.FuseModule(64, operations)
    network.load_state_dict(state)
    return network


def test_our_encode_takes_comfyui_s_object(clip, images, monkeypatch):
    state = load_file(GOLDENS / "photomaker_v1_state.safetensors")
    ours = PhotoMaker(comfy.model_patcher.CoreModelPatcher(golden_network(state), CPU, CPU))
    monkeypatch.setattr("consistent_video.faces.photomaker.CorePhotoMaker.image_size", 56)
    for options in ({}, {"several": True}):
        text = TEXT if not options else "a man img and a woman img"
        found = encode_tensors(core_photomaker(state), clip, images, text, **options)
        expected = encode_tensors(ours, clip, images, text, **options)
        assert (found.merged - expected.merged).abs().max() < 1e-5
        assert torch.equal(found.text_only, expected.text_only)


def test_comfyui_s_encode_takes_our_object(v1, v2, clip, images):
    text = "photograph of photomaker"
    found = core.PhotoMakerEncode.execute(v1, images[:1], clip, text).result[0]
    embeds = clip.encode_from_tokens(clip.tokenize(text))
    assert found[0][0].shape == embeds.shape
    changed = (found[0][0] - embeds).abs().amax(dim=(0, 2)) > 1e-4
    assert changed.nonzero().flatten().tolist() == [2]
    pixels = comfy.clip_model.clip_preprocess(images[:1]).unsqueeze(0)
    mask = torch.arange(77).eq(2).unsqueeze(0)
    assert torch.equal(found[0][0], v1(pixels, embeds, mask))
    with pytest.raises(ValueError, match="v2 needs a face recognition embedding"):
        core.PhotoMakerEncode.execute(v2, images[:1], clip, text)


# Delayed conditioning


def published_steps(merge_start, steps):
    """Which steps see the person."""
    return [step > int(merge_start * steps) for step in range(steps)]


class Recorder(torch.nn.Module):
    """A network that notes at which timestep it sees which text."""

    dtype = torch.float32

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x, timesteps, context=None, **kwargs):
        self.seen += zip(timesteps.tolist(), context[:, 0, 0].tolist())
        return 0.1 * x


@pytest.fixture
def recorder():
    """(MODEL, its network); every text is one number."""
    config = comfy.supported_models_base.BASE({"disable_unet_model_creation": True})
    config.latent_format = comfy.latent_formats.SDXL()
    model = comfy.model_base.BaseModel(config, comfy.model_base.ModelType.EPS)
    model.diffusion_model = Recorder()
    return comfy.model_patcher.ModelPatcher(model, CPU, CPU), model.diffusion_model


def entry(value):
    return [torch.full((1, 77, 8), float(value)), {"pooled_output": torch.zeros(1, 8)}]


def run(recorder, sampler, sigmas, positive):
    """(sigma, text) of every model call."""
    model, network = recorder
    noise = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    sample(model, positive, [entry(-1)], noise, comfy.samplers.sampler_object(sampler), sigmas, cfg=1.0)
    sampling = model.get_model_object("model_sampling")
    return [(float(sampling.sigma(torch.tensor(timestep))), text) for timestep, text in network.seen]


def schedule(recorder, name, steps):
    return comfy.samplers.calculate_sigmas(recorder[0].get_model_object("model_sampling"), name, steps)


@pytest.mark.parametrize("merge_start", [0.0, 0.2, 0.34, 0.9])
@pytest.mark.parametrize("scheduler", ["normal", "karras", "ddim_uniform", "sgm_uniform"])
def test_steps_are_the_published_ones(recorder, merge_start, scheduler):
    sigmas = schedule(recorder, scheduler, 10)
    steps = len(sigmas) - 1
    calls = run(recorder, "euler", sigmas, delayed(entry(0), entry(1), merge_start, sigmas))
    assert [text == 1 for _, text in calls] == published_steps(merge_start, steps)


@pytest.mark.parametrize(
    "sampler", ["heun", "dpm_2", "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m", "ddim", "uni_pc", "lcm"]
)
def test_any_sampler_sees_one_text_per_call(recorder, sampler):
    sigmas = schedule(recorder, "karras", 10)
    conditioning = delayed(entry(0), entry(1), 0.3, sigmas)
    calls = run(recorder, sampler, sigmas, conditioning)
    assert len(calls) >= 10 and {text for _, text in calls} == {0.0, 1.0}
    threshold = last_text_sigma(sigmas, 0.3)
    assert float(sigmas[4]) < threshold < float(sigmas[3])
    for sigma, text in calls:
        if abs(sigma - threshold) > 1e-3 * threshold:
            assert text == float(sigma < threshold)


def test_look_ahead_within_a_step_keeps_the_step_s_text(recorder):
    sigmas = schedule(recorder, "karras", 10)
    calls = run(recorder, "dpm_2", sigmas, delayed(entry(0), entry(1), 0.3, sigmas))
    assert [text for _, text in calls] == [0.0] * 8 + [1.0] * (len(calls) - 8)


def test_ranges_meet_without_gap_or_overlap():
    early, late = delayed(entry(0), entry(1), 0.2, SIGMAS)
    end, start = early[1]["timestep_end"], late[1]["timestep_start"]
    assert "timestep_start" not in early[1] and "timestep_end" not in late[1]
    assert torch.nextafter(torch.tensor(start), torch.tensor(1e9)) == torch.tensor(end)
    assert end == pytest.approx(4.0 + 0.01 * 4.0)


def test_partial_repeated_and_exhausted_schedules():
    assert last_text_sigma(SIGMAS[3:], 0.0) == pytest.approx(1.01)
    assert last_text_sigma(torch.tensor([4.0, 4.0, 4.0, 1.0, 0.0]), 0.0) == pytest.approx(1.03)
    assert last_text_sigma(SIGMAS, 1.0) is None and last_text_sigma(SIGMAS[-2:], 0.0) is None
    assert delayed(entry(0), entry(1), 1.0, SIGMAS)[0][0].unique().tolist() == [0.0]
    assert len(delayed(entry(0), entry(1), 1.0, SIGMAS)) == 1


def test_without_sigmas_the_share_is_of_the_model_s_schedule(recorder):
    sigmas = schedule(recorder, "normal", 20)
    calls = run(recorder, "euler", sigmas, delayed(entry(0), entry(1), 0.31, None))
    threshold = recorder[0].get_model_object("model_sampling").percent_to_sigma(0.31)
    assert [text for _, text in calls] == [float(sigma < threshold) for sigma, _ in calls]
    assert {text for _, text in calls} == {0.0, 1.0}
    merged, text_only = (delayed(entry(0), entry(1), share, None) for share in (0.0, 1.0))
    assert [part[0].unique().tolist() for part in (*merged, *text_only)] == [[1.0], [0.0]]


@pytest.mark.parametrize("sigmas", [[1.0], [1.0, 2.0, 0.0], [float("nan"), 0.0], [[1.0, 0.0]], [0.0, 0.0], []])
def test_sigmas_that_are_no_schedule_are_refused(sigmas):
    with pytest.raises(ValueError, match="are no schedule.*Connect the output of a scheduler"):
        delayed(entry(0), entry(1), 0.2, torch.tensor(sigmas))
    with pytest.raises(ValueError, match="merge_start is 1.5, expected a share of the steps"):
        delayed(entry(0), entry(1), 1.5, None)


def test_encode_gives_both_conditionings(v1, clip, images):
    merged, text_only = encode(v1, clip, images, TEXT, merge_start=0.2, sigmas=SIGMAS)
    found = encode_tensors(v1, clip, images, TEXT)
    assert [len(merged), len(text_only)] == [2, 1]
    assert torch.equal(merged[0][0], found.text_only) and torch.equal(merged[1][0], found.merged)
    assert torch.equal(merged[0][1]["pooled_output"], found.text_only_options["pooled_output"])
    assert torch.equal(merged[1][1]["pooled_output"], found.merged_options["pooled_output"])
    assert set(text_only[0][1]) == {"pooled_output"}
