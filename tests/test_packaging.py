"""What the registry, ComfyUI's pack loader and the house rules demand of the repository's files."""

import ast
import hashlib
import re
import subprocess
import sys
from pathlib import Path

import node_schemas
import pytest
from comfy_config import config_parser

import consistent_video
from comfy_process import REPOSITORY

# Folder -> folders of the pack that it may import.
MAY_IMPORT = {
    "": {"nodes"},
    "nodes": {"nodes", "loaders", "patches", "samplers", "faces", "story", "models"},
    "training": {"training", "loaders", "samplers", "models"},
    "loaders": {"loaders", "patches", "samplers", "faces", "models"},
    "story": {"story", "patches", "samplers", "faces", "models"},
    "patches": {"patches", "samplers", "models"},
    "faces": {"faces", "samplers", "models"},
    "samplers": {"samplers", "models"},
    "models": {"models"},
}
SOURCES = sorted(
    [
        *REPOSITORY.glob("*.py"),
        *(path for folder in MAY_IMPORT if folder for path in (REPOSITORY / folder).rglob("*.py")),
    ]
)
# Beside the declared dependencies: ComfyUI, and what ComfyUI itself cannot start without.
HOST_PACKAGES = {
    "PIL", "comfy", "comfy_api", "comfyui_version", "folder_paths", "latent_preview", "node_helpers", "numpy", "server",
    "torch",
}  # fmt: skip
OWN_PACKAGES = {"consistent_video", "consistent_video_train", *MAY_IMPORT, "tests", "scripts", "benchmarks"} - {""}
IMPORT_NAMES = {"pyyaml": "yaml"}  # of distributions that are imported under another name
FORBIDDEN_IMPORTS = {
    "aiohttp", "ftplib", "http", "httpx", "huggingface_hub", "marshal", "requests", "runpy",
    "shelve", "smtplib", "socket", "subprocess", "urllib", "webbrowser",
}  # fmt: skip
FORBIDDEN_CALLS = {
    "print", "input", "eval", "exec", "compile", "__import__", "breakpoint", "os.system", "os.popen", "torch.load",
    "torch.hub.load", "pickle.load", "pickle.loads", "pickle.Unpickler",
}  # fmt: skip
REGISTRY_RULES = "S102,S307,E702"
MAX_LINES = 350

# SHA-256 of https://www.apache.org/licenses/LICENSE-2.0.txt without its empty first line.
APACHE_2_0 = "c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4"

each_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(REPOSITORY).as_posix())


@pytest.fixture(scope="module")
def configuration():
    """pyproject.toml as ComfyUI reads it."""
    return config_parser.extract_node_configuration(str(REPOSITORY))


@pytest.fixture(scope="module")
def settings():
    """What pyproject.toml has beside what ComfyUI takes from it."""
    return config_parser.load_pyproject_settings(REPOSITORY / "pyproject.toml")


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def folder(path: Path) -> str:
    """The pack's folder that a module lies in, "" for the root."""
    parts = path.relative_to(REPOSITORY).parts
    return parts[0] if len(parts) > 1 else ""


def absolute_imports(module: ast.Module) -> set[str]:
    """Top-level names of the packages that a module imports absolutely."""
    names = [alias.name for node in ast.walk(module) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in ast.walk(module) if isinstance(node, ast.ImportFrom) and node.level == 0]
    return {name.split(".")[0] for name in names}


