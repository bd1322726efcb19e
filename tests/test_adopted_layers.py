"""Layers of torch that became ComfyUI's are as if ComfyUI had built them."""

import comfy.memory_management
import comfy.ops
import pytest
import torch
from torch import nn

from consistent_video.models.adopt import ADOPTED_LAYERS, adopt

LAYERS = {
    "Linear": lambda: (nn.Linear(4, 6), nn.Linear(4, 6, bias=False)),
    "Conv1d": lambda: (nn.Conv1d(4, 6, 3, padding=1), nn.Conv1d(4, 4, 2, groups=2, bias=False)),
    "Conv2d": lambda: (nn.Conv2d(4, 6, 3, padding="same"), nn.Conv2d(4, 6, (1, 2), stride=2)),
    "Conv3d": lambda: (nn.Conv3d(4, 6, (3, 1, 1), padding=(1, 0, 0)), nn.Conv3d(4, 6, 2, padding_mode="replicate")),
    "GroupNorm": lambda: (nn.GroupNorm(2, 4), nn.GroupNorm(1, 4, eps=1e-3)),
    "LayerNorm": lambda: (nn.LayerNorm(4), nn.LayerNorm((4,), bias=False), nn.LayerNorm(4, elementwise_affine=False)),
    "RMSNorm": lambda: (nn.RMSNorm(4), nn.RMSNorm(4, eps=1e-3)),
    "Embedding": lambda: (nn.Embedding(5, 4), nn.Embedding(5, 4, padding_idx=1)),
}
SHAPES = {"Conv1d": (2, 4, 5), "Conv2d": (2, 4, 5, 6), "Conv3d": (2, 4, 3, 5, 6), "GroupNorm": (2, 4, 5)}


def of_fast_ops():
    """An operations namespace whose matrix layers keep what their constructor says, as `--fast cublas_ops` does."""

    class Kept(nn.Linear):
        def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
            super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
            self.has_bias, self.shape = bias, (in_features, out_features, dtype)

    class Operations(comfy.ops.manual_cast):
        class Linear(Kept, comfy.ops.manual_cast.Linear):
            def forward_comfy_cast_weights(self, given):
                weight, bias, stream = comfy.ops.cast_bias_weight(self, given, offloadable=True)
                assert self.has_bias == (bias is not None)
                return nn.functional.linear(given, weight, bias)

    return Operations


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_every_kind_computes_in_another_type_than_its_weights(kind, dynamic, monkeypatch):
    monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", dynamic)
    torch.manual_seed(0)
    for layer in LAYERS[kind]():
        layer.requires_grad_(False)
        given = torch.tensor([[1, 4, 0]]) if kind == "Embedding" else torch.randn(SHAPES.get(kind, (2, 3, 4)))
        expected, weight = layer(given), layer.weight
        adopted = adopt(nn.ModuleList([layer]), comfy.ops.manual_cast)[0]
        assert adopted.weight is weight
        torch.testing.assert_close(adopted(given), expected)
        if kind != "Embedding":
            assert adopted(given.double()).dtype == torch.float64


def test_all_adopted_kinds_are_tried():
    assert set(LAYERS) == set(ADOPTED_LAYERS)


def test_layers_have_what_their_class_gives_them_when_it_builds_one():
    layers = adopt(nn.ModuleList([nn.Linear(4, 6, bias=False), nn.Linear(4, 6).half()]), of_fast_ops())
    assert [layer.has_bias for layer in layers] == [False, True]
    assert [layer.shape for layer in layers] == [(4, 6, torch.float32), (4, 6, torch.float16)]
    given = torch.randn(2, 4)
    assert torch.equal(layers[0](given), nn.functional.linear(given, layers[0].weight))
    assert layers[1](given).shape == (2, 6)
