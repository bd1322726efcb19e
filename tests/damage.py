"""Ways in which a checkpoint folder can be broken; each function breaks the folder it is given."""

import json
import pickle
import shutil

import torch
from safetensors.torch import load_file, save_file

WEIGHTS = "diffusion_pytorch_model"


def write_shards(folder, state, suffix=".safetensors", index_name=None):
    keys = sorted(state)
    parts = [f"{WEIGHTS}-0000{part + 1}-of-00002{suffix}" for part in range(2)]
    weight_map = {}
    for part, name in enumerate(parts):
        chunk = {key: state[key] for key in keys[part::2]}
        save_file(chunk, folder / name) if suffix == ".safetensors" else torch.save(chunk, folder / name)
        weight_map |= dict.fromkeys(chunk, name)
    name = index_name or f"{WEIGHTS}{suffix}.index.json"
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")


def config(folder):
    (folder / "unet" / "config.json").write_text("{", encoding="utf-8")


def family(folder):
    (folder / "unet" / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}), encoding="utf-8")


def truncated(folder):
    path = folder / "unet" / f"{WEIGHTS}.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def header(folder):
    (folder / "unet" / f"{WEIGHTS}.safetensors").write_bytes(b"\xff" * 64)


def pickled_code(folder):
    (folder / "unet" / f"{WEIGHTS}.safetensors").unlink()
    with open(folder / "unet" / f"{WEIGHTS}.bin", "wb") as file:
        pickle.dump(Malice(str(folder / "owned")), file)


def channels(folder):
    config = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"in_channels": 9}), encoding="utf-8")


def nan(folder):
    path = folder / "unet" / f"{WEIGHTS}.safetensors"
    state = load_file(path)
    state["conv_in.weight"][0, 0, 0, 0] = float("nan")
    save_file(state, path)


def missing_key(folder):
    path = folder / "unet" / f"{WEIGHTS}.safetensors"
    state = load_file(path)
    del state["conv_in.bias"]
    state["conv_in.scale"] = torch.zeros(1)
    save_file(state, path)


def empty(folder):
    shutil.rmtree(folder / "unet")
    (folder / "unet").mkdir()


def shards(folder):
    path = folder / "unet" / f"{WEIGHTS}.safetensors"
    write_shards(folder / "unet", load_file(path))
    path.unlink()
    (folder / "unet" / f"{WEIGHTS}-00002-of-00002.safetensors").unlink()


def vae(folder):
    path = folder / "vae" / f"{WEIGHTS}.safetensors"
    state = load_file(path)
    del state["decoder.conv_in.bias"]
    save_file(state, path)


def text(folder):
    config = json.loads((folder / "text_encoder" / "config.json").read_text(encoding="utf-8"))
    (folder / "text_encoder" / "config.json").write_text(json.dumps(config | {"hidden_size": 128}), encoding="utf-8")


class Malice:
    """Creates a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")
