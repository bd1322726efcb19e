"""Prompts of panels, alone and in batches, and people from pictures in stories."""

import dataclasses

import pytest
import tiny_photomaker
import torch
from test_i2vgenxl_parity import picture_of
from test_story_sampler import CONTEXT, NO_STYLE, SIGMAS, recording, run_of, tools  # noqa: F401
from tiny_faces import BrightSpotDetector, LinearRecogniser, spot_picture
from tiny_unets import one_thread  # noqa: F401

from consistent_video.faces.arcface import ArcFace
from consistent_video.faces.embeddings import FaceEmbeds, photomaker_embeddings
from consistent_video.faces.face_model import FaceModel
from consistent_video.faces.photomaker import encode, encode_tensors
from consistent_video.faces.photomaker_faces import faces_for_photomaker
from consistent_video.faces.scrfd import Scrfd
from consistent_video.loaders.photomaker import load_photomaker
from consistent_video.story.conditioning import Identity, batch, encode_panel, encode_text
from consistent_video.story.script import parse_story

SIZE = 96, 64
PEOPLE = "[Ann] a woman img with red hair\n[Ben] an old man img"
STORY = parse_story(
    PEOPLE, "[Ann] runs\n[Ben] sits\n[NC] a tree\n[Ben] and [Ann] talk\n[Ann] waves at [Ann]", NO_STYLE, "blurry"
)
MAIN = parse_story("a man img", "reads\n[NC] a tree", NO_STYLE)


@pytest.fixture(scope="module")
def clip(tools):  # noqa: F811
    return tools.clip


def load_version(version: str, folder):
    path = tiny_photomaker.write_photomaker(folder / f"{version}.safetensors", version, CONTEXT, lora=False)
    with torch.inference_mode():
        return load_photomaker(path, torch.float32)[0]


@pytest.fixture(scope="module")
def v1(tmp_path_factory):
    return load_version("v1", tmp_path_factory.mktemp("photomaker"))


@pytest.fixture(scope="module")
def v2(tmp_path_factory):
    return load_version("v2", tmp_path_factory.mktemp("photomaker"))


@pytest.fixture(scope="module")
def images():
    return torch.stack([picture_of(90, 130, seed=seed) for seed in range(3)])


@pytest.fixture(scope="module")
def faces():
    return torch.randn(3, 512, generator=torch.Generator().manual_seed(5))


def same(conditioning: list, other: list) -> bool:
    """Whether two CONDITIONINGs agree bit for bit."""
    return len(conditioning) == len(other) and all(
        torch.equal(text, others)
        and options.keys() == more.keys()
        and all(
            torch.equal(value, more[key]) if isinstance(value, torch.Tensor) else value == more[key]
            for key, value in options.items()
        )
        for (text, options), (others, more) in zip(conditioning, other)
    )


def text_of(length: int, seed: int, pooled: bool = True) -> list:
    """CONDITIONING of one entry."""
    generator = torch.Generator().manual_seed(seed)
    options = {"pooled_output": torch.randn(1, 3, generator=generator)} if pooled else {"pooled_output": None}
    return [[torch.randn(1, length, 4, generator=generator), {**options, "width": 64}]]


# Texts


def test_a_text_has_the_size_of_the_pictures(clip):
    ((text, options),) = encode_text(clip, "a (red:1.2) hat", *SIZE)
    ((expected, plain),) = clip.encode_from_tokens_scheduled(clip.tokenize("a (red:1.2) hat"))
    assert torch.equal(text, expected)
    assert torch.equal(options.pop("pooled_output"), plain.pop("pooled_output"))
    assert options == {**plain, "width": 96, "height": 64, "target_width": 96, "target_height": 64}


def test_a_panel_has_its_prompt_in_the_style(clip):
    story = parse_story("[Ann] a girl", "[Ann] runs #Off!", "Comic book")
    expected = story.style.apply("a girl runs")
    assert "a girl runs" in expected and expected != "a girl runs"
    assert same(encode_panel(clip, story, story.panels[0], *SIZE), encode_text(clip, expected, *SIZE))


