"""Does a fit that is off say so?  Errors and flags of hard targets and of real data, default settings.

    python tests/benchmarks/silent_failures.py                     # hard targets, one seed
    python tests/benchmarks/silent_failures.py --posteriordb --seeds 5

Off: a scalar by more than 0.5 sd in mean or 50 % in sd.  Flagged: k-hat above 0.7, not converged, or several modes.
Good: every error below 0.1.  Whatever else `summary()` warns of is beside it.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from verdicts import Verdict, judge, problems  # noqa: E402


def totals(found: list[tuple[str, Verdict]]) -> list[str]:
    """How often silence and false flags, and which warnings stand on good fits."""
    verdicts = [verdict for _, verdict in found]
    off, good = [v for v in verdicts if v.is_off], [v for v in verdicts if v.is_good]
    silent = [name for name, v in found if v.word == "SILENT"]
    false = [name for name, v in found if v.word == "false flag"]
    warned = Counter(warning.split(":")[0].split(". ")[0][:40] for v in good for warning in v.warnings)
    return [
        f"{len(verdicts)} fits: {len(off)} off, {len(silent)} of them silent {sorted(set(silent))}",
        f"{len(good)} good, {len(false)} of them flagged {sorted(set(false))}",
        f"warnings of any kind on {sum(bool(v.warnings) for v in good)} of the good ones: {dict(warned)}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of a name")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--posteriordb", action="store_true", help="real data too")
    options = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    print(
        f"{'target':38} {'mean':>6} {'sd':>6}  {'weighed':>11}  {'k-hat':>6}  conv  {'verdict':10} {'s':>5}  warnings"
    )
    found = []
    for seed in range(options.first, options.first + options.seeds):
        for make in problems(options.only, options.posteriordb):
            problem = make()
            v = judge(problem, seed)
            found.append((problem.name, v))
            print(
                f"{problem.name:38} {v.mean:6.2f} {v.sd:6.2f}  {v.weighted[0]:5.2f} {v.weighted[1]:5.2f}  {v.khat:6.2f}  "
                f"{'yes' if v.converged else 'no':4}  {v.word:10} {v.seconds:5.1f}  {v.flags}",
                flush=True,
            )
        print("\n".join(totals(found)), flush=True)


if __name__ == "__main__":
    main()
