"""What comes over the inputs of every node: values of another kind, damaged ones, choices over a wire."""

import inspect
import types

import comfy.latent_formats
import node_schemas
import numpy as np
import pytest
import torch
from comfy_api.latest import io

import tiny_checkpoints
from consistent_video.faces.embeddings import FaceEmbeds
from consistent_video.faces.face_model import FaceModel
from consistent_video.loaders import folders
from consistent_video.loaders.checkpoint import load_folder_clip, load_folder_vae, load_folder_vision
from consistent_video.loaders.families import CONSISTI2V
from consistent_video.models import clip_latents
from consistent_video.models.i2vgenxl_conditioning import IMAGE_EMBEDDING, IMAGE_LATENT
from consistent_video.models.motion_predictor import MotionPredictorModel
from consistent_video.models.pictures import on_paper, rgb
from consistent_video.nodes import sockets
from consistent_video.nodes.conditioning import ConsistI2VConditioning, I2VGenXLConditioning
from consistent_video.nodes.faces import FaceEncode, FaceSimilarity
from consistent_video.nodes.latents import EmptyLatent
from consistent_video.nodes.noise import SharedNoise
from consistent_video.nodes.story import StoryConditioning, StoryScript
from consistent_video.nodes.transitions import JoinTransitions
from consistent_video.patches.character_bank import CharacterBank
from consistent_video.story.script import parse_story

NODES = {node.GET_SCHEMA().node_id: node for node in node_schemas.nodes()}
SCHEMAS = {node_id: node.GET_SCHEMA() for node_id, node in NODES.items()}
NAN = float("nan")


def nodes_with(kind):
    return [node for node, schema in SCHEMAS.items() if kind in {entry.get_io_type() for entry in schema.inputs}]


def having(*names):
    return types.SimpleNamespace(**dict.fromkeys(names))


def blank(kind):
    """A value of a class without its contents."""
    return kind.__new__(kind)


FITTING = {
    "MODEL": having("model", "clone", "model_options"),
    "CLIP": having("tokenize", "encode_from_tokens_scheduled"),
    "VAE": having("decode", "encode", "latent_channels", "spacial_compression_decode"),
    "CLIP_VISION": having("encode_image", "image_size"),
    "CONDITIONING": [[torch.zeros(1, 77, 8), {}]],
    "LATENT": {"samples": torch.zeros(1, 4, 2, 8, 8)},
    "IMAGE": torch.zeros(1, 8, 8, 3),
    "NOISE": having("generate_noise"),
    "SAMPLER": having("sample"),
    "SIGMAS": torch.tensor([1.0, 0.0]),
    "STORY": parse_story("a girl", "walks", "(No style)"),
    "CHARACTER_BANK": blank(CharacterBank),
    "PHOTOMAKER": lambda: None,
    "FACE_MODEL": blank(FaceModel),
    "FACE_EMBEDS": blank(FaceEmbeds),
    "MOTION_PREDICTOR": blank(MotionPredictorModel),
}
# Values of widgets, which are not looked at.
WIDGETS = {"INT": 1, "FLOAT": 1.0, "STRING": "", "BOOLEAN": False}
SOCKET_INPUTS = [
    pytest.param(node_id, entry.id, id=f"{node_id.removeprefix('ConsistentVideo')}-{entry.id}")
    for node_id, schema in SCHEMAS.items()
    for entry in schema.inputs
    if entry.get_io_type() in sockets.SOCKETS
]


def fitting_inputs(node_id):
    values = {}
    for entry in SCHEMAS[node_id].inputs:
        choice = (entry.options or ["name"])[0] if isinstance(entry, io.Combo.Input) else None
        value = choice or FITTING.get(entry.get_io_type(), WIDGETS.get(entry.get_io_type()))
        values[entry.id] = [value] if SCHEMAS[node_id].is_input_list else value
    return values


def refusal(node_id, name, value):
    """What a node says about one value; the others fit their sockets but could not be worked with."""
    with pytest.raises(ValueError) as caught:
        NODES[node_id].execute(**fitting_inputs(node_id) | {name: value})
    return str(caught.value)


def test_every_input_is_a_widget_or_has_a_check():
    kinds = {entry.get_io_type() for schema in SCHEMAS.values() for entry in schema.inputs}
    assert kinds - set(WIDGETS) - {"COMBO"} == set(sockets.SOCKETS) == set(FITTING)


