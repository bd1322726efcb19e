"""Photograph every example workflow in the graph editor: `python3 scripts/update_thumbnails.py`.

Writes example_workflows/<name>.jpg, which ComfyUI's template browser shows. Needs Debian's chromium.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from environment import ROOT, EnvironmentProblem, prepare

WORKFLOWS = ROOT / "example_workflows"


def photograph() -> None:
    """Runs with the interpreter of the environment."""
    sys.path.insert(0, str(ROOT / "tests"))
    from comfy_server import ComfyServer
    from editor_driver import Editor

    with tempfile.TemporaryDirectory() as folder:
        for script, kind in (("tiny_checkpoints.py", "models"), ("example_inputs.py", "input")):
            subprocess.run([sys.executable, ROOT / "tests" / script, Path(folder) / kind], check=True)
        with ComfyServer(Path(folder)) as server, Editor(server.url) as editor:
            for path in sorted(WORKFLOWS.glob("*.json")):
                editor.open_template(path.stem)
                editor.page.wait_for_timeout(1000)
                editor.screenshot(path.with_suffix(".jpg"))
                print(path.with_suffix(".jpg").name)


def main() -> int:
    if "--inside" in sys.argv:
        photograph()
        return 0
    try:
        environment = prepare()
    except EnvironmentProblem as problem:
        print(problem, file=sys.stderr)
        return 1
    variables = {**os.environ, "COMFYUI_PATH": str(environment.comfyui)}
    return subprocess.call([str(environment.python), __file__, "--inside"], cwd=ROOT, env=variables)


if __name__ == "__main__":
    sys.exit(main())