def test_a_batch_has_a_row_of_each():
    texts = [text_of(5, seed) for seed in range(3)]
    ((found, options),) = batch(texts)
    assert torch.equal(found, torch.cat([text for ((text, _),) in texts]))
    assert torch.equal(options["pooled_output"], torch.cat([extra["pooled_output"] for ((_, extra),) in texts]))
    assert options["width"] == 64
    assert texts[0][0][1]["pooled_output"].shape == (1, 3)


def test_texts_of_several_lengths_are_repeated_as_a_whole():
    ((found, _),) = batch([text_of(4, 0), text_of(6, 1)])
    assert found.shape == (2, 12, 4)
    assert torch.equal(found[:1], text_of(4, 0)[0][0].repeat(1, 3, 1))
    assert torch.equal(found[1:], text_of(6, 1)[0][0].repeat(1, 2, 1))


def test_long_prompts_draw_what_they_draw_alone(tools):  # noqa: F811
    """Repeated texts change no picture: an empty bank leaves panels to themselves."""
    words = " ".join(["red", "green", "blue", "old", "new"] * 20)
    story = parse_story("a girl", f"runs\nsees {words}", NO_STYLE)
    unshared = dataclasses.replace(run_of(tools, story).settings.sharing, rate_32=0.0, rate_64=0.0)
    samples, _ = run_of(tools, story, sharing=unshared).draw()
    alone = [run_of(tools, story, sharing=unshared, id_panels=1).draw(wanted=[panel])[0] for panel in (0, 1)]
    assert (samples - torch.cat(alone)).abs().max() < 1e-4 * samples.abs().max()


def test_entries_without_a_pooled_text_stay_without():
    assert batch([text_of(5, 0, pooled=False), text_of(5, 1, pooled=False)])[0][1]["pooled_output"] is None


def test_several_entries_are_batched_one_by_one():
    first, second = [*text_of(5, 0), *text_of(5, 1)], [*text_of(5, 2), *text_of(5, 3)]
    found = batch([first, second])
    assert same(found[:1], batch([first[:1], second[:1]])) and same(found[1:], batch([first[1:], second[1:]]))


def test_conditionings_of_different_numbers_of_entries_are_refused():
    with pytest.raises(ValueError, match="different numbers of entries, as after Conditioning .Combine.. Draw these"):
        batch([text_of(5, 0), [*text_of(5, 1), *text_of(5, 2)]])


# People from pictures


def expected_panel(identity: Identity, clip, text: str, pictures: list[int], counts: list[int]) -> list:
    size = {"width": 96, "height": 64, "target_width": 96, "target_height": 64}
    embeds, shown = identity.face_embeds, identity.has_face
    return encode(
        identity.photomaker,
        clip,
        identity.images[pictures],
        text,
        face_embeds=None if embeds is None else embeds[pictures],
        has_face=None if shown is None else shown[pictures],
        counts=counts,
        merge_start=identity.merge_start,
        sigmas=SIGMAS,
        size_options=size,
    )[0]


@pytest.mark.parametrize(
    "panel, text, pictures",
    [
        (0, "a woman img with red hair runs", [0]),
        (1, "an old man img sits", [1]),
        (3, "an old man img and a woman img with red hair talk", [1, 0]),
        (4, "a woman img with red hair waves at a woman img with red hair", [0, 0]),
    ],
    ids=["first", "second", "both, in the order of the text", "twice the same"],
)
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_everybody_has_the_own_picture(request, clip, images, faces, version, panel, text, pictures):
    embeds = faces[:2] if version == "v2" else None
    identity = Identity(request.getfixturevalue(version), images[:2], embeds)
    found = encode_panel(clip, STORY, STORY.panels[panel], *SIZE, identity, SIGMAS)
    assert len(found) == 2
    assert same(found, expected_panel(identity, clip, text, pictures, [1] * len(pictures)))


