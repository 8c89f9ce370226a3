"""The command: tries, and prints a table; fails where something went wrong, with the smallest input that it goes wrong with."""

from __future__ import annotations

import argparse
import sys
import tempfile
import traceback
from contextlib import ExitStack
from pathlib import Path

from comfyui.client import installed

from . import in_comfyui
from .harness import fuzz
from .targets import TARGETS


def main() -> None:
    """Try, and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--count", type=int, default=1000, help="inputs of the quickest targets; of slow ones fewer (default: 1000)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="the targets whose name has one of the words")
    a = parser.parse_args()
    results, found, targets = [], installed(), TARGETS
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        tempfile.tempdir = folder
        if found is None:
            print("There is no ComfyUI: the nodes are left out. Set COMFYUI_PATH and COMFYUI_PYTHON.")
        elif not a.only or any(word in name for name in in_comfyui.NAMES for word in a.only):
            targets = [*TARGETS, *in_comfyui.targets(stack.enter_context(in_comfyui.asked(*found, Path(folder))))]
        print("| inputs | tried | refused in words | seconds | |\n|---|---|---|---|---|")
        for target in targets:
            if a.only and not any(word in target.name for word in a.only):
                continue
            result = fuzz(target, max(1, a.count // target.cost), a.seed)
            results.append(result)
            verdict = "WRONG" if result.wrong else "stopped" if result.stopped else ""
            print(
                f"| {target.name} | {result.tried} | {result.refused} | {result.seconds:.0f} | {verdict} |", flush=True
            )
            if result.stopped:
                break
            if result.wrong:
                traceback.print_exception(result.wrong, file=sys.stdout)
        tempfile.tempdir = None
    wrong = [result.target.name for result in results if result.wrong]
    print(f"\n{sum(result.tried for result in results)} inputs." + (f" Wrong: {', '.join(wrong)}." if wrong else ""))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
