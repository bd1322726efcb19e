"""Prepare everything, then run the tests: `python3 scripts/test.py [pytest arguments]`.

Without a path under tests/ among the arguments all tests run. `--comfyui-version 0.30.0` tests against that ComfyUI.
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
    if not any(argument.startswith("tests") for argument in arguments):
        arguments.insert(0, "tests")
    command = [str(environment.python), "-m", "pytest", "-c", "tests/pytest.ini", *arguments]
    return subprocess.call(command, cwd=ROOT, env={**os.environ, "COMFYUI_PATH": str(environment.comfyui)})


if __name__ == "__main__":
    sys.exit(main())
