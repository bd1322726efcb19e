"""The pack on a live ComfyUI server, over HTTP and websocket."""

import io
import json
import shutil
import threading
from pathlib import Path

import av
import damage
import pytest
from comfy_server import ComfyServer, PromptError, PromptInterrupted, PromptRejected, link_or_copy
from PIL import Image
from prompts import node, picture_to_video, text_to_video

import tiny_checkpoints

pytestmark = pytest.mark.server

SCHEMAS = Path(__file__).parent / "data" / "schema.json"
AFTER_THE_NOISE = ["noise", "sample", "decode", "video", "save"]


def frames_of(server, result):
    (file,) = result.files()
    with av.open(io.BytesIO(server.view(file))) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)], container.streams.video[0]


def test_the_server_knows_every_node_and_imported_the_pack_without_complaint(server):
    assert server.failed_imports() == []
    info = server.object_info()
    assert {name for name in info if name.startswith("ConsistentVideo")} == set(
        json.loads(SCHEMAS.read_text(encoding="utf-8"))
    )
    assert info["ConsistentVideoModelScopeLoader"]["output"] == ["MODEL", "CLIP", "VAE"]


def test_a_clip_is_rendered_with_progress_and_previews_and_listed_in_history(server):
    result = server.run(text_to_video(steps=4, seed=11))
    assert result.progress["sample"][-4:] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    pictures = [Image.open(io.BytesIO(preview.data)) for preview in result.previews if preview.node_id == "sample"]
    assert len(pictures) == 4
    width, height = pictures[0].size
    assert width / height == pytest.approx(3 / 2, abs=0.01)  # five frames of 8x8: three columns and two rows
    frames, stream = frames_of(server, result)
    assert len(frames) == 5 and frames[0].shape == (64, 64, 3) and stream.average_rate == 8
    assert frames[0].std() > 5
    listed = server.history(result.prompt_id)
    assert listed["status"]["status_str"] == "success"
    assert [file["filename"] for file in listed["outputs"]["save"]["images"]] == [result.files()[0]["filename"]]


def test_the_same_prompt_again_is_served_from_the_cache(server):
    prompt = text_to_video(steps=2, seed=12)
    server.run(prompt)
    again = server.run(prompt)
    assert again.executing == [] and set(again.cached) == set(prompt)


def test_another_seed_runs_only_what_depends_on_it(server):
    server.run(text_to_video(steps=2, seed=13))
    again = server.run(text_to_video(steps=2, seed=14))
    assert sorted(again.executing) == sorted(AFTER_THE_NOISE)


def test_replaced_weights_on_disk_are_loaded_again(server):
    source = server.folder / "models" / "diffusers" / tiny_checkpoints.MODELSCOPE_NAME
    folder = source.with_name("replaced")
    shutil.copytree(source, folder)
    first = server.run(text_to_video("replaced", steps=2))
    tiny_checkpoints.write_modelscope(source.with_name("other"), seed=5)
    shutil.rmtree(folder)
    source.with_name("other").rename(folder)
    second = server.run(text_to_video("replaced", steps=2))
    assert "loader" in second.executing
    assert (frames_of(server, first)[0][0] != frames_of(server, second)[0][0]).any()
    shutil.rmtree(folder)


def test_interrupt_stops_within_a_step_and_the_next_prompt_works(server):
    seen = []

    def interrupt(kind, data, result):
        if kind == "progress" and data.get("node") == "sample" and data["value"] == 2 and not seen:
            seen.append(data["value"])
            threading.Thread(target=server.interrupt).start()

    with pytest.raises(PromptInterrupted) as caught:
        server.run(text_to_video(steps=200, seed=15, frames=8), on_event=interrupt)
    assert caught.value.node_id == "sample"
    assert caught.value.result.progress["sample"][-1][0] <= 4
    assert len(server.run(text_to_video(steps=2, seed=16)).files()) == 1


def test_two_checkpoints_in_one_graph(server):
    folder = server.folder / "models" / "diffusers" / "second"
    tiny_checkpoints.write_modelscope(folder, seed=1)
    first = text_to_video(steps=2, seed=17, prefix="first")
    second = text_to_video("second", steps=2, seed=17, prefix="second")
    joined = first | {f"{name}2": rename_links(value) for name, value in second.items()}
    result = server.run(joined)
    assert len(result.files()) == 2
    files = [result.outputs[name]["images"][0] for name in ("save", "save2")]
    clips = [av.open(io.BytesIO(server.view(file))) for file in files]
    pictures = [next(clip.decode(video=0)).to_ndarray(format="rgb24").astype(int) for clip in clips]
    assert abs(pictures[0] - pictures[1]).mean() > 5
    alone = server.run(second | {"save": node("SaveVideo", **second["save"]["inputs"] | {"filename_prefix": "alone"})})
    assert (frames_of(server, alone)[0][0] == pictures[1]).all()
    shutil.rmtree(folder)


def rename_links(entry):
    inputs = {
        name: [f"{value[0]}2", value[1]] if isinstance(value, list) else value
        for name, value in entry["inputs"].items()
    }
    return {**entry, "inputs": inputs}


def test_models_unload_on_request_and_load_again(server):
    server.run(text_to_video(steps=2, seed=18))
    server.free()
    again = server.run(text_to_video(steps=2, seed=18))
    assert "loader" in again.executing and len(again.files()) == 1


