"""ConsisID on a live ComfyUI server: clips, caches, samplers, faces, interrupt, bad input."""

import io
import shutil
import threading

import example_inputs
import numpy as np
import pytest
from comfy_server import PromptError, PromptInterrupted, PromptRejected
from PIL import Image
from prompts import node
from safetensors.torch import load
from tiny_consisid import CONSISID_NAME

pytestmark = pytest.mark.server

FACES = f"{CONSISID_NAME}/face_encoder"
BUILT_IN = "built-in detector"
AFTER_THE_NOISE = ["decode", "latents", "noise", "sample", "save"]


@pytest.fixture(scope="module", autouse=True)
def inputs(server):
    """Pictures: drawn ones of the example workflows, a photograph of a person, and one without a face."""
    folder = server.folder / "input"
    example_inputs.write_inputs(folder)
    Image.new("RGB", (320, 320), (128, 128, 128)).save(folder / "empty.png")
    data = pytest.importorskip("skimage.data")
    shutil.copy(f"{data.__path__[0]}/astronaut.png", folder / "photograph.png")


def clip_prompt(image=example_inputs.FACE_NAME, faces=FACES, steps=2, seed=0, prefix="consisid", **conditioning):
    """A face to a clip as the example workflow has it, but for its frames, which are written as pictures."""
    settings = {
        "width": 64, "height": 64, "frames": 5, "identity_strength": 1.0, "batch_size": 1, "encoding": "sample",
        "seed": 0,
    }  # fmt: skip
    return {
        "image": node("LoadImage", image=image),
        "faces": node("ConsistentVideoFaceModelLoader", source=faces, provider="auto"),
        "face": node("ConsistentVideoFaceEncode", face_model=["faces", 0], image=["image", 0], align=True),
        "loader": node("ConsistentVideoConsisIDLoader", checkpoint=CONSISID_NAME, weight_dtype="default"),
        "guidance": node("ConsistentVideoDynamicCFG", model=["loader", 0], mode="progress", steps=steps),
        "positive": node("CLIPTextEncode", clip=["loader", 1], text="a person walks through a city at night"),
        "negative": node("CLIPTextEncode", clip=["loader", 1], text=""),
        "conditioning": node(
            "ConsistentVideoConsisIDConditioning",
            positive=["positive", 0],
            negative=["negative", 0],
            vae=["loader", 2],
            face=["face", 0],
            **{**settings, **conditioning},
        ),
        "noise": node("RandomNoise", noise_seed=seed),
        "guider": node(
            "CFGGuider",
            model=["guidance", 0],
            positive=["conditioning", 0],
            negative=["conditioning", 1],
            cfg=6.0,
        ),
        "sampler": node("ConsistentVideoReferenceSampler", algorithm="auto", eta=0.0),
        "sigmas": node("ConsistentVideoReferenceScheduler", model=["guidance", 0], steps=steps, denoise=1.0),
        "sample": node(
            "SamplerCustomAdvanced",
            noise=["noise", 0],
            guider=["guider", 0],
            sampler=["sampler", 0],
            sigmas=["sigmas", 0],
            latent_image=["conditioning", 2],
        ),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["loader", 2]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix=prefix),
        "latents": node("SaveLatent", samples=["sample", 0], filename_prefix=prefix),
    }


def frames_of(server, result):
    """Bytes (frames, height, width, 3)."""
    files = result.outputs["save"]["images"]
    return np.stack([np.asarray(Image.open(io.BytesIO(server.view(file))).convert("RGB")) for file in files])


def latents_of(server, result):
    (file,) = result.outputs["latents"]["latents"]
    return load(server.view(file))["latent_tensor"]


@pytest.fixture(scope="module")
def first(server):
    """A prompt and its result."""
    prompt = clip_prompt(seed=1)
    return prompt, server.run(prompt)


