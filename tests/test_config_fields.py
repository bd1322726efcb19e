"""Every field of a configuration acts, is known to change nothing, or is named."""

import json
import logging
import os
import shutil

import pytest
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, CLIPVisionConfig, CLIPVisionModelWithProjection

import tiny_checkpoints
from consistent_video.loaders import audit, checkpoint, fingerprint, folders, text_encoder, vae, vision
from consistent_video.loaders.config_fields import SCHEDULER, Fields
from consistent_video.loaders.families import CONSISID, CONSISTI2V, I2VGENXL, MODELSCOPE
from consistent_video.samplers import schedules


@pytest.fixture
def copy(models_folder, modelscope_folder, request):
    """A checkpoint folder of its own, listed by ComfyUI."""
    folder = models_folder / "diffusers" / f"fields-{abs(hash(request.node.name))}"
    shutil.copytree(modelscope_folder, folder)
    yield folder
    shutil.rmtree(folder)


def change(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | fields), encoding="utf-8")


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("family", [MODELSCOPE, I2VGENXL, CONSISTI2V, CONSISID], ids=lambda family: family.name)
def test_published_configurations_are_known(models_folder, family, caplog):
    names = {"modelscope": tiny_checkpoints.MODELSCOPE_NAME, "i2vgenxl": "i2vgen-xl", "consisti2v": "ConsistI2V"}
    folder = models_folder / "diffusers" / names.get(family.name, "ConsisID-preview")
    checkpoint.load_folder(family, folder, "fp32")
    if family is I2VGENXL:
        checkpoint.load_folder_vision(folder, "fp32")
    assert [line for line in warnings(caplog) if "without effect" in line or "has no" in line] == []


CHANGES = {
    "unet/config.json": {"unheard_of": 3, "conv_in_kernel": 3, "only_cross_attention": False},
    "vae/config.json": {"shift_factor": 0.1, "latents_mean": None},
    "text_encoder/config.json": {"rope_scaling": {"factor": 2.0}, "projection_dim": 77},
    "tokenizer/tokenizer_config.json": {"bos_token": "<s>", "eos_token": {"content": "<|endoftext|>"}},
    "scheduler/scheduler_config.json": {"sigma_max": 700.0, "skip_prk_steps": True, "timestep_type": "discrete"},
}


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("unet/config.json", "unheard_of 3."),
        ("vae/config.json", "shift_factor 0.1."),
        ("text_encoder/config.json", "rope_scaling {'factor': 2.0}."),
        ("tokenizer/tokenizer_config.json", "bos_token '<s>'."),
        ("scheduler/scheduler_config.json", "sigma_max 700.0."),
    ],
)
def test_fields_without_effect_are_named(copy, file, said, caplog):
    change(copy / file, **CHANGES[file])
    checkpoint.load_folder(MODELSCOPE, copy, "fp32")
    (line,) = warnings(caplog)
    assert line.endswith(said) and file.replace("/", os.sep) in line and "without effect in this pack" in line


@pytest.mark.parametrize(
    ("file", "fields"),
    [
        ("vae/config.json", {"act_fn": "relu"}),
        ("vae/config.json", {"in_channels": 4}),
        ("vae/config.json", {"down_block_types": ["AttnDownEncoderBlock2D"] * 4}),
        ("vae/config.json", {"norm_num_groups": 12}),
        ("text_encoder/config.json", {"hidden_act": "relu"}),
        ("text_encoder/config.json", {"model_type": "t5"}),
    ],
)
def test_what_cannot_be_done_is_refused(copy, file, fields):
    change(copy / file, **fields)
    with pytest.raises(ValueError) as caught:
        checkpoint.load_folder(MODELSCOPE, copy, "fp32")
    assert file.replace("/", os.sep) in str(caught.value) and next(iter(fields)) in str(caught.value)


AUTOENCODERS = {
    "16 groups": {"norm_num_groups": 16},
    "8 groups": {"norm_num_groups": 8},
    "no quant_conv": {"use_quant_conv": False, "use_post_quant_conv": False},
    "no attention": {"mid_block_add_attention": False},
    "one layer": {"layers_per_block": 1},
    "all": {"norm_num_groups": 16, "use_quant_conv": False, "mid_block_add_attention": False},
}


