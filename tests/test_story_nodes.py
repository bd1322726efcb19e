"""The story nodes as ComfyUI calls them, and windows over the panels of a batch."""

import inspect
import os

import comfy.samplers
import pytest
import torch
from activation_memory import ActivationPeak
from test_bank_files import bank_of, folders  # noqa: F401
from test_story_conditioning import embeds_of, faces, images, v1, v2  # noqa: F401
from test_story_sampler import NO_STYLE, SETTINGS, SHARING, recording, run_of, same_bank, tools, two  # noqa: F401
from tiny_unets import SIGMAS, assert_same, denoise, different, guide, latents, one_thread, prompt  # noqa: F401
from tiny_unets import build as build_unet

from consistent_video.loaders import fonts
from consistent_video.nodes import banks, comic, patches, story
from consistent_video.patches.consistent_attention import ConsistentAttention
from consistent_video.patches.context_windows import slide
from consistent_video.patches.token_sharing import Sharing
from consistent_video.story import conditioning, pages
from consistent_video.story.plan import describe
from consistent_video.story.script import parse_story

CHARACTERS = "[Ann] a girl with red hair\n[Ben] an old sailor"
PANELS = (
    "[Ann] runs #Hurry!\n[Ben] sits\n[NC] a tree #\n[Ben] and [Ann] talk\n[Ben] eats\n[Ann] jumps\n[Ann] sleeps # zzz "
)
PEOPLE = "[Ann] a woman img\n[Ben] an old man img"
# The settings of `test_story_sampler`, as the node names them.
WIDGETS = {
    "cfg": 4.0,
    "seed": 3,
    "width": 64,
    "height": 64,
    "id_panels": 2,
    "sampling_rate_32": 0.5,
    "sampling_rate_64": 0.6,
    "plain_probability_early": 0.3,
    "plain_probability_late": 0.1,
    "late_step": 2,
}


@pytest.fixture
def all_folders(folders):  # noqa: F811
    """ComfyUI's folders, with those of the pack."""
    fonts.register_folder()
    return folders


@pytest.fixture(scope="module")
def script():
    return story.StoryScript.execute(CHARACTERS, PANELS, NO_STYLE, "blurry").args[0]


def draw(tools, story_value, sampler="euler", sigmas=SIGMAS, **changes) -> tuple:  # noqa: F811
    """What Story Sampler returns: (LATENT, CHARACTER_BANK, plan)."""
    sampler = comfy.samplers.sampler_object(sampler)
    return story.StorySampler.execute(
        tools.model, tools.clip, story_value, sampler, sigmas, **{**WIDGETS, **changes}
    ).args


# Schemas


@pytest.mark.parametrize("node", [*story.NODES, patches.ConsistentSelfAttention], ids=lambda node: node.__name__)
def test_defaults_of_the_schema_are_those_of_the_function(all_folders, node):
    schema = node.define_schema()
    parameters = inspect.signature(node.execute).parameters
    assert [entry.id for entry in schema.inputs] and {entry.id for entry in schema.inputs} == set(parameters)
    for entry in schema.inputs:
        default = parameters[entry.id].default
        assert (default is not inspect.Parameter.empty) == bool(entry.optional), entry.id
        if entry.optional and hasattr(entry, "default"):
            assert entry.default == default, entry.id


# A story


def test_a_story_through_the_nodes(tools, script, two):  # noqa: F811
    latent, bank, plan = draw(tools, script)
    assert set(latent) == {"samples"}
    assert torch.equal(latent["samples"], two[0])
    assert same_bank(bank, two[1])
    assert plan == describe(script, 2)
    assert "Panel 4 (line 4): with [Ann] and [Ben] as in the references" in plan


def test_widgets_reach_the_run(tools, script):  # noqa: F811
    changes = {"start_step": 0, "step_unit": "fractions", "token_count": "random", "warm_up": "full_bank"}
    latent, bank, _ = draw(tools, script, width=72, height=56, only_panels="1", **changes)
    assert bank.origin.sharing == Sharing(0.5, 0.6, 0, 0.3, 0.1, 2, 3, "random", "full_bank", "fractions")
    assert (bank.origin.width, bank.origin.height) == (9, 7)
    assert latent["samples"].shape == (1, 4, 7, 9)


