"""Loading checkpoints: every published file layout works, everything damaged is named with a remedy."""

import json
import shutil

import comfy.utils
import damage
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_checkpoints
from consistent_video.loaders import assembly, audit, checkpoint, folders, network, single_file, weights
from consistent_video.loaders.families import MODELSCOPE
from consistent_video.models.unet3d import ModelScopeUNet

pytestmark = pytest.mark.usefixtures("memory_mode")

WEIGHTS = "diffusion_pytorch_model"


@pytest.fixture
def copy(models_folder, modelscope_folder, request):
    """A checkpoint folder of its own, listed by ComfyUI, that a test may damage."""
    folder = models_folder / "diffusers" / f"copy-{request.node.name}".replace("[", "-").replace("]", "")
    shutil.copytree(modelscope_folder, folder)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def unet_state(modelscope_folder):
    return load_file(modelscope_folder / "unet" / f"{WEIGHTS}.safetensors")


@pytest.fixture
def single(models_folder, request):
    """Writes a state dict into a file of the diffusion_models folder."""
    written = []

    def write(state, name="network.safetensors"):
        path = models_folder / "diffusion_models" / name
        save_file(state, path) if name.endswith(".safetensors") else torch.save(state, path)
        written.append(path)
        return path

    yield write
    for path in written:
        path.unlink()


def loaded_weights(patcher):
    return patcher.model.diffusion_model.state_dict()


def assert_same_weights(patcher, state):
    found = loaded_weights(patcher)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key].float(), value.float()) for key, value in state.items())


@pytest.mark.parametrize("layout", ["safetensors", "bin", "fp16", "sharded", "sharded_bin", "sharded_fp16"])
def test_published_file_layouts_load(copy, unet_state, layout):
    unet = copy / "unet"
    (unet / f"{WEIGHTS}.safetensors").unlink()
    half = {key: value.half() for key, value in unet_state.items()}
    if layout == "safetensors":
        save_file(unet_state, unet / f"{WEIGHTS}.safetensors")
    elif layout == "bin":
        torch.save(unet_state, unet / f"{WEIGHTS}.bin")
    elif layout == "fp16":
        save_file(half, unet / f"{WEIGHTS}.fp16.safetensors")
    elif layout == "sharded_fp16":
        damage.write_shards(unet, half, index_name=f"{WEIGHTS}.safetensors.index.fp16.json")
    else:
        damage.write_shards(unet, unet_state, ".bin" if layout == "sharded_bin" else ".safetensors")
    assert_same_weights(
        assembly.load_folder_network(MODELSCOPE, copy, "default"), half if "fp16" in layout else unet_state
    )


def test_half_types_prefer_the_fp16_variant(copy, unet_state):
    marked = {key: (value + 1).half() for key, value in unet_state.items()}
    save_file(marked, copy / "unet" / f"{WEIGHTS}.fp16.safetensors")
    assert_same_weights(assembly.load_folder_network(MODELSCOPE, copy, "fp32"), unet_state)
    half = assembly.load_folder_network(MODELSCOPE, copy, "fp16")
    assert_same_weights(half, marked)
    assert half.model.get_dtype() == torch.float16


def test_fp8_keeps_norms_and_biases_in_sixteen_bits(modelscope_folder):
    state = loaded_weights(assembly.load_folder_network(MODELSCOPE, modelscope_folder, "fp8_e4m3fn"))
    assert {value.dtype for value in state.values() if value.ndim > 1} == {torch.float8_e4m3fn}
    assert {value.dtype for value in state.values() if value.ndim == 1} == {torch.bfloat16}


def test_weights_are_the_files_memory(modelscope_folder):
    files = weights.find_weights(modelscope_folder / "unet", WEIGHTS)
    state = weights.read_weights(files)
    pointers = {key: value.data_ptr() for key, value in state.items()}
    built = network.build_on_meta(ModelScopeUNet, folders.read_config(modelscope_folder / "unet" / "config.json"), "")
    import comfy.ops

    built = network.load_network(built, state, torch.float32, comfy.ops.disable_weight_init, {}, "")
    assert {key: value.data_ptr() for key, value in built.state_dict().items()} == pointers


