"""Tiny face networks in the published layouts, and stand-ins that need no optional package."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

STRIDES = (8, 16, 32)
ANCHORS = 2
# Distances of the box's sides and shifts of the key points from the cell's corner, in strides.
BOX = (2.0, 2.0, 6.0, 6.0)
POINTS = ((0.5, 0.9), (3.5, 0.8), (2.1, 2.4), (0.8, 4.1), (3.3, 4.0))
# EVA02-CLIP with few channels: two heads, 4 x 4 patches.
EVA_WIDTH, EVA_DEPTH, EVA_HIDDEN, EVA_PATCH, EVA_GRID, EVA_OUTPUT = 128, 22, 341, 14, 4, 768


class BrightSpotDetector:
    """An SCRFD session in NumPy: cells of the finest stride whose mean brightness is above 0.9 are faces."""

    def __init__(self, size=None, batched=False):
        self.shape = [1, 3, size or "?", size or "?"]
        self.batched = batched
        self.sizes = []

    def get_inputs(self):
        return [SimpleNamespace(name="input.1", shape=self.shape)]

    def get_outputs(self):
        return [SimpleNamespace(name=str(index), shape=[None, width]) for width in (1, 4, 10) for index in range(3)]

    def run(self, names, feeds):
        pixels = feeds["input.1"][0]
        self.sizes.append(pixels.shape[-1])
        scores, boxes, points = [], [], []
        for stride in STRIDES:
            cells = pixels.shape[-1] // stride
            brightness = pixels[:, : cells * stride, : cells * stride].mean(axis=0)
            brightness = brightness.reshape(cells, stride, cells, stride).mean(axis=(1, 3)).reshape(-1)
            score = brightness if stride == STRIDES[0] else np.zeros_like(brightness)
            # The second anchor is a little less certain.
            scores.append(np.stack([score, score * 0.95], axis=1).reshape(-1, 1))
            count = cells * cells * ANCHORS
            boxes.append(np.tile(np.array(BOX, dtype=np.float32), (count, 1)))
            points.append(np.tile(np.array(POINTS, dtype=np.float32).reshape(1, 10), (count, 1)))
        outputs = [values.astype(np.float32) for values in (*scores, *boxes, *points)]
        return [values[None] for values in outputs] if self.batched else outputs


class LinearRecogniser:
    """An ArcFace session in NumPy: a seeded random matrix times the blurred crop."""

    def __init__(self, side=112):
        self.side = side
        self.matrix = np.random.default_rng(0).normal(size=(512, 3 * 14 * 14)).astype(np.float32)

    def get_inputs(self):
        return [SimpleNamespace(name="input.1", shape=["None", 3, self.side, self.side])]

    def get_outputs(self):
        return [SimpleNamespace(name="683", shape=[1, 512])]

    def run(self, names, feeds):
        (blob,) = feeds.values()
        cells = blob.reshape(len(blob), 3, 14, self.side // 14, 14, self.side // 14).mean(axis=(3, 5))
        return [cells.reshape(len(blob), -1) @ self.matrix.T]


def spot_picture(width=320, height=320, spots=((96, 96),), side=8):
    """A dark picture with white squares at multiples of 8 pixels: faces to `BrightSpotDetector` at scale 1."""
    picture = np.full((height, width, 3), 20, dtype=np.uint8)
    ramp = np.linspace(0, 60, width).astype(np.uint8)
    picture[..., 1] += ramp
    for x, y in spots:
        picture[y : y + side, x : x + side] = 255
    return picture


def write_detector(file: Path, seed: int = 0) -> None:
    """An SCRFD file: one strided convolution per output, random but for its bright-spot scores."""
    from onnx import TensorProto, helper, numpy_helper

    generator = np.random.default_rng(seed)
    nodes, weights, outputs = [], [], []
    for kind, width in (("score", 1), ("bbox", 4), ("kps", 10)):
        for stride in STRIDES:
            channels, name = ANCHORS * width, f"{kind}_{stride}"
            kernel = generator.normal(0, 0.3 / stride, (channels, 3, stride, stride)).astype(np.float32)
            if kind == "score":
                kernel = kernel * 4
            bias = np.tile({"score": [-1.0], "bbox": BOX, "kps": np.ravel(POINTS)}[kind], ANCHORS).astype(np.float32)
            shape = np.array([-1, width], dtype=np.int64)
            weights += [
                numpy_helper.from_array(array, f"{name}.{part}")
                for part, array in (("weight", kernel), ("bias", bias), ("shape", shape))
            ]
            nodes += [
                helper.make_node(
                    "Conv", ["input.1", f"{name}.weight", f"{name}.bias"], [f"{name}.map"], strides=[stride, stride]
                ),
                helper.make_node("Transpose", [f"{name}.map"], [f"{name}.last"], perm=[0, 2, 3, 1]),
                helper.make_node(
                    "Reshape", [f"{name}.last", f"{name}.shape"], [name if kind != "score" else f"{name}.raw"]
                ),
            ]
            if kind == "score":
                nodes.append(helper.make_node("Sigmoid", [f"{name}.raw"], [name]))
            outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, width]))
    entry = helper.make_tensor_value_info("input.1", TensorProto.FLOAT, [1, 3, "?", "?"])
    _save(nodes, [entry], outputs, weights, file)


def write_recogniser(file: Path, seed: int = 1) -> None:
    """An ArcFace file: a strided convolution and a linear layer to 512 numbers."""
    from onnx import TensorProto, helper, numpy_helper

    generator = np.random.default_rng(seed)
    weights = [
        numpy_helper.from_array(generator.normal(0, 0.1, (4, 3, 16, 16)).astype(np.float32), "conv.weight"),
        numpy_helper.from_array(generator.normal(0, 0.1, (512, 4 * 7 * 7)).astype(np.float32), "fc.weight"),
        numpy_helper.from_array(np.zeros(512, dtype=np.float32), "fc.bias"),
    ]
    nodes = [
        helper.make_node("Conv", ["input.1", "conv.weight"], ["conv"], strides=[16, 16]),
        helper.make_node("Tanh", ["conv"], ["tanh"]),
        helper.make_node("Flatten", ["tanh"], ["flat"]),
        helper.make_node("Gemm", ["flat", "fc.weight", "fc.bias"], ["683"], transB=1),
    ]
    entry = helper.make_tensor_value_info("input.1", TensorProto.FLOAT, ["None", 3, 112, 112])
    _save(nodes, [entry], [helper.make_tensor_value_info("683", TensorProto.FLOAT, [1, 512])], weights, file)


def write_pack(folder: Path) -> None:
    """A model pack of insightface: detector and recogniser under the names of antelopev2."""
    folder.mkdir(parents=True)
    write_detector(folder / "scrfd_10g_bnkps.onnx")
    write_recogniser(folder / "glintr100.onnx")


def eva_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under the keys of EVA-CLIP's published file, with a piece of its text tower."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, center=0.0):
        return center + torch.randn(shape, generator=generator) * (0.02 if len(shape) > 1 else 0.05)

    state = {
        "logit_scale": draw(1)[0],
        "text.positional_embedding": draw(77, 64),
        "visual.cls_token": draw(1, 1, EVA_WIDTH),
        "visual.pos_embed": draw(1, 1 + EVA_GRID**2, EVA_WIDTH),
        "visual.patch_embed.proj.weight": draw(EVA_WIDTH, 3, EVA_PATCH, EVA_PATCH),
        "visual.patch_embed.proj.bias": draw(EVA_WIDTH),
        "visual.rope.freqs_cos": draw(EVA_GRID**2, 64),
        "visual.rope.freqs_sin": draw(EVA_GRID**2, 64),
        "visual.norm.weight": draw(EVA_WIDTH, center=1.0),
        "visual.norm.bias": draw(EVA_WIDTH),
        "visual.head.weight": draw(EVA_OUTPUT, EVA_WIDTH),
        "visual.head.bias": draw(EVA_OUTPUT),
    }
    norms = {"norm1": EVA_WIDTH, "norm2": EVA_WIDTH, "attn.inner_attn_ln": EVA_WIDTH, "mlp.ffn_ln": EVA_HIDDEN}
    layers = {
        "attn.proj": (EVA_WIDTH, EVA_WIDTH),
        "mlp.w1": (EVA_HIDDEN, EVA_WIDTH),
        "mlp.w2": (EVA_HIDDEN, EVA_WIDTH),
        "mlp.w3": (EVA_WIDTH, EVA_HIDDEN),
    }
    for index in range(EVA_DEPTH):
        block = f"visual.blocks.{index}."
        for name, width in norms.items():
            state[f"{block}{name}.weight"] = draw(width, center=1.0)
            state[f"{block}{name}.bias"] = draw(width)
        for name, shape in layers.items():
            # Small steps of the residual stream, so that rounding does not pile up over the blocks.
            scale = 0.3 if shape[0] == EVA_WIDTH else 1.0
            state[f"{block}{name}.weight"] = draw(*shape) * scale
            state[f"{block}{name}.bias"] = draw(shape[0]) * scale
        for name in "qkv":
            state[f"{block}attn.{name}_proj.weight"] = draw(EVA_WIDTH, EVA_WIDTH)
        for name in "qv":
            state[f"{block}attn.{name}_bias"] = draw(EVA_WIDTH)
    return state


def _save(nodes, inputs, outputs, weights, file: Path) -> None:
    import onnx
    from onnx import helper

    graph = helper.make_graph(nodes, "tiny", inputs, outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), str(file))