def test_a_panel_is_drawn_again(tools, script, two):  # noqa: F811
    samples, bank = two
    latent, same, plan = draw(tools, script, character_bank=bank, only_panels="7, 3-4")
    assert torch.equal(latent["samples"], samples[[2, 3, 6]])
    assert same_bank(same, bank)
    assert "[Ann] a girl with red hair: from the character bank" in plan


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"only_panels": "8"}, "panels is '8', but the story has panels 1 to 7"),
        ({"only_panels": "all"}, "'all' is not a number"),
        ({"id_panels": 3}, "id_panels asks for 3 as references"),
        ({"sigmas": torch.tensor([])}, "no step. Connect a scheduler"),
        ({"sampling_rate_32": 1.5}, "rate_32 is 1.5. Choose a value from 0 to 1"),
    ],
)
def test_wrong_inputs_are_refused(tools, script, changes, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        draw(tools, script, **changes)


def test_a_bank_of_other_settings_is_refused(tools, script, two):  # noqa: F811
    with pytest.raises(ValueError, match=r"was made with seed 3 \(here 4\)"):
        draw(tools, script, seed=4, character_bank=two[1])


def test_photomaker_in_a_story(tools, v1, images):  # noqa: F811
    people = parse_story(PEOPLE, "[Ann] runs\n[Ben] sits\n[Ben] and [Ann] talk", NO_STYLE, "blurry")
    latent, _, _ = draw(tools, people, photomaker=v1, face_images=images[:2], id_panels=1, merge_start=0.4)
    identity = conditioning.Identity(v1, images[:2], merge_start=0.4)
    assert torch.equal(latent["samples"], run_of(tools, people, identity=identity, id_panels=1).draw()[0])
    assert not torch.equal(latent["samples"], draw(tools, people, id_panels=1)[0]["samples"])


def test_photomaker_inputs_that_do_not_fit_are_refused(tools, script, v1, v2, images, faces):  # noqa: F811
    people = parse_story(PEOPLE, "[Ann] runs\n[Ben] sits", NO_STYLE)
    with pytest.raises(ValueError, match="PhotoMaker needs pictures of the person: connect them as images"):
        draw(tools, people, photomaker=v1, id_panels=1)
    with pytest.raises(ValueError, match="There are 3 face pictures for 2 characters"):
        draw(tools, people, photomaker=v1, face_images=images, id_panels=1)
    with pytest.raises(ValueError, match="'a girl with red hair' has no trigger word"):
        draw(tools, script, photomaker=v1, face_images=images[:2])
    with pytest.raises(ValueError, match="face embeds are of 1 picture.s., but there are 2 images"):
        embeds = embeds_of(faces[:1])
        draw(tools, people, photomaker=v2, face_images=images[:2], face_embeds=embeds, id_panels=1)


def test_all_panels_as_one_batch(tools, script):  # noqa: F811
    positive, negative, count = story.StoryConditioning.execute(tools.clip, script, 64, 48).args
    assert count == 7
    ((text, options),) = positive
    assert len(text) == len(options["pooled_output"]) == 7
    prompts = [conditioning.encode_text(tools.clip, script.prompt(panel), 64, 48)[0] for panel in script.panels]
    assert torch.equal(text, torch.cat([entry[0] for entry in prompts]))
    assert (options["width"], options["target_height"]) == (64, 48)
    assert torch.equal(negative[0][0], conditioning.encode_text(tools.clip, "blurry", 64, 48)[0][0])


# Banks on disk


def test_a_bank_is_saved_listed_and_loaded(folders, two):  # noqa: F811
    default = {entry.id: entry for entry in banks.SaveCharacterBank.define_schema().inputs}["filename_prefix"].default
    names = []
    for bank in (bank_of("Ann"), two[1]):
        (saved,) = banks.SaveCharacterBank.execute(bank, default).ui["banks"]
        assert (saved["subfolder"], saved["type"]) == ("character_banks", "output")
        names.append(saved["filename"])
    assert names == ["bank_00001_.safetensors", "bank_00002_.safetensors"]
    options = {entry.id: entry for entry in banks.LoadCharacterBank.define_schema().inputs}["file"].options
    assert sorted(options) == names
    assert same_bank(banks.LoadCharacterBank.execute(names[1]).args[0], two[1])
    assert banks.LoadCharacterBank.validate_inputs(names[0]) is True
    assert "Character bank 'x.safetensors' was not found" in banks.LoadCharacterBank.validate_inputs("x.safetensors")


def test_a_rewritten_bank_is_loaded_again(folders):  # noqa: F811
    banks.SaveCharacterBank.execute(bank_of("Ann"), "character_banks/bank")
    name = "bank_00001_.safetensors"
    before = banks.LoadCharacterBank.fingerprint_inputs(name)
    assert banks.LoadCharacterBank.fingerprint_inputs(name) == before
    path = folders / "output" / "character_banks" / name
    os.utime(path, ns=(1, 1))
    assert banks.LoadCharacterBank.fingerprint_inputs(name) != before


def test_a_prefix_outside_of_the_output_folder_is_refused(folders):  # noqa: F811
    with pytest.raises(Exception, match="outside the output folder|not allowed"):
        banks.SaveCharacterBank.execute(bank_of("Ann"), "../bank")
    assert not list(folders.rglob("*.safetensors"))


# Comic pages


def test_captions_of_a_story_or_of_a_text(script):
    assert pages.captions_of(7, script, "") == [
        "Hurry!", "Ben sits", "", "Ben and Ann talk", "Ben eats", "Ann jumps", "zzz",
    ]  # fmt: skip
    assert pages.captions_of(3, None, "one\n\nthree") == ["one", "", "three"]
    assert pages.captions_of(3, None, " \n ") == ["", "", ""]
    with pytest.raises(ValueError, match="Both a story and captions are given. Clear captions, or disconnect"):
        pages.captions_of(7, script, "one")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one\ntwo\n", ["one", "two"]),
        ("one\n\n", ["one", ""]),
        ("one\r\ntwo\r\n \r\n\r\n", ["one", "two"]),
        ("\ufeffone\n\ntwo\n", ["one", "two"]),
        ("\none\n\n", ["", "one"]),
        ("one\ntwo\nthree\n\n", ["one", "two", "three"]),
    ],
)
def test_a_line_for_each_picture(text, expected):
    """The last caption may be blank; blank lines after it, and between all captions, do not count."""
    assert pages.captions_of(2, None, text) == expected


