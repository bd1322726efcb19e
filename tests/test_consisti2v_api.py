"""ConsistI2V on a live ComfyUI server: the original's numbers through the whole graph, caches, interrupt, bad input."""

import io
import json
import shutil
import threading
from pathlib import Path

import pytest
from comfy_server import PromptError, PromptInterrupted, PromptRejected
from example_inputs import disc_clip
from PIL import Image
from prompts import node
from safetensors.torch import load, load_file, save_file

import tiny_checkpoints

pytestmark = pytest.mark.server

GOLDENS = Path(__file__).parent / "goldens" / "consisti2v_A"
META = json.loads((GOLDENS / "meta.json").read_text(encoding="utf-8"))
GOLDEN_CHECKPOINT = "consisti2v-golden"
SCALE = 0.18215


@pytest.fixture(scope="module")
def golden_server(server):
    """The server with the golden weights as a published folder, and the recorded inputs."""
    folder = server.folder / "models" / "diffusers" / GOLDEN_CHECKPOINT
    shutil.copytree(
        folder.with_name(tiny_checkpoints.CONSISTI2V_NAME), folder, ignore=shutil.ignore_patterns("scheduler")
    )
    config = json.loads((GOLDENS / "unet_config.json").read_text(encoding="utf-8"))
    named = {"_class_name": tiny_checkpoints.CONSISTI2V_UNET["_class_name"], **config}
    (folder / "unet" / "config.json").write_text(json.dumps(named), encoding="utf-8")
    shutil.copy(GOLDENS / "unet.safetensors", folder / "unet" / "diffusion_pytorch_model.safetensors")
    tiny_checkpoints.write_scheduler(folder, META["scheduler"])
    recorded = load_file(GOLDENS / "tensors.safetensors")
    recorded["first_frame"] = recorded["pipe.first_frame_latent"].unsqueeze(2) / SCALE
    save_file(recorded, server.folder / "input" / "recorded.safetensors")
    yield server
    shutil.rmtree(folder)


def golden_prompt(name: str) -> dict:
    """One of the original's recorded runs as a graph: everything but the drawn numbers comes from our nodes."""
    run = META["runs"][name]
    prompt = {
        "loader": node("ConsistentVideoConsistI2VLoader", checkpoint=GOLDEN_CHECKPOINT, weight_dtype="fp32"),
        "positive": node("RecordedText", key="pipe.text_cond"),
        "negative": node("RecordedText", key="pipe.text_uncond"),
        "first_frame": node("RecordedLatent", key="first_frame"),
        "conditioning": node(
            "ConsistentVideoConsistI2VConditioning",
            positive=["positive", 0],
            negative=["negative", 0],
            vae=["loader", 2],
            first_frame_latent=["first_frame", 0],
            width=64,
            height=64,
            frames=META["frames"],
            frame_stride=META["frame_stride"],
            camera_motion="none",
            batch_size=1,
        ),
        "noise": node("RecordedNoise", key=f"{name}.initial_noise"),
        "guider": node(
            "ConsistentVideoImageTextGuider",
            model=["loader", 0],
            positive=["conditioning", 0],
            negative=["conditioning", 1],
            cfg_text=run["guidance_scale_txt"],
            cfg_image=run["guidance_scale_img"],
            rescale=run["guidance_rescale"],
        ),
        "sampler": node("ConsistentVideoReferenceSampler", algorithm="auto", eta=0.0),
        "sigmas": node("ConsistentVideoReferenceScheduler", model=["loader", 0], steps=META["steps"], denoise=1.0),
        "sample": node(
            "SamplerCustomAdvanced",
            noise=["noise", 0],
            guider=["guider", 0],
            sampler=["sampler", 0],
            sigmas=["sigmas", 0],
            latent_image=["conditioning", 2],
        ),
        "save": node("SaveLatent", samples=["sample", 0], filename_prefix=name),
    }
    if run["frameinit"]:
        filtering = META["filter"]
        prompt["frame_init"] = node(
            "ConsistentVideoFrameInitNoise",
            noise=["noise", 0],
            model=["loader", 0],
            static_video=["conditioning", 3],
            noise_level=META["frameinit_noise_level"],
            filter="gaussian",
            order=filtering["n"],
            spatial_stop=filtering["d_s"],
            temporal_stop=filtering["d_t"],
        )
        prompt["sample"]["inputs"]["noise"] = ["frame_init", 0]
    return prompt


@pytest.mark.parametrize("name", META["runs"])
def test_the_graph_gives_the_latents_of_the_original(golden_server, name):
    result = golden_server.run(golden_prompt(name))
    (file,) = result.files()
    latents = load(golden_server.view(file))["latent_tensor"]
    expected = load_file(GOLDENS / "tensors.safetensors")[f"{name}.latents"]
    assert (latents * SCALE - expected).abs().max() < 2e-4
    assert result.progress["sample"][-1] == (META["steps"], META["steps"])


@pytest.fixture(scope="module")
def image(server):
    data = io.BytesIO()
    Image.fromarray(disc_clip(1, 96)[0]).save(data, "PNG")
    return server.upload_image("consisti2v.png", data.getvalue())