@pytest.mark.parametrize("frames", [1, 5, 9])
def test_a_clip_is_rendered_with_progress_and_listed_in_history(server, frames):
    result = server.run(clip_prompt(steps=3, seed=2, frames=frames))
    # ComfyUI leaves out steps in between that are fast and have no preview.
    assert result.progress["sample"][0] == (1, 3) and result.progress["sample"][-1] == (3, 3)
    assert latents_of(server, result).shape == (1, 16, (frames - 1) // 4 + 1, 8, 8)
    clip = frames_of(server, result)
    assert clip.shape == (frames, 64, 64, 3) and clip.std() > 2
    listed = server.history(result.prompt_id)
    assert listed["status"]["status_str"] == "success"
    assert listed["outputs"]["save"]["images"] == result.outputs["save"]["images"]


def test_the_same_prompt_again_is_served_from_the_cache(server, first):
    prompt, _ = first
    again = server.run(prompt)
    assert again.executing == [] and set(again.cached) == set(prompt)


def test_another_seed_runs_only_what_depends_on_it(server, first):
    prompt, result = first
    again = server.run(clip_prompt(seed=3))
    assert sorted(again.executing) == AFTER_THE_NOISE
    assert (latents_of(server, again) - latents_of(server, result)).abs().max() > 0.1


def test_a_clip_is_the_same_after_others_and_after_unloading(server, first):
    _, result = first
    server.run(clip_prompt(seed=1, width=96, frames=9))
    server.free()
    again = server.run(clip_prompt(seed=1, prefix="again"))
    assert (latents_of(server, again) == latents_of(server, result)).all()


@pytest.mark.parametrize(
    "change",
    [
        {"identity_strength": 0.0},
        {"image": example_inputs.PICTURE_NAME},
        {"seed": 1, "encoding": "mode"},
    ],
)
def test_strength_face_and_encoding_change_the_clip(server, first, change):
    other = latents_of(server, server.run(clip_prompt(**{"seed": 1, **change})))
    assert (other - latents_of(server, first[1])).abs().max() > 0.01


def native(sampler, scheduler, seed=4):
    """`clip_prompt` under KSampler."""
    prompt = clip_prompt(seed=seed)
    for name in ("noise", "guider", "sampler", "sigmas"):
        del prompt[name]
    prompt["sample"] = node(
        "KSampler",
        model=["guidance", 0],
        seed=seed,
        steps=2,
        cfg=6.0,
        sampler_name=sampler,
        scheduler=scheduler,
        positive=["conditioning", 0],
        negative=["conditioning", 1],
        latent_image=["conditioning", 2],
        denoise=1.0,
    )
    return prompt


def test_every_step_has_a_preview(server):
    result = server.run(clip_prompt(steps=3, seed=2, frames=9, prefix="previews"))
    assert [preview.node_id for preview in result.previews].count("sample") == 3


@pytest.mark.parametrize(("sampler", "scheduler"), [("euler", "sgm_uniform"), ("dpmpp_2m", "simple")])
def test_native_samplers_render_every_frame(server, sampler, scheduler):
    result = server.run(native(sampler, scheduler))
    assert result.progress["sample"][-1] == (2, 2)
    assert latents_of(server, result).isfinite().all()
    clip = frames_of(server, result)
    assert clip.shape == (5, 64, 64, 3) and clip.std() > 2


def test_tiled_decoding_gives_the_frames_of_the_whole(server):
    prompt = clip_prompt(seed=5, width=96, frames=9)
    whole = frames_of(server, server.run(prompt))
    prompt["decode"] = node(
        "VAEDecodeTiled",
        samples=["sample", 0],
        vae=["loader", 2],
        tile_size=64,
        overlap=32,
        temporal_size=64,
        temporal_overlap=8,
    )
    result = server.run(prompt)
    assert sorted(result.executing) == ["decode", "save"]
    tiled = frames_of(server, result)
    assert tiled.shape == whole.shape == (9, 64, 96, 3)
    # The norms of a tile are its own.
    assert np.abs(tiled.astype(int) - whole).mean() < 0.1 * whole.std()


def test_interrupt_stops_within_a_step_and_the_next_prompt_works(server):
    seen = []

    def interrupt(kind, data, result):
        if kind == "progress" and data.get("node") == "sample" and data["value"] >= 2 and not seen:
            seen.append(data["value"])
            threading.Thread(target=server.interrupt).start()

    with pytest.raises(PromptInterrupted) as caught:
        server.run(clip_prompt(steps=200, seed=6, width=256, height=256, frames=9), on_event=interrupt)
    assert caught.value.node_id == "sample"
    assert caught.value.result.progress["sample"][-1][0] <= seen[0] + 2
    assert len(frames_of(server, server.run(clip_prompt(seed=7)))) == 5


def test_a_face_without_identity_is_named_with_what_is_missing(server):
    prompt = clip_prompt("photograph.png", BUILT_IN, seed=8)
    words = "no identity: ConsisID needs the published face networks.*antelopev2"
    with pytest.raises(PromptError, match=words) as caught:
        server.run(prompt)
    assert caught.value.node_id == "conditioning" and caught.value.exception_type == "FileNotFoundError"


@pytest.mark.parametrize(
    ("image", "faces"), [("empty.png", FACES), ("empty.png", BUILT_IN), (example_inputs.PICTURE_NAME, BUILT_IN)]
)
def test_a_picture_without_a_face_is_named(server, image, faces):
    with pytest.raises(PromptError, match=r"No face was found in the picture \(\d+x\d+\).*Use a sharp") as caught:
        server.run(clip_prompt(image, faces, seed=8))
    assert caught.value.node_id == "face"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"frames": 6}, "frames 6 is not 1 more than a multiple of 4. Use 5 or 9."),
        ({"width": 72}, "width 72 is not a multiple of 16. Use 64 or 80."),
        ({"height": 100}, "height 100 is not a multiple of 16. Use 96 or 112."),
    ],
)
def test_sizes_that_cannot_be_made_are_named_and_the_server_lives(server, first, change, words):
    with pytest.raises(PromptError, match=words) as caught:
        server.run(clip_prompt(seed=1, **change))
    assert caught.value.node_id == "conditioning"
    prompt, result = first
    assert (latents_of(server, server.run(prompt)) == latents_of(server, result)).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"frames": 0}, "smaller than min of 1: frames"),
        ({"width": 32}, "smaller than min of 64: width"),
        ({"identity_strength": -0.5}, "smaller than min of 0.0: identity_strength"),
        ({"identity_strength": 11.0}, "bigger than max of 10.0: identity_strength"),
        ({"encoding": "draw"}, "encoding.*not in"),
        ({"faces": "ConsisID/face_encoder"}, "Face model 'ConsisID/face_encoder' was not found.*antelopev2"),
    ],
)
def test_values_outside_the_range_are_rejected(server, change, words):
    with pytest.raises(PromptRejected, match=words):
        server.run(clip_prompt(seed=1, **change))


