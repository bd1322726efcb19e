"""One of the pack's video networks against its reference, at published width on this machine's CPU.

    python3 benchmarks/unet3d.py [--network NAME] [--json PATH] [--seconds 170] [--threads N]

Prepares the environment like scripts/test.py, then measures in a process of its own: the networks that diffusers has
against those (unet3d_measure.py, consisid_measure.py), ConsistI2V's attention against the published formulation
(consisti2v_measure.py).
Prints a table and writes the numbers to benchmarks/results/<network>.json. Needs 10 GB of free memory and about three
minutes.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

SCRIPTS = {
    "modelscope": "unet3d_measure.py",
    "i2vgenxl": "unet3d_measure.py",
    "consisti2v": "consisti2v_measure.py",
    "consisid": "consisid_measure.py",
}
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from environment import EnvironmentProblem, prepare


def main(description: str, scripts: dict[str, str]) -> int:
    """Start the script of one of several subjects, the first unless `--network` names another; its exit status."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--network", choices=scripts, default=next(iter(scripts)), help="what to measure")
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/<network>.json")
    parser.add_argument("--seconds", type=int, default=170, help="time for everything (default 170)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's choice)")
    parser.add_argument("--comfyui-version", help="see scripts/environment.py")
    options = parser.parse_args()
    try:
        environment = prepare(options.comfyui_version)
    except EnvironmentProblem as problem:
        print(problem, file=sys.stderr)
        return 1
    script = Path(__file__).with_name(scripts[options.network])
    path = options.json or ROOT / "benchmarks" / "results" / f"{options.network}.json"
    arguments = (options.network, path, options.seconds, options.threads)
    command = [str(environment.python), str(script), *map(str, arguments)]
    # threads that wait must not look busy: processor time then counts work only, also while others use the machine
    settings = {"COMFYUI_PATH": str(environment.comfyui), "OMP_WAIT_POLICY": "passive"}
    return subprocess.call(command, env={**os.environ, **settings})


if __name__ == "__main__":
    sys.exit(main(__doc__.splitlines()[0], SCRIPTS))
