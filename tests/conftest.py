"""Fixtures: a real ComfyUI in this process, tiny checkpoints built once per session."""

import random
import shutil
from pathlib import Path

from comfy_process import comfyui_folder, enter

enter()

import comfy.memory_management  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.utils  # noqa: E402
import comfy_aimdo.control  # noqa: E402
import folder_paths  # noqa: E402
import pytest  # noqa: E402
import safetensors.torch  # noqa: E402
import torch  # noqa: E402
from comfy_server import ComfyServer  # noqa: E402

import tiny_checkpoints  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--shuffle", type=int, metavar="SEED", help="run modules, and the tests in them, in random order")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Sort the tests into groups that share what is expensive to make: all of the server's, else those of a module."""
    groups = {}
    for item in items:
        of_server = item.get_closest_marker("server") is not None
        if of_server or item.get_closest_marker("device"):
            item.add_marker("slow")
        groups.setdefault("server" if of_server else item.path.stem, []).append(item)
    names = sorted(groups)
    if config.option.shuffle is not None:
        order = random.Random(config.option.shuffle)
        order.shuffle(names)
        for group in groups.values():
            order.shuffle(group)
    # the longest first, so that one process is not left with it at the end
    names.sort(key=lambda name: name != "server")
    items[:] = [item for name in names for item in groups[name]]
    if config.pluginmanager.hasplugin("xdist"):
        for name, group in groups.items():
            for item in group:
                item.add_marker(pytest.mark.xdist_group(name))


def pytest_collection_finish(session):
    """Refuse a pytest-xdist that keeps no groups together: each process would start a server of its own."""
    grouped = getattr(session.config.option, "loadgroup", False) and hasattr(session.config, "workerinput")
    if grouped and not all("@" in item.nodeid for item in session.items):
        raise pytest.UsageError(
            "This pytest-xdist does not keep groups of tests together under this pytest. Use the versions of "
            "scripts/environment.txt, or run in one process with -n 0."
        )


@pytest.fixture(params=["classic", "dynamic"])
def memory_mode(request, monkeypatch):
    """Runs a test twice: as ComfyUI loads on a CPU, and with what dynamic VRAM, its default on NVIDIA, does to loading.

    There, layers have no weights until a state dict is loaded, and ComfyUI maps safetensors files itself. How such
    weights are then computed with is tested on the simulated device (tests/device).
    """
    if request.param == "dynamic":
        monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", True)
        monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcherDynamic)
        # Where the library of the mapping is not built for this system, other readers of the format stand in.
        if not comfy_aimdo.control.init():
            monkeypatch.setattr(comfy.utils, "load_safetensors", lambda path: (safetensors.torch.load_file(path), {}))
    return request.param


@pytest.fixture(scope="session")
def tiny_models(pytestconfig):
    """The tiny checkpoints as a ComfyUI models folder that is kept between runs; not to be written into."""
    return tiny_checkpoints.build_once(pytestconfig.cache.mkdir("tiny_checkpoints"))


@pytest.fixture(scope="session")
def models_folder(tmp_path_factory, tiny_models):
    """A ComfyUI models folder with the tiny checkpoints, known to ComfyUI's `folder_paths`."""
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(tiny_models, folder, dirs_exist_ok=True)
    for kind in ("diffusers", "diffusion_models", "loras", "vae"):
        (folder / kind).mkdir(exist_ok=True)
        folder_paths.add_model_folder_path(kind, str(folder / kind), is_default=True)
    return folder


@pytest.fixture(scope="session")
def modelscope_folder(models_folder):
    return models_folder / "diffusers" / tiny_checkpoints.MODELSCOPE_NAME


@pytest.fixture(scope="session")
def i2vgenxl_folder(models_folder):
    return models_folder / "diffusers" / tiny_checkpoints.I2VGENXL_NAME


@pytest.fixture(scope="session")
def server(tmp_path_factory, tiny_models):
    """A live ComfyUI server with this pack, `tensor_nodes` and checkpoints of its own, which a test may damage."""
    folder = tmp_path_factory.mktemp("comfyui")
    shutil.copytree(tiny_models, folder / "models")
    (folder / "custom_nodes").mkdir()
    shutil.copytree(Path(__file__).parent / "tensor_nodes", folder / "custom_nodes" / "tensor_nodes")
    with ComfyServer(folder, comfyui=comfyui_folder()) as running:
        yield running


@pytest.fixture(autouse=True)
def inference():
    """ComfyUI executes nodes in inference mode."""
    with torch.inference_mode():
        yield