@pytest.mark.parametrize(("node_id", "name"), SOCKET_INPUTS)
def test_values_in_place_of_links_are_named_before_the_node_works(node_id, name):
    optional = next(entry for entry in SCHEMAS[node_id].inputs if entry.id == name).optional
    as_list = SCHEMAS[node_id].is_input_list
    values = {"the text 'abc'": "abc", "the value 3": 3, "object Mock of tests": Foreign()}
    for words, value in values.items():
        said = refusal(node_id, name, [value] if as_list else value)
        assert said.startswith(f"{name}: expected ") and words in said and "Connect " in said
    if not optional:
        assert "found nothing" in refusal(node_id, name, [None] if as_list else None)
    assert refusal(node_id, name, []).startswith(f"{name}: ")
    assert refusal(node_id, name, [{}] if as_list else {}).startswith(f"{name}: ")


class Foreign:
    """An object of another pack."""


Foreign.__module__, Foreign.__qualname__ = "tests.other_pack", "Mock"


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.zeros(0, 8, 8, 3), "batch is empty"),
        (torch.zeros(1, 0, 8, 3), "8x0 pixels"),
        (torch.zeros(8, 8, 3), r"shape (8, 8, 3)"),
        (torch.zeros(1, 8, 8, 5), "5 channels"),
        (torch.zeros(1, 8, 8, 0), "0 channels"),
        (torch.zeros(1, 8, 8, 3, dtype=torch.uint8), "type uint8"),
        (torch.full((2, 8, 8, 3), NAN), "NaN"),
        (torch.full((1, 8, 8, 3), float("inf")), "infinite"),
    ],
)
@pytest.mark.parametrize("node_id", nodes_with("IMAGE"))
def test_damaged_pictures_are_named_by_every_node(node_id, images, words):
    for entry in SCHEMAS[node_id].inputs:
        if entry.get_io_type() == "IMAGE":
            said = refusal(node_id, entry.id, [images] if SCHEMAS[node_id].is_input_list else images)
            assert said.startswith(f"{entry.id}: ") and words in said


@pytest.mark.parametrize(
    ("kind", "value", "words"),
    [
        ("LATENT", {"samples": torch.full((1, 4, 8, 8), NAN)}, "NaN"),
        ("LATENT", {"samples": torch.zeros(0, 4, 8, 8)}, "tensor (0, 4, 8, 8)"),
        ("LATENT", {"samples": torch.zeros(1, 4, 8, 8, dtype=torch.int64)}, "type int64"),
        ("LATENT", {"samples": [1]}, "a list of 1 entry"),
        ("LATENT", {}, "nothing as samples"),
        ("CONDITIONING", [torch.zeros(1, 77, 8)], "pairs"),
        ("SIGMAS", torch.tensor([1.0, NAN]), "finite"),
        ("SIGMAS", torch.ones(2, 2), "tensor (2, 2)"),
    ],
)
def test_damaged_values_are_named(kind, value, words):
    for node_id, name in [param.values for param in SOCKET_INPUTS]:
        if next(entry for entry in SCHEMAS[node_id].inputs if entry.id == name).get_io_type() == kind:
            said = refusal(node_id, name, value)
            assert said.startswith(f"{name}: ") and words in said


def test_an_empty_list_of_clips_is_named():
    with pytest.raises(ValueError, match="images: an empty list"):
        JoinTransitions.execute([])


def test_half_characters_are_left_out(caplog):
    story = StoryScript.execute("a girl \ud83d", "walks\udc00 #Hi 🐼\ud83d", "(No style)", "").result[0]
    assert story.panels[0].prompt == "a girl, walks" and story.captions == ("Hi 🐼",)
    assert "panels: 2 half characters are left out" in caplog.text


def test_the_signature_and_the_result_of_a_node_stay():
    assert list(inspect.signature(FaceSimilarity.execute).parameters) == ["face_model", "reference", "images"]
    assert JoinTransitions.execute([torch.zeros(2, 8, 8, 3)]).result[0].shape == (2, 8, 8, 3)