@pytest.mark.parametrize("settings", AUTOENCODERS)
def test_image_vaes_agree_with_diffusers(tmp_path, settings):
    torch.manual_seed(0)
    defaults = {"layers_per_block": 2, "block_out_channels": (32, 32, 64, 64)}
    theirs = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        **(defaults | AUTOENCODERS[settings]),
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "vae")
    ours = vae.load_vae(tmp_path)
    latent, pixels = torch.randn(1, 4, 8, 8), torch.rand(1, 64, 64, 3)
    expected = (theirs.decode(latent).sample.movedim(1, -1) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(ours.decode(latent), expected, rtol=0, atol=2e-4)
    mean = theirs.encode(pixels.movedim(-1, 1) * 2 - 1).latent_dist.mean
    torch.testing.assert_close(ours.encode(pixels)[:, :, 0], mean, rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    "fields", [{"hidden_act": "gelu_new"}, {"hidden_act": "quick_gelu"}, {"layer_norm_eps": 1e-2}, {"eos_token_id": 2}]
)
def test_text_encoders_agree_with_transformers(tmp_path, modelscope_folder, fields):
    torch.manual_seed(0)
    config = {
        **{"vocab_size": 49408, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "hidden_act": "gelu"},
    }
    theirs = CLIPTextModel(CLIPTextConfig(**config | fields)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "text_encoder")
    shutil.copytree(modelscope_folder / "tokenizer", tmp_path / "tokenizer")
    clip = text_encoder.load_text_encoder(tmp_path, published_pad="!")
    ours = clip.encode_from_tokens(clip.tokenize("a red panda"))
    tokens = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")("a red panda", padding="max_length", max_length=77)
    expected = theirs(torch.tensor([tokens.input_ids])).last_hidden_state
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("fields", [{"layer_norm_eps": 1e-2}, {"hidden_act": "gelu_new"}, {"projection_dim": 24}])
def test_vision_towers_agree_with_transformers(tmp_path, fields):
    torch.manual_seed(0)
    config = {
        **{"hidden_size": 64, "intermediate_size": 128, "projection_dim": 32, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "image_size": 28, "patch_size": 14, "hidden_act": "gelu"},
    }
    theirs = CLIPVisionModelWithProjection(CLIPVisionConfig(**config | fields)).eval()
    theirs.save_pretrained(tmp_path / "image_encoder")
    tower = vision.load_vision_tower(tmp_path)
    picture = torch.rand(1, 28, 28, 3)
    mean, std = torch.tensor(tower.image_mean), torch.tensor(tower.image_std)
    pixels = (((picture * 255).round() / 255 - mean) / std).movedim(-1, 1)
    torch.testing.assert_close(tower.encode_image(picture).image_embeds, theirs(pixels).image_embeds, rtol=0, atol=1e-4)


def test_another_preparation_of_pictures_is_named(models_folder, tmp_path, caplog):
    shutil.copytree(models_folder / "diffusers" / "i2vgen-xl" / "image_encoder", tmp_path / "image_encoder")
    (tmp_path / "feature_extractor").mkdir()
    statistics = {"size": {"height": 28, "width": 28}, "crop_size": 224, "resample": 2, "do_center_crop": True}
    (tmp_path / "feature_extractor" / "preprocessor_config.json").write_text(json.dumps(statistics), encoding="utf-8")
    vision.load_vision_tower(tmp_path)
    (line,) = warnings(caplog)
    assert "without effect in this pack: crop_size 224, resample 2." in line


@pytest.mark.parametrize(("family", "pad"), [(MODELSCOPE, 0), (I2VGENXL, 49407)])
@pytest.mark.parametrize("left", [(), ("vocab.json",), ("vocab.json", "merges.txt"), ("tokenizer_config.json",)])
def test_an_incomplete_tokenizer_pads_as_published(models_folder, tmp_path, family, pad, left, caplog):
    name = tiny_checkpoints.MODELSCOPE_NAME if family is MODELSCOPE else "i2vgen-xl"
    folder = tmp_path / "partial"
    shutil.copytree(models_folder / "diffusers" / name, folder)
    for file in (folder / "tokenizer").iterdir():
        if file.name not in left:
            file.unlink()
    if not left:
        shutil.rmtree(folder / "tokenizer")
    clip = checkpoint.load_folder_clip(family, folder)
    tokens = [token for token, _ in clip.tokenize("a panda")["h"][0]]
    assert tokens[:4] == [49406, 320, 12952, 49407] and set(tokens[4:]) == {pad}
    word = "!" if pad == 0 else "<|endoftext|>"
    assert any(f"padded with '{word}', as published" in line for line in warnings(caplog))


def test_shorter_prompts_than_comfyuis_are_named(copy, caplog):
    change(copy / "tokenizer" / "tokenizer_config.json", model_max_length=64)
    checkpoint.load_folder_clip(MODELSCOPE, copy)
    assert any("model_max_length 64 has no effect" in line for line in warnings(caplog))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le-bom"])
def test_configurations_of_windows_editors_are_read(copy, encoding):
    for file in copy.rglob("*.json"):
        text = file.read_text(encoding="utf-8")
        if encoding == "utf-16-le-bom":
            file.write_bytes(b"\xff\xfe" + text.encode("utf-16-le"))
        else:
            file.write_text(text, encoding=encoding)
    merges = copy / "tokenizer" / "merges.txt"
    merges.write_bytes(b"\xef\xbb\xbf" + merges.read_bytes())
    assert copy.name in folders.list_checkpoints(MODELSCOPE)
    clip = checkpoint.load_folder(MODELSCOPE, copy, "fp32")[1]
    assert [token for token, _ in clip.tokenize("a panda")["h"][0]][:4] == [49406, 320, 12952, 49407]


def test_links_back_are_not_followed(models_folder, copy):
    root = models_folder / "diffusers"
    inner = root / "shelf"
    inner.mkdir()
    try:
        (inner / "up").symlink_to(root, target_is_directory=True)
        (inner / "self").symlink_to(inner, target_is_directory=True)
        (inner / "other").symlink_to(copy, target_is_directory=True)
        (copy / "again").symlink_to(copy, target_is_directory=True)
        names = [name for name in folders.checkpoint_folders() if name.startswith("shelf")]
        assert names == ["shelf/other"]
        checkpoint.load_folder(MODELSCOPE, folders.find_checkpoint("shelf/other"), "fp32")
        before = fingerprint.of_folder(inner)
        (copy / "unet" / "config.json").touch()
        assert fingerprint.of_folder(inner) != before
    finally:
        (copy / "again").unlink()
        shutil.rmtree(inner)


def test_another_class_in_the_index_is_said(copy, caplog):
    caplog.set_level(logging.INFO)
    change(copy / "model_index.json", unet=["other", "MyUNet3D"])
    checkpoint.load_folder(MODELSCOPE, copy, "fp32")
    assert (
        "model_index.json names a MyUNet3D for unet, whose own configuration says UNet3DConditionModel" in caplog.text
    )


@pytest.mark.parametrize(
    ("name", "clips"),
    [
        ("DDIMScheduler", True),
        (None, True),
        ("DDPMScheduler", True),
        ("PNDMScheduler", False),
        ("EulerDiscreteScheduler", False),
        ("DPMSolverMultistepScheduler", False),
        ("UniPCMultistepScheduler", False),
    ],
)
def test_only_schedulers_that_clip_do_so_by_default(name, clips):
    config = {} if name is None else {"_class_name": name}
    assert schedules.settings(config)["clip_sample"] is clips
    assert schedules.settings(config | {"clip_sample": not clips})["clip_sample"] is not clips


@pytest.mark.parametrize(
    "name",
    [
        *(
            "DDIMScheduler",
            "DDPMScheduler",
            "PNDMScheduler",
            "EulerDiscreteScheduler",
            "EulerAncestralDiscreteScheduler",
        ),
        *("DPMSolverMultistepScheduler", "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler", "LMSDiscreteScheduler"),
        *("UniPCMultistepScheduler", "EulerAncestralDiscreteScheduler"),
    ],
)
def test_schedulers_of_diffusers_are_known(name, caplog):
    import diffusers

    SCHEDULER.check(dict(getattr(diffusers, name)().config), name)
    assert warnings(caplog) == []


def test_values_that_switch_nothing_on_are_no_news(caplog):
    fields = Fields("a thing", used=("a",), accepted={"b": (1, 2)}, harmless=("c",), neutral={"d": (1, 2)})
    fields.check({"a": 5, "b": 2, "c": 9, "d": [1, 2], "e": None, "f": False, "g": [], "_h": 1}, "here")
    assert warnings(caplog) == []
    fields.check({"d": [2, 2], "e": 0, "f": "x" * 100}, "here")
    assert warnings(caplog) == [
        f"here: fields of a thing without effect in this pack: d [2, 2], e 0, f '{'x' * 56}...."
    ]
    with pytest.raises(ValueError, match="here has b 3, which a thing cannot do here; expected 1 or 2."):
        fields.check({"b": 3}, "here")


def test_audit_says_what_the_loaders_say(copy):
    for file, fields in CHANGES.items():
        change(copy / file, **fields)
    (copy / "tokenizer" / "vocab.json").unlink()
    report = audit.report(copy.name)
    for said in ("unheard_of 3.", "shift_factor 0.1.", "rope_scaling", "bos_token '<s>'", "sigma_max 700.0"):
        assert any(line.startswith("Note: ") and said in line for line in report.splitlines()), report
    assert "read with ComfyUI's own CLIP vocabulary" in report
    assert "To load it: use Load ModelScope." in report
    assert "Note:" not in audit.report(tiny_checkpoints.MODELSCOPE_NAME)
