"""Prepare everything, then run the tests: `python3 scripts/test.py [pytest arguments]`.

Without a path under tests/ among the arguments all tests run, two processes at a time; `-n 0` runs them in one.
`-m "not slow"` leaves out what takes long. `--comfyui-version 0.30.0` tests against that ComfyUI.
"""

import argparse
import os
import shutil
import subprocess
import sys

from environment import ROOT, SOURCES, EnvironmentProblem, prepare

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# the editor draws the Chinese locale with the font
BROWSER_PACKAGES = ("chromium", "fonts-noto-cjk")
PROCESSES = 2  # each takes about 2 GB of memory, and shares the server's tests with nobody


def ensure_browser() -> None:
    """Install Chromium where that is ours to do (root on a machine with apt-get); say why when there is none."""
    if any(shutil.which(name) for name in BROWSERS):
        return
    if shutil.which("apt-get") is None or not hasattr(os, "geteuid") or os.geteuid() != 0:
        print("No Chromium found: tests of the graph editor are skipped. Install it to run them.", flush=True)
        return
    print("Installing Chromium for the tests of the graph editor ...", flush=True)
    for command in (["update"], ["install", "-y", "--no-install-recommends", *BROWSER_PACKAGES]):
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        if subprocess.call(["apt-get", "-qq", *command], env=environment, stdout=subprocess.DEVNULL):
            print(f"apt-get {command[0]} failed: tests of the graph editor are skipped.", flush=True)
            return


def pytest_call(arguments: list[str], cores: int) -> tuple[list[str], dict[str, str]]:
    """Return pytest's arguments, and the environment variables to set, for the arguments of this script.

    All tests run in `PROCESSES` processes where there are as many cores, each with its share of the cores as threads;
    single files run in one, which is there sooner.
    """
    if any(argument.startswith("tests") for argument in arguments):
        return arguments, {}
    own = [argument for argument in arguments if argument.startswith(("-n", "--numprocesses", "--pdb", "--dist"))]
    processes = min(PROCESSES, cores)
    if own or processes < 2:
        return ["tests", *arguments], {}
    threads = {"OMP_NUM_THREADS": str(max(1, cores // processes))}
    return ["tests", "-n", str(processes), "--dist", "loadgroup", "--no-loadscope-reorder", *arguments], threads


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--comfyui-version", choices=list(SOURCES))
    options, arguments = parser.parse_known_args()
    try:
        environment = prepare(options.comfyui_version)
    except EnvironmentProblem as problem:
        print(problem, file=sys.stderr)
        return 1
    ensure_browser()
    arguments, threads = pytest_call(arguments, os.cpu_count() or 1)
    command = [str(environment.python), "-m", "pytest", "-c", "tests/pytest.ini", *arguments]
    variables = {**threads, **os.environ, "COMFYUI_PATH": str(environment.comfyui)}
    return subprocess.call(command, cwd=ROOT, env=variables)


if __name__ == "__main__":
    sys.exit(main())