@pytest.mark.parametrize("node_id", nodes_with("COMBO"))
def test_choices_over_a_wire(models_folder, node_id):
    """ComfyUI hands None for wires to validation and fingerprints, and any value to the node."""
    node, schema = NODES[node_id], SCHEMAS[node_id]
    combos = [entry.id for entry in schema.inputs if isinstance(entry, io.Combo.Input)]
    for name in combos:
        if name not in sockets.LISTED_FILES:
            assert f"{name}: 'none of them' is not one of the choices" in refusal(node_id, name, "none of them")
        else:
            assert f"{name}: expected a name, found the value 3" in refusal(node_id, name, 3)
    if "validate_inputs" in vars(node):
        names = inspect.signature(node.validate_inputs).parameters
        assert node.validate_inputs(**dict.fromkeys(names)) is True
    if "fingerprint_inputs" in vars(node):
        unknown = dict.fromkeys(inspect.signature(node.fingerprint_inputs).parameters)
        assert isinstance(node.fingerprint_inputs(**unknown), str)


def test_a_fingerprint_without_a_name_follows_every_checkpoint(models_folder):
    before = folders.fingerprint_checkpoint(None)
    assert folders.fingerprint_checkpoint(None) == before
    file = models_folder / "diffusers" / tiny_checkpoints.I2VGENXL_NAME / "note.txt"
    file.write_text("new", encoding="utf-8")
    try:
        assert folders.fingerprint_checkpoint(None) != before
    finally:
        file.unlink()


@pytest.fixture(scope="module")
def parts(models_folder):
    clip = load_folder_clip(CONSISTI2V, models_folder / "diffusers" / tiny_checkpoints.CONSISTI2V_NAME)
    vae = load_folder_vae(CONSISTI2V, models_folder / "diffusers" / tiny_checkpoints.CONSISTI2V_NAME)
    vision = load_folder_vision(models_folder / "diffusers" / tiny_checkpoints.I2VGENXL_NAME, "default")
    return clip.encode_from_tokens_scheduled(clip.tokenize("a")), vae, vision


def variants(gray):
    """A gray picture (1, H, W, 1) in every number of channels."""
    alpha = torch.rand(gray.shape, generator=torch.Generator().manual_seed(1))
    color = gray.expand(-1, -1, -1, 3)
    return {1: gray, 2: torch.cat((gray, alpha), -1), 3: color, 4: torch.cat((color, alpha), -1)}


@pytest.mark.parametrize("motion", ["none", "zoom_in"])
def test_gray_and_alpha_give_the_clip_of_the_colours(parts, motion):
    prompt, vae, vision = parts
    pictures = variants(torch.rand(1, 70, 90, 1, generator=torch.Generator().manual_seed(0)))
    for channels in (1, 2, 4):
        found, expected = (
            ConsistI2VConditioning.execute(prompt, prompt, vae, 64, 64, 4, 3, motion, 1, first_frame=picture).result[3]
            for picture in (pictures[channels], pictures[3])
        )
        assert (found["samples"] - expected["samples"]).abs().max() < 1e-3, channels
        if motion == "none":
            found, expected = (
                I2VGenXLConditioning.execute(prompt, prompt, vae, vision, picture, 64, 64, 4, 16, 1).result[0][0][1]
                for picture in (pictures[channels], pictures[3])
            )
            assert all(torch.equal(found[key], expected[key]) for key in (IMAGE_LATENT, IMAGE_EMBEDDING)), channels


def test_colours_of_pictures():
    gray = torch.tensor([0.25, 0.5]).view(1, 1, 2, 1)
    alpha = torch.tensor([1.0, 0.5]).view(1, 1, 2, 1)
    assert rgb(torch.cat((gray, alpha), -1)).flatten().tolist() == [0.25] * 3 + [0.5] * 3
    assert on_paper(torch.cat((gray, alpha), -1)).flatten().tolist() == [0.25] * 3 + [0.75] * 3
    assert torch.equal(on_paper(gray), rgb(gray))


def test_a_face_model_of_another_pack_is_named():
    with pytest.raises(
        ValueError, match="face_model: expected FACE_MODEL, found an object Mock of tests. Connect Load"
    ):
        FaceEncode.execute(Foreign(), torch.rand(1, 64, 64, 3), True)
    with pytest.raises(ValueError, match="found a list of 2 entries"):
        FaceEncode.execute([np.zeros(2), 3], torch.rand(1, 64, 64, 3), True)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((1, 16, 5, 8, 8), "16 channels, but this model's latents have 4: another VAE"),
        ((5, 4, 1, 8, 8), "5 clips of 1 frame each.*Empty Clip Latent.*frames 5 and batch_size 1"),
        ((1, 4, 64), "expected .clips, 4, frames, height, width"),
        ((1, 4, 0, 8, 8), "expected .clips, 4, frames, height, width"),
    ],
)
def test_latents_that_are_not_clips_are_refused(shape, words):
    with pytest.raises(ValueError, match=words):
        clip_latents.check_clip_latents(torch.zeros(shape), comfy.latent_formats.SD15())


