"""PhotoMaker's networks: the numbers of the originals, and their published keys.

`goldens/storydiffusion_A` holds small random id encoders, what the original classes compute with them, and every key
and shape of the published files.
"""

import json
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import numpy
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from test_i2vgenxl_parity import picture_of

from consistent_video.loaders import photomaker as loader
from consistent_video.loaders.network import build_on_meta, compare, load_network
from consistent_video.models.photomaker import IdEncoderV1, IdEncoderV2, PhotoMaker
from consistent_video.models.photomaker_picture import normalise

GOLDENS = Path(__file__).parent / "goldens" / "storydiffusion_A"
META = json.loads((GOLDENS / "photomaker_meta.json").read_text(encoding="utf-8"))
KEYS = json.loads((GOLDENS / "photomaker_real_keys.json").read_text(encoding="utf-8"))
TOLERANCE = 1e-5
# transformers 5 resizes with torchvision unless asked for Pillow, which its older versions, and the original, use.
PROCESSOR = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)


@pytest.fixture(scope="module", params=["v1", "v2"])
def golden(request):
    """(version, network of the golden's weights, its cases)."""
    version = request.param
    state = load_file(GOLDENS / f"photomaker_{version}_state.safetensors")
    return version, golden_network(state), load_file(GOLDENS / f"photomaker_{version}_cases.safetensors")


def golden_network(state, operations=comfy.ops.manual_cast, dtype=torch.float32):
    """The head widths of the goldens are not the published ones, and shapes do not tell them."""
    network_class, config = loader.describe(state, "golden")
    config["vision"] |= {"num_attention_heads": META["vision_config"]["num_attention_heads"]}
    if network_class is IdEncoderV2:
        config["perceiver"] |= {"heads": META["qformer"]["heads"]}
        state = {key: value for key, value in state.items() if key not in loader.UNREAD_V2}
    return load_network(build_on_meta(network_class, config, "golden"), dict(state), dtype, operations, {}, "golden")


def case_inputs(cases, name):
    inputs = {key: cases[f"{name}.{key}"] for key in ("id_pixel_values", "prompt_embeds", "class_tokens_mask")}
    return inputs | {"face_embeds": cases.get(f"{name}.insightface_embeds")}


def published_state(version):
    """Key -> empty tensor of the published shape."""
    keys = KEYS[version]
    layers = [
        (key.format(i=layer), shape)
        for layer in range(keys["encoder_layers"])
        for key, shape in keys["per_layer"].items()
    ]
    return {key: torch.empty(shape, device="meta") for key, shape in [*layers, *keys["other"].items()]}


def difference(found, expected):
    assert found.shape == expected.shape
    return float((found - expected).abs().max()) if found.numel() else 0.0


def test_updated_embeddings_are_the_originals(golden):
    version, network, cases = golden
    names = [name for name, case in META["cases"].items() if name.startswith(version) and not case.get("error")]
    assert len(names) == {"v1": 4, "v2": 2}[version]
    for name in names:
        inputs = case_inputs(cases, name)
        before = inputs["prompt_embeds"].clone()
        updated = network(**inputs)
        assert difference(updated, cases[f"{name}.updated_prompt_embeds"]) < TOLERANCE
        assert torch.equal(inputs["prompt_embeds"], before)
        mask = inputs["class_tokens_mask"].bool()
        assert torch.equal(updated[~mask], before[~mask])
        if f"{name}.fused_rows" in cases:
            assert difference(updated[mask], cases[f"{name}.fused_rows"]) < TOLERANCE


def test_identity_rows_are_the_originals(golden):
    version, network, cases = golden
    for name in ("one", "three"):
        inputs = case_inputs(cases, f"{version}_{name}")
        faces = None if inputs["face_embeds"] is None else inputs["face_embeds"][0]
        rows = network.identity_rows(inputs["id_pixel_values"][0], faces)
        expected = cases[f"v1_{name}.id_embeds"][0] if version == "v1" else cases[f"v2_{name}.qformer_out"]
        assert difference(rows, expected) < TOLERANCE


def test_the_tower_and_the_parts_are_the_originals(golden):
    version, network, cases = golden
    pictures = cases[f"{version}_three.id_pixel_values"][0]
    if version == "v1":
        assert difference(network.vision_model(pictures)[2], cases["v1_three.clip_pooled"]) < TOLERANCE
        for index, mlp in ((1, network.fuse_module.mlp1), (2, network.fuse_module.mlp2)):
            rows = cases[f"mlp{index}.in"]
            residual = rows if index == 2 else 0
            assert difference(mlp(rows) + residual, cases[f"mlp{index}.out"]) < TOLERANCE
        return
    hidden = network.vision_model(pictures)[0]
    assert difference(hidden, cases["v2_three.clip_last_hidden_state"]) < TOLERANCE
    perceiver = network.qformer_perceiver
    queries = cases["v2_three.token_norm_out"]
    assert difference(perceiver.perceiver_resampler(hidden, queries), cases["v2_three.resampler_out"]) < TOLERANCE


def test_v2_refuses_a_truncated_mask_and_missing_faces():
    cases = load_file(GOLDENS / "photomaker_v2_cases.safetensors")
    network = golden_network(load_file(GOLDENS / "photomaker_v2_state.safetensors"))
    with pytest.raises(ValueError, match="has 3 class tokens, but the pictures give 6 identity rows"):
        network(**case_inputs(cases, "v2_three_truncated"))
    with pytest.raises(ValueError, match="v2 needs a face recognition embedding"):
        network(**case_inputs(cases, "v2_one") | {"face_embeds": None})


