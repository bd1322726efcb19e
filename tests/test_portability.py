"""What Windows and macOS ask of the sources, read from them: these systems run no tests here."""

import ast
import os
import pickle
import re
from multiprocessing.reduction import ForkingPickler

import comfy_server
import folder_paths
import pytest

from comfy_process import REPOSITORY
from consistent_video.loaders import folders, listed_files, single_file
from consistent_video.training import checkpoints, clips

FOLDERS = (
    "", "faces", "loaders", "models", "nodes", "patches", "samplers", "story", "training", "scripts", "benchmarks",
    "tests", "tests/device", "tests/tensor_nodes", "world",
)  # fmt: skip
SOURCES = sorted(path for folder in FOLDERS for path in (REPOSITORY / folder).glob("*.py"))
PACK_SOURCES = [path for path in SOURCES if path.parts[-2] not in ("tests", "device", "tensor_nodes", "benchmarks")]

# Functions and modules that Windows lacks, or that need a privilege there -> the only places that may use them, each of
# which has another way for Windows.
RESERVED = {
    "symlink_to": {"scripts/comfy_server.py"},
    "hardlink_to": set(),
    "symlink": set(),
    "link": {"training/checkpoints.py"},
    "fsync": {"training/checkpoints.py"},
    "geteuid": {"scripts/test.py"},
    "fork": set(),
    "killpg": set(),
    "setsid": set(),
    "sched_getaffinity": set(),
}
RESERVED_MODULES = {"fcntl": {"scripts/environment.py"}, "msvcrt": {"scripts/environment.py"}}
RESERVED_MODULES |= dict.fromkeys(("resource", "pwd", "grp", "termios"), set())
# The signals that every system has.
SIGNALS = {"SIGINT", "SIGTERM", "SIG_IGN", "SIG_DFL"}
OPENERS = {"open", "fdopen", "NamedTemporaryFile", "TemporaryFile"}
# `open` of these opens no text file.
OF_OTHERS = re.compile(r"^(os|Image|av|tarfile|zipfile|fonts|row|FontRow\(.*\))\.open$")


def calls(path):
    """The calls in a module: name, name with what it belongs to, and the node."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            function = node.func
            name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            yield name, ast.unparse(function), node


def where(path, node) -> str:
    return f"{path.relative_to(REPOSITORY).as_posix()}:{node.lineno}"


def is_text(name: str, node: ast.Call) -> bool:
    """Whether an opener opens a text file."""
    words = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
    words += [entry.value.value for entry in node.keywords if entry.arg == "mode"]
    modes = [word for word in words if isinstance(word, str) and re.fullmatch("[rwabxt+]{1,3}", word)]
    return "b" not in (modes or ["r" if name in ("open", "fdopen") else "w+b"])[0]


def test_every_text_file_and_pipe_names_its_encoding():
    """Windows would take that of the country: a caption with an umlaut, or a path, would break."""
    silent = []
    for path in SOURCES:
        for name, full, node in calls(path):
            named = {entry.arg for entry in node.keywords}
            text = name == "read_text" and not node.args or name == "write_text" and len(node.args) < 2
            text |= name in OPENERS and not OF_OTHERS.match(full) and is_text(name, node)
            text |= full.startswith("subprocess.") and bool(named & {"text", "universal_newlines"})
            if text and "encoding" not in named:
                silent.append(where(path, node))
    assert silent == []


def test_what_windows_lacks_is_used_where_there_is_another_way():
    found = []
    for path in PACK_SOURCES:
        name_of = path.relative_to(REPOSITORY).as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found += [where(path, node) for name, _, node in calls(path) if name_of not in RESERVED.get(name, {name_of})]
        imported = [node for node in ast.walk(tree) if isinstance(node, ast.Import)]
        for node in imported:
            found += [
                where(path, node) for alias in node.names if name_of not in RESERVED_MODULES.get(alias.name, {name_of})
            ]
        found += [
            where(path, node)
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "signal"
            if node.attr.startswith("SIG") and node.attr not in SIGNALS
        ]
    assert found == []


def test_windows_is_asked_for_no_fsync_of_a_folder(tmp_path, monkeypatch):
    """It opens no folders, and writes their entries by itself."""
    monkeypatch.setattr(os, "fsync", lambda handle: pytest.fail("fsync"))
    monkeypatch.setattr(checkpoints.os, "name", "nt")
    checkpoints._on_disk(tmp_path)


def refuse(*arguments, **options):
    raise OSError("A required privilege is not held by the client")


def test_no_link_is_needed(tmp_path, monkeypatch):
    source = tmp_path / "source"
    (source / "inside").mkdir(parents=True)
    (source / "inside" / "file.txt").write_text("text", encoding="utf-8")
    monkeypatch.setattr("pathlib.Path.symlink_to", refuse)
    monkeypatch.setattr(os, "link", refuse)
    comfy_server.link_or_copy(source, tmp_path / "folder")
    comfy_server.link_or_copy(source / "inside" / "file.txt", tmp_path / "file.txt")
    checkpoints.link_or_copy(source, tmp_path / "checkpoint")
    copies = [tmp_path / "folder/inside/file.txt", tmp_path / "file.txt", tmp_path / "checkpoint/inside/file.txt"]
    assert [copy.read_text(encoding="utf-8") for copy in copies] == ["text"] * 3


def test_workers_start_where_processes_cannot_fork(tmp_path):
    """Windows and macOS spawn them: all that a worker gets is pickled."""
    loader = clips.loader(_Numbers(), clips.SampleNumbers(1, 1, 0, 0, 1), 1)
    for part in (loader.dataset, loader.collate_fn, loader.worker_init_fn, loader.generator):
        assert pickle.loads(ForkingPickler.dumps(part)) is not None


class _Numbers:
    def __getitem__(self, number):
        return number

    def __len__(self):
        return 1


@pytest.fixture
def windows_names(tmp_path, monkeypatch):
    """Lists the files of a kind as ComfyUI does on Windows, and finds them by those names only."""
    monkeypatch.setattr(
        folder_paths, "get_filename_list", lambda kind: [r"mine\new\one.safetensors", "two.safetensors"]
    )
    monkeypatch.setattr(
        folder_paths,
        "get_full_path",
        lambda kind, name: str(tmp_path / name) if name in folder_paths.get_filename_list(kind) else None,
    )


def test_names_with_backslashes_are_those_with_slashes(windows_names, tmp_path):
    files = listed_files.ListedFiles("photomaker", "PhotoMaker file", "Put it into {folders}")
    for name in ("mine/new/one.safetensors", r"mine\new\one.safetensors"):
        assert files.check(name) is True
        assert files.find(name) == single_file.find_file(name) == tmp_path / r"mine\new\one.safetensors"
    assert "was not found" in files.check("mine/new/other.safetensors")


def test_checkpoint_folders_are_listed_with_slashes_and_found_with_either(modelscope_folder, monkeypatch):
    monkeypatch.setattr(folders, "checkpoint_folders", lambda: {"mine/new": modelscope_folder})
    assert folders.find_checkpoint(r"mine\new") == folders.find_checkpoint("mine/new") == modelscope_folder