def test_published_size_matches_key_by_key():
    published = network.build_on_meta(ModelScopeUNet, {}, "published")
    state = published.state_dict()
    assert sum(value.numel() for value in state.values()) == 1_411_233_860
    assert single_file.network_config(MODELSCOPE, state) == {
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [320, 640, 1280, 1280],
        "layers_per_block": 2,
        "cross_attention_dim": 1024,
        "down_block_types": ["CrossAttnDownBlock3D"] * 3 + ["DownBlock3D"],
        "up_block_types": ["UpBlock3D"] + ["CrossAttnUpBlock3D"] * 3,
    }
    assert not network.compare(
        state, network.build_on_meta(ModelScopeUNet, single_file.network_config(MODELSCOPE, state), "")
    )


@pytest.mark.parametrize("name", ["network.safetensors", "network.pth"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "unet."])
def test_single_files_load(single, unet_state, name, prefix):
    path = single({prefix + key: value for key, value in unet_state.items()}, name)
    assert_same_weights(single_file.load_file(single_file.find_file(path.name), "auto", "default"), unet_state)


def test_text_encoder_without_prefix_loads(copy, modelscope_folder):
    path = copy / "text_encoder" / "model.safetensors"
    state = load_file(path)
    save_file({key.removeprefix("text_model."): value for key, value in state.items()}, path)
    expected = checkpoint.load_folder(MODELSCOPE, modelscope_folder, "default")[1].encode("a cat")
    assert torch.equal(checkpoint.load_folder(MODELSCOPE, copy, "default")[1].encode("a cat"), expected)


def test_foreign_fields_and_index_entries_are_ignored(copy, unet_state):
    config = json.loads((copy / "unet" / "config.json").read_text(encoding="utf-8"))
    config |= {"_name_or_path": "elsewhere", "time_cond_proj_dim": None, "unknown_field": 3}
    (copy / "unet" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (copy / "model_index.json").write_text(json.dumps({"unet": ["other", "MyUNet3D"]}), encoding="utf-8")
    assert copy.name in folders.list_checkpoints(MODELSCOPE)
    assert_same_weights(assembly.load_folder_network(MODELSCOPE, copy, "default"), unet_state)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (damage.config, ["unet/config.json", "not valid JSON", "again"]),
        (damage.family, ["unet/config.json", "UNet2DConditionModel", "UNet3DConditionModel"]),
        (damage.truncated, [f"{WEIGHTS}.safetensors", "damaged or incomplete", "download it again"]),
        (damage.header, [f"{WEIGHTS}.safetensors", "damaged or incomplete"]),
        (damage.pickled_code, [f"{WEIGHTS}.bin", "refused", ".safetensors"]),
        (damage.channels, ["unet", "conv_in.weight is (64, 4, 3, 3), expected (64, 9, 3, 3)"]),
        (damage.nan, [f"{WEIGHTS}.safetensors", "NaN", "conv_in.weight"]),
        (damage.missing_key, ["unet", "1 missing keys (conv_in.bias)", "1 unexpected keys (conv_in.scale)"]),
        (damage.empty, ["unet", "config.json is missing"]),
        (damage.shards, ["index.json", f"{WEIGHTS}-00002-of-00002.safetensors"]),
        (damage.vae, ["vae", "decoder.conv_in.bias"]),
        (damage.text, ["text_encoder", "expected (49408, 128)"]),
    ],
)
def test_damage_is_named_with_a_remedy(copy, how, words):
    how(copy)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        checkpoint.load_folder(MODELSCOPE, copy, "default")
    message = str(caught.value).replace("\\", "/")
    assert str(copy).replace("\\", "/") in message
    assert [word for word in words if word not in message] == []
    assert not (copy / "owned").exists()


@pytest.mark.parametrize("content", ["list of one", "list of two", "number", "nested list"])
def test_a_file_of_something_else_than_named_tensors_says_so(tmp_path, content):
    tensor, path = torch.zeros(2), tmp_path / "model.bin"
    contents = {"list of one": [tensor], "list of two": [tensor] * 2, "number": 3}
    torch.save(contents.get(content, {"state_dict": [tensor]}), path)
    with pytest.raises(ValueError, match="should hold named tensors") as caught:
        weights.read_weights([path])
    assert str(path) in str(caught.value) and "Choose a file of weights" in str(caught.value)