def test_a_comic_page_of_a_story(all_folders, script, caplog):
    panels = torch.rand(7, 96, 96, 3, generator=torch.Generator().manual_seed(1))
    settings = ("four_panel", comic.lettering_fonts.BUNDLED, 0, 0)
    made = comic.ComicPage.execute(panels, *settings, story=script).args[0]
    captions = "\n".join(script.captions)
    assert len(made) == 2 and made.ndim == 4
    assert torch.equal(made, comic.ComicPage.execute(panels, *settings, captions=captions).args[0])
    assert not torch.equal(made, comic.ComicPage.execute(panels, *settings).args[0])
    # Panels that were drawn again: their own captions, or none and a warning.
    again = comic.ComicPage.execute(panels[:3], *settings, story=script, only_panels="1, 4-5").args[0]
    assert torch.equal(
        again, comic.ComicPage.execute(panels[:3], *settings, captions="Hurry!\nBen and Ann talk\nBen eats").args[0]
    )
    bare = comic.ComicPage.execute(panels[:3], *settings, story=script).args[0]
    assert torch.equal(bare, comic.ComicPage.execute(panels[:3], *settings).args[0])
    assert "the story has 7 panels, but there are 3 pictures" in caplog.text
    with pytest.raises(ValueError, match="8 images but 7 captions"):
        comic.ComicPage.execute(panels[[*range(7), 0]], *settings, story=script)
    with pytest.raises(ValueError, match="only_panels is '1-2', which is 2 panels, but there are 3 pictures"):
        comic.ComicPage.execute(panels[:3], *settings, story=script, only_panels="1-2")
    with pytest.raises(ValueError, match="Connect the story, or clear only_panels"):
        comic.ComicPage.execute(panels[:3], *settings, only_panels="1-3")