def test_one_character_without_a_name_has_all_pictures(v1, clip, images):
    identity = Identity(v1, images)
    found = encode_panel(clip, MAIN, MAIN.panels[0], *SIZE, identity, SIGMAS)
    assert same(found, expected_panel(identity, clip, "a man img, reads", [0, 1, 2], [3]))


@pytest.mark.parametrize("story, panel", [(STORY, 2), (MAIN, 1)], ids=["named", "described"])
def test_a_panel_of_nobody_is_text_only(v1, clip, images, story, panel):
    found = encode_panel(clip, story, story.panels[panel], *SIZE, Identity(v1, images[:2]), SIGMAS)
    assert same(found, encode_text(clip, "a tree", *SIZE))


def test_pictures_without_a_face_do_not_count(v2, clip, images, faces):
    shown = torch.tensor([True, False, True])
    identity = Identity(v2, images, faces, shown)
    found = encode_panel(clip, MAIN, MAIN.panels[0], *SIZE, identity, SIGMAS)
    expected = encode_tensors(v2, clip, images[[0, 2]], "a man img, reads", face_embeds=faces[[0, 2]], counts=[2])
    assert torch.equal(found[1][0], expected.merged)
    with pytest.raises(ValueError, match="Panels, line 2: No face was found in any picture. PhotoMaker v2 needs at"):
        encode_panel(clip, STORY, STORY.panels[1], *SIZE, identity, SIGMAS)
    with pytest.raises(ValueError, match="Panels, line 4: No face was found in any picture of person 1"):
        encode_panel(clip, STORY, STORY.panels[3], *SIZE, identity, SIGMAS)


def test_the_second_version_needs_faces(v2, clip, images):
    with pytest.raises(
        ValueError, match="Panels, line 1: This is a PhotoMaker v2 file, which needs a face recognition"
    ):
        encode_panel(clip, STORY, STORY.panels[0], *SIZE, Identity(v2, images[:2]), SIGMAS)


@pytest.mark.parametrize("count", [1, 3])
def test_one_picture_per_named_character(v1, images, count):
    with pytest.raises(ValueError, match=f"There are {count} face pictures for 2 characters. Give one picture per"):
        Identity(v1, images[:count]).check(STORY)
    Identity(v1, images[:2]).check(STORY)
    Identity(v1, images[:count]).check(MAIN)


@pytest.mark.parametrize("description", ["an old man", "an old manimg", "an old man with an image"])
def test_a_description_without_the_trigger_word_is_refused(v1, images, description):
    story = parse_story(f"\n[Ann] a woman img\n[Ben] {description}", "[Ann] runs", NO_STYLE)
    with pytest.raises(ValueError, match=f"Characters, line 3: '{description}' has no trigger word. Write 'img' after"):
        Identity(v1, images[:2]).check(story)


def test_a_run_checks_the_pictures_first(tools, v1, images):  # noqa: F811
    with pytest.raises(ValueError, match="There are 3 face pictures for 2 characters"):
        run_of(tools, STORY, identity=Identity(v1, images), id_panels=1)


# Drawn


def test_pictures_reach_their_character_only(tools, v1, images):  # noqa: F811
    samples, _ = run_of(tools, STORY, identity=Identity(v1, images[:2]), id_panels=1).draw()
    other, _ = run_of(tools, STORY, identity=Identity(v1, images[[0, 2]]), id_panels=1).draw()
    changed = [not torch.equal(ours, theirs) for ours, theirs in zip(samples, other)]
    assert changed == [False, True, False, True, False]
    assert torch.equal(run_of(tools, STORY, id_panels=1).draw(wanted=[2])[0], samples[2:3])


def test_single_panels_with_pictures_are_drawn_as_they_were(tools, v1, images):  # noqa: F811
    run = run_of(tools, STORY, identity=Identity(v1, images[:2]), id_panels=1)
    samples, bank = run.draw()
    assert torch.equal(run.draw(bank, [3, 4])[0], samples[[3, 4]])
    # The text alone in the first step, which shares nothing; then the person, under the second entry.
    assert {slot.evaluation[:3] for tokens in bank.characters.values() for slot in tokens} == {
        (0, 1, 1),
        (0, 1, 2),
        (1, 0, 1),
        (1, 0, 2),
    }


