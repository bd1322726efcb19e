"""Run every example workflow on a real ComfyUI and show what they made: `python3 scripts/demo.py`.

Prepares the environment, writes tiny checkpoints with random weights (so the pictures are noise with structure, not
art), queues the workflows through the API and writes clips and `contact_sheet.png` to `output/`.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from environment import ROOT, TREES, Environment, EnvironmentProblem, prepare, run_inside
from workflow_to_prompt import to_prompt

OUTPUT = ROOT / "output"
# 13 frames: 1 more than a multiple of 4, as networks with latent frames of 4 need.
MOST_STEPS, LONGEST_SIDE, MOST_FRAMES = 8, 128, 13
SIZE_MULTIPLE = 16
TIMEOUT = 3600.0


def main() -> int:
    options = _options()
    workflows = _workflows(options.only)
    try:
        environment = prepare(options.comfyui_version)
    except EnvironmentProblem as problem:
        print(problem, file=sys.stderr)
        return 1
    run_inside(environment)
    try:
        return _run(options, workflows, environment)
    except KeyboardInterrupt:
        return 130


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    device = parser.add_mutually_exclusive_group()
    device.add_argument("--cpu", dest="cpu", action="store_true", default=True, help="run on the CPU (default)")
    device.add_argument("--gpu", dest="cpu", action="store_false", help="let ComfyUI use its accelerator")
    parser.add_argument("--only", metavar="NAME", help="only workflows with NAME in their name")
    parser.add_argument("--keep-size", action="store_true", help="run the workflows as saved, not shrunk")
    parser.add_argument("--serve", action="store_true", help="afterwards leave the graph editor open until Ctrl-C")
    parser.add_argument("--comfyui-version", help="see environment.py")
    return parser.parse_args()


def _workflows(only: str | None) -> list[Path]:
    found = sorted((ROOT / "example_workflows").glob("*.json"))
    chosen = [path for path in found if only is None or only.lower() in path.stem.lower()]
    if not chosen:
        names = "\n".join(f"  {path.stem}" for path in found) or "  (none)"
        sys.exit(f"No example workflow has {only!r} in its name. There are:\n{names}")
    return chosen


def _run(options: argparse.Namespace, workflows: list[Path], environment: Environment) -> int:
    # these need packages of the environment, which exists only now
    from comfy_server import ComfyServer, ServerFailed
    from contact_sheet import contact_sheet

    base = TREES / "demo"
    _write_inputs(base, environment)
    OUTPUT.mkdir(exist_ok=True)
    print("Starting ComfyUI ...", flush=True)
    failures = {}
    rows = []
    try:
        with ComfyServer(base, comfyui=environment.comfyui, cpu=options.cpu) as server:
            if server.failed_imports():
                print("ComfyUI could not import the pack:", server.log_tail(), sep="\n", file=sys.stderr)
                return 1
            nodes = server.object_info()
            for number, path in enumerate(workflows, 1):
                title = f"[{number}/{len(workflows)}] {path.stem}"
                row, failure = _run_one(server, path, nodes, title, options.keep_size)
                rows.append(row)
                if failure:
                    failures[path.stem] = failure
            contact_sheet(rows).save(OUTPUT / "contact_sheet.png")
            print(f"\nClips and contact_sheet.png are in {OUTPUT}")
            if options.serve:
                _serve(server)
    except ServerFailed as error:
        print(error, file=sys.stderr)
        return 1
    if failures:
        print(f"\n{len(failures)} of {len(workflows)} workflows failed:", file=sys.stderr)
        for name, message in failures.items():
            print(f"\n- {name}\n{message}", file=sys.stderr)
    return 1 if failures else 0


def _write_inputs(base: Path, environment: Environment) -> None:
    """Tiny checkpoints and input media that the workflows name; those already written are kept."""
    print("Writing tiny checkpoints ...", flush=True)
    variables = {**os.environ, "COMFYUI_PATH": str(environment.comfyui)}
    for script, folder in (("tiny_checkpoints.py", "models"), ("example_inputs.py", "input")):
        (base / folder).mkdir(parents=True, exist_ok=True)
        command = [str(environment.python), str(ROOT / "tests" / script), str(base / folder)]
        if subprocess.call(command, cwd=ROOT, env=variables):
            sys.exit(f"tests/{script} failed (see above).")


def _run_one(server: object, path: Path, nodes: dict, title: str, keep_size: bool) -> tuple[object, str]:
    """Run one workflow; returns its row of the contact sheet and what went wrong ("" when all went well)."""
    from comfy_server import PromptError, PromptInterrupted, PromptRejected
    from contact_sheet import Row

    progress = Progress(title)
    try:
        prompt = to_prompt(json.loads(path.read_text(encoding="utf-8")), nodes)
        if not keep_size:
            shrink(prompt)
        progress.prompt = prompt
        result = server.run(prompt, TIMEOUT, progress.event)
        if result.node_errors:
            raise PromptRejected(
                {"error": {"message": "some outputs were left out"}, "node_errors": result.node_errors}
            )
    except (ValueError, PromptRejected, PromptError, PromptInterrupted, TimeoutError) as error:
        progress.finish("failed")
        return Row(f"{path.stem} (failed)", text=str(error)), str(error)
    files = _collect(server.folder, result, path.stem)
    text = "\n".join(str(part) for output in result.outputs.values() for part in output.get("text", []))
    if text:
        (OUTPUT / f"{path.stem}.txt").write_text(text, encoding="utf-8")
    progress.finish(f"{len(files)} files" if files else "no files")
    return Row(f"{path.stem}  ({result.seconds:.0f} s)", files, text), ""


def _collect(base: Path, result: object, name: str) -> list[Path]:
    """Copy the pictures and clips of a run into OUTPUT, named after the workflow; previews when nothing was saved."""
    copies = []
    for record in result.files("output") or result.files("temp"):
        if record["filename"].endswith(".safetensors"):  # stays where Load nodes list it
            continue
        source = base / record["type"] / record["subfolder"] / record["filename"]
        number = f" {len(copies) + 1}" if copies else ""
        copies.append(Path(shutil.copyfile(source, OUTPUT / f"{name}{number}{source.suffix}")))
    return copies


def shrink(prompt: dict) -> None:
    """Make a prompt small enough for a CPU, in place: at most 8 steps, 13 frames, and 128 pixels on the longer side."""
    for node in prompt.values():
        inputs = node["inputs"]
        for name, most in (("steps", MOST_STEPS), ("frames", MOST_FRAMES)):
            if isinstance(inputs.get(name), int):
                inputs[name] = min(inputs[name], most)
        sides = [inputs.get("width"), inputs.get("height")]
        if all(isinstance(side, int) for side in sides) and max(sides) > LONGEST_SIDE:
            scale = LONGEST_SIDE / max(sides) / SIZE_MULTIPLE
            inputs["width"], inputs["height"] = (
                max(1, round(side * scale)) * SIZE_MULTIPLE if side else 0 for side in sides
            )


def _serve(server: object) -> None:
    print(f"The graph editor is open at {server.url} (Ctrl-C ends it).", flush=True)
    try:
        while server.process.poll() is None:
            time.sleep(0.5)
    except KeyboardInterrupt:
        print()


class Progress:
    """Shows how far a prompt is: a bar on a terminal, one line per node elsewhere."""

    WIDTH = 30

    def __init__(self, title: str) -> None:
        self.title = title
        self.prompt: dict = {}
        self.terminal = sys.stdout.isatty()
        self.started = time.monotonic()
        self._print(title)

    def event(self, kind: str, data: dict, result: object) -> None:
        if kind not in ("executing", "progress") or data["node"] is None:
            return
        node = self.prompt.get(data["node"].split(".")[0], {}).get("class_type", "")
        step = (data["value"], data["max"]) if kind == "progress" else (0, 1)
        if self.terminal:
            started = len(set(result.executing) | set(result.cached))
            share = (max(started - 1, 0) + step[0] / max(step[1], 1)) / max(len(self.prompt), 1)
            full = round(min(share, 1) * self.WIDTH)
            count = f"{step[0]}/{step[1]}" if kind == "progress" else ""
            self._print(f"{self.title}  [{'#' * full}{'.' * (self.WIDTH - full)}] {node} {count}")
        elif kind == "executing":
            print(f"    {node}", flush=True)

    def finish(self, outcome: str) -> None:
        self._print(f"{self.title}: {outcome}, {time.monotonic() - self.started:.1f} s")
        if self.terminal:
            print()

    def _print(self, line: str) -> None:
        if self.terminal:
            width = shutil.get_terminal_size().columns - 1
            print("\r" + line[:width].ljust(width), end="", flush=True)
        else:
            print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
