"""How much memory training takes, counted at the published sizes on tensors without content: no card, any machine.

    python3 benchmarks/training_memory.py [--json PATH]

Prepares the environment like scripts/test.py, then counts in a process of its own (training_memory_measure.py). Prints
tables and writes the numbers to benchmarks/results/training_memory.json. Needs 2 GB of free memory and two minutes.
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
    """Start the count; its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "training_memory.json")
    parser.add_argument("--comfyui-version", help="see scripts/environment.py")
    options = parser.parse_args()
    try:
        environment = prepare(options.comfyui_version)
    except EnvironmentProblem as problem:
        print(problem, file=sys.stderr)
        return 1
    script = Path(__file__).with_name("training_memory_measure.py")
    command = [str(environment.python), str(script), str(options.json)]
    return subprocess.call(command, env={**os.environ, "COMFYUI_PATH": str(environment.comfyui)})


if __name__ == "__main__":
    sys.exit(main())
