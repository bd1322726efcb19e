"""Write docs/native-nodes.md, what ComfyUI's nodes do with every model: `python3 scripts/update_native_nodes.py`.

Run it after a change of what is served or said, and read the difference.
"""

import os
import subprocess
import sys

from environment import ROOT, EnvironmentProblem, prepare


def main() -> int:
    try:
        environment = prepare()
    except EnvironmentProblem as problem:
        print(problem, file=sys.stderr)
        return 1
    command = [str(environment.python), str(ROOT / "tests" / "native_nodes.py")]
    search = os.pathsep.join(str(ROOT / folder) for folder in ("tests", "scripts"))
    variables = {**os.environ, "COMFYUI_PATH": str(environment.comfyui), "PYTHONPATH": search}
    return subprocess.call(command, cwd=ROOT, env=variables)


if __name__ == "__main__":
    sys.exit(main())
