"""Stories on a live ComfyUI server: panels, banks, pages, caches, interrupt, bad input."""

import io
import shutil
import threading

import example_inputs
import pytest
from comfy_server import PromptError, PromptInterrupted
from PIL import Image, ImageChops
from prompts import node
from safetensors.torch import load, save_file
from torch import zeros

import tiny_checkpoints

pytestmark = pytest.mark.server

CHARACTER = "a girl with red hair"
PANELS = "waits for the bus #Late again.\nopens a box\nruns home #At last!"


def story_prompt(panels=PANELS, characters=CHARACTER, steps=2, seed=0, size=64, prefix="story", **settings):
    """A story as the example workflow has it; node ids are names."""
    sampler = {
        "cfg": 5.0, "id_panels": 2, "sampling_rate_32": 0.5, "sampling_rate_64": 0.5, "start_step": 0,
    }  # fmt: skip
    return {
        "checkpoint": node("CheckpointLoaderSimple", ckpt_name=tiny_checkpoints.SDXL_NAME),
        "story": node(
            "ConsistentVideoStoryScript", characters=characters, panels=panels, style="Comic book", negative=""
        ),
        "sampler": node("KSamplerSelect", sampler_name="euler"),
        "sigmas": node("BasicScheduler", model=["checkpoint", 0], scheduler="ddim_uniform", steps=steps, denoise=1.0),
        "draw": node(
            "ConsistentVideoStorySampler",
            model=["checkpoint", 0],
            clip=["checkpoint", 1],
            story=["story", 0],
            sampler=["sampler", 0],
            sigmas=["sigmas", 0],
            seed=seed,
            width=size,
            height=size,
            **{**sampler, **settings},
        ),
        "decode": node("VAEDecode", samples=["draw", 0], vae=["checkpoint", 2]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix=prefix),
        "latents": node("SaveLatent", samples=["draw", 0], filename_prefix=prefix),
    }


def pictures_of(server, result, save="save"):
    files = result.outputs[save]["images"]
    return [Image.open(io.BytesIO(server.view(file))).convert("RGB") for file in files]


def latents_of(server, result):
    (file,) = result.outputs["latents"]["latents"]
    return load(server.view(file))["latent_tensor"]


def same(first, second):
    return all(ImageChops.difference(*pair).getbbox() is None for pair in zip(first, second, strict=True))


@pytest.fixture(scope="module")
def drawn(server):
    """The result of a story that also writes its bank and its pages."""
    shutil.rmtree(server.folder / "output" / "character_banks", ignore_errors=True)
    prompt = story_prompt(seed=1)
    prompt["bank"] = node(
        "ConsistentVideoSaveCharacterBank", bank=["draw", 1], filename_prefix="character_banks/tested"
    )
    prompt["page"] = node(
        "ConsistentVideoComicPage",
        images=["decode", 0],
        layout="four_panel",
        font="ComicNeue-Bold.otf",
        size=0,
        seed=0,
        story=["story", 0],
        captions="",
    )
    prompt["pages"] = node("SaveImage", images=["page", 0], filename_prefix="page")
    return prompt, server.run(prompt)


def test_panels_pages_and_bank_are_written_with_progress_and_previews(server, drawn):
    _, result = drawn
    panels, (page,) = pictures_of(server, result), pictures_of(server, result, "pages")
    assert len(panels) == 3 and not same(panels[:1], panels[1:2])
    assert page.width > 128 and page.getpixel((1, 1)) == (255, 255, 255)
    steps = [value for value, total in result.progress["draw"] if total == 6]
    assert steps[-1] == 6 and steps == sorted(steps)
    assert {2, 4, 5, 6} <= set(steps)  # two panels at a time, then one
    assert [preview.node_id for preview in result.previews].count("draw") == 4
    (bank,) = result.outputs["bank"]["banks"]
    assert (server.folder / "output" / bank["subfolder"] / bank["filename"]).stat().st_size > 10_000
    assert "Character bank of 2 reference panels" in server.log()


def test_the_same_story_again_is_served_from_the_cache(server, drawn):
    prompt, _ = drawn
    again = server.run(prompt)
    assert again.executing == [] and set(again.cached) == set(prompt)


def test_one_panel_is_drawn_again_from_the_saved_bank(server, drawn):
    _, result = drawn
    prompt = story_prompt(seed=1, prefix="again", only_panels="3")
    prompt["load"] = node("ConsistentVideoLoadCharacterBank", file="tested_00001_.safetensors")
    prompt["draw"]["inputs"]["character_bank"] = ["load", 0]
    assert (latents_of(server, server.run(prompt)) == latents_of(server, result)[2:]).all()


def test_a_story_is_the_same_after_others(server, drawn):
    _, result = drawn
    server.run(story_prompt(seed=1, size=96, prefix="larger"))
    server.run(story_prompt(seed=1, panels="sleeps\nwakes up\neats", prefix="other"))
    server.free()
    again = server.run(story_prompt(seed=1, prefix="first"))
    assert (latents_of(server, again) == latents_of(server, result)).all()
    assert same(pictures_of(server, again), pictures_of(server, result))


def test_interrupt_stops_within_a_step_and_the_next_story_works(server):
    seen = []

    def interrupt(kind, data, result):
        if kind == "progress" and data.get("node") == "draw" and data["value"] >= 4 and not seen:
            seen.append(data["value"])
            threading.Thread(target=server.interrupt).start()

    with pytest.raises(PromptInterrupted) as caught:
        server.run(story_prompt(steps=100, seed=2), on_event=interrupt)
    assert caught.value.node_id == "draw"
    assert caught.value.result.progress["draw"][-1][0] <= 10
    assert len(pictures_of(server, server.run(story_prompt(seed=3)))) == 3