def clip_prompt(image, steps=2, seed=0, **conditioning):
    """A clip of a picture as the example workflow has it."""
    checkpoint = tiny_checkpoints.CONSISTI2V_NAME
    settings = {
        "width": 64, "height": 64, "frames": 4, "frame_stride": 3, "camera_motion": "none", "batch_size": 1,
    }  # fmt: skip
    return {
        "loader": node("ConsistentVideoConsistI2VLoader", checkpoint=checkpoint, weight_dtype="default"),
        "image": node("LoadImage", image=image),
        "positive": node("CLIPTextEncode", clip=["loader", 1], text="a boat"),
        "negative": node("CLIPTextEncode", clip=["loader", 1], text=""),
        "conditioning": node(
            "ConsistentVideoConsistI2VConditioning",
            positive=["positive", 0],
            negative=["negative", 0],
            vae=["loader", 2],
            **{"first_frame": ["image", 0], **settings, **conditioning},
        ),
        "shared": node("ConsistentVideoSharedNoise", noise_seed=seed, mode="mixed", alpha=1.0),
        "noise": node(
            "ConsistentVideoFrameInitNoise",
            noise=["shared", 0],
            model=["loader", 0],
            static_video=["conditioning", 3],
            noise_level=850,
            filter="gaussian",
            order=4,
            spatial_stop=0.25,
            temporal_stop=0.25,
        ),
        "sample": node(
            "SamplerCustom",
            model=["loader", 0],
            add_noise=True,
            noise_seed=seed,
            cfg=7.5,
            positive=["conditioning", 0],
            negative=["conditioning", 1],
            sampler=["sampler", 0],
            sigmas=["sigmas", 0],
            latent_image=["conditioning", 2],
        ),
        "sampler": node("KSamplerSelect", sampler_name="euler"),
        "sigmas": node("ConsistentVideoReferenceScheduler", model=["loader", 0], steps=steps, denoise=1.0),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["loader", 2]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="consisti2v"),
    }


def advanced(image, steps=2, seed=0, **conditioning):
    """`clip_prompt` with FrameInit noise under SamplerCustomAdvanced."""
    prompt = clip_prompt(image, steps, seed, **conditioning)
    prompt["guider"] = node(
        "ConsistentVideoImageTextGuider",
        model=["loader", 0],
        positive=["conditioning", 0],
        negative=["conditioning", 1],
        cfg_text=7.5,
        cfg_image=1.0,
        rescale=0.0,
    )
    prompt["sample"] = node(
        "SamplerCustomAdvanced",
        noise=["noise", 0],
        guider=["guider", 0],
        sampler=["sampler", 0],
        sigmas=["sigmas", 0],
        latent_image=["conditioning", 2],
    )
    return prompt


def test_the_native_sampler_node_renders_every_frame(server, image):
    prompt = clip_prompt(image)
    del prompt["shared"], prompt["noise"]
    assert len(server.run(prompt).files()) == 4


def test_another_seed_does_not_encode_the_picture_again(server, image):
    server.run(advanced(image, seed=1))
    assert sorted(server.run(advanced(image, seed=2)).executing) == ["decode", "noise", "sample", "save", "shared"]
    again = server.run(advanced(image, seed=2))
    assert again.executing == []


def test_interrupt_stops_within_a_step_and_the_next_prompt_works(server, image):
    seen = []

    def interrupt(kind, data, result):
        if kind == "progress" and data.get("node") == "sample" and data["value"] == 2 and not seen:
            seen.append(data["value"])
            threading.Thread(target=server.interrupt).start()

    with pytest.raises(PromptInterrupted) as caught:
        # steps long enough for the request to arrive within one
        server.run(advanced(image, steps=200, seed=3, frames=24), on_event=interrupt)
    assert caught.value.node_id == "sample"
    assert caught.value.result.progress["sample"][-1][0] <= 4
    assert len(server.run(advanced(image, seed=4)).files()) == 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"frames": 1}, "smaller than min of 2: frames"),
        ({"frame_stride": 0}, "smaller than min of 1: frame_stride"),
        ({"frame_stride": 61}, "bigger than max of 60: frame_stride"),
        ({"camera_motion": "orbit"}, "camera_motion.*not in"),
    ],
)
def test_values_outside_the_range_are_rejected(server, image, change, words):
    with pytest.raises(PromptRejected, match=words):
        server.run(advanced(image, seed=5, **change))


@pytest.mark.parametrize("both", [False, True])
def test_no_first_frame_or_two_are_named_and_the_server_lives(server, image, both):
    prompt = advanced(image, seed=5)
    if both:
        prompt["one"] = node(
            "ConsistentVideoEmptyLatent", vae=["loader", 2], width=64, height=64, frames=1, batch_size=1
        )
        prompt["conditioning"]["inputs"]["first_frame_latent"] = ["one", 0]
    else:
        del prompt["conditioning"]["inputs"]["first_frame"]
    with pytest.raises(PromptError, match="Connect either first_frame .*only one of the two"):
        server.run(prompt)
    assert len(server.run(advanced(image, seed=5)).files()) == 4


def test_a_picture_too_small_to_pan_over_is_named(server, image):
    with pytest.raises(PromptError, match="no room to pan in.*Use a wider picture"):
        server.run(advanced(image, seed=5, camera_motion="pan_left", width=512, height=64))


def test_a_static_video_of_another_size_is_named(server, image):
    prompt = advanced(image, seed=6)
    prompt["latent"] = node(
        "ConsistentVideoEmptyLatent", vae=["loader", 2], width=64, height=96, frames=4, batch_size=1
    )
    prompt["noise"]["inputs"]["static_video"] = ["latent", 0]
    with pytest.raises(PromptError, match="static video is .*latent to sample is .*Encode the static video"):
        server.run(prompt)
