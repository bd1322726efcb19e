"""What a ComfyUI that the pack does not fit leaves of it: everything that does not need what is missing."""

import asyncio
import logging
import re
import shutil
import subprocess
import sys
import types

import comfy.weight_adapter
import comfyui_version
import folder_paths
import node_schemas
import pytest

import nodes as comfy_nodes
from comfy_process import REPOSITORY, comfyui_folder
from consistent_video.loaders import host

pytestmark = pytest.mark.slow

FOLDERS = ("faces", "loaders", "models", "nodes", "patches", "samplers", "story")
ALL_NODES = [node.GET_SCHEMA().node_id for node in node_schemas.nodes()]
NEEDED = host.needed_version()


def nodes_of(module: str) -> set[str]:
    """Ids of the nodes that a module of `nodes/` defines, read from its source."""
    return set(re.findall(r'node_id="(\w+)"', (REPOSITORY / "nodes" / f"{module}.py").read_text(encoding="utf-8")))


@pytest.fixture
def pack(tmp_path):
    """A copy of the pack in a custom_nodes folder, to be damaged."""
    folder = tmp_path / "custom_nodes" / "ComfyUI-ConsistentVideo"
    for name in FOLDERS:
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("__init__.py", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, folder / name)
    return folder


@pytest.fixture
def load(pack, monkeypatch, caplog):
    """A function that lets ComfyUI load the pack: whether it did, the node ids it got, and what it logged."""
    monkeypatch.setattr(comfy_nodes, "NODE_CLASS_MAPPINGS", {})
    monkeypatch.setattr(comfy_nodes, "NODE_DISPLAY_NAME_MAPPINGS", {})
    monkeypatch.setattr(comfy_nodes, "LOADED_MODULE_DIRS", {})
    monkeypatch.setattr(comfy_nodes, "EXTENSION_WEB_DIRS", {})
    monkeypatch.setattr(comfy.weight_adapter, "adapters", list(comfy.weight_adapter.adapters))
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", dict(folder_paths.folder_names_and_paths))
    known = set(sys.modules)

    def load() -> tuple[bool, list[str], str]:
        caplog.clear()
        with caplog.at_level(logging.INFO):
            done = asyncio.run(comfy_nodes.load_custom_node(str(pack)))
        return done, list(comfy_nodes.NODE_CLASS_MAPPINGS), caplog.text

    yield load
    for name in set(sys.modules) - known:
        if name.startswith(str(pack.parent.parent).replace(".", "_x_")):
            del sys.modules[name]


def break_module(pack, path: str) -> None:
    file = pack / path
    file.write_text("raise ImportError('no longer in ComfyUI')\n" + file.read_text(encoding="utf-8"), encoding="utf-8")


def test_a_whole_pack_loads_without_a_word(load):
    assert load() == (True, ALL_NODES, "")


@pytest.mark.parametrize(
    ("path", "said", "lost"),
    [
        ("models/modelscope.py", "checkpoints of ModelScope text-to-video", []),
        ("models/i2vgenxl_unet.py", "checkpoints of I2VGen-XL", []),
        ("models/consisti2v_unet.py", "checkpoints of ConsistI2V", []),
        ("models/consisid_transformer.py", "checkpoints of ConsisID", []),
        ("loaders/t5_text_encoder.py", "checkpoints of ConsisID", []),
        ("models/consisid.py", "checkpoints of ConsisID", ["consisid"]),
        ("models/cogvideox_vae.py", "checkpoints of ConsisID", []),
        ("faces/eva_vision.py", "nodes of nodes/faces.py", ["faces"]),
        ("models/photomaker.py", "nodes of nodes/photomaker.py", ["photomaker"]),
        ("models/motion_predictor.py", "nodes of nodes/transitions.py", ["transitions"]),
        ("patches/consistent_attention.py", "nodes of nodes/patches.py", ["patches", "story"]),
        ("patches/context_windows.py", "nodes of nodes/patches.py", ["patches"]),
        ("samplers/guidance.py", "nodes of nodes/sampling.py", ["sampling"]),
        ("loaders/lora.py", "LoRA files of diffusers' trainers", []),
        ("loaders/fonts.py", "files listed by loaders/fonts.py", ["comic"]),
    ],
)
def test_what_cannot_be_imported_is_logged_and_the_rest_loads(pack, load, path, said, lost):
    break_module(pack, path)
    done, found, log = load()
    gone = set().union(*map(nodes_of, lost))
    assert done and found == [node for node in ALL_NODES if node not in gone]
    assert said in log and f"{path}, line 1: ImportError: no longer in ComfyUI" in log
    assert comfyui_version.__version__ in log and "Traceback" not in log


