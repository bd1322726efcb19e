"""Transitions: files of motion predictors, conditioning from two pictures, a list of pairs, one video of the clips."""

import json
import pickle

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import damage
import folder_paths
import numpy
import pytest
import tiny_motion_predictor
import torch
from PIL import Image
from prompts import node
from safetensors.torch import load_file, save_file
from test_i2vgenxl_parity import noise_of, picture_of

import tiny_checkpoints
from consistent_video.loaders import checkpoint
from consistent_video.loaders import motion_predictor as files
from consistent_video.loaders.families import I2VGENXL
from consistent_video.models import i2vgenxl_conditioning, i2vgenxl_picture
from consistent_video.models.i2vgenxl import FPS, IMAGE_EMBEDDING, IMAGE_LATENT
from consistent_video.models.motion_predictor import MotionPredictorModel
from consistent_video.nodes import transitions as nodes
from consistent_video.samplers import reference, schedules
from consistent_video.story.script import parse_story
from native_sampling import conditioning, sample

FRAMES, SIZE = 6, (64, 48)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_motion_predictor.write_motion_predictor(tmp_path_factory.mktemp("predictors") / "tiny.safetensors")


@pytest.fixture(scope="module")
def predictor(path):
    return files.load_motion_predictor(path)


@pytest.fixture(scope="module")
def loaded(i2vgenxl_folder):
    parts = checkpoint.load_folder(I2VGENXL, i2vgenxl_folder, "default")
    return (*parts, checkpoint.load_folder_vision(i2vgenxl_folder, "default"))


def pictures(*seeds, height=72, width=80):
    return torch.stack([picture_of(height, width, seed=seed) for seed in seeds])


def condition(loaded, predictor, start, end, frames=FRAMES, batch_size=1, **settings):
    _, clip, vae, vision = loaded
    prompts = conditioning(clip, "a boat"), conditioning(clip, "")
    settings = {"fps": 8, "batch_size": batch_size, "motion_predictor": predictor, "encoding": "mode", **settings}
    width, height = SIZE
    return nodes.TransitionConditioning.execute(
        *prompts, vae, vision, start, end, width, height, frames, **settings
    ).args


def draw(model, positive, negative, noise):
    sigmas = schedules.reference_sigmas(model.model.scheduler_config, 2)
    return sample(model, positive, negative, noise, reference.reference_sampler(), sigmas, cfg=7.0)


def test_file_and_network_are_what_was_saved(path, predictor):
    expected, found = tiny_motion_predictor.network().state_dict(), predictor.patcher.model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert predictor.config == tiny_motion_predictor.CONFIG
    assert files.read_config(path) == tiny_motion_predictor.CONFIG
    half = files.load_motion_predictor(path, dtype=torch.float16)
    assert {parameter.dtype for parameter in half.patcher.model.parameters()} == {torch.float16}
    inputs = [noise_of(2, 64), noise_of(2, 64, seed=1), noise_of(2, 5, 64), noise_of(2, 5, 64, seed=1)]
    difference = half.predict(*inputs, FRAMES) - predictor.predict(*inputs, FRAMES)
    assert difference.dtype == torch.float32 and 0 < difference.abs().max() < 1e-2


def test_settings_that_are_left_out_are_written(tmp_path):
    target, built = tmp_path / "sparse.safetensors", tiny_motion_predictor.network(max_frames=32)
    sparse = {key: value for key, value in built.config.items() if key != "max_frames"}
    files.save_motion_predictor(built.state_dict(), sparse, target)
    assert files.read_config(target) == built.config


def test_network_is_in_comfyui_s_memory_management(predictor):
    patcher = predictor.patcher
    assert isinstance(predictor, MotionPredictorModel) and isinstance(patcher, comfy.model_patcher.CoreModelPatcher)
    assert patcher.load_device == comfy.model_management.text_encoder_device()
    assert patcher.offload_device == comfy.model_management.text_encoder_offload_device()
    linears = {type(module) for module in patcher.model.modules() if isinstance(module, torch.nn.Linear)}
    assert linears == {comfy.ops.manual_cast.Linear}
    load, arguments = patcher.cached_patcher_init
    again = load(*arguments, disable_dynamic=True)
    assert type(again) is comfy.model_patcher.ModelPatcher
    comfy.model_management.unload_all_models()
    inputs = [noise_of(1, 64), noise_of(1, 64, seed=1), noise_of(1, 5, 64), noise_of(1, 5, 64, seed=1)]
    result = predictor.predict(*inputs, FRAMES)
    assert any(model.model is patcher for model in comfy.model_management.current_loaded_models)
    assert (result.device, result.dtype) == (comfy.model_management.intermediate_device(), torch.float32)
    assert torch.equal(MotionPredictorModel(again).predict(*inputs, FRAMES), result)


