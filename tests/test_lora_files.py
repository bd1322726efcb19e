"""LoRA files of every trainer: each name of a layer gives the same weights, and what has no effect is said."""

import json
import logging

import comfy.model_management
import comfy.sd
import comfy.utils
import pytest
import tiny_consisid
import torch

from consistent_video.loaders import assembly, checkpoint, lora, original_modelscope
from consistent_video.loaders.families import CONSISID, CONSISTI2V, I2VGENXL, MODELSCOPE
from consistent_video.models.adopt import is_bypassed

pytestmark = pytest.mark.slow

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
TEMPORAL = "down_blocks.0.temp_convs.0.conv2.3"
CONVOLUTION = "down_blocks.0.resnets.0.conv1"


@pytest.fixture(scope="module", autouse=True)
def formats():
    lora.register()


@pytest.fixture(scope="module")
def model(modelscope_folder):
    return assembly.load_folder_network(MODELSCOPE, modelscope_folder, "fp32")


@pytest.fixture(scope="module")
def consisid(models_folder):
    return assembly.load_folder_network(CONSISID, models_folder / "diffusers" / "ConsisID-preview", "fp32")


def weight(patcher, layer):
    return patcher.model.state_dict()[f"diffusion_model.{layer}"]


def patched_weights(model, tensors, *layers, strength=1.0, metadata=None):
    """Weights of layers of the loaded MODEL with a LoRA."""
    patched = comfy.sd.load_lora_for_models(model, None, tensors, strength, 0, lora_metadata=metadata)[0]
    comfy.model_management.load_models_gpu([patched])
    found = [weight(patched, f"{layer}.weight").clone() for layer in layers]
    comfy.model_management.unload_all_models()
    return found


def matrices(model, layer, rank=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows, columns = weight(model, f"{layer}.weight").shape[:2]
    return torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator)


