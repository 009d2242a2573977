"""Compares the speed of this tree with the last release: `python -m benchmarks.release.check`.

The release is unpacked from git beside this tree. The same timings run in both trees in turn, so the load of the
machine affects both. The exit code is 1 if a figure is more than LIMIT times that of the release, and 2 if there is no
release to compare with.
"""

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from statistics import median

from tabulate import tabulate
from tqdm import tqdm

LIMIT = 1.15
ROUNDS = 5
TIMINGS = Path(__file__).with_name("timings.py")
NO_RELEASE = 2
TOO_SLOW = 1
ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

Figures = dict[str, float]  # microseconds by name


def newest_release() -> str:
    """The newest tag of a release before this commit; "" if there is none."""
    found = subprocess.run(
        ["git", "describe", "--tags", "--abbrev=0", "--match", "v[0-9]*", "HEAD^"],
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() if found.returncode == 0 else ""


def unpack(revision: str, folder: Path) -> None:
    """Write the files of a commit into a folder.

    Raises:
        CalledProcessError: git does not know the revision.
    """
    archive = subprocess.run(
        ["git", "archive", "--format=tar", revision, "policies"],
        capture_output=True,
        check=True,
    )
    with tarfile.open(fileobj=BytesIO(archive.stdout)) as files:
        files.extractall(folder, filter="data")


def measure(tree: Path) -> Figures:
    """The timings in one tree.

    Raises:
        CalledProcessError: the timings do not run there.
    """
    done = subprocess.run(
        [sys.executable, "-P", str(TIMINGS)],
        cwd=tree,
        env=os.environ | dict.fromkeys(ONE_THREAD, "1"),
        capture_output=True,
        text=True,
        check=True,
    )
    figures: Figures = json.loads(done.stdout)
    return figures


def ratios(here: Sequence[Figures], released: Sequence[Figures]) -> Figures:
    """By figure, the median over the rounds of this tree's time over the release's; figures of both trees only.

    Args:
        here: a measurement of each round, of this tree.
        released: the same of the release.
    """
    names = [name for name in here[0] if name in released[0]]
    return {
        name: median(mine[name] / theirs[name] for mine, theirs in zip(here, released))
        for name in names
    }


def main() -> None:
    """Measure both trees, and print the figures and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--release", default="", help="a tag or commit; default: the newest tag v*"
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    release = arguments.release or newest_release()
    if not release:
        print("no release before this commit; name a commit: make bench-check RELEASE=")
        raise SystemExit(NO_RELEASE)
    here: list[Figures] = []
    released: list[Figures] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            unpack(release, Path(folder))
            measure(Path(folder))  # compiles the kernels
            for n in tqdm(range(arguments.rounds), unit="round"):
                trees = [(Path.cwd(), here), (Path(folder), released)]
                for tree, found in trees[:: 1 if n % 2 else -1]:
                    found.append(measure(tree))
        except subprocess.CalledProcessError as error:
            message = error.stderr if isinstance(error.stderr, str) else "unknown"
            print(f"{release} cannot be measured: {message[-2000:]}")
            raise SystemExit(NO_RELEASE) from None
    found_ratios = ratios(here, released)
    rows = [
        (
            name,
            median(figures[name] for figures in here),
            median(figures[name] for figures in released),
            ratio,
        )
        for name, ratio in found_ratios.items()
    ]
    print(
        tabulate(
            rows,
            headers=("µs of processor time a request", "here", release, "ratio"),
            floatfmt=("", ".1f", ".1f", ".2f"),
        )
    )
    slow = [name for name, ratio in found_ratios.items() if ratio > LIMIT]
    if slow:
        print(f"more than {LIMIT} times as slow as {release}: {', '.join(slow)}")
        raise SystemExit(TOO_SLOW)


if __name__ == "__main__":
    main()