def truncated(path):
    path.write_bytes(path.read_bytes()[:-1000])


def header(path):
    path.write_bytes(b"\xff" * 64)


def pickled_code(path):
    with open(path, "wb") as file:
        pickle.dump({"state": damage.Malice(str(path.parent / "owned"))}, file)


def other_file(path):
    save_file({"first": torch.zeros(1)}, path, metadata={"format": "pt"})


def rewritten(change_state=None, change_description=None):
    """Damage of the tensors or of the description, both taken from a good file."""

    def write(path):
        state, description = load_file(path), {"version": 1, "config": files.read_config(path)}
        if change_state:
            change_state(state)
        text = change_description(description) if change_description else json.dumps(description)
        save_file(state, path, metadata={files.FORMAT.key: text})

    return write


def missing_key(state):
    del state["blocks.1.ff.net.2.bias"]
    state["blocks.1.scale"] = torch.zeros(1)


def other_shape(state):
    state["embedding_in.weight"] = torch.zeros(32, 63)


def nan(state):
    state["norm_out.bias"][0] = float("nan")


def setting(**values):
    return lambda description: json.dumps({**description, "config": {**description["config"], **values}})


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (truncated, ["damaged or no safetensors file", "Choose a file that this pack's trainer wrote"]),
        (header, ["damaged or no safetensors file"]),
        (pickled_code, ["damaged or no safetensors file"]),
        (other_file, ["is no motion predictor", "trainer"]),
        (rewritten(missing_key), ["1 missing keys (blocks.1.ff.net.2.bias)", "1 unexpected keys (blocks.1.scale)"]),
        (rewritten(other_shape), ["embedding_in.weight is (32, 63), expected (32, 64)"]),
        (rewritten(nan), ["NaN", "norm_out.bias"]),
        (
            rewritten(None, lambda _: "{"),
            ["not a motion predictor that this version can read", "Expecting property name"],
        ),
        (rewritten(None, lambda _: "[1, 2]"), ["not a motion predictor that this version can read"]),
        (rewritten(None, lambda _: "{}"), ["has version None of the format, expected 1"]),
        (rewritten(None, lambda _: '{"version": 2, "sizes": []}'), ["version 2 of the format, expected 1", "Update"]),
        (rewritten(None, lambda _: '{"version": 1}'), ["its config is None, expected settings"]),
        (rewritten(None, setting(num_layers=3)), ["missing keys (blocks.2.attn.to_k.weight"]),
        (rewritten(None, setting(num_layers=0)), ["does not describe a working network: num_layers is 0", "1 to 256"]),
        (rewritten(None, setting(hidden_size="32")), ["hidden_size is '32', expected a whole number"]),
        (rewritten(None, setting(image_tokens=0)), ["unexpected keys (image_tokens.latents"]),
    ],
)
def test_damage_is_named_with_a_remedy(tmp_path, how, words):
    path = tiny_motion_predictor.write_motion_predictor(tmp_path / "broken.safetensors")
    how(path)
    with pytest.raises(ValueError) as caught:
        files.load_motion_predictor(path)
    message = str(caught.value)
    assert str(path) in message
    assert [word for word in words if word not in message] == []
    assert not (tmp_path / "owned").exists()


def test_tensors_that_do_not_fit_are_not_saved(tmp_path):
    state, target = tiny_motion_predictor.network().state_dict(), tmp_path / "never.safetensors"
    with pytest.raises(ValueError, match="do not fit their configuration: .*missing keys"):
        files.save_motion_predictor(state, {**tiny_motion_predictor.CONFIG, "num_layers": 3}, target)
    assert not target.exists()