FLAT = LAYER.replace(".", "_")
ORIGINAL = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"
FORMS = {
    "generic": (f"diffusion_model.{LAYER}", "lora_B.weight", "lora_A.weight"),
    "kohya": (f"lora_unet_{FLAT}", "lora_up.weight", "lora_down.weight"),
    "diffusers": (f"unet.{LAYER}", "lora.up.weight", "lora.down.weight"),
    "peft": (f"base_model.model.{LAYER}", "lora_B.weight", "lora_A.weight"),
    "peft adapter": (f"base_model.model.{LAYER}", "lora_B.default.weight", "lora_A.default.weight"),
    "peft in a pipeline": (f"unet.base_model.model.{LAYER}", "lora_B.weight", "lora_A.weight"),
    "SimpleTuner": (f"transformer.base_model.model.{LAYER}", "lora.up.weight", "lora.down.weight"),
    "VideoX-Fun": (f"lora_unet__{FLAT}", "lora_up.weight", "lora_down.weight"),
    "OneTrainer": (f"lora_transformer_{FLAT}", "lora_up.weight", "lora_down.weight"),
    "LyCORIS": (f"lycoris_{FLAT}", "lora_up.weight", "lora_down.weight"),
    "Stable LoRA": (LAYER, "lora_B", "lora_A"),
    "Stable LoRA, web UI": (ORIGINAL, "lora_B", "lora_A"),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_name_of_a_layer_changes_its_weight(model, form, caplog):
    name, up_name, down_name = FORMS[form]
    up, down = matrices(model, LAYER)
    with caplog.at_level(logging.INFO):
        (found,) = patched_weights(model, {f"{name}.{up_name}": up, f"{name}.{down_name}": down}, LAYER)
    torch.testing.assert_close(found, weight(model, f"{LAYER}.weight") + up @ down)
    assert "LoRA: 1 of 1 layers applied." in caplog.text
    assert "not loaded" not in caplog.text


def test_stable_lora_changes_kernels_by_its_formula(model):
    names = {new: old for old, new in original_modelscope.key_map((64, 64, 128, 128), 1).items()}
    tensors, expected = {}, []
    for seed, layer in enumerate((TEMPORAL, CONVOLUTION)):
        old, kernel = names[f"{layer}.weight"].removesuffix(".weight"), weight(model, f"{layer}.weight")
        out, inner, side = kernel.shape[:3]
        generator = torch.Generator().manual_seed(seed)
        up = torch.randn(out * side, 2 * side, generator=generator)
        down = torch.randn(2 * side, inner * side, generator=generator)
        tensors |= {f"{old}.lora_B": up, f"{old}.lora_A": down}
        square = (up @ down).view(out, inner, side, side)
        expected.append(kernel + (square.mean(-1)[..., None, None] if kernel.ndim == 5 else square))
    found = patched_weights(model, tensors, TEMPORAL, CONVOLUTION)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_original_names_follow_the_depth_of_the_files_network(depth):
    from consistent_video.loaders.lora_files import LoRAFile

    names = original_modelscope.key_map((64, 64, 128, 128), depth)
    attentions = {old: new for old, new in names.items() if ".attn" in old and old.endswith(".weight")}
    stems = {old.removesuffix(".weight"): new.removesuffix(".weight") for old, new in attentions.items()}
    file = LoRAFile({old: [f"{old}.lora_A", f"{old}.lora_B"] for old in stems}, set())
    assert all(old in file.original_names(f"diffusion_model.{new}") for old, new in stems.items())


@pytest.mark.parametrize("prefix", ["diffusion_model.", "unet.", "transformer.", "base_model.model."])
def test_ready_made_changes_act_under_every_prefix(model, prefix):
    change, bias = torch.full((64, 64), 0.5), torch.full((64,), 0.25)
    norm = torch.full((64,), 2.0)
    tensors = {
        f"{prefix}{LAYER}.diff": change,
        f"{prefix}conv_in.diff_b": bias,
        f"{prefix}down_blocks.0.resnets.0.norm1.w_norm": norm,
        f"{prefix}down_blocks.0.resnets.0.norm1.b_norm": bias,
        f"{prefix}down_blocks.0.resnets.0.norm2.set_weight": norm,
    }
    patched = comfy.sd.load_lora_for_models(model, None, tensors, 0.5, 0)[0]
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    comfy.model_management.load_models_gpu([patched])
    after = patched.model.state_dict()

    def moved(key):
        return after[f"diffusion_model.{key}"] - before[f"diffusion_model.{key}"]

    resnet = "down_blocks.0.resnets.0"
    torch.testing.assert_close(moved(f"{LAYER}.weight"), 0.5 * change)
    torch.testing.assert_close(moved("conv_in.bias"), 0.5 * bias)
    torch.testing.assert_close(moved(f"{resnet}.norm1.weight"), 0.5 * norm)
    torch.testing.assert_close(moved(f"{resnet}.norm1.bias"), 0.5 * bias)
    assert torch.equal(after[f"diffusion_model.{resnet}.norm2.weight"], norm)
    comfy.model_management.unload_all_models()


def test_adapters_of_other_kinds_act_under_trainers_names(model):
    generator = torch.Generator().manual_seed(0)
    a, b, c, d = (torch.randn(*shape, generator=generator) for shape in ((64, 4), (4, 64), (64, 4), (4, 64)))
    loha = {
        f"unet.{LAYER}.hada_w{n}_{s}": m for (n, s), m in zip(((1, "a"), (1, "b"), (2, "a"), (2, "b")), (a, b, c, d))
    }
    one, two = torch.randn(8, 8, generator=generator), torch.randn(8, 8, generator=generator)
    lokr = {f"lycoris_{FLAT}.lokr_w1": one, f"lycoris_{FLAT}.lokr_w2": two}
    before = weight(model, f"{LAYER}.weight").clone()
    torch.testing.assert_close(patched_weights(model, loha, LAYER)[0], before + (a @ b) * (c @ d))
    torch.testing.assert_close(patched_weights(model, lokr, LAYER)[0], before + torch.kron(one, two))


@pytest.mark.parametrize("name", ["dora_scale", "lora_magnitude_vector"])
def test_dora_scales_each_row(model, name):
    up, down = matrices(model, LAYER)
    magnitude = torch.linspace(1, 2, 64)
    scale = magnitude[:, None] if name == "dora_scale" else magnitude
    tensors = {f"unet.{LAYER}.lora_B.weight": up, f"unet.{LAYER}.lora_A.weight": down, f"unet.{LAYER}.{name}": scale}
    plain = weight(model, f"{LAYER}.weight").clone()
    (found,) = patched_weights(model, tensors, LAYER)
    # ComfyUI's formula divides by the norm of the weight without the LoRA
    torch.testing.assert_close(found, (plain + up @ down) * (magnitude[:, None] / plain.norm(dim=1, keepdim=True)))


@pytest.mark.parametrize(
    ("metadata", "scale"),
    [
        ({"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 12})}, 3.0),
        ({"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 4, "unet.alpha_pattern": {"attn1.to_q": 2}})}, 0.5),
        ({"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 4, "unet.use_rslora": True})}, 2.0),
        ({"ss_network_alpha": "2.0", "ss_network_dim": "4"}, 0.5),
        ({"lora_alpha": "8"}, 2.0),
        ({"lora_adapter_metadata": "{", "modelspec.title": "x"}, 1.0),
    ],
)
@pytest.mark.parametrize("name", [f"unet.{LAYER}", f"diffusion_model.{LAYER}"])
def test_alpha_of_the_metadata_scales_the_lora(model, metadata, scale, name):
    up, down = matrices(model, LAYER)
    tensors = {f"{name}.lora_B.weight": up, f"{name}.lora_A.weight": down}
    (found,) = patched_weights(model, tensors, LAYER, metadata=metadata)
    torch.testing.assert_close(found, weight(model, f"{LAYER}.weight") + scale * up @ down)


def test_metadata_is_that_of_its_own_file(model):
    up, down = matrices(model, LAYER)
    tensors = {f"unet.{LAYER}.lora_B.weight": up, f"unet.{LAYER}.lora_A.weight": down}
    before = weight(model, f"{LAYER}.weight").clone()
    for metadata, scale in (
        ([{"lora_alpha": "8"}, None], 3.0),
        ([None, {"lora_alpha": "8"}], 3.0),
        ([None, None], 2.0),
    ):
        patched = model
        for entry in metadata:
            patched = comfy.sd.load_lora_for_models(patched, None, tensors, 1.0, 0, lora_metadata=entry)[0]
        comfy.model_management.load_models_gpu([patched.clone()])
        torch.testing.assert_close(weight(patched, f"{LAYER}.weight"), before + scale * up @ down)
        comfy.model_management.unload_all_models()


def test_what_has_no_effect_is_said(model, caplog):
    caplog.set_level(logging.INFO)
    up, down = matrices(model, LAYER)
    tensors = {f"unet.{LAYER}.lora_B.weight": up, f"unet.{LAYER}.lora_A.weight": down}
    stranger = {"unet.down_blocks.9.attn.to_q.lora_B.weight": up, "lora_te_text_model_x.alpha": torch.ones(())}
    comfy.sd.load_lora_for_models(model, None, tensors | stranger, 1.0, 0)
    assert (
        "LoRA: 1 of 2 layers applied, 2 keys not used, for example lora_te_text_model_x.alpha, unet.down" in caplog.text
    )
    caplog.clear()
    comfy.sd.load_lora_for_models(model, None, stranger, 1.0, 0)
    assert ("WARNING", True) in [(r.levelname, "LoRA: 0 of 1 layers" in r.getMessage()) for r in caplog.records]
    caplog.clear()
    wide = {key: torch.randn(96, 4) if "lora_B" in key else value for key, value in tensors.items()}
    comfy.sd.load_lora_for_models(model, None, wide, 1.0, 0)
    assert ("WARNING", True) in [(r.levelname, "another shape" in r.getMessage()) for r in caplog.records]
    caplog.clear()
    model.clone()
    assert "LoRA" not in caplog.text


@pytest.mark.parametrize("name", ["transformer_blocks.0.attn1.to_q", "proj_out", "patch_embed.text_proj"])
def test_consisid_layers_take_trainers_names(consisid, name):
    up, down = matrices(consisid, name)
    for form in (f"transformer.base_model.model.{name}", f"lora_unet__{name.replace('.', '_')}"):
        tensors = {f"{form}.lora_B.weight": up, f"{form}.lora_A.weight": down}
        (found,) = patched_weights(consisid, tensors, name)
        torch.testing.assert_close(found, weight(consisid, f"{name}.weight") + up @ down)


@pytest.mark.parametrize(
    "form",
    ["text_encoder.{}", "text_encoder.base_model.model.{}", "lora_te_{flat}", "base_model.model.{}", "{openclip}"],
)
def test_text_encoders_take_trainers_names(modelscope_folder, form):
    clip = checkpoint.load_folder_clip(MODELSCOPE, modelscope_folder)
    layer = "text_model.encoder.layers.1.mlp.fc1"
    key = f"clip_h.transformer.{layer}.weight"
    before = clip.cond_stage_model.state_dict()[key].clone()
    up, down = torch.randn(before.shape[0], 2), torch.randn(2, before.shape[1])
    name = form.format(layer, flat=layer.replace(".", "_"), openclip="resblocks.1.mlp.c_fc")
    tensors = {f"{name}.lora_B.weight": up, f"{name}.lora_A.weight": down}
    patched = comfy.sd.load_lora_for_models(None, clip, tensors, 0, 1.0)[1]
    patched.load_model()
    torch.testing.assert_close(patched.cond_stage_model.state_dict()[key], before + up @ down)
    comfy.model_management.unload_all_models()


# parameters that are not a layer's


BARE = {
    "ConsistI2V": (CONSISTI2V, ["down_blocks.0.conv3ds.0.alpha", "down_blocks.0.tempo_attns.0.alpha",
                                "down_blocks.0.tempo_attns.0.transformer_blocks.0.attn1.rotary_emb.freqs"]),
    "ConsisID-preview": (CONSISID, ["local_facial_extractor.latents", "local_facial_extractor.proj_out"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BARE)
@pytest.mark.parametrize("mode", ["classic", "lowvram"])
def test_patches_reach_parameters_that_no_layer_holds(models_folder, name, mode):
    family, keys = BARE[name]
    model = assembly.load_folder_network(family, models_folder / "diffusers" / name, "fp32")
    before = {key: weight(model, key).clone() for key in keys}
    tensors = {f"diffusion_model.{key}.diff": torch.full_like(value, 0.5) for key, value in before.items()}
    patched = comfy.sd.load_lora_for_models(model, None, tensors, 0.5, 0)[0]
    for _ in range(2):
        if mode == "classic":
            comfy.model_management.load_models_gpu([patched])
        else:
            patched.partially_load(patched.load_device, extra_memory=1)
            assert patched.model.model_lowvram
        for key in keys:
            torch.testing.assert_close(weight(patched, key), before[key] + 0.25)
    comfy.model_management.unload_all_models()
    patched.detach()
    for key in keys:
        assert torch.equal(weight(model, key), before[key])


def test_learned_positions_of_consisid_are_patched(models_folder, tmp_path):
    folder = tmp_path / "learned"
    tiny_consisid.write_consisid(folder)
    model = assembly.load_folder_network(CONSISID, folder, "fp32")
    before = weight(model, "patch_embed.pos_embedding").clone()
    other = assembly.load_folder_network(CONSISID, folder, "fp32")
    with torch.no_grad():
        other.model.diffusion_model.patch_embed.pos_embedding.add_(1.0)
    merged = model.clone()
    merged.add_patches(other.get_key_patches("diffusion_model."), 0.25, 0.75)
    comfy.model_management.load_models_gpu([merged])
    torch.testing.assert_close(weight(merged, "patch_embed.pos_embedding"), before + 0.25)
    comfy.model_management.unload_all_models()


def test_merging_another_family_is_refused_or_said(models_folder, model, caplog):
    def merged_with(other):
        merged = model.clone()
        merged.add_patches(other.get_key_patches("diffusion_model."), 0.5, 0.5)
        comfy.model_management.load_models_gpu([merged])
        comfy.model_management.unload_all_models()

    folders = models_folder / "diffusers"
    with pytest.raises(ValueError, match="another shape, for example .*conv_in.weight.*merge MODELs of one family"):
        merged_with(assembly.load_folder_network(I2VGENXL, folders / "i2vgen-xl", "fp32"))
    merged_with(assembly.load_folder_network(CONSISTI2V, folders / "ConsistI2V", "fp32"))
    assert "Merging changes" in caplog.text
    caplog.clear()
    merged_with(assembly.load_folder_network(MODELSCOPE, folders / "zeroscope_v2_XL", "fp32"))
    assert "Merging" not in caplog.text


def test_bypass_loras_add_up_and_leave_nothing_behind(model):
    layer = comfy.utils.get_attr(model.model.diffusion_model, LAYER)
    x, original = torch.randn(3, 64), layer.forward
    patched, expected = model, layer(x)
    for seed in range(3):
        up, down = matrices(model, LAYER, seed=seed)
        tensors = {f"unet.{LAYER}.lora_B.weight": up, f"unet.{LAYER}.lora_A.weight": down}
        patched, _ = comfy.sd.load_bypass_lora_for_models(patched, None, tensors, 0.5, 0)
        expected = expected + 0.5 * x @ (up @ down).T
    for _ in range(2):
        patched.inject_model()
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
        assert is_bypassed(layer)
        patched.eject_model()
        assert layer.forward == original and not is_bypassed(layer)
