"""PhotoMaker files: every published layout loads, damage is named with a remedy, the LoRA finds its MODEL."""

import pickle
from pathlib import Path

import comfy.lora
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.supported_models
import comfy.supported_models_base
import damage
import folder_paths
import pytest
import tiny_photomaker
import tiny_sdxl
import torch
from safetensors.torch import save_file
from whole_layers import weights_from_the_start

from consistent_video.loaders import photomaker as loader
from consistent_video.models.photomaker import PhotoMaker

pytestmark = pytest.mark.usefixtures("memory_mode")

WIDTH = 64
SD15_UNET = {
    **tiny_sdxl.UNET,
    "channel_mult": [1, 2, 4, 4],
    "num_res_blocks": [2, 2, 2, 2],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
    "context_dim": 768,
    "adm_in_channels": None,
    "num_classes": None,
    "use_linear_in_transformer": False,
    "num_heads": 8,
    "num_head_channels": -1,
}


def sdxl_model(device="cpu"):
    return unet_model(comfy.supported_models.SDXL, comfy.model_base.SDXL, tiny_sdxl.UNET, device)


@weights_from_the_start()
def unet_model(config_class, model_class, unet, device="meta"):
    """A MODEL of zero weights; what the text towers and autoencoder would be is not there."""
    config = config_class(dict(unet))
    config.unet_config["dtype"] = torch.float16
    model = model_class(config, device=device)
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


@pytest.fixture(params=["v1.bin", "v2.bin", "v1.pt", "v1.safetensors", "v2.safetensors"])
def written(request, tmp_path):
    path = tmp_path / f"photomaker-{request.param}"
    return tiny_photomaker.write_photomaker(path, path.stem[-2:], WIDTH)


def test_published_layouts_load(written):
    version = written.stem[-2:]
    photomaker, lora = loader.load_photomaker(written)
    assert isinstance(photomaker, PhotoMaker)
    assert (photomaker.version, photomaker.width, photomaker.image_size) == (version, WIDTH, 224)
    assert (photomaker.tokens_per_picture, photomaker.face_width) == {"v1": (1, None), "v2": (2, 512)}[version]
    found, expected = photomaker.patcher.model.state_dict(), tiny_photomaker.encoder_state(version, WIDTH)
    assert expected.keys() - found.keys() == (set(loader.UNREAD_V2) if version == "v2" else set())
    assert all(torch.equal(value, expected[key].to(value.dtype)) for key, value in found.items())
    expected = tiny_photomaker.lora_state()
    assert lora.keys() == expected.keys() and all(torch.equal(lora[key], expected[key]) for key in lora)


def test_the_encoder_is_in_comfyui_s_memory_management(written):
    photomaker = loader.load_photomaker(written)[0]
    patcher = photomaker.patcher
    assert isinstance(patcher, comfy.model_patcher.ModelPatcher)
    assert patcher.load_device == photomaker.load_device == comfy.model_management.text_encoder_device()
    assert patcher.offload_device == comfy.model_management.text_encoder_offload_device()
    expected = comfy.model_management.text_encoder_dtype(patcher.load_device)
    assert {parameter.dtype for parameter in patcher.model.parameters()} == {expected}
    layers = [
        type(module) for module in patcher.model.modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    ]
    assert set(layers) == {comfy.ops.manual_cast.Linear, comfy.ops.manual_cast.Conv2d}
    load, arguments = patcher.cached_patcher_init
    again = load(*arguments, disable_dynamic=True)
    assert type(again) is comfy.model_patcher.ModelPatcher
    assert all(torch.equal(value, patcher.model.state_dict()[key]) for key, value in again.model.state_dict().items())
    assert loader.load_photomaker(written, dtype=torch.float32)[0].patcher.model.fuse_module.mlp1.fc1.weight.dtype == (
        torch.float32
    )


@pytest.mark.parametrize("layout", ["bare.safetensors", "bare.bin", "nested.bin"])
def test_files_for_comfyui_s_own_loader_load_without_lora(tmp_path, layout):
    state = tiny_photomaker.encoder_state("v1", WIDTH)
    path = tmp_path / layout
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state if "bare" in layout else {"id_encoder": state}, path)
    photomaker, lora = loader.load_photomaker(path)
    assert (photomaker.version, lora) == ("v1", {})
    model = sdxl_model("meta")
    assert loader.apply_lora(model, lora, 0.0, str(path)).patches == {}
    with pytest.raises(ValueError, match="without its LoRA.*published file.*LoRA strength to 0"):
        loader.apply_lora(model, lora, 1.0, str(path))


def truncated(path):
    path.write_bytes(path.read_bytes()[:-1000])


def header(path):
    path.write_bytes(b"\xff" * 64)


def pickled_code(path):
    with open(path, "wb") as file:
        pickle.dump({"id_encoder": damage.Malice(str(path.parent / "owned"))}, file)


def with_state(change):
    """Damage that changes the id encoder's tensors."""

    def write(path):
        state = tiny_photomaker.encoder_state("v2" if "v2" in path.name else "v1", WIDTH)
        change(state)
        torch.save({"id_encoder": state, "lora_weights": {}}, path)

    return write


def missing_key(state):
    del state["fuse_module.mlp1.fc2.bias"]
    state["fuse_module.scale"] = torch.zeros(1)


def missing_width(state):
    del state["vision_model.embeddings.class_embedding"]


def other_shape(state):
    state["fuse_module.mlp2.fc2.weight"] = torch.zeros(WIDTH + 1, 8)


def other_projection(state):
    state["visual_projection.weight"] = torch.zeros(7, 64)


def nan(state):
    state["fuse_module.mlp1.fc1.bias"][0] = float("nan")


