"""The pack's ModelScope network against diffusers' `UNet3DConditionModel`, at published width on this machine's CPU.

    python3 benchmarks/unet3d.py [--json PATH] [--seconds 170] [--threads N]

Prepares the environment like scripts/test.py, then measures in a process of its own: see unet3d_measure.py. Prints a
table and writes the numbers to benchmarks/results/unet3d.json. Needs 10 GB of free memory and about three minutes.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from environment import EnvironmentProblem, prepare


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "unet3d.json")
    parser.add_argument("--seconds", type=int, default=170, help="time for everything (default 170)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's choice)")
    parser.add_argument("--comfyui-version", help="see scripts/environment.py")
    options = parser.parse_args()
    try:
        environment = prepare(options.comfyui_version)
    except EnvironmentProblem as problem:
        print(problem, file=sys.stderr)
        return 1
    script = Path(__file__).with_name("unet3d_measure.py")
    command = [str(environment.python), str(script), str(options.json), str(options.seconds), str(options.threads)]
    # threads that wait must not look busy: processor time then counts work only, also while others use the machine
    settings = {"COMFYUI_PATH": str(environment.comfyui), "OMP_WAIT_POLICY": "passive"}
    return subprocess.call(command, env={**os.environ, **settings})


if __name__ == "__main__":
    sys.exit(main())
