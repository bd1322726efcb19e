"""A pack for the test server: noise and text states from a file of the input folder, to repeat a recorded run."""

import folder_paths
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


class TensorNodes(ComfyExtension):
    async def get_node_list(self):
        return [RecordedNoise, RecordedText, RecordedLatent]


async def comfy_entrypoint():
    return TensorNodes()
