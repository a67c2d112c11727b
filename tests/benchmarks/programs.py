"""Pyro's own programs under SVI, under BLRInference step for step, and without a guide: final ELBO and processor time.

    PYTHONPATH=tests OMP_NUM_THREADS=1 python tests/benchmarks/programs.py             # the table
    PYTHONPATH=tests OMP_NUM_THREADS=1 python tests/benchmarks/programs.py --record    # and SVI's ends, for the tests

Times are ratios of processor seconds of the steps or of `run` to SVI's, in one process, after programs that warm imports up.
Programs that take minutes are left out without `--minutes`; what takes more than `--limit` processor seconds is cut.
"""

from __future__ import annotations

import json
import signal
import warnings
from collections.abc import Callable

import torch
from acceptance.programs import PROGRAMS, RECORD
from acceptance.scripts import Fit, Program, by_steps, by_svi, without_guide
from side_by_side import argument_parser, heading


class Cut(BaseException):
    """The processor time of a fit is used up: no engine takes it for an error of the model's own."""


def attempt(fit: Callable[[Program], Fit], program: Program, limit: float) -> Fit | str:
    """A fit, or the first line of the error that refused it."""
    signal.setitimer(signal.ITIMER_VIRTUAL, limit)
    try:
        return fit(program)
    except Cut:
        return f"more than {limit:g} s"
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def cut(*_: object) -> None:
    raise Cut


def bound(fit: Fit | str | None) -> str:
    if fit is None:
        return "-"
    return fit if isinstance(fit, str) else f"{fit.elbo:.2f}" + (f" ± {fit.error:.2f}" if fit.error >= 0.005 else "")


def ratio(fit: Fit | str | None, svi: Fit | str | None) -> str:
    return f"{fit.seconds / svi.seconds:.2f}" if isinstance(fit, Fit) and isinstance(svi, Fit) else "-"


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--only", default=[""], nargs="+", help="parts of the names of the programs to run")
    parser.add_argument("--rest", action="store_true", help="only programs whose end under SVI is not recorded")
    parser.add_argument("--record", action="store_true", help="write where SVI ended")
    parser.add_argument("--minutes", action="store_true", help="also programs that take minutes")
    parser.add_argument("--limit", type=float, default=300, help="processor seconds after which a fit is cut")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGVTALRM, cut)
    heading("Pyro's programs")
    for fit, number in ((by_svi, 2), (by_steps, 0), (without_guide, 0)):
        attempt(fit, PROGRAMS[number], options.limit)
    print(
        "| program | guide | SVI: ELBO | same guide: ELBO | time | no guide: ELBO | time |\n|---|---|---|---|---|---|---|"
    )
    ends = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for program in PROGRAMS:
        wanted = any(part in program.name for part in options.only) and (options.minutes or not program.minutes)
        if not wanted or (options.rest and program.name in ends):
            continue
        svi, steps = (attempt(fit, program, options.limit) for fit in (by_svi, by_steps))
        free = None if program.points or not program.alone else attempt(without_guide, program, options.limit)
        cells = [f"{program.name} (`{program.source}`)", program.guide, bound(svi), bound(steps), ratio(steps, svi)]
        print("| " + " | ".join([*cells, bound(free), ratio(free, svi)]) + " |", flush=True)
        if options.record and isinstance(svi, Fit):
            ends[program.name] = {"elbo": svi.elbo, "error": svi.error, "seconds": round(svi.seconds, 2)}
            RECORD.write_text(json.dumps(ends, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    torch.set_default_dtype(torch.float32)  # as published
    main()