def test_a_comfyui_that_looks_into_every_pickle_as_into_a_dictionary(tmp_path, monkeypatch):
    """Newer versions of ComfyUI do so, and answer a file without a dictionary with an AttributeError."""
    path = tmp_path / "model.bin"
    torch.save([torch.zeros(2)] * 2, path)
    monkeypatch.setattr(comfy.utils, "load_torch_file", lambda *_, **__: [].items())
    with pytest.raises(weights.NoNamedTensorsError, match="should hold named tensors"):
        weights.read_file(path)


def test_single_file_of_another_family_is_refused(single):
    path = single({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3)})
    with pytest.raises(ValueError, match="not a network of .*ModelScope.*input_blocks.0.0.weight") as caught:
        single_file.load_file(path, "auto", "default")
    assert str(path) in str(caught.value)


def test_missing_checkpoint_names_repository_and_folder(models_folder):
    message = folders.explain_missing(MODELSCOPE, "nowhere")
    assert MODELSCOPE.repository in message and str(models_folder / "diffusers") in message
    assert folders.explain_missing(MODELSCOPE, tiny_checkpoints.MODELSCOPE_NAME) is True


def test_audit_of_a_good_folder(modelscope_folder):
    report = audit.report(tiny_checkpoints.MODELSCOPE_NAME)
    assert "Family: ModelScope text-to-video" in report
    assert "Missing keys: none\nUnexpected keys: none\nMisshapen keys: none" in report
    assert "To load it: use Load ModelScope." in report
    parameters = sum(
        value.numel() for value in load_file(modelscope_folder / "unet" / f"{WEIGHTS}.safetensors").values()
    )
    assert f"Network: {parameters:,} parameters (float32 {parameters:,})" in report


def test_audit_of_a_damaged_folder(copy):
    damage.missing_key(copy)
    report = audit.report(copy.name)
    assert "Missing keys: 1 (conv_in.bias)" in report and "Unexpected keys: 1 (conv_in.scale)" in report
    damage.vae(copy)
    assert "vae: cannot be loaded" in audit.report(copy.name) and "decoder.conv_in.bias" in audit.report(copy.name)
    damage.truncated(copy)
    assert "Cannot be loaded" in audit.report(copy.name)


def test_audit_of_a_single_file(single, unet_state):
    path = single(unet_state)
    assert f"diffusion_models/{path.name}" in audit.list_sources()
    assert "To load it: use Load Video Diffusion Model." in audit.report(f"diffusion_models/{path.name}")


def test_a_vision_tower_of_other_weights_is_named(i2vgenxl_folder, tmp_path):
    folder = tmp_path / "i2vgen-xl"
    shutil.copytree(i2vgenxl_folder / "image_encoder", folder / "image_encoder")
    path = folder / "image_encoder" / "model.safetensors"
    state = load_file(path)
    state["vision_model.scale"] = state.pop("vision_model.encoder.layers.0.mlp.fc1.bias")
    state["visual_projection.weight"] = torch.zeros(3, 3)
    save_file(state, path)
    with pytest.raises(ValueError) as caught:
        checkpoint.load_folder_vision(folder, "default")
    message = str(caught.value)
    assert str(path) in message and "Restore the published files" in message
    assert "1 missing keys (vision_model.encoder.layers.0.mlp.fc1.bias)" in message
    assert "1 unexpected keys (vision_model.scale)" in message and "visual_projection.weight is (3, 3)" in message


def test_a_text_encoder_pools_as_transformers_does(modelscope_folder):
    """Published text encoders have no projection; ComfyUI's model has one, whose weights must not be left to chance."""
    clip = checkpoint.load_folder_clip(MODELSCOPE, modelscope_folder)
    tokens = clip.tokenize("a cat")
    pooled = clip.encode_from_tokens(tokens, return_pooled=True)[1]
    assert torch.equal(pooled, clip.encode_from_tokens(tokens, return_pooled="unprojected")[1])
