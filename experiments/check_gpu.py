"""Everything that needs a GPU, in one go: GPU tests, then the benchmarks, then a short run of longctx.py.

    python experiments/check_gpu.py --out runs/gpu --minutes 9

Compiling takes longer than computing, so every benchmark runs once in the background, to fill the caches of
Triton and Inductor, while the tests run; nothing is timed until all of them have ended. Each step has a share
of the time, its output goes to DIR/STEP.log as it comes, and what is left out is said. Rows go to DIR.
Exit code 0 when every step ended well, 1 otherwise, 2 on bad input.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from _common import StrictParser, fail, fresh_folder

ROOT = Path(__file__).resolve().parents[1]
LENGTHS = ("4096,8192,16384", "32768,65536,131072")  # two processes: more only compile side by side
PYTEST = ["-m", "pytest", "-m", "gpu", "--tb=short"]
LONGCTX = ["experiments/longctx.py", "--n", "32768", "--preset", "gpt2"]
# Step: share of the time, arguments of Python. Order is the order of importance.
STEPS: dict[str, tuple[float, list[str]]] = {
    "tests": (0.33, [*PYTEST, "-vv", "--maxfail=9", "tests/kernels"]),
    # Alone, because it takes 60 GiB: beside other tests it is skipped.
    "long": (0.07, [*PYTEST, "-k", "131072", "tests/kernels/test_gpu_model.py"]),
    "attention": (0.34, ["experiments/bench_attention.py", "--repeats", "9", "--parts", "fixed"]),
    "model": (0.13, ["experiments/bench_model.py"]),
    "longctx": (0.13, [*LONGCTX, "--steps", "12", "--warmup-steps", "2", "--sample", "8"]),
}  # fmt: skip
WARM = [["experiments/bench_attention.py", "--repeats", "1", "--lengths", some] for some in LENGTHS]
WARM.append(["experiments/bench_model.py", "--repeats", "1"])
WARM.append([*LONGCTX, "--steps", "2", "--warmup-steps", "1", "--sample", "2"])


def _hear_interrupts() -> None:
    """In the child: a job of `nohup ... &` ignores them, and what it starts would, too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(arguments: list[str], log: Path) -> subprocess.Popen:
    env = os.environ | {"PYTHONUNBUFFERED": "1"}
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=env,
            stdout=file,
            stderr=file,
            preexec_fn=_hear_interrupts,
        )


def end(process: subprocess.Popen, seconds: float) -> int:
    """Exit code; 124 where the time ran out. The interrupt lets pytest say what has failed so far."""
    try:
        return process.wait(max(1.0, seconds))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return 124


def main(argv: list[str] | None = None) -> int:
    parser = StrictParser(description=__doc__.splitlines()[0], formatter_class=argparse.HelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="all in all (9)")
    parser.add_argument("--workers", type=int, default=8, help="processes of pytest, with pytest-xdist (8)")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), metavar="DIR")
    try:
        args = parser.parse_args(argv)
        if not 0 < args.minutes < float("inf"):
            raise ValueError(f"minutes={args.minutes}: must be a finite number above 0")
        if args.workers < 1:
            raise ValueError(f"workers={args.workers}: must be at least 1")
        if not torch.cuda.is_available():
            raise ValueError("device: needs a CUDA GPU")
        out = args.out.resolve()
        fresh_folder(out, f"{next(iter(STEPS))}.log")
    except ValueError as error:
        return fail(error)
    print(
        torch.cuda.get_device_name(), f"torch {torch.__version__}", f"{args.minutes} minutes", out, flush=True
    )
    until = time.monotonic() + 60 * args.minutes
    warm = []
    for i, command in enumerate(WARM):
        warm.append(start([*command, "--out", str(out / f"warm{i}")], out / f"warm{i}.log"))
    codes = {}
    for name, (share, command) in STEPS.items():
        began = time.monotonic()
        limit = min(share * 60 * args.minutes, until - began)
        of_pytest = {"tests": ["-n", str(args.workers), "--dist", "loadgroup"], "long": []}
        extra = of_pytest.get(name, ["--out", str(out / name)])
        codes[name] = end(start([*command, *extra], out / f"{name}.log"), limit)
        if name == "tests":
            for one in warm:
                end(one, limit - (time.monotonic() - began))
        lines = (out / f"{name}.log").read_text(errors="replace").splitlines()
        print(f"\n== {name}: exit code {codes[name]}, {time.monotonic() - began:.0f} s")
        print(*lines[-45:], sep="\n", flush=True)
    told = [f"{name} {'ok' if code == 0 else f'FAILED ({code})'}" for name, code in codes.items()]
    print("\n" + ", ".join(told))
    return int(any(codes.values()))


if __name__ == "__main__":
    sys.exit(main())
