"""Write what follows from the node schemas: `python3 scripts/update_schemas.py`.

Run it after a node's names, inputs, limits or tooltips changed on purpose, and read the difference: the editor shows
`locales/en/nodeDefs.json`, saved workflows depend on what is in `tests/data/schema.json`. The other languages under
`locales/` and the help pages under `web/docs/` are edited by hand; `tests/test_documentation.py` says what they lack.
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
    command = [str(environment.python), str(ROOT / "tests" / "node_schemas.py")]
    return subprocess.call(command, cwd=ROOT, env={**os.environ, "COMFYUI_PATH": str(environment.comfyui)})


if __name__ == "__main__":
    sys.exit(main())