def imported_folders(path: Path) -> set[str]:
    """The pack's folders that a module imports relatively."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and node.level:
            package = list(path.relative_to(REPOSITORY).parent.parts)
            package = package[: len(package) - node.level + 1]
            named = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {[*package, *name.split(".")][0] for name in named}
    return found


def calls(module: ast.Module) -> set[str]:
    """Dotted names of what a module calls."""
    return {ast.unparse(node.func) for node in ast.walk(module) if isinstance(node, ast.Call)}


def distribution(requirement: str) -> str:
    return re.match(r"[A-Za-z0-9_.-]+", requirement).group().lower()


def import_names(requirements: list[str]) -> set[str]:
    """What the distributions of some requirements are imported as."""
    return {IMPORT_NAMES.get(name, name) for name in map(distribution, requirements)}


def ruff(*arguments: str) -> None:
    """Run ruff in the repository; its findings are the message of the failure."""
    command = [sys.executable, "-m", "ruff", *arguments, "--no-cache"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, encoding="utf-8", check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_comfyui_reads_the_project(configuration):
    project, comfy = configuration.project, configuration.tool_comfy
    assert project.name == "consistent-video"
    assert re.fullmatch(r"\d+\.\d+\.\d+", project.version)
    assert project.license.file == "LICENSE"
    assert project.requires_python == ">=3.10"
    assert project.supported_os == ["OS Independent"]
    assert re.fullmatch(r">=\d+\.\d+\.\d+", project.supported_comfyui_version)
    assert (comfy.publisher_id, comfy.display_name) == ("consistent-video", "Consistent Video")


def test_requirements_are_the_dependencies(configuration):
    lines = (REPOSITORY / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert lines == configuration.project.dependencies


def test_dependencies_leave_torch_to_comfyui_and_pin_nothing(configuration):
    for requirement in configuration.project.dependencies:
        assert distribution(requirement) not in ("torch", "torchvision", "torchaudio", "xformers", "triton", "numpy")
        assert re.fullmatch(r"[a-z0-9_-]+>=[0-9.]+", requirement)


def test_changelog_begins_with_this_version(configuration):
    versions = re.findall(r"^## (\S+)", (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert versions[0] == configuration.project.version
    assert len(set(versions)) == len(versions)


def test_license_is_apache_2_0():
    assert hashlib.sha256((REPOSITORY / "LICENSE").read_bytes()).hexdigest() == APACHE_2_0


def test_registry_security_lint_passes():
    ruff("check", "--isolated", "--select", REGISTRY_RULES, *map(str, SOURCES))


def test_lint_passes():
    ruff("check", ".")


def test_format_passes():
    ruff("format", "--check", ".")


def test_entry_point_is_the_v3_one():
    assert sorted(consistent_video.__all__) == ["WEB_DIRECTORY", "comfy_entrypoint"]
    assert not hasattr(consistent_video, "NODE_CLASS_MAPPINGS")  # ComfyUI would read it instead
    assert (REPOSITORY / consistent_video.WEB_DIRECTORY).is_dir()


@each_source
def test_imports_are_relative_and_point_one_way(path):
    assert absolute_imports(tree(path)).isdisjoint(OWN_PACKAGES)
    assert imported_folders(path) <= MAY_IMPORT[folder(path)]


@each_source
def test_imports_are_declared(path, settings):
    declared = import_names(settings.project["dependencies"])
    if folder(path) == "training":
        declared |= import_names(settings.project["optional-dependencies"]["train"])
    assert absolute_imports(tree(path)) <= HOST_PACKAGES | declared | sys.stdlib_module_names


@each_source
def test_nothing_reaches_for_the_network_the_shell_or_pickles(path):
    module = tree(path)
    assert absolute_imports(module).isdisjoint(FORBIDDEN_IMPORTS)
    assert calls(module).isdisjoint(FORBIDDEN_CALLS)


@each_source
def test_source_is_ascii_and_short(path):
    text = path.read_text(encoding="utf-8")
    assert text.isascii()
    assert len(text.splitlines()) < MAX_LINES


def test_node_ids_are_literals_in_the_source():
    literals = []
    for path in (REPOSITORY / "nodes").rglob("*.py"):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "io.Schema":
                literals += [keyword.value.value for keyword in node.keywords if keyword.arg == "node_id"]
    assert sorted(literals) == sorted(node.GET_SCHEMA().node_id for node in node_schemas.nodes())


def test_no_pack_folder_is_outside_the_rules():
    folders = {path.parent.relative_to(REPOSITORY).parts[0] for path in REPOSITORY.glob("*/__init__.py")}
    assert folders == set(MAY_IMPORT) - {""}
