"""FreeU against diffusers' networks and filter, and against the rule of ComfyUI's own node."""

import comfy.model_base
import comfy.model_patcher
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import pytest
import torch
from comfy_extras.nodes_freelunch import FreeU
from diffusers import UNet2DConditionModel
from diffusers.utils.torch_utils import fourier_filter

from consistent_video.patches.free_u import (
    install_free_u,
    output_block_numbers,
    scale_backbone,
    scale_low_frequencies,
)

CPU = torch.device("cpu")
PUBLISHED = {"b1": 1.1, "b2": 1.2, "s1": 0.6, "s2": 0.4}
WIDTH, CONTEXT, LABEL = 32, 24, 40
# ComfyUI's network settings in which the families differ; each has the family's structure at a tenth of its width.
SDXL = {
    "channel_mult": [1, 2, 4],
    "num_res_blocks": [2, 2, 2],
    "transformer_depth": [0, 0, 1, 1, 2, 2],
    "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2],
    "transformer_depth_middle": 2,
    "num_head_channels": WIDTH,
    "num_heads": -1,
    "use_linear_in_transformer": True,
    "adm_in_channels": LABEL,
    "num_classes": "sequential",
}
SD15 = {
    "channel_mult": [1, 2, 4, 4],
    "num_res_blocks": [2, 2, 2, 2],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
    "num_head_channels": -1,
    "num_heads": 2,
    "use_linear_in_transformer": False,
    "adm_in_channels": None,
}
SD21 = {**SD15, "num_head_channels": WIDTH, "num_heads": -1, "use_linear_in_transformer": True}
FAMILIES = {
    "sdxl": (SDXL, comfy.supported_models.SDXL, comfy.model_base.SDXL),
    "sd15": (SD15, comfy.supported_models.SD15, comfy.model_base.BaseModel),
    "sd21": (SD21, comfy.supported_models.SD20, comfy.model_base.BaseModel),
}


