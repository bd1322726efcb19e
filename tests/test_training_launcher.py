"""The launcher of training as users start it: from a checkout in custom_nodes, and from an installed wheel."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from comfy_server import link_or_copy

from comfy_process import PACKAGE, REPOSITORY, comfyui_folder

pytestmark = pytest.mark.slow

ACCELERATE = ("-m", "accelerate.commands.launch", "--cpu", "-m", "consistent_video_train")
DIRECT = ("-m", "consistent_video_train")
# What ComfyUI reads of a pack, beside its packages.
DATA_FOLDERS = ("example_workflows", "locales", "web")
# setuptools puts each module of the root into the package, too.
ROOT_FILES = {"__init__.py", "consistent_video_train.py", "THIRD_PARTY.md"}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of this repository in the custom_nodes of a ComfyUI, in a folder whose name is no package's."""
    comfyui = tmp_path_factory.mktemp("launcher") / "ComfyUI"
    comfyui.mkdir()
    for entry in comfyui_folder().resolve().iterdir():
        if entry.name != "custom_nodes":
            link_or_copy(entry, comfyui / entry.name)
    left_out = shutil.ignore_patterns(".*", "__pycache__", "build", "*.egg-info", "output", "goldens")
    return shutil.copytree(REPOSITORY, comfyui / "custom_nodes" / "ComfyUI-ConsistentVideo", ignore=left_out)


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    """The wheel that pip builds of the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    offline = ("--no-deps", "--no-build-isolation", "--no-index")
    result = python("-m", "pip", "wheel", *offline, "-w", str(folder), str(checkout), cwd=folder)
    assert result.returncode == 0, result.stdout + result.stderr
    [built] = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder for PYTHONPATH, with the wheel installed in it."""
    folder = tmp_path_factory.mktemp("installed") / "deep" / "packages"
    options = ("--no-deps", "--no-index", "--no-compile", "--target", str(folder))
    result = python("-m", "pip", "install", *options, str(wheel), cwd=wheel.parent)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def python(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run Python with a few environment variables, without those of this process that steer the launcher."""
    steering = ("ACCELERATE_", "COMFYUI_PATH", "LOCAL_RANK", "PYTHONPATH")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(steering)}
    variables = {**inherited, "HF_HOME": str(cwd), **environment}  # HF_HOME: where accelerate looks for defaults
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=variables,
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=120,
    )


def test_a_checkout_in_custom_nodes_lists_the_trainers(checkout):
    result = python(*ACCELERATE, "--help", cwd=checkout)
    assert result.returncode == 0, result.stderr
    assert "consisti2v" in result.stdout and "motion_predictor" in result.stdout


def test_the_wheel_holds_the_pack_and_nothing_else(checkout, wheel):
    packages = [path.parent.name for path in checkout.glob("*/__init__.py")]
    files = {
        path.relative_to(checkout).as_posix()
        for folder in (*packages, *DATA_FOLDERS)
        for path in (checkout / folder).rglob("*")
        if path.is_file()
    }
    found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert found == {f"{PACKAGE}/{name}" for name in files | ROOT_FILES} | {"consistent_video_train.py"}
    assert {"training/command.py", "story/typefaces/OFL.txt", "locales/zh/nodeDefs.json"} <= files
    assert any(name.startswith("web/docs/") for name in files)


def test_the_wheel_runs_with_the_comfyui_that_is_named(installed, tmp_path):
    arguments = (*ACCELERATE, "consisti2v", "--help")
    result = python(*arguments, cwd=tmp_path, PYTHONPATH=str(installed), COMFYUI_PATH=str(comfyui_folder().resolve()))
    assert result.returncode == 0, result.stderr
    for field in ("pretrained  (required)", "data.frames  (16)", "validation.clips[].prompt  (required)"):
        assert f"\n  {field}\n" in result.stdout


def test_a_missing_comfyui_is_named_with_what_to_do(installed, tmp_path):
    nowhere = tmp_path / "nowhere"
    named = python(*DIRECT, "--help", cwd=tmp_path, PYTHONPATH=str(installed), COMFYUI_PATH=str(nowhere))
    found_none = python(*DIRECT, "--help", cwd=tmp_path, PYTHONPATH=str(installed))
    for result, place in ((named, nowhere), (found_none, installed.parent.parent)):
        assert result.returncode == 1
        assert result.stdout == ""
        assert result.stderr == (
            f"No ComfyUI in {place}. Set COMFYUI_PATH to the folder that holds ComfyUI's main.py.\n"
        )


def test_wrong_settings_are_named_without_a_traceback(installed, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("output: run\npretrained: base\ncolour: red\ndata: {frames: 1, sources: []}\n", encoding="utf-8")
    result = python(
        *DIRECT, "consisti2v", str(file), "steps=many", cwd=tmp_path, PYTHONPATH=str(installed),
        COMFYUI_PATH=str(comfyui_folder().resolve()), ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert f"{file} with steps=many does not describe a run:\n" in result.stderr
    for field in ("colour", "data.frames", "data.sources", "steps"):
        assert f"\n  {field}: " in result.stderr