def test_pictures_of_every_kind_lie_on_the_paper(all_folders):
    settings = ("none", comic.lettering_fonts.BUNDLED, 0, 0)
    color = torch.rand(2, 32, 32, 3, generator=torch.Generator().manual_seed(1))
    gray, alpha = color[..., :1], torch.zeros(2, 32, 32, 1)
    alpha[:, :16] = 1
    page = comic.ComicPage.execute(torch.cat((color, alpha), -1), *settings).args[0]
    plain = comic.ComicPage.execute(color, *settings).args[0]
    assert torch.equal(page[:, :16], plain[:, :16]) and (page[:, 16:] == 1).all() and plain[:, 16:].std() > 0.1
    page = comic.ComicPage.execute(gray, *settings).args[0]
    assert torch.equal(page, comic.ComicPage.execute(gray.expand(-1, -1, -1, 3), *settings).args[0])
    assert (comic.ComicPage.execute(torch.cat((gray, alpha), -1), *settings).args[0][:, 16:] == 1).all()


# Windows over the panels of a batch

AT_ONCE = Sharing(start_step=0, plain_early=0.3, seed=5)
BRIEF = torch.tensor([6.0, 2.5, 0.0])


@pytest.fixture(scope="module")
def unet():
    with torch.inference_mode():
        return build_unet("sdxl", transformer_depth=[0, 0, 1, 1, 1, 1], transformer_depth_middle=1)


def windowed(model, panels: int, window: int, stride: int = 1, side: int = 8) -> tuple[torch.Tensor, list[list[int]]]:
    """Latents of a batch of panels through the node, and the numbers of the panels of every forward pass.

    Panels are recognised by the noise they start from.
    """
    node = patches.ConsistentSelfAttention.execute(model, 0.5, 0.5, 0, 0.3, 0.1, 20, window, 5, stride).args[0]
    node, evaluated = recording(node)
    noise = latents(panels, side, side)
    samples = denoise(guide(node, prompt(panels, 1), prompt(1, 2), 1.0), noise, sigmas=BRIEF)
    start = [round(value, 2) for value in (noise * BRIEF[0])[:, 0, 0, 0].tolist()]
    first = [given for given in evaluated if given["timestep"][0] == BRIEF[0]]
    return samples, [[start.index(round(row[0, 0, 0].item(), 2)) for row in given["input"]] for given in first]


@pytest.mark.parametrize(
    "window, stride, expected",
    [
        (2, 1, [[0, 1], [1, 2], [2, 3], [3, 4], [4, 5]]),
        (4, 1, [[0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5]]),
        (4, 2, [[0, 1, 2, 3], [2, 3, 4, 5]]),
        (4, 3, [[0, 1, 2, 3], [2, 3, 4, 5]]),
        (4, 4, [[0, 1, 2, 3], [2, 3, 4, 5]]),
        (5, 4, [[0, 1, 2, 3, 4], [1, 2, 3, 4, 5]]),
        (3, 3, [[0, 1, 2], [3, 4, 5]]),
    ],
)
def test_windows_slide_over_all_panels(unet, window, stride, expected):
    samples, found = windowed(unet, 6, window, stride)
    assert found == expected
    assert samples.isfinite().all()
    assert different(samples, windowed(unet, 6, 0)[0])


@pytest.mark.parametrize("panels, window", [(4, 4), (3, 4), (2, 64)])
def test_a_window_over_everything_is_no_window(unet, panels, window):
    samples, found = windowed(unet, panels, window)
    assert found == [list(range(panels))]
    assert torch.equal(samples, windowed(unet, panels, 0)[0])