def test_clips_that_can_be_sampled_are_not_refused():
    for shape in ((1, 4, 1, 8, 8), (3, 4, 2, 9, 5)):
        clip_latents.check_clip_latents(torch.zeros(shape), comfy.latent_formats.SD15())
    for pictures, clips in ((1, 3), (2, 4), (2, 1), (3, 3)):
        clip_latents.check_clip_count(pictures, clips)
    with pytest.raises(ValueError, match="2 pictures, but the latent to sample holds 3 clips"):
        clip_latents.check_clip_count(2, 3)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((1, 16, 8, 8), "16 channels, but the latent to sample has 4: another VAE"),
        ((1, 4, 8, 9), "Sample the latent of"),
    ],
)
def test_pictures_of_another_vae_or_size_are_refused(shape, words):
    with pytest.raises(ValueError, match=words):
        clip_latents.check_picture_latent("picture", torch.zeros(shape), torch.zeros(2, 4, 3, 8, 8), "Conditioning")
    clip_latents.check_picture_latent("picture", torch.zeros(1, 4, 8, 8), torch.zeros(2, 4, 3, 8, 8), "Conditioning")


def test_vaes_take_gray_pictures_and_name_what_is_not_theirs(parts):
    vae = parts[1]
    gray = torch.rand(2, 64, 64, 1, generator=torch.Generator().manual_seed(0))
    found, expected = (vae.encode(pictures) for pictures in (gray, gray.expand(-1, -1, -1, 3)))
    assert (found - expected).abs().max() < 1e-4
    for pixels, words in (({}, "found dict"), (torch.zeros(8, 8), r"found \(8, 8\)"), (torch.zeros(1, 8, 8, 5), "5")):
        with pytest.raises(ValueError, match=f"The VAE encodes pictures.*{words}"):
            vae.encode(pixels)
    for shape in ((1, 16, 2, 8, 8), (1, 16, 8, 8), (4, 8, 8), (0, 4, 8, 8)):
        for decode in (vae.decode, vae.decode_tiled):
            with pytest.raises(ValueError, match="decodes latents of 4 channels.*VAE that belongs"):
                decode(torch.zeros(shape))


def test_numbers_over_a_wire_that_no_widget_gives_are_named(parts):
    prompt, vae, vision = parts
    picture = torch.rand(1, 64, 64, 3)
    story = parse_story("a girl", "walks", "(No style)")
    calls = {
        "alpha is nan, not a finite number": lambda: SharedNoise.execute(0, "mixed", NAN),
        "batch_size 0": lambda: EmptyLatent.execute(vae, 64, 64, 5, 0),
        "batch_size -1": lambda: I2VGenXLConditioning.execute(prompt, prompt, vae, vision, picture, 64, 64, 5, 16, -1),
        "fps 0 is not a frame rate": lambda: I2VGenXLConditioning.execute(
            prompt, prompt, vae, vision, picture, 64, 64, 5, 0, 1
        ),
        "width 0 is not a multiple": lambda: ConsistI2VConditioning.execute(
            prompt, prompt, vae, 0, 64, 4, 3, "none", 1, first_frame=picture
        ),
        "frames 0 is outside": lambda: ConsistI2VConditioning.execute(
            prompt, prompt, vae, 64, 64, 0, 3, "zoom_in", 1, first_frame=picture
        ),
        "height -8 is not a multiple": lambda: StoryConditioning.execute(FITTING["CLIP"], story, 64, -8),
    }
    for words, call in calls.items():
        with pytest.raises(ValueError, match=words):
            call()


@pytest.mark.parametrize("node_id", nodes_with("COMBO"))
def test_values_in_place_of_names_are_answered_by_validation(models_folder, node_id):
    node = NODES[node_id]
    if "validate_inputs" in vars(node):
        names = inspect.signature(node.validate_inputs).parameters
        for value in (3, 2.5, True, "", {}, [1], "a\\b"):
            assert "was not found" in node.validate_inputs(**dict.fromkeys(names, value))
