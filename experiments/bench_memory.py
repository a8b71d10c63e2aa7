"""Peak memory of a training step against the length of the context: is it linear?

    python experiments/bench_memory.py --lengths 4096,8192,16384,32768 --out runs/memory

Each length runs in a process of its own: two optimizer steps on random tokens; the figure is the peak
resident size (CPU) or allocation (CUDA) above what the process held before the model was built. On a CPU the
C library is told to give freed memory back at once: what it would keep differs by a third from run to run. A
line, memory = a + b T, is drawn through the two shortest lengths and the others are compared with it.
"""

from __future__ import annotations

import argparse
import datetime
import os
import resource
import subprocess
import sys
from pathlib import Path

import torch
from _arms import parse_integers
from _common import StrictParser, choose_device, environment, fail, fresh_folder, write_json

from coga import CoGAConfig
from coga.config import PRESETS
from coga.models import CoGAGPT

# glibc: blocks from 64 KiB are mapped, and so unmapped, one by one; other C libraries ignore this.
GIVE_BACK = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
}


def measure(length: int, preset: str, device: str) -> float:
    """MiB that two training steps need at this length."""
    torch.manual_seed(0)
    small = CoGAGPT(CoGAConfig.preset("tiny"))  # loads every library before the baseline is taken
    small(torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1, 8, dtype=torch.int64)).total_loss.backward()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    model = CoGAGPT(CoGAConfig.preset(preset)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = torch.randint(model.config.vocab_size, (1, length + 1), device=device)
    for step in range(2):
        out = model(tokens[:, :-1], tokens[:, 1:], noise_step=step)
        out.total_loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_groups(out)
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before


def checked(argv: list[str] | None) -> tuple[argparse.Namespace, list[int]]:
    """Arguments and lengths; ValueError (field, value, rule)."""
    parser = StrictParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--lengths", default="4096,8192,16384,32768", help="three or more, ascending, in tokens"
    )
    parser.add_argument("--preset", default="tiny", help=f"{', '.join(PRESETS)} (tiny)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:INDEX (cpu)")
    parser.add_argument("--out", type=Path, default=Path("runs/memory"), metavar="DIR", help="(runs/memory)")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    lengths = parse_integers(args.lengths, "lengths")
    if args.preset not in PRESETS:
        raise ValueError(f"preset={args.preset!r}: must be one of {', '.join(PRESETS)}")
    limit = CoGAConfig.preset(args.preset).max_len
    if len(lengths) < 3 or lengths != sorted(set(lengths)) or not 1 <= lengths[0] <= lengths[-1] <= limit:
        raise ValueError(f"lengths={args.lengths!r}: must be three or more, ascending, from 1 to {limit}")
    args.device = str(choose_device(args.device))
    return args, lengths


def main(argv: list[str] | None = None) -> int:
    try:
        args, lengths = checked(argv)
        if args.one is not None:
            print(measure(args.one, args.preset, args.device))
            return 0
        fresh_folder(args.out, "memory.json")
    except ValueError as error:
        return fail(error)
    print(f"preset {args.preset}, device {args.device}, torch {torch.__version__}", flush=True)
    found = {}
    for length in lengths:
        command = [sys.executable, __file__, "--one", str(length), "--preset", args.preset]
        command += ["--device", args.device]
        env = os.environ | GIVE_BACK
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
        found[length] = float(done.stdout.split()[-1])
        print(f"{length:8d} tokens {found[length]:9.1f} MiB", flush=True)
    first, second = lengths[:2]
    slope = (found[second] - found[first]) / (second - first)
    print(f"\n{'tokens':>8s}{'MiB':>10s}{'linear':>10s}{'ratio':>8s}{'KiB/token':>11s}")
    rows = []
    for length in lengths:
        line = found[first] + slope * (length - first)
        ratio = found[length] / line
        print(
            f"{length:8d}{found[length]:10.1f}{line:10.1f}{ratio:8.3f}{found[length] * 1024 / length:11.2f}"
        )
        rows.append({"tokens": length, "mib": round(found[length], 1), "over_linear": round(ratio, 4)})
    where = environment(torch.device(args.device))
    report = {"preset": args.preset, **where, "date": datetime.date.today().isoformat(), "rows": rows}
    write_json(args.out / "memory.json", report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
