"""Run every video family at published size on this machine's accelerator: `python3 scripts/device_check.py`.

Starts a real ComfyUI in its default memory mode. Inside it, random weights of the published shapes are drawn on the
device, nothing is downloaded, and handed to the function that the loaders call once a file is read; the autoencoders,
which are small, are written to files and loaded from them. Text encoders, vision towers and face networks are left out:
prompts are random states. Each family makes two guided steps with weights stored as fp16, bf16 and fp8, decodes the
clip whole and in tiles, and does one step of diffusers' network where there is one. ConsisID runs once more with its
weights streamed (--novram). Ends after 8 minutes; what did not fit into them is named.

`beside` is the peak of memory beside the weights, which ComfyUI's `estimate` is for. Without an accelerator,
`--cpu --tiny` runs the same on the CPU with tiny networks.
"""

import argparse
import json
import platform
import sys
import time
from pathlib import Path

from environment import ROOT, TREES, Environment, EnvironmentProblem, prepare, run_inside

NODES = ROOT / "scripts" / "device_check_nodes"
# Family -> its share of the time.
FAMILIES = {"modelscope": 0.15, "i2vgenxl": 0.25, "consisti2v": 0.15, "consisid": 0.3}
STREAMED_SHARE = 0.15
MINUTES = 8.0
# For starting ComfyUI and for the row that is at work when a family's time is over.
SPARE_SECONDS = 60.0
NEEDED = (
    "No accelerator was found: this check needs a graphics card (NVIDIA, AMD, Intel or Apple) that the PyTorch of the "
    "environment can use. `--cpu --tiny` runs the same code on the CPU with tiny networks."
)
# GB allocated / reserved that ConsisID's authors publish for their pipeline, 49 frames of 720 x 480.
PUBLISHED = "plain 37 / 44, model offload 22 / 25, sequential offload 16 / 22, and VAE tiling 5 / 7"
# Head of a column -> key of a row.
COLUMNS = {
    "all s": "seconds",
    "s/step": "step_seconds",
    "allocated": "allocated_gib",
    "reserved": "reserved_gib",
    "beside": "beside_weights_gib",
    "estimate": "estimate_gib",
    "finite": "finite",
    "computed in": "computed_in",
}


def main() -> int:
    options = _options()
    try:
        environment = prepare(options.comfyui_version)
    except EnvironmentProblem as problem:
        print(problem, file=sys.stderr)
        return 1
    run_inside(environment)
    import torch  # of the environment, which exists only now

    if not options.cpu and not torch.accelerator.is_available():
        print(NEEDED, file=sys.stderr)
        return 1
    try:
        return _run(options, environment)
    except KeyboardInterrupt:
        return 130


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--family", action="append", choices=list(FAMILIES), help="only this one; may be repeated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to FILE")
    parser.add_argument("--cpu", action="store_true", help="run on the CPU")
    parser.add_argument("--tiny", action="store_true", help="tiny networks and clips")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="time for everything (default: %(default)s)")
    parser.add_argument("--comfyui-version", help="see environment.py")
    return parser.parse_args()


def _run(options: argparse.Namespace, environment: Environment) -> int:
    from comfy_server import ServerFailed

    report = _machine(environment, options)
    clock = Clock(options.minutes * 60, options.family or list(FAMILIES))
    print(f"ComfyUI {report['comfyui']}, PyTorch {report['torch']}; random weights; memory in GiB.", flush=True)
    try:
        for streamed in (False, True):
            _run_mode(options, environment, clock, streamed, report)
    except ServerFailed as error:
        report["failed"] = str(error)
        print(error, file=sys.stderr)
    if not options.tiny and any(result["family"] == "consisid" for result in report["results"]):
        print(f"\nConsisID as its authors publish it, in GB allocated / reserved: {PUBLISHED}.")
    report["minutes"] = round(clock.passed / 60, 2)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    # what diffusers cannot do on this device is not a fault of the pack
    rows = [row for result in report["results"] for name, row in result["rows"].items() if "diffusers" not in name]
    bad = "failed" in report or any("failed" in row or row.get("finite") is False for row in rows)
    return 1 if bad else 0