def test_v1_refuses_more_class_tokens_than_pictures():
    cases = load_file(GOLDENS / "photomaker_v1_cases.safetensors")
    network = golden_network(load_file(GOLDENS / "photomaker_v1_state.safetensors"))
    inputs = case_inputs(cases, "v1_three")
    with pytest.raises(ValueError, match="has 3 class tokens, but the pictures give 1 identity rows"):
        network(**inputs | {"id_pixel_values": inputs["id_pixel_values"][:, :1]})


def test_prompts_of_a_batch_are_independent(golden):
    version, network, cases = golden
    pair = [case_inputs(cases, f"{version}_three") for _ in range(2)]
    pair[1]["prompt_embeds"] = pair[1]["prompt_embeds"].flip(1)
    pair[1]["class_tokens_mask"] = pair[1]["class_tokens_mask"].roll(5)
    both = {key: None if pair[0][key] is None else torch.cat([inputs[key] for inputs in pair]) for key in pair[0]}
    expected = torch.cat([network(**inputs) for inputs in pair])
    assert difference(network(**both), expected) < TOLERANCE


def test_half_precision_weights_stay_close(golden):
    version, network, cases = golden
    half = golden_network(load_file(GOLDENS / f"photomaker_{version}_state.safetensors"), dtype=torch.float16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float16}
    inputs = case_inputs(cases, f"{version}_three")
    updated = half(**inputs)
    assert updated.dtype == torch.float32
    assert difference(updated, cases[f"{version}_three.updated_prompt_embeds"]) < 0.02
    low = half(**inputs | {"prompt_embeds": inputs["prompt_embeds"].half()})
    assert low.dtype == torch.float16


@pytest.mark.parametrize(
    ("version", "network_class", "tensors", "parameters"),
    [("v1", IdEncoderV1, 407, 326_273_024), ("v2", IdEncoderV2, 463, 543_395_840)],
)
def test_published_files_match_key_by_key(version, network_class, tensors, parameters):
    state = published_state(version)
    assert len(state) == tensors == KEYS[version]["total_keys"]
    assert sum(value.numel() for value in state.values()) == parameters
    found_class, config = loader.describe(state, "published")
    assert found_class is network_class
    assert config["vision"] == {
        "model_type": "clip_vision_model",
        "hidden_act": "quick_gelu",
        "num_channels": 3,
        "hidden_size": 1024,
        "image_size": 224,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
    }
    if version == "v2":
        assert config["perceiver"] == {
            "tokens": 2,
            "face_width": 512,
            "face_hidden": 2048,
            "inner": 2048,
            "heads": 16,
            "feed_forward": 8192,
            "depth": 4,
        }
    network = build_on_meta(network_class, config, "published")
    found = compare(state, network)
    assert found.missing == found.misshapen == []
    assert tuple(found.unexpected) == (loader.UNREAD_V2 if version == "v2" else ())
    assert set(found.unexpected) <= set(KEYS["unused_in_v2_forward"])


def test_the_value_on_the_socket_runs_in_memory_management(golden):
    version, network, cases = golden
    device = comfy.model_management.text_encoder_device()
    photomaker = PhotoMaker(comfy.model_patcher.CoreModelPatcher(network, device, torch.device("cpu")))
    assert (photomaker.version, photomaker.width, photomaker.image_size) == (version, 64, 56)
    assert photomaker.tokens_per_picture == META[f"num_tokens_{version}"]
    inputs = case_inputs(cases, f"{version}_one")
    updated = photomaker(**inputs)
    assert difference(updated, cases[f"{version}_one.updated_prompt_embeds"]) < TOLERANCE
    assert photomaker.patcher in [entry.model for entry in comfy.model_management.current_loaded_models]
    with pytest.raises(ValueError, match="are 48 wide, but this PhotoMaker file expects 64.*SDXL"):
        photomaker(**inputs | {"prompt_embeds": torch.zeros(1, 77, 48)})
    with pytest.raises(ValueError, match="mask covers 77 tokens, the text has 154"):
        photomaker(**inputs | {"prompt_embeds": torch.zeros(1, 154, 64)})
    with pytest.raises(ValueError, match="56x28 pixels, expected 56x56"):
        photomaker(**inputs | {"id_pixel_values": inputs["id_pixel_values"][..., :28, :]})
    if version == "v2":
        with pytest.raises(ValueError, match=r"shape \(1, 7\), expected 1 rows of 32 values"):
            photomaker(**inputs | {"face_embeds": torch.zeros(1, 1, 7)})


def test_pictures_are_the_goldens():
    golden = load_file(GOLDENS / "clip_preprocess.safetensors")
    images = golden["image_uint8_hwc"].unsqueeze(0).float() / 255
    assert difference(normalise(images)[0, :, ::8, ::8], golden["pixel_values_stride8"]) < 1e-6


@pytest.mark.parametrize("size", [(90, 130), (130, 90), (224, 224), (300, 401), (1000, 333), (8, 60)])
def test_pictures_are_those_of_the_published_processor(size):
    picture = picture_of(*size)
    array = numpy.asarray(Image.fromarray((picture * 255).round().to(torch.uint8).numpy()))
    expected = PROCESSOR()(array.copy(), return_tensors="pt").pixel_values
    assert difference(normalise(picture.unsqueeze(0)), expected) < 1e-6


def test_alpha_is_dropped_and_gray_repeated():
    picture = picture_of(40, 50, channels=4).unsqueeze(0)
    assert torch.equal(normalise(picture), normalise(picture[..., :3]))
    gray = picture[..., :1]
    assert torch.equal(normalise(gray, 56), normalise(gray.expand(-1, -1, -1, 3), 56))
    with pytest.raises(ValueError, match="image batch is empty"):
        normalise(picture[:0])