@pytest.fixture
def copy(server):
    """A copy of the checkpoint that a test may damage, without face networks."""
    source = server.folder / "models" / "diffusers" / CONSISID_NAME
    folder = source.with_name("damaged")
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("face_encoder"))
    yield folder
    shutil.rmtree(folder)


def test_a_damaged_file_is_named_and_the_server_lives(server, copy, first):
    file = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    prompt = clip_prompt(seed=1)
    prompt["loader"]["inputs"]["checkpoint"] = copy.name
    with pytest.raises(PromptError, match=f"transformer.{file.name}.*damaged") as caught:
        server.run(prompt)
    assert caught.value.node_id == "loader"
    result = server.run(clip_prompt(seed=1, prefix="after"))
    assert (latents_of(server, result) == latents_of(server, first[1])).all()


def test_a_checkpoint_without_face_encoder_makes_clips_but_is_no_source_of_faces(server, copy, first):
    prompt = clip_prompt(seed=1, prefix="other")
    prompt["loader"]["inputs"]["checkpoint"] = copy.name
    result = server.run(prompt)
    assert (latents_of(server, result) == latents_of(server, first[1])).all()
    with pytest.raises(PromptRejected, match=f"Face model '{copy.name}/face_encoder' was not found"):
        server.run(clip_prompt(faces=f"{copy.name}/face_encoder"))


def test_prompts_without_a_face_are_named(server):
    prompt = clip_prompt(seed=9)
    prompt["guider"]["inputs"] |= {"positive": ["positive", 0], "negative": ["negative", 0]}
    with pytest.raises(PromptError, match="connect both prompts through ConsisID Conditioning"):
        server.run(prompt)