def diffusers_network(settings: dict, seed: int = 0) -> UNet2DConditionModel:
    """A random network of diffusers with the structure of ComfyUI's settings."""
    mult, resnets = settings["channel_mult"], settings["num_res_blocks"][0]
    depths = settings["transformer_depth"][::resnets]
    linear = settings["num_head_channels"] == WIDTH
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        block_out_channels=[WIDTH * factor for factor in mult],
        down_block_types=["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
        up_block_types=["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in depths[::-1]],
        transformer_layers_per_block=[depth or settings["transformer_depth_middle"] for depth in depths],
        layers_per_block=resnets,
        # diffusers takes the number of heads under this name.
        attention_head_dim=mult if linear else settings["num_heads"],
        use_linear_projection=settings["use_linear_in_transformer"],
        cross_attention_dim=CONTEXT,
        class_embed_type="projection" if settings["adm_in_channels"] else None,
        projection_class_embeddings_input_dim=settings["adm_in_channels"],
    ).eval()


def comfy_model(family: str, weights: dict | None = None) -> comfy.model_patcher.ModelPatcher:
    """A MODEL of ComfyUI, with diffusers' weights if there are any."""
    settings, config_class, model_class = FAMILIES[family]
    config = config_class(
        {
            **settings,
            "image_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "model_channels": WIDTH,
            "context_dim": CONTEXT,
            "use_spatial_transformer": True,
            "legacy": False,
            "dtype": torch.float32,
        }
    )
    # What a family says of its published size must not replace what is tiny here.
    config.unet_config.update(settings)
    model = model_class(config, device=CPU)
    if weights is not None:
        names = comfy.utils.unet_to_diffusers(config.unet_config)
        converted = {names[key]: value for key, value in weights.items()}
        model.diffusion_model.load_state_dict(converted, strict=True)
    return comfy.model_patcher.ModelPatcher(model, CPU, CPU)


def inputs_of(family: str, height: int = 16, width: int = 24) -> dict[str, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "x": torch.randn(2, 4, height, width, generator=generator),
        "timesteps": torch.tensor([981, 21]),
        "context": torch.randn(2, 7, CONTEXT, generator=generator),
    }
    if FAMILIES[family][0]["adm_in_channels"]:
        inputs["y"] = torch.randn(2, LABEL, generator=generator)
    return inputs


def predict(model: comfy.model_patcher.ModelPatcher, inputs: dict) -> torch.Tensor:
    options = model.model_options["transformer_options"]
    return model.model.diffusion_model(**inputs, transformer_options={**options})


def diffusers_predict(network: UNet2DConditionModel, inputs: dict) -> torch.Tensor:
    return network(inputs["x"], inputs["timesteps"], inputs["context"], class_labels=inputs.get("y")).sample


def block_patch(model: comfy.model_patcher.ModelPatcher):
    (patch,) = model.model_options["transformer_options"]["patches"]["output_block_patch"]
    return patch


def recorded_blocks(family: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Backbone and skip of every output block of an unpatched network."""
    recorded = []

    def record(backbone, skip, options):
        recorded.append((backbone, skip))
        return backbone, skip

    model = comfy_model(family, diffusers_network(FAMILIES[family][0]).state_dict())
    model.set_model_output_block_patch(record)
    predict(model, inputs_of(family))
    return recorded


def factors(model: comfy.model_patcher.ModelPatcher, blocks: list) -> list[tuple[float, float]]:
    """What the model's patch multiplies in every block: the backbone's first half, the skip's mean."""
    found = []
    for number, (backbone, skip) in enumerate(blocks):
        patched = block_patch(model)(backbone.clone(), skip.clone(), {"block": ("output", number)})
        half = backbone.shape[1] // 2
        assert torch.equal(patched[0][:, half:], backbone[:, half:])
        ratios = [
            (patched[0][:, :half].norm() / backbone[:, :half].norm()).item(),
            (patched[1].mean((2, 3)).norm() / skip.mean((2, 3)).norm()).item(),
        ]
        found.append(tuple(round(ratio, 4) for ratio in ratios))
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [(8, 8), (16, 24), (13, 21)], ids=["square", "wide", "odd"])
def test_prediction_is_that_of_diffusers(family, size):
    network = diffusers_network(FAMILIES[family][0])
    plain = comfy_model(family, network.state_dict())
    inputs = inputs_of(family, *size)
    expected_plain = diffusers_predict(network, inputs)
    network.enable_freeu(**PUBLISHED)
    expected = diffusers_predict(network, inputs)
    assert (predict(plain, inputs) - expected_plain).abs().max() < 1e-5
    assert (predict(install_free_u(plain), inputs) - expected).abs().max() < 1e-5
    assert (expected - expected_plain).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_other_factors_are_those_of_diffusers(family):
    network = diffusers_network(FAMILIES[family][0])
    values = {"b1": 1.4, "b2": 0.7, "s1": 1.5, "s2": 0.2}
    patched = install_free_u(comfy_model(family, network.state_dict()), **values)
    network.enable_freeu(**values)
    inputs = inputs_of(family)
    assert (predict(patched, inputs) - diffusers_predict(network, inputs)).abs().max() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_first_two_up_blocks_are_scaled(family):
    first, second, rest = (1.1, 0.6), (1.2, 0.4), (1.0, 1.0)
    blocks = recorded_blocks(family)
    expected = [first] * 3 + [second] * 3 + [rest] * (len(blocks) - 6)
    assert factors(install_free_u(comfy_model(family)), blocks) == expected


@pytest.mark.parametrize(
    ("family", "differing"), [("sdxl", [3, 6]), ("sd15", [3, 4, 5, 6, 7, 8, 9]), ("sd21", [3, 4, 5, 6, 7, 8, 9])]
)
def test_comfyuis_node_takes_other_blocks(family, differing):
    blocks = recorded_blocks(family)
    model = comfy_model(family)
    ours = factors(install_free_u(model), blocks)
    theirs = factors(FreeU.execute(model, **PUBLISHED).result[0], blocks)
    assert [number for number, pair in enumerate(zip(ours, theirs)) if pair[0] != pair[1]] == differing


@pytest.mark.parametrize(
    ("resnets", "expected"),
    [
        ([2, 2, 2], [range(0, 3), range(3, 6)]),
        ([1, 1, 1], [range(0, 2), range(2, 4)]),
        ([1, 2, 3], [range(0, 4), range(4, 7)]),
        ([2], [range(0, 3)]),
    ],
)
def test_block_numbers_follow_the_network(resnets, expected):
    model = comfy_model("sdxl")
    model.model.diffusion_model.num_res_blocks = resnets
    assert output_block_numbers(model) == expected


SIZES = [(1, 1), (1, 6), (5, 1), (2, 2), (2, 7), (3, 3), (8, 8), (9, 13), (12, 20), (64, 64), (96, 151)]


@pytest.mark.parametrize("factor", [0.0, 0.4, 0.6, 1.5])
@pytest.mark.parametrize("size", SIZES)
def test_filter_is_that_of_diffusers(size, factor):
    features = 1 + torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    found = scale_low_frequencies(features, factor)
    torch.testing.assert_close(found, fourier_filter(features, 1, factor), rtol=0, atol=5e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_filter_in_half_precision_is_that_of_diffusers(size, dtype):
    features = (1 + torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))).to(dtype)
    found, expected = scale_low_frequencies(features, 0.4), fourier_filter(features, 1, 0.4)
    assert found.dtype == dtype
    # Both compute in float32, so that they differ by one rounding at most.
    torch.testing.assert_close(found, expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_filter_scales_half_precision_beyond_its_sums():
    features = torch.full((1, 2, 128, 128), 60000.0, dtype=torch.float16)
    assert torch.equal(scale_low_frequencies(features, 0.5), torch.full_like(features, 30000.0))


def test_filter_keeps_double_precision():
    features = torch.randn(1, 2, 9, 10, dtype=torch.float64)
    spectrum = torch.fft.fft2(features)
    rows, columns = torch.tensor([[0], [-1]]), torch.tensor([0, -1])
    spectrum[..., rows, columns] *= 0.4
    found = scale_low_frequencies(features, 0.4)
    torch.testing.assert_close(found, torch.fft.ifft2(spectrum).real, rtol=0, atol=1e-13)


def test_filter_of_another_memory_layout_is_the_same():
    features = torch.randn(2, 6, 9, 10, generator=torch.Generator().manual_seed(0))
    found = scale_low_frequencies(features.to(memory_format=torch.channels_last), 0.4)
    assert torch.equal(found, scale_low_frequencies(features, 0.4))


def test_filter_keeps_high_frequencies():
    checkers = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(4, 4).expand(1, 2, 8, 8)
    torch.testing.assert_close(scale_low_frequencies(3 + checkers, 0.4), 1.2 + checkers, rtol=0, atol=1e-6)


def test_backbone_scales_the_first_half():
    features = torch.arange(1.0, 6.0).view(1, 5, 1, 1)
    assert scale_backbone(features, 2.0).flatten().tolist() == [2.0, 4.0, 3.0, 4.0, 5.0]


def test_inputs_are_not_changed():
    patch = block_patch(install_free_u(comfy_model("sdxl")))
    backbone, skip = torch.randn(1, 8, 4, 4), torch.randn(1, 8, 4, 4)
    copies = backbone.clone(), skip.clone()
    patch(backbone, skip, {"block": ("output", 0)})
    assert torch.equal(backbone, copies[0]) and torch.equal(skip, copies[1])


def test_ones_leave_the_model_as_it_is():
    plain = comfy_model("sdxl", diffusers_network(SDXL).state_dict())
    patched = install_free_u(plain, 1, 1, 1, 1)
    inputs = inputs_of("sdxl")
    assert torch.equal(predict(patched, inputs), predict(plain, inputs))
    backbone, skip = torch.randn(1, 8, 4, 4), torch.randn(1, 8, 4, 4)
    assert all(
        after is before
        for number in range(9)
        for after, before in zip(block_patch(patched)(backbone, skip, {"block": ("output", number)}), (backbone, skip))
    )


def test_the_given_model_is_not_patched():
    model = comfy_model("sdxl")
    patched = install_free_u(model)
    assert patched is not model and patched.model is model.model
    assert "patches" not in model.model_options["transformer_options"]


@pytest.mark.parametrize("name", ["b1", "b2", "s1", "s2"])
@pytest.mark.parametrize("value", [-0.1, 10.5, float("nan"), float("inf")])
def test_factors_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"FreeU: {name} is {value}\. Choose a value from 0 to 10"):
        install_free_u(comfy_model("sdxl"), **{name: value})


def test_other_networks_are_refused():
    config = comfy.supported_models_base.BASE({"disable_unet_model_creation": True})
    config.latent_format = comfy.supported_models.SDXL.latent_format()
    model = comfy.model_base.BaseModel(config)
    model.diffusion_model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="Stable Diffusion 1.x, 2.x and XL; BaseModel has no UNet with output blocks"):
        install_free_u(comfy.model_patcher.ModelPatcher(model, CPU, CPU))


def test_a_skip_that_another_patch_used_is_missed():
    patched = comfy_model("sdxl")
    patched.set_model_output_block_patch(lambda backbone, skip, options: (torch.cat((backbone, skip), dim=1), None))
    patched = install_free_u(patched)
    with pytest.raises(ValueError, match="FreeU finds no skip at output block 0"):
        predict(patched, inputs_of("sdxl"))