def test_a_family_that_cannot_be_imported_says_so_when_it_is_used(pack, load):
    break_module(pack, "models/consisid_transformer.py")
    load()
    families = sys.modules[f"{str(pack).replace('.', '_x_')}.loaders.families"]
    assert families.MODELSCOPE.network.__name__ == "ModelScopeUNet"
    with pytest.raises(RuntimeError, match=r"^ConsisID cannot be used: models/consisid_transformer.py, line 1: "):
        families.CONSISID.network  # noqa: B018


def test_a_schema_that_comfyui_refuses_costs_one_node(pack, load):
    file = pack / "nodes" / "latents.py"
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace("io.Schema(", "io.Schema(unknown=1, ", 1), encoding="utf-8")
    done, found, log = load()
    lost = re.search(r'node_id="(\w+)"', text).group(1)
    assert done and found == [node for node in ALL_NODES if node != lost]
    assert "nodes/latents.py" in log and "unknown" in log


def test_a_refused_replacement_costs_no_node(load, monkeypatch):
    class Manager:
        def register(self, replacement):
            raise TypeError("replacements work otherwise now")

    import server

    running = types.SimpleNamespace(node_replace_manager=Manager())
    monkeypatch.setattr(server.PromptServer, "instance", running, raising=False)
    done, found, log = load()
    assert done and found == ALL_NODES
    assert "replacements of the node ModelScopeT2VLoader are left out" in log and "work otherwise now" in log


@pytest.mark.parametrize("version", ["0.16.3", "0.29.9", "0.3.64"])
def test_an_old_comfyui_is_told_in_one_sentence_what_is_needed(load, monkeypatch, version):
    monkeypatch.setattr(comfyui_version, "__version__", version)
    done, found, log = load()
    assert (done, found) == (False, [])
    assert log.count("\n") == 1 and "Traceback" not in log
    assert log.rstrip().endswith(
        f"ComfyUI-ConsistentVideo needs ComfyUI {NEEDED} or newer, and this is {version}: update ComfyUI."
    )


@pytest.mark.parametrize("version", [NEEDED, "0.30.1", "0.46.0", "0.100.0", "1.0", "0.31.0rc1"])
def test_a_newer_comfyui_is_new_enough(monkeypatch, version):
    monkeypatch.setattr(comfyui_version, "__version__", version)
    assert host.explain_old_comfyui() is None


def test_the_needed_version_is_that_of_the_project():
    assert f'requires-comfyui = ">={NEEDED}"' in (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")


def test_a_comfyui_without_entry_points_is_told_too(pack):
    """Before the pack's entry point is known to ComfyUI, the sentence is logged on import."""
    code = (
        "import importlib.util, logging, sys, types; logging.basicConfig(); "
        "sys.modules['comfyui_version'] = types.SimpleNamespace(__version__='0.3.10'); "
        f"spec = importlib.util.spec_from_file_location('pack', {str(pack / '__init__.py')!r}, "
        f"submodule_search_locations=[{str(pack)!r}]); "
        "module = importlib.util.module_from_spec(spec); sys.modules['pack'] = module; spec.loader.exec_module(module)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    assert re.findall("needs ComfyUI .* or newer", done.stderr) == [f"needs ComfyUI {NEEDED} or newer"]
    assert "Traceback" not in done.stderr


def test_the_pack_loads_where_no_server_runs(load, monkeypatch):
    import server

    monkeypatch.delattr(server.PromptServer, "instance", raising=False)
    assert load() == (True, ALL_NODES, "")


def test_the_tree_under_test_is_the_one_that_is_imported():
    assert comfy_nodes.__file__ == str(comfyui_folder() / "nodes.py")