def test_pictures_of_a_batch_see_each_other_under_ksampler(server):
    prompt = story_prompt(seed=4, prefix="batch")
    for name in ("sampler", "sigmas"):
        del prompt[name]
    prompt["attention"] = node(
        "ConsistentVideoConsistentSelfAttention",
        model=["checkpoint", 0],
        sampling_rate_32=0.5,
        sampling_rate_64=0.5,
        start_step=0,
        plain_probability_early=0.0,
        plain_probability_late=0.0,
        late_step=20,
        window=0,
        seed=0,
    )
    prompt["texts"] = node(
        "ConsistentVideoStoryConditioning", clip=["checkpoint", 1], story=["story", 0], width=64, height=64
    )
    prompt["latent"] = node("EmptyLatentImage", width=64, height=64, batch_size=["texts", 2])
    prompt["draw"] = node(
        "KSampler",
        model=["attention", 0],
        seed=4,
        steps=2,
        cfg=5.0,
        sampler_name="euler",
        scheduler="normal",
        positive=["texts", 0],
        negative=["texts", 1],
        latent_image=["latent", 0],
        denoise=1.0,
    )
    together = latents_of(server, server.run(prompt))
    prompt["draw"]["inputs"]["model"] = ["checkpoint", 0]
    apart = latents_of(server, server.run(prompt))
    assert len(together) == 3
    assert all((one - other).abs().max() > 0.1 for one, other in zip(together, apart))


def test_a_face_becomes_the_character(server):
    (server.folder / "input").mkdir(exist_ok=True)
    example_inputs.write_inputs(server.folder / "input")
    faces = {"face": node("LoadImage", image=example_inputs.FACE_NAME)}
    prompt = story_prompt(characters="a woman img in a coat", seed=5, prefix="face") | faces
    prompt["photomaker"] = node(
        "ConsistentVideoPhotoMakerLoader", model=["checkpoint", 0], file="photomaker-v1.bin", lora_strength=1.0
    )
    inputs = prompt["draw"]["inputs"]
    inputs |= {"model": ["photomaker", 0], "photomaker": ["photomaker", 1], "face_images": ["face", 0]}
    first = latents_of(server, server.run(prompt))
    prompt["face"]["inputs"]["image"] = example_inputs.PICTURE_NAME
    other = latents_of(server, server.run(prompt))
    assert all((one - another).abs().max() > 0.01 for one, another in zip(first, other))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"characters": "[Ana] a girl", "panels": "[Bob] sleeps"}, r"line 1: unknown character \[Bob\]"),
        ({"panels": "waits\n[NC] the sky\nruns"}, r"line 2: \[NC\].*first 2 panels"),
        ({"characters": "[Ana] a girl", "panels": "[Ana] sleeps\n[NC] the sky"}, "id_panels asks for 2"),
        ({"panels": " \n "}, "no panels"),
        ({"panels": "\n".join(["runs"] * 200)}, "200 panels.*at most 100"),
        ({"only_panels": "7"}, "panels 1 to 3"),
    ],
)
def test_a_wrong_script_is_named_and_the_server_lives(server, change, words):
    with pytest.raises(PromptError, match=words):
        server.run(story_prompt(seed=6, **change))
    assert server.queue()["queue_running"] == []


@pytest.mark.parametrize(
    ("characters", "words"), [("a woman in a coat", "no trigger word"), ("a woman img img in a coat", "trigger")]
)
def test_a_description_without_or_with_two_trigger_words_is_named(server, characters, words):
    example_inputs.write_inputs(server.folder / "input")
    prompt = story_prompt(characters=characters, seed=7)
    prompt["face"] = node("LoadImage", image=example_inputs.FACE_NAME)
    prompt["photomaker"] = node(
        "ConsistentVideoPhotoMakerLoader", model=["checkpoint", 0], file="photomaker-v1.bin", lora_strength=1.0
    )
    prompt["draw"]["inputs"] |= {"photomaker": ["photomaker", 1], "face_images": ["face", 0]}
    with pytest.raises(PromptError, match=words):
        server.run(prompt)


def test_banks_that_cannot_be_read_are_named(server, drawn):
    folder = server.folder / "output" / "character_banks"
    save_file({"up.weight": zeros(2, 2)}, folder / "lora.safetensors")
    (folder / "empty.safetensors").touch()
    for file, words in (("lora", "no character bank"), ("empty", "damaged")):
        prompt = story_prompt(seed=8)
        prompt["load"] = node("ConsistentVideoLoadCharacterBank", file=f"{file}.safetensors")
        prompt["draw"]["inputs"]["character_bank"] = ["load", 0]
        with pytest.raises(PromptError, match=words):
            server.run(prompt)
    prompt["load"]["inputs"]["file"] = "missing.safetensors"
    # the story itself is fine: ComfyUI runs it, and leaves out the panels
    errors = server.run(prompt).node_errors["load"]["errors"]
    assert "was not found. Save one" in errors[0]["details"]


def test_a_bank_of_another_run_is_named(server, drawn):
    for change, words in (({"seed": 9}, "seed 1"), ({"steps": 3, "seed": 1}, "2 steps"), ({"size": 96}, "64x64")):
        prompt = story_prompt(**{"seed": 1, **change})
        prompt["load"] = node("ConsistentVideoLoadCharacterBank", file="tested_00001_.safetensors")
        prompt["draw"]["inputs"]["character_bank"] = ["load", 0]
        with pytest.raises(PromptError, match=words):
            server.run(prompt)