def test_loader_lists_finds_and_explains(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    monkeypatch.delitem(folder_paths.folder_names_and_paths, files.FOLDER, raising=False)
    files.register_folder()
    (tmp_path / files.FOLDER).mkdir()
    path = tiny_motion_predictor.write_motion_predictor(tmp_path / files.FOLDER / "mine.safetensors")
    (path.parent / "notes.txt").write_text("no network", encoding="utf-8")
    assert files.FILES.names() == ["mine.safetensors"]
    loader = nodes.MotionPredictorLoader
    assert loader.validate_inputs("mine.safetensors") is True
    before = loader.fingerprint_inputs("mine.safetensors")
    assert loader.execute("mine.safetensors").args[0].config == tiny_motion_predictor.CONFIG
    tiny_motion_predictor.write_motion_predictor(path, num_layers=1)
    assert loader.fingerprint_inputs("mine.safetensors") != before
    message = loader.validate_inputs("gone.safetensors")
    assert "Motion predictor 'gone.safetensors' was not found" in message and str(path.parent) in message


def test_conditioning_is_the_picture_and_the_predictor_s_embeddings(loaded, predictor):
    _, clip, vae, vision = loaded
    start, end = pictures(0), pictures(5, height=64)
    positive, negative, latent = condition(loaded, predictor, start, end, fps=5)
    assert latent["samples"].shape == (1, 4, FRAMES, 6, 8) and not latent["samples"].any()
    first, last = (
        vision.encode_image(i2vgenxl_picture.vision_pictures(images, SIZE[0], vision.image_size))
        for images in (start, end)
    )
    network = tiny_motion_predictor.network()
    expected = network(
        first["image_embeds"],
        last["image_embeds"],
        first["penultimate_hidden_states"],
        last["penultimate_hidden_states"],
        FRAMES,
    )
    found = positive[0][1]
    assert found[IMAGE_EMBEDDING].shape == (1, FRAMES, 64)
    assert (found[IMAGE_EMBEDDING] - expected).abs().max() < 1e-5
    own = i2vgenxl_conditioning.embed_pictures(vision, start, SIZE[0])
    assert (found[IMAGE_EMBEDDING][:, :1] - own).abs().max() < 1e-5
    assert torch.equal(negative[0][1][IMAGE_EMBEDDING], torch.zeros(1, FRAMES, 64))
    single = i2vgenxl_conditioning.condition_prompts(
        conditioning(clip, "a boat"), conditioning(clip, ""), vae, vision, start, *SIZE, 5, "mode"
    )
    for extra, reference_extra in ((found, single[0][0][1]), (negative[0][1], single[1][0][1])):
        assert torch.equal(extra[IMAGE_LATENT], reference_extra[IMAGE_LATENT])
        assert extra[FPS] == reference_extra[FPS] == 5.0
    drawn = [condition(loaded, predictor, start, end, encoding="sample", seed=seed)[0][0][1] for seed in (1, 1, 2)]
    assert torch.equal(drawn[0][IMAGE_LATENT], drawn[1][IMAGE_LATENT])
    assert not torch.equal(drawn[0][IMAGE_LATENT], drawn[2][IMAGE_LATENT])


def test_batches_are_one_clip_per_pair(loaded, predictor):
    both = condition(loaded, predictor, pictures(0, 1), pictures(2, 3))
    alone = [condition(loaded, predictor, pictures(i), pictures(i + 2)) for i in (0, 1)]
    for part in (0, 1):
        for name in (IMAGE_EMBEDDING, IMAGE_LATENT):
            expected = torch.cat([pair[part][0][1][name] for pair in alone])
            assert (both[part][0][1][name] - expected).abs().max() < 1e-5
    assert both[2]["samples"].shape[0] == 2
    shared = condition(loaded, predictor, pictures(0), pictures(2, 3), batch_size=2)
    assert shared[2]["samples"].shape[0] == 4
    embeddings = shared[0][0][1][IMAGE_EMBEDDING]
    assert embeddings.shape == (2, FRAMES, 64) and torch.equal(embeddings[0, 0], embeddings[1, 0])
    assert (embeddings[0] - alone[0][0][0][1][IMAGE_EMBEDDING][0]).abs().max() < 1e-5
    noise = noise_of(2, 4, FRAMES, 6, 8)
    together = draw(loaded[0], *both[:2], noise)
    apart = torch.cat([draw(loaded[0], *pair[:2], noise[i : i + 1]) for i, pair in enumerate(alone)])
    assert (together - apart).abs().max() < 1e-4 * apart.abs().max()


def test_without_a_predictor_embeddings_are_interpolated(loaded, tmp_path):
    start, end = pictures(0), pictures(1)
    positive, negative, latent = condition(loaded, None, start, end)
    found = positive[0][1][IMAGE_EMBEDDING]
    first, last = (i2vgenxl_conditioning.embed_pictures(loaded[3], images, SIZE[0]) for images in (start, end))
    shares = torch.arange(FRAMES).view(1, -1, 1) / (FRAMES - 1)
    assert (found - ((1 - shares) * first + shares * last)).abs().max() < 1e-5
    assert latent["samples"].shape[2] == FRAMES
    assert torch.equal(negative[0][1][IMAGE_EMBEDDING], torch.zeros(1, FRAMES, 64))


@pytest.mark.parametrize(
    ("start", "end", "settings", "words"),
    [
        ((0, 1), (2, 3, 4), {}, "2 start pictures and 3 end pictures"),
        ((0,), (1,), {"frames": 33}, "frames is 33, but this motion predictor makes 2 to 32"),
        ((0,), (1,), {"encoding": "mode", "frames": 513}, r"frames 513 is outside 1\.\.512"),
    ],
)
def test_what_does_not_fit_is_named(loaded, predictor, start, end, settings, words):
    with pytest.raises(ValueError, match=words):
        condition(loaded, predictor, pictures(*start), pictures(*end), **settings)


def test_bad_pictures_and_other_towers_are_named(loaded, predictor, tmp_path):
    good = pictures(0)
    for start, end in ((good[:0], good), (good, good[:0])):
        with pytest.raises(ValueError, match="The image batch is empty"):
            condition(loaded, predictor, start, end)
    for settings, words in (({"embedding_dim": 96}, r"two of \(batch, 96\)"), ({"vision_dim": 80}, "needs 80")):
        path = tiny_motion_predictor.write_motion_predictor(tmp_path / "other.safetensors", **settings)
        with pytest.raises(ValueError, match=f"{words}.*Use the vision tower that it was trained with"):
            condition(loaded, files.load_motion_predictor(path), good, good)


def test_the_end_picture_changes_the_frames_more_the_later_they_are(loaded, predictor):
    noise, start = noise_of(1, 4, FRAMES, 6, 8), pictures(0)
    clips = [draw(loaded[0], *condition(loaded, predictor, start, pictures(seed))[:2], noise) for seed in (4, 9, 4)]
    assert torch.equal(clips[0], clips[2])
    assert clips[0].shape == (1, 4, FRAMES, 6, 8) and clips[0].isfinite().all()
    change = (clips[1] - clips[0]).abs().mean(dim=(0, 1, 3, 4))
    assert change[-1] > 1e-4 and change[-1] > 2 * change[0]


def test_story_transitions_pair_neighbours():
    images = pictures(0, 1, 2)
    starts, ends, prompts = nodes.StoryTransitions.execute(images).args
    assert [len(part) for part in (starts, ends, prompts)] == [2, 2, 2]
    assert torch.equal(torch.cat(starts), images[:2]) and torch.equal(torch.cat(ends), images[1:])
    assert {picture.shape for picture in (*starts, *ends)} == {(1, 72, 80, 3)}
    assert prompts == ["", ""]
    outputs = nodes.StoryTransitions.GET_SCHEMA().outputs
    assert [output.is_output_list for output in outputs] == [True, True, True]
    with pytest.raises(ValueError, match="the batch has 1"):
        nodes.StoryTransitions.execute(images[:1])


def test_prompts_tell_both_panels_in_the_style():
    story = parse_story("[Ann] a woman img, red hair", "[Ann] runs. #Hurry!\n[NC] a tree\n[NC] a tree", "Line art")
    prompts = nodes.StoryTransitions.execute(pictures(0, 1, 2), story).args[2]
    assert prompts == [story.style.apply("a woman, red hair runs, then a tree"), story.style.apply("a tree")]
    with pytest.raises(ValueError, match="The story has 3 panels, but there are 2 pictures"):
        nodes.StoryTransitions.execute(pictures(0, 1), story)


def test_join_transitions_drops_the_repeated_panels():
    clips = [torch.rand(frames, 4, 6, 3) for frames in (5, 2, 3)]
    joined = nodes.JoinTransitions.execute(clips).args[0]
    assert torch.equal(joined, torch.cat((clips[0][:4], clips[1][:1], clips[2])))
    assert torch.equal(nodes.JoinTransitions.execute(clips[:1]).args[0], clips[0])
    assert nodes.JoinTransitions.GET_SCHEMA().is_input_list is True
    with pytest.raises(ValueError, match="Clip 2 has frames of 8x4 pixels and 3 channels, but clip 1 of 6x4 pixels"):
        nodes.JoinTransitions.execute([clips[0], torch.rand(5, 4, 8, 3)])
    with pytest.raises(ValueError, match="Clip 2 has 1 frame"):
        nodes.JoinTransitions.execute([clips[0], clips[1][:1], clips[2]])


@pytest.mark.server
def test_a_story_s_panels_become_one_video(server):
    """What lies behind Story Transitions runs once per pair, and Join Transitions once, over the list."""
    size = {"width": 64, "height": 64}
    for number in range(3):
        picture = (picture_of(64, 64, seed=number) * 255).round().to(torch.uint8).numpy()
        Image.fromarray(picture).save(server.folder / "input" / f"panel{number}.png")
    prompt = {
        "loader": node("ConsistentVideoI2VGenXLLoader", checkpoint=tiny_checkpoints.I2VGENXL_NAME, weight_dtype="fp32"),
        "predictor": node("ConsistentVideoMotionPredictorLoader", file="motion_predictor.safetensors"),
        "story": node(
            "ConsistentVideoStoryScript",
            characters="a girl",
            panels="runs\njumps\nsleeps",
            style="(No style)",
            negative="",
        ),
        **{f"panel{number}": node("LoadImage", image=f"panel{number}.png") for number in range(3)},
        "two": node("ImageBatch", image1=["panel0", 0], image2=["panel1", 0]),
        "panels": node("ImageBatch", image1=["two", 0], image2=["panel2", 0]),
        "pairs": node("ConsistentVideoStoryTransitions", images=["panels", 0], story=["story", 0]),
        "positive": node("CLIPTextEncode", clip=["loader", 1], text=["pairs", 2]),
        "negative": node("CLIPTextEncode", clip=["loader", 1], text=""),
        "conditioning": node(
            "ConsistentVideoTransitionConditioning",
            positive=["positive", 0],
            negative=["negative", 0],
            vae=["loader", 2],
            clip_vision=["loader", 3],
            motion_predictor=["predictor", 0],
            start_image=["pairs", 0],
            end_image=["pairs", 1],
            frames=4,
            fps=8,
            batch_size=1,
            **size,
        ),
        "sampler": node(
            "KSampler",
            model=["loader", 0],
            positive=["conditioning", 0],
            negative=["conditioning", 1],
            latent_image=["conditioning", 2],
            seed=1,
            steps=1,
            cfg=2.0,
            sampler_name="euler",
            scheduler="simple",
            denoise=1.0,
        ),
        "clips": node("VAEDecode", samples=["sampler", 0], vae=["loader", 2]),
        "video": node("ConsistentVideoJoinTransitions", images=["clips", 0]),
        "save": node("SaveImage", images=["video", 0], filename_prefix="transitions/frame"),
        "parts": node("SaveImage", images=["clips", 0], filename_prefix="transitions/part"),
    }
    server.run(prompt)
    frames, parts = (
        [numpy.array(Image.open(path)) for path in sorted((server.folder / "output" / "transitions").glob(f"{kind}*"))]
        for kind in ("frame", "part")
    )
    assert (len(parts), len(frames)) == (8, 7)
    assert numpy.array_equal(frames, parts[:3] + parts[4:])
    assert not numpy.array_equal(parts[0], parts[4])
