"""EVA02-CLIP's vision tower against an independent implementation, and the face parser and aligner against facexlib."""

import math

import numpy as np
import pytest
import torch
from tiny_faces import EVA_DEPTH, EVA_GRID, EVA_OUTPUT, EVA_PATCH, EVA_WIDTH, eva_state
from torch.nn.functional import conv2d, layer_norm, linear, silu

from consistent_video.faces import eva_vision, parsing
from consistent_video.faces.alignment import PORTRAIT_TEMPLATE, similarity_transform
from consistent_video.faces.pictures import resize_bilinear

SIDE = EVA_GRID * EVA_PATCH


def turn_pairs(values, tables):
    """Rotary positions as EVA02 has them: neighbouring channels are a pair; the class token is not turned."""
    cos, sin = tables
    pairs = values[:, :, 1:].unflatten(-1, (-1, 2))
    first, second = pairs.unbind(-1)
    turned = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)
    return torch.cat([values[:, :, :1], turned], dim=2)


def rotary_tables(grid, head=64, trained=16):
    """Angles of 16 frequencies for the row, then 16 for the column, scaled to the trained grid: two (N, 32)."""
    frequencies = 1 / 10000 ** (torch.arange(0, head // 2, 2) / (head // 2))
    places = torch.arange(grid) / grid * trained
    rows = (places[:, None] * frequencies).unsqueeze(1).expand(-1, grid, -1)
    columns = (places[:, None] * frequencies).unsqueeze(0).expand(grid, -1, -1)
    angles = torch.cat([rows, columns], dim=-1).flatten(0, 1)
    return angles.cos(), angles.sin()


def reference_tower(state, pixels):
    """The published forward pass on the published keys, written out."""
    weights = {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}

    def norm(values, name):
        return layer_norm(values, values.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-6)

    def project(values, name, bias=None):
        return linear(values, weights[f"{name}.weight"], weights.get(bias or f"{name}.bias"))

    patches = conv2d(pixels, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], stride=EVA_PATCH)
    x = torch.cat([weights["cls_token"].expand(len(pixels), -1, -1), patches.flatten(2).mT], dim=1)
    x = x + weights["pos_embed"]
    tables, states = rotary_tables(EVA_GRID), []
    for index in range(EVA_DEPTH):
        if index in (4, 8, 12, 16, 20):
            states.append(x)
        block = f"blocks.{index}."
        y = norm(x, f"{block}norm1")
        query, key, value = (
            project(y, f"{block}attn.{name}_proj", f"{block}attn.{name}_bias").unflatten(-1, (-1, 64)).transpose(1, 2)
            for name in "qkv"
        )
        scores = turn_pairs(query, tables) @ turn_pairs(key, tables).mT / math.sqrt(64)
        attended = (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)
        x = x + project(norm(attended, f"{block}attn.inner_attn_ln"), f"{block}attn.proj")
        y = norm(x, f"{block}norm2")
        gated = silu(project(y, f"{block}mlp.w1")) * project(y, f"{block}mlp.w2")
        x = x + project(norm(gated, f"{block}mlp.ffn_ln"), f"{block}mlp.w3")
    return project(norm(x, "norm")[:, 0], "head"), states


def normalised(pictures):
    mean, std = (torch.tensor(values)[:, None, None] for values in (eva_vision.MEAN, eva_vision.STD))
    return (pictures - mean) / std


@pytest.fixture(scope="module")
def tower():
    pytest.importorskip("timm")
    return eva_vision.EvaVision(eva_state(), "EVA02_CLIP_L_336_psz14_s6B.pt")


def test_the_tower_is_the_published_one(tower):
    pictures = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    pooled, states = reference_tower(eva_state(), normalised(pictures))
    found, found_states = tower.encode(pictures)
    assert found.shape == (2, EVA_OUTPUT) and len(found_states) == len(states) == 5
    assert (found - pooled).abs().max() < 1e-5
    for state, expected in zip(found_states, states):
        assert state.shape == expected.shape == (2, 1 + EVA_GRID**2, EVA_WIDTH)
        assert (state - expected).abs().max() < 1e-5
    assert (states[0] - states[4]).abs().max() > 0.1


def test_pictures_are_scaled_as_by_torchvision(tower):
    transforms = pytest.importorskip("torchvision.transforms.functional")
    large = torch.rand(1, 3, 100, 100, generator=torch.Generator().manual_seed(2))
    scaled = transforms.resize(large, SIDE, transforms.InterpolationMode.BICUBIC)
    pooled, _ = reference_tower(eva_state(), normalised(scaled))
    assert (tower.encode(large)[0] - pooled).abs().max() < 1e-5


def test_half_precision_weights_stay_half_and_compute_in_single(tower):
    state = {key: value.half() for key, value in eva_state().items()}
    half = eva_vision.EvaVision(dict(state), "file")
    assert half.patcher.model.blocks[0].mlp.fc1_g.weight.dtype == torch.float16
    pictures = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    pooled, _ = reference_tower({key: value.float() for key, value in state.items()}, normalised(pictures))
    assert (half.encode(pictures)[0] - pooled).abs().max() < 1e-3


def test_the_published_size_fits_on_meta():
    eva = pytest.importorskip("timm.models.eva")
    with torch.device("meta"):
        published = eva.eva02_large_patch14_clip_336(num_classes=768)
    shapes = {key: value for key, value in published.state_dict().items()}
    network = eva_vision._build(shapes, "file")
    assert {key: value.shape for key, value in network.state_dict().items()} == {
        key: value.shape for key, value in shapes.items()
    }
    assert sum(value.numel() for value in shapes.values()) == 304_432_832  # timm lists 304.43 million
    assert network.rope.pos_embed.shape == (576, 128) and network.rope.pos_embed.device.type == "cpu"


def test_other_files_are_named():
    with pytest.raises(ValueError, match=r"open_clip.pt holds no EVA02-CLIP vision tower \(no pos_embed"):
        eva_vision.vision_state({"visual.conv1.weight": torch.zeros(1)}, "open_clip.pt")


def test_a_damaged_tower_is_named():
    pytest.importorskip("timm")
    state = eva_state()
    del state["visual.blocks.3.mlp.w3.weight"]
    with pytest.raises(ValueError, match="blocks.3.mlp.fc2.weight"):
        eva_vision.EvaVision(state, "file")


def test_background_labels_become_white():
    crop = np.full((2, 19, 3), (200, 100, 50), dtype=np.uint8)
    labels = torch.arange(19).expand(2, -1)
    cut = parsing.face_on_white(crop, labels)
    kept = [index for index in range(19) if index not in (0, 7, 8, 9, 14, 15, 16, 18)]
    assert (cut.color[0, :, 0, :].T == 1).all(dim=1).nonzero().flatten().tolist() == [0, 7, 8, 9, 14, 15, 16, 18]
    assert cut.color[0, :, 1, kept[0]].mul(255).round().tolist() == [200, 100, 50]
    luminance = (0.299 * 200 + 0.587 * 100 + 0.114 * 50) / 255
    assert cut.grey[0, :, 1, kept].sub(luminance).abs().max() < 1e-6
    assert cut.grey[0, :, 0, 16].tolist() == [1, 1, 1]


def test_the_parser_is_facexlibs():
    bisenet = pytest.importorskip("facexlib.parsing.bisenet")
    torch.manual_seed(0)
    reference = bisenet.BiSeNet(num_class=19).eval()
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    crop = resize_bilinear(noise, 128, 128)
    pixels = torch.from_numpy(crop).permute(2, 0, 1)[None] / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = reference((pixels - mean[:, None, None]) / std[:, None, None])[0].argmax(dim=1)[0]
    parser = parsing.FaceParser(dict(reference.state_dict()), "parsing_bisenet.pth")
    assert torch.equal(parser.labels(crop), expected) and len(expected.unique()) > 1
    with pytest.raises(ValueError, match="parsing_bisenet.pth does not fit BiSeNet"):
        parsing.FaceParser({"weight": torch.zeros(1)}, "parsing_bisenet.pth")


def test_the_aligner_is_facexlibs():
    published = pytest.importorskip("facexlib.detection.retinaface")
    opencv = pytest.importorskip("cv2")
    from consistent_video.faces.retinaface import RetinaFace, robust_portrait

    torch.manual_seed(0)
    reference = published.RetinaFace("resnet50", device=torch.device("cpu"))
    for head in reference.ClassHead:
        # Some, not all, anchors become certain.
        head.conv1x1.weight.mul_(0.02)
    for head in (*reference.BboxHead, *reference.LandmarkHead):
        # Boxes of about the anchors' sizes.
        head.conv1x1.weight.mul_(0.02)
    state = {f"module.{key}": value for key, value in reference.state_dict().items()}
    noise = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    picture = resize_bilinear(noise, 160, 128)
    expected = reference.detect_faces(picture[..., ::-1].copy(), 0.97)
    faces = RetinaFace(state, "detection_Resnet50_Final.pth").detect(picture)
    assert len(faces) == len(expected) > 0
    found = np.array([[*face.box, face.score, *face.points.ravel()] for face in faces])
    assert np.abs(found - expected).max() < 1e-2
    points = PORTRAIT_TEMPLATE * 0.2 + [[10, 4], [11, 4], [22, 4], [10, 5], [10, 4]]
    matrix = opencv.estimateAffinePartial2D(points, PORTRAIT_TEMPLATE, method=opencv.LMEDS)[0]
    crop, used = robust_portrait(picture, points)
    assert crop.shape == (512, 512, 3)
    assert np.abs(used - matrix).max() < 1e-6
    assert np.abs(similarity_transform(points, PORTRAIT_TEMPLATE) - matrix).max() > 0.1


def test_half_precision_parsers_compute_in_single():
    published = pytest.importorskip("facexlib.parsing.bisenet")
    torch.manual_seed(0)
    state = published.BiSeNet(num_class=19).state_dict()
    crop = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    rounded = {key: value.half().to(value.dtype) for key, value in state.items()}
    half = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    assert torch.equal(
        parsing.FaceParser(half, "half").labels(crop), parsing.FaceParser(rounded, "single").labels(crop)
    )