@pytest.mark.parametrize("merge_start, text_steps", [(0.0, 1), (0.2, 2), (0.5, 3), (0.79, 4), (0.8, 5), (1.0, 5)])
def test_the_person_joins_at_the_published_step(tools, v1, images, merge_start, text_steps):  # noqa: F811
    """Steps 0 to int(merge_start * steps) see the text alone, of all passes; five steps of another schedule."""
    sigmas = torch.tensor([14.6, 9.0, 2.0, 0.9, 0.3, 0.0])
    model, evaluated = recording(tools.model)
    identity = Identity(v1, images[:1], merge_start=merge_start)
    story = parse_story("a man img", "reads\nwrites", NO_STYLE)
    run_of(tools, story, sigmas=sigmas, model=model, identity=identity, id_panels=1, cfg=1.0).draw()
    assert len(evaluated) == 10
    for number, panel in enumerate(story.panels):
        found = encode_tensors(v1, tools.clip, images[:1], story.prompt(panel), counts=[1])
        expected = [found.text_only] * text_steps + [found.merged] * (5 - text_steps)
        given = [given["c"]["c_crossattn"] for given in evaluated[5 * number : 5 * number + 5]]
        assert [torch.equal(*pair) for pair in zip(given, expected)] == [True] * 5
        assert not torch.equal(found.text_only, found.merged)


# Faces of the pictures


@pytest.fixture(scope="module")
def face_model():
    return FaceModel("spots", Scrfd(BrightSpotDetector(), "det"), ArcFace(LinearRecogniser(), "rec"))


@pytest.fixture(scope="module")
def portraits():
    """Pictures of which the second shows no face."""
    shown = [spot_picture(spots=spots) for spots in (((96, 96),), (), ((160, 64),))]
    return torch.stack([torch.from_numpy(picture).float() / 255 for picture in shown])


def embeds_of(rows: torch.Tensor | None) -> FaceEmbeds:
    return FaceEmbeds(torch.zeros(1, 8, 8, 3), None, None, rows, None, [], {})


def test_faces_of_pictures(v2, face_model, portraits):
    embeddings, shown = faces_for_photomaker(v2, portraits, face_model, None)
    expected, kept = photomaker_embeddings(face_model, portraits)
    assert shown.tolist() == [True, False, True] and kept == [0, 2]
    assert torch.equal(embeddings[[0, 2]], expected) and embeddings.shape == (3, 512)


def test_the_first_version_needs_no_faces(v1, face_model, images, faces):
    assert faces_for_photomaker(v1, images, face_model, embeds_of(faces)) == (None, None)


def test_face_embeds_take_the_place_of_a_face_model(v2, images, faces):
    embeddings, shown = faces_for_photomaker(v2, images[:1], None, embeds_of(faces[:1]))
    assert torch.equal(embeddings, faces[:1]) and shown is None
    assert faces_for_photomaker(v2, images, None, None) == (None, None)


def test_faces_that_do_not_fit_are_refused(v2, face_model, images, faces):
    with pytest.raises(
        ValueError, match="The face embeds are of 1 picture.s., but there are 2 images. Connect face_mo"
    ):
        faces_for_photomaker(v2, images[:2], None, embeds_of(faces[:1]))
    with pytest.raises(ValueError, match="Connect either face_model or face_embeds, not both"):
        faces_for_photomaker(v2, images[:1], face_model, embeds_of(faces[:1]))
    with pytest.raises(ValueError, match="The face embeds hold no identity, because the face model had no recog"):
        faces_for_photomaker(v2, images[:1], None, embeds_of(None))
    with pytest.raises(ValueError, match="PhotoMaker needs pictures of the person: connect them as images"):
        faces_for_photomaker(v2, None, face_model, None)