def other_family(path):
    torch.save({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(4), "first": torch.zeros(1)}, path)


def lora_only(path):
    save_file({f"lora_weights.{key}": value for key, value in tiny_photomaker.lora_state().items()}, path)


def stranger(path):
    torch.save({"id_encoder": {"a": torch.zeros(1)}, "lora_weights": {}, "epoch": torch.zeros(1)}, path)


def number_inside(path):
    torch.save({"id_encoder": {"a": torch.zeros(1)}, "epoch": 3}, path)


def a_list(path):
    torch.save([torch.zeros(1), torch.zeros(1)], path)


@pytest.mark.parametrize(
    ("name", "how", "words"),
    [
        ("v1.bin", truncated, ["damaged or incomplete", "download it again"]),
        ("v1.safetensors", truncated, ["damaged or incomplete", "download it again"]),
        ("v1.safetensors", header, ["damaged or incomplete"]),
        ("v1.bin", pickled_code, ["refused", ".safetensors"]),
        ("v1.bin", with_state(missing_key), ["1 missing keys (fuse_module.mlp1.fc2.bias)", "fuse_module.scale"]),
        ("v1.bin", with_state(missing_width), ["missing keys (vision_model.embeddings.class_embedding)"]),
        ("v2.bin", with_state(missing_key), ["1 missing keys (fuse_module.mlp1.fc2.bias)", "fuse_module.scale"]),
        ("v1.bin", with_state(other_shape), ["fuse_module.mlp2.fc2.weight is (65, 8), expected (64, 8)"]),
        ("v1.bin", with_state(other_projection), ["projections of 7 and 40 values, expected a sum of 64", "again"]),
        ("v1.bin", with_state(nan), ["NaN", "id_encoder.fuse_module.mlp1.fc1.bias"]),
        ("v1.bin", other_family, ["not a PhotoMaker file", "input_blocks.0.0.weight", "TencentARC/PhotoMaker"]),
        ("v1.safetensors", lora_only, ["not a PhotoMaker file", "only lora_weights"]),
        ("v1.bin", stranger, ["not a PhotoMaker file", "also epoch"]),
        ("v1.bin", number_inside, ["other objects under epoch"]),
        ("v1.bin", a_list, ["not a PhotoMaker file", "found a"]),
    ],
)
def test_damage_is_named_with_a_remedy(tmp_path, name, how, words):
    path = tiny_photomaker.write_photomaker(tmp_path / f"photomaker-{name}", name[:2], WIDTH)
    how(path)
    with pytest.raises(ValueError) as caught:
        loader.load_photomaker(path)
    message = str(caught.value)
    assert str(path) in message
    assert [word for word in words if word not in message] == []
    assert not (tmp_path / "owned").exists()


def test_files_are_found_and_missing_ones_explained(tmp_path, monkeypatch):
    (tmp_path / "photomaker").mkdir()
    extensions = folder_paths.folder_names_and_paths["photomaker"][1]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "photomaker", ([str(tmp_path / "photomaker")], extensions))
    path = tiny_photomaker.write_photomaker(tmp_path / "photomaker" / "photomaker-v1.bin", "v1", WIDTH)
    assert loader.FILES.names() == ["photomaker-v1.bin"]
    assert loader.FILES.find("photomaker-v1.bin") == path
    with pytest.raises(FileNotFoundError) as caught:
        loader.FILES.find("photomaker-v2.bin")
    message = str(caught.value)
    assert "TencentARC/PhotoMaker-V2" in message and str(Path(tmp_path / "photomaker")) in message


def test_the_lora_changes_every_attention_projection():
    model, lora = sdxl_model(), tiny_photomaker.lora_state()
    patched = loader.apply_lora(model, lora, 0.75, "photomaker-v1.bin")
    assert model.patches == {}
    projections = {
        key
        for key in model.model.state_dict()
        if ".attn" in key and key.endswith(("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight"))
    }
    assert set(patched.patches) == projections
    assert 2 * len(projections) == len(lora)
    name = "unet.up_blocks.0.attentions.1.transformer_blocks.1.attn2.processor.to_k_lora"
    key = "diffusion_model.output_blocks.1.1.transformer_blocks.1.attn2.to_k.weight"
    weight = torch.zeros(model.model.state_dict()[key].shape)
    found = comfy.lora.calculate_weight(patched.patches[key], weight, key)
    expected = 0.75 * lora[f"{name}.up.weight"].float() @ lora[f"{name}.down.weight"].float()
    assert (found - expected).abs().max() < 1e-5 and expected.abs().max() > 1e-3


def test_a_lora_is_refused_by_other_models():
    lora = tiny_photomaker.lora_state()
    older = unet_model(comfy.supported_models.SD15, comfy.model_base.BaseModel, SD15_UNET)
    with pytest.raises(ValueError, match=r"photomaker-v1.bin does not fit the MODEL \(BaseModel\).*SDXL checkpoint"):
        loader.apply_lora(older, lora, 1.0, "photomaker-v1.bin")
    model = sdxl_model("meta")
    renamed = {key.replace("down_blocks.1", "down_blocks.7"): value for key, value in lora.items()}
    with pytest.raises(ValueError, match="no layer of it is named as unet.down_blocks.7"):
        loader.apply_lora(model, renamed, 1.0, "photomaker-v1.bin")
    key = next(key for key in lora if key.endswith("attn2.processor.to_k_lora.down.weight"))
    with pytest.raises(ValueError, match=r"attn2.to_k.weight is \(320, 2048\), its LoRA \(320, 2\) x \(2, 768\)"):
        loader.apply_lora(model, lora | {key: torch.zeros(2, 768)}, 1.0, "photomaker-v1.bin")
