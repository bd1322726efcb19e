"""Photograph the example workflows in the graph editor: `python3 scripts/update_thumbnails.py [part of a name]`.

Writes example_workflows/<name>.jpg, which ComfyUI's template browser shows. Needs Debian's chromium.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from environment import ROOT, EnvironmentProblem, prepare

WORKFLOWS = ROOT / "example_workflows"


def photograph(name: str) -> None:
    """Runs with the interpreter of the environment."""
    sys.path.insert(0, str(ROOT / "tests"))
    from comfy_server import ComfyServer
    from editor_driver import Editor

    with tempfile.TemporaryDirectory() as folder:
        for script, kind in (("tiny_checkpoints.py", "models"), ("example_inputs.py", "input")):
            subprocess.run([sys.executable, ROOT / "tests" / script, Path(folder) / kind], check=True)
        bank = Path(folder) / "output" / "character_banks" / "story_00001_.safetensors"
        bank.parent.mkdir(parents=True)
        bank.touch()  # so that the workflow that loads it shows no missing file
        with ComfyServer(Path(folder)) as server, Editor(server.url) as editor:
            for path in sorted(WORKFLOWS.glob(f"*{name}*.json")):
                editor.open_template(path.stem)
                editor.page.wait_for_timeout(1000)
                editor.screenshot(path.with_suffix(".jpg"))
                print(path.with_suffix(".jpg").name)


def main() -> int:
    if "--inside" in sys.argv:
        photograph(sys.argv[-1])
        return 0
    try:
        environment = prepare()
    except EnvironmentProblem as problem:
        print(problem, file=sys.stderr)
        return 1
    variables = {**os.environ, "COMFYUI_PATH": str(environment.comfyui)}
    return subprocess.call(
        [str(environment.python), __file__, "--inside", *(sys.argv[1:2] or [""])], cwd=ROOT, env=variables
    )


if __name__ == "__main__":
    sys.exit(main())
