"""A pack for the test server: values from a file of the input folder, to repeat a recorded run, and damaged ones."""

import folder_paths
import torch
from comfy.utils import load_torch_file
from comfy_api.latest import ComfyExtension, io


def read(key: str):
    return load_torch_file(folder_paths.get_annotated_filepath("recorded.safetensors"))[key]


class RecordedValues:
    """A NOISE of given values."""

    seed = 0

    def __init__(self, tensor):
        self.tensor = tensor

    def generate_noise(self, latent):
        return self.tensor


class RecordedNoise(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema("RecordedNoise", inputs=[io.String.Input("key")], outputs=[io.Noise.Output()])

    @classmethod
    def execute(cls, key):
        return io.NodeOutput(RecordedValues(read(key)))


class RecordedText(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema("RecordedText", inputs=[io.String.Input("key")], outputs=[io.Conditioning.Output()])

    @classmethod
    def execute(cls, key):
        return io.NodeOutput([[read(key), {}]])


class RecordedLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema("RecordedLatent", inputs=[io.String.Input("key")], outputs=[io.Latent.Output()])

    @classmethod
    def execute(cls, key):
        return io.NodeOutput({"samples": read(key)})


DAMAGED = {
    "gray": lambda: torch.rand(1, 64, 64, 1),
    "gray_alpha": lambda: torch.rand(1, 64, 64, 2),
    "rgba": lambda: torch.rand(1, 64, 64, 4),
    "nan": lambda: torch.full((1, 64, 64, 3), float("nan")),
    "infinite": lambda: torch.full((1, 64, 64, 3), float("inf")),
    "no_pictures": lambda: torch.rand(0, 64, 64, 3),
    "no_pixels": lambda: torch.rand(1, 0, 64, 3),
    "bytes": lambda: torch.zeros(1, 64, 64, 3, dtype=torch.uint8),
    "three_dimensions": lambda: torch.rand(64, 64, 3),
    "five_channels": lambda: torch.rand(1, 64, 64, 5),
    "one_pixel": lambda: torch.rand(1, 1, 1, 3),
    "half": lambda: torch.rand(1, 64, 64, 3).half(),
    "many": lambda: torch.rand(3, 64, 64, 3),
    "other_vae": lambda: {"samples": torch.randn(1, 16, 3, 8, 8)},
    "stills": lambda: {"samples": torch.zeros(5, 4, 8, 8)},
    "nan_latent": lambda: {"samples": torch.full((1, 4, 5, 8, 8), float("nan"))},
    "no_latent": lambda: {},
    "object": object,
    "empty_list": list,
    "text": lambda: "abc",
    "nothing": lambda: None,
}


class DamagedValue(io.ComfyNode):
    """A value that fits no socket, or not as it is, for every type of socket."""

    @classmethod
    def define_schema(cls):
        kind = io.Combo.Input("kind", options=list(DAMAGED))
        return io.Schema("DamagedValue", inputs=[kind], outputs=[io.AnyType.Output()])

    @classmethod
    def execute(cls, kind):
        return io.NodeOutput(DAMAGED[kind]())


class TensorNodes(ComfyExtension):
    async def get_node_list(self):
        return [RecordedNoise, RecordedText, RecordedLatent, DamagedValue]


async def comfy_entrypoint():
    return TensorNodes()