def test_nodes_of_dead_packs_are_replaced(server):
    prompt = text_to_video(steps=2, seed=19)
    prompt["old"] = node(
        "ModelScopeT2VLoader",
        model_path=tiny_checkpoints.ORIGINAL_NAME,
        enable_attn=True,
        enable_conv=True,
        temporal_attn_strength=1.0,
        temporal_conv_strength=1.0,
    )
    prompt["old"]["_meta"] = {
        "title": "ModelScopeT2VLoader"
    }  # as the editor exports it; ComfyUI's replacement reads it
    prompt["guider"]["inputs"]["model"] = prompt["sigmas"]["inputs"]["model"] = ["old", 0]
    clip = frames_of(server, server.run(prompt))[0]
    # Its graphs have the frames as the batch of an image latent.
    prompt["latent"] = node("EmptyLatentImage", width=64, height=64, batch_size=5)
    result = server.run(prompt)
    frames = frames_of(server, result)[0]
    assert "sample" in result.executing and len(frames) == len(clip) == 5
    prompt["guider"]["inputs"]["model"] = prompt["sigmas"]["inputs"]["model"] = ["loader", 0]
    with pytest.raises(PromptError, match="5 clips of 1 frame each.*Empty Clip Latent"):
        server.run(prompt)


def test_one_frame_is_a_clip(server):
    frames, _ = frames_of(server, server.run(text_to_video(steps=2, frames=1)))
    assert len(frames) == 1


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (damage.config, "unet/config.json is not valid JSON"),
        (damage.family, "describes a UNet2DConditionModel"),
        (damage.truncated, "damaged or incomplete"),
        (damage.pickled_code, "refused"),
        (damage.channels, "expected (64, 9, 3, 3)"),
        (damage.nan, "NaN or infinite values"),
        (damage.empty, "is missing"),
    ],
)
def test_bad_checkpoints_fail_in_the_loader_and_the_server_lives(server, how, words):
    source = server.folder / "models" / "diffusers" / tiny_checkpoints.MODELSCOPE_NAME
    folder = source.with_name("broken")
    shutil.copytree(source, folder)
    how(folder)
    with pytest.raises(PromptError) as caught:
        server.run(text_to_video("broken", steps=1))
    assert caught.value.node_id == "loader"
    assert words in caught.value.exception_message and str(folder) in caught.value.exception_message
    assert not (folder / "owned").exists()
    shutil.rmtree(folder)
    assert len(server.run(text_to_video(steps=1)).outputs["save"]["images"]) == 1


@pytest.mark.parametrize(
    ("change", "value", "words"),
    [
        (("loader", "checkpoint"), "nowhere", "Download ModelScope text-to-video"),
        (("loader", "checkpoint"), "../../secrets", "was not found"),
        (("latent", "frames"), 0, "smaller than min of 1"),
        (("latent", "frames"), 1000, "bigger than max of 512"),
        (("sampler", "eta"), 2.0, "bigger than max of 1.0"),
    ],
)
def test_impossible_values_are_refused_before_anything_runs(server, change, value, words):
    prompt = text_to_video(steps=1)
    prompt[change[0]]["inputs"][change[1]] = value
    with pytest.raises(PromptRejected) as caught:
        server.run(prompt)
    assert list(caught.value.node_errors) == [change[0]] and words in str(caught.value)


def test_sizes_that_the_vae_cannot_have_name_the_nearest_ones(server):
    with pytest.raises(PromptError) as caught:
        server.run(text_to_video(width=250))
    assert caught.value.node_id == "latent"
    assert "width 250 is not a multiple of 8. Use 248 or 256." in caught.value.exception_message


def test_memory_saving_flags(tmp_path, models_folder):
    (tmp_path / "models").mkdir()
    link_or_copy(models_folder / "diffusers", tmp_path / "models" / "diffusers")
    with ComfyServer(tmp_path, arguments=("--cache-none", "--disable-smart-memory", "--fp16-unet")) as small:
        result = small.run(text_to_video(steps=2))
        assert len(result.files()) == 1 and result.cached == []
        assert "manual cast: torch.float32" in small.log()


@pytest.fixture(scope="module")
def picture(server):
    """The name of an uploaded picture."""
    data = io.BytesIO()
    Image.radial_gradient("L").convert("RGB").resize((120, 90)).save(data, "PNG")
    return server.upload_image("picture.png", data.getvalue())


def test_a_picture_becomes_a_clip_and_another_frame_rate_keeps_the_models(server, picture):
    result = server.run(picture_to_video(picture, seed=21, width=96, height=64))
    assert result.progress["sample"][-1] == (4, 4)
    frames, _ = frames_of(server, result)
    assert len(frames) == 5 and frames[0].shape == (64, 96, 3)
    slower = server.run(picture_to_video(picture, seed=21, width=96, height=64, fps=4))
    assert sorted(slower.executing) == sorted(["latent", "guider", "sample", "decode", "video", "save"])
    assert (frames_of(server, slower)[0][-1] != frames[-1]).any()
    assert server.run(picture_to_video(picture, seed=21, width=96, height=64, fps=4)).executing == []


@pytest.mark.parametrize(("name", "value"), [("fps", 0), ("fps", 1000), ("frames", 1), ("frames", 1000)])
def test_impossible_clips_of_a_picture_are_refused(server, picture, name, value):
    with pytest.raises(PromptRejected, match=f"node latent.*{name}.*Value {value}|Value {value}.*{name}"):
        server.run(picture_to_video(picture, **{name: value}))


def test_a_picture_of_one_pixel_fails_in_the_conditioning(server):
    data = io.BytesIO()
    Image.new("RGB", (1, 1)).save(data, "PNG")
    with pytest.raises(PromptError, match="1x1 pixels") as caught:
        server.run(picture_to_video(server.upload_image("pixel.png", data.getvalue())))
    assert caught.value.node_id == "latent"