def test_predictions_of_windows_are_averaged(unet):
    """Of 3 panels in windows of 2: the middle one is in both, with equal weights."""
    sigmas, noise = torch.tensor([6.0, 0.0]), latents(3)
    patched = ConsistentAttention(AT_ONCE).install(unet)
    averaged = denoise(guide(slide(patched, 2), prompt(3, 1), prompt(1, 2), 1.0), noise, sigmas=sigmas)
    recorder, evaluated = recording(slide(patched, 2))
    recorded = []

    def keep(apply, given):
        recorded.append(apply(given["input"], given["timestep"], **given["c"]))
        return recorded[-1]

    recorder.set_model_unet_function_wrapper(keep)
    denoise(guide(recorder, prompt(3, 1), prompt(1, 2), 1.0), noise, sigmas=sigmas)
    first, second = recorded
    expected = torch.stack((first[0], (first[1] + second[0]) / 2, second[1]))
    # Latents leave the model's space scaled.
    assert_same(averaged, unet.model.process_latent_out(expected))


def peaks_of(model, panels: int, window: int) -> tuple[int, int]:
    """Bytes that were there at once: in a forward pass without its inputs, and in the whole run, noise included."""
    inside = []

    def measured(apply, given):
        with ActivationPeak() as activations:
            output = apply(given["input"], given["timestep"], **given["c"])
        inside.append(activations.peak)
        return output

    model = slide(ConsistentAttention(AT_ONCE).install(model), window, window)
    model.set_model_unet_function_wrapper(measured)
    guider = guide(model, prompt(panels, 1), prompt(1, 2), 1.0)
    with ActivationPeak() as whole:
        denoise(guider, latents(panels, 16, 16), sigmas=torch.tensor([6.0, 0.0]))
    assert len(inside) == panels // window
    return max(inside), whole.peak


def test_memory_goes_by_the_window_not_by_the_panels(unet):
    """Of 32 panels and of 8, without latents and noise; with them it grows by some latents of each further panel."""
    (few, few_whole), (many, many_whole) = peaks_of(unet, 8, 4), peaks_of(unet, 32, 4)
    assert many <= 1.01 * few
    further_latents = 24 * 4 * 16 * 16 * 4
    assert many_whole - few_whole < 8 * further_latents
    assert peaks_of(unet, 32, 16)[0] > 3 * many


@pytest.mark.parametrize(
    "window, stride, message",
    [
        (1, 1, "window is 1: pictures in it cannot see each other. Choose 2 or more, or 0 for none"),
        (4, 5, "window_stride is 5, which leaves out pictures. Choose 1 to 4, the window"),
        (4, 0, "window_stride is 0"),
    ],
)
def test_windows_that_make_no_sense_are_refused(unet, window, stride, message):
    with pytest.raises(ValueError, match=message):
        windowed(unet, 6, window, stride)


def test_a_bank_through_the_node(tools, two):  # noqa: F811
    """Panels of Consistent Self-Attention that read a story's bank; empty names are all of the bank's."""
    samples, bank = two
    rates = (0.5, 0.6, 1, 0.3, 0.1, 2, 0, 3)

    def panel(**inputs):
        return patches.ConsistentSelfAttention.execute(tools.model, *rates, character_bank=bank, **inputs).args[0]

    positive = conditioning.encode_text(tools.clip, "an old sailor and a girl with red hair talk", 64, 64)
    negative = conditioning.encode_text(tools.clip, "blurry", 64, 64)
    noise = run_of(tools).noise[3:4]
    for names in ("", "Ann, Ben", " [Ann],[Ben], "):
        assert torch.equal(denoise(guide(panel(characters=names), positive, negative), noise), samples[3:4])
    assert not torch.equal(denoise(guide(panel(characters="Ben"), positive, negative), noise), samples[3:4])
    with pytest.raises(ValueError, match="holds Ann, Ben, but not Zoe"):
        panel(characters="Zoe")
    with pytest.raises(ValueError, match="characters is 'Ann', but no character bank is connected"):
        patches.ConsistentSelfAttention.execute(tools.model, *rates, characters="Ann")


def test_settings_are_those_of_the_sampler_tests():
    assert (WIDGETS["cfg"], WIDGETS["seed"], WIDGETS["id_panels"]) == (SETTINGS.cfg, SETTINGS.seed, SETTINGS.id_panels)
    assert (SHARING.rate_32, SHARING.rate_64, SHARING.start_step, SHARING.late_step) == (0.5, 0.6, 1, 2)