def _run_mode(options, environment: Environment, clock: "Clock", streamed: bool, report: dict) -> None:
    """Check the families of one memory mode in a ComfyUI of their own; adds to the report."""
    from comfy_server import ComfyServer

    if not clock.remaining(streamed):
        return
    base = TREES / "device_check"
    _link(base / "custom_nodes" / NODES.name)
    arguments = ("--novram",) if streamed and not options.cpu else ()
    with ComfyServer(base, comfyui=environment.comfyui, cpu=options.cpu, arguments=arguments) as server:
        if not streamed:
            report["devices"] = [device["name"] for device in server.system_stats()["devices"]]
            print(", ".join(report["devices"]), flush=True)
        for family in clock.remaining(streamed):
            inputs = {"family": family, "tiny": options.tiny, "streamed": streamed}
            result = _check(server, inputs | {"seconds": clock.seconds(family, streamed)}, clock.left)
            report["results"].append(inputs | result)
            _print(result, ", weights streamed" if streamed else "")


class Clock:
    """Deals out the time: what a family leaves goes to those after it.

    Args:
        seconds: for everything.
        families: that are checked.
    """

    def __init__(self, seconds: float, families: list[str]):
        self.start, self.whole = time.monotonic(), seconds
        self.shares = {(family, False): FAMILIES[family] for family in families}
        if "consisid" in families:
            self.shares["consisid", True] = STREAMED_SHARE

    @property
    def passed(self) -> float:
        return time.monotonic() - self.start

    @property
    def left(self) -> float:
        return max(1.0, self.whole - self.passed)

    def remaining(self, streamed: bool) -> list[str]:
        """Families that are still to be checked in a mode."""
        return [family for family, mode in self.shares if mode == streamed]

    def seconds(self, family: str, streamed: bool) -> float:
        """After which a family begins nothing more; it is then no longer to be checked."""
        whole = sum(self.shares.values())
        return max(0.0, self.left - SPARE_SECONDS) * self.shares.pop((family, streamed)) / whole


def _machine(environment: Environment, options: argparse.Namespace) -> dict:
    import torch

    versions = {"comfyui": environment.comfyui.name, "torch": torch.__version__, "python": platform.python_version()}
    bypassed = "reading the networks' files; text encoders, vision towers and face networks"
    return versions | {"system": platform.platform(), "tiny": options.tiny, "bypassed": bypassed, "results": []}


def _link(place: Path) -> None:
    from comfy_server import link_or_copy

    place.parent.mkdir(parents=True, exist_ok=True)
    if not place.exists():
        link_or_copy(NODES, place)


def _check(server: object, inputs: dict, timeout: float) -> dict:
    """The rows of one family; those that were there when it failed or ran out of time, with the reason."""
    from comfy_server import PromptError, PromptInterrupted

    file = server.folder / "output" / f"{inputs['family']}.json"
    file.unlink(missing_ok=True)
    problem = None
    try:
        node = {"class_type": "DeviceCheck", "inputs": inputs | {"file": file.name}}
        server.run({"1": node}, timeout)
    except TimeoutError:
        problem = {"left out": "the time for all checks is over"}
    except (PromptError, PromptInterrupted) as error:
        problem = {"failed": str(error).splitlines()[0]}
    found = {"title": inputs["family"], "clip": "", "rows": {}}
    if file.is_file():
        found = json.loads(file.read_text(encoding="utf-8"))
    if problem:
        found["rows"]["the rest"] = problem
    return found


def _print(result: dict, note: str) -> None:
    print(f"\n{result['title']}, {result['clip']}{note}")
    print(" " * 24 + "".join(name.rjust(13) for name in COLUMNS))
    for name, row in result["rows"].items():
        reason = row.get("failed") or row.get("left out")
        values = (row.get(key) for key in COLUMNS.values())
        text = f"  {'failed: ' if 'failed' in row else ''}{reason}" if reason else "".join(map(_cell, values))
        print(f"{name:<24}{text}", flush=True)


def _cell(value: object) -> str:
    text = {None: "-", True: "yes", False: "NO"}.get(value) if value is None or isinstance(value, bool) else str(value)
    return text.rjust(13)


if __name__ == "__main__":
    sys.exit(main())
