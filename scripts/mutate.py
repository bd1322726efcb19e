"""Do the tests notice faults? Put each fault of `mutations.py` into a copy of this repository and run its tests.

    python3 scripts/mutate.py [--only TEXT]

A fault is noticed when the tests fail. Prints one line per fault and the score, and exits with 1 when less than 95 %
are noticed, or when a fault no longer fits the code. Takes about a quarter of an hour for all of them.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from environment import ROOT, Environment, EnvironmentProblem, prepare
from mutations import MUTATIONS, Mutation

PASSING_SCORE = 0.95
FAILED_TESTS = 1  # pytest's exit status; others mean that the tests did not run
LONGEST_RUN = 600


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="faults whose file or tests have TEXT in their name")
    options = parser.parse_args()
    chosen = [mutation for mutation in MUTATIONS if options.only in f"{mutation.file} {mutation.tests}"]
    if not chosen:
        parser.error(f"no fault has {options.only!r} in the name of its file or tests")
    try:
        environment = prepare()
    except EnvironmentProblem as problem:
        print(problem, file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / ROOT.name
        _copy_tracked_files(copy)
        results = [_report(mutation, _notice(mutation, copy, environment)) for mutation in chosen]
    noticed = results.count("noticed")
    print(f"{noticed} of {len(results)} faults noticed ({noticed / len(results):.0%}).")
    return 0 if noticed >= PASSING_SCORE * len(results) and "out of date" not in results else 1


def _copy_tracked_files(target: Path) -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
    for name in filter(None, listed.decode("utf-8").split("\0")):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name)


def _notice(mutation: Mutation, copy: Path, environment: Environment) -> str:
    """What happens to a fault: "noticed", "missed", "out of date" (not in the code once), or "not run"."""
    path = copy / mutation.file
    source = path.read_text(encoding="utf-8") if path.is_file() else ""
    if source.count(mutation.found) != 1:
        return "out of date"
    path.write_text(source.replace(mutation.found, mutation.changed), encoding="utf-8")
    command = [str(environment.python), "-m", "pytest", "-c", "tests/pytest.ini", "-q", "-x", f"tests/{mutation.tests}"]
    variables = {**os.environ, "COMFYUI_PATH": str(environment.comfyui), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        run = subprocess.run(command, cwd=copy, env=variables, stdout=subprocess.DEVNULL, timeout=LONGEST_RUN)
    except subprocess.TimeoutExpired:
        return "noticed"
    finally:
        path.write_text(source, encoding="utf-8")
    return {0: "missed", FAILED_TESTS: "noticed"}.get(run.returncode, "not run")


def _report(mutation: Mutation, result: str) -> str:
    print(f"{result}: {mutation.file}: {mutation.found}  ->  {mutation.changed}", flush=True)
    return result


if __name__ == "__main__":
    sys.exit(main())
