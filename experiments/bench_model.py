"""Training speed of whole models on a GPU: the gpt2 shape with CoGA layers against its multi-head twin.

    python experiments/bench_model.py --n 32768 --out runs/bench

A step is forward with fused loss, backward and AdamW, bf16 autocast, compiled block by block and recorded as
a CUDA graph (`coga.models.train_graph`); tokens/s from the median step, and from the median of steps launched
kernel by kernel. Before anything is timed, the losses of a few steps with the default backend are compared
with the reference backend's: where they differ by more than bf16 noise, no speed is printed. Rows go to
DIR/model_speed.json; a folder that has rows is refused. Exit codes: 0 done, 1 the check is red, 2 bad input.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path

import torch
from _common import StrictParser, fail, fresh_folder, names_of, write_text
from _gpu_time import median_ms
from _script import at_least
from bench_attention import attempt, row
from torch.nn.attention import SDPBackend, sdpa_kernel

from coga import CoGAConfig
from coga.models import CoGAGPT
from coga.models.train_graph import GraphedStep

ROWS = "model_speed.json"
GROUPS = dict(layers="near 32 32 32", latent_dim=64)
EQUAL = GROUPS | dict(capacity_factor=1.0)  # as bench_attention times them
ARMS = {
    "coga": EQUAL,
    "coga-room": GROUPS,  # the default
    "coga-gated": EQUAL | dict(output_gate=True),  # rows before 2026-11-27
    "coga-full": dict(layers="full", latent_dim=64),
    "sdpa-mha": dict(layers="mha"),
}


def step_of(model: CoGAGPT, tokens: torch.Tensor, compiled: bool, graph: bool = True):
    """A callable that runs one training step and returns the loss."""
    rate = torch.tensor(1e-4, device=tokens.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, fused=True, capturable=True)
    if compiled:
        model.compile_blocks()
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    graphed = GraphedStep(model, optimizer)
    run = graphed if graph else graphed.launch
    return lambda: run(x, y)[0]


def losses_agree(config: CoGAConfig, steps: int = 4, length: int = 4096) -> bool:
    """The first losses of two runs that differ in the backend alone."""
    tokens = torch.randint(config.vocab_size, (1, length + 1), device="cuda")
    curves = []
    for backend in ("reference", "auto"):
        model = CoGAGPT(config.replace(backend=backend)).cuda()
        step = step_of(model, tokens, compiled=False, graph=False)
        curves.append([float(step()) for _ in range(steps)])
        del model, step
        torch.cuda.empty_cache()
    gap = max(abs(a - b) for a, b in zip(*curves, strict=True))
    print(
        f"losses reference {curves[0]}\n       kernels   {curves[1]}\n       largest gap {gap:.4f}",
        flush=True,
    )
    return gap < 0.05


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = StrictParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=32768)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--arms", default="sdpa-mha,coga,coga-full")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    return parser.parse_args(argv)


def check_arguments(args: argparse.Namespace) -> list[str]:
    """Names of arms. ValueError: field, value, rule."""
    at_least(args, 1, "n", "batch", "repeats")
    names = names_of(args.arms, "arms", ARMS)
    if not torch.cuda.is_available():
        raise ValueError("device: needs a CUDA GPU")
    fresh_folder(args.out, ROWS)
    return names


def main(argv: list[str] | None = None) -> int:
    try:
        args = arguments(argv)
        names = check_arguments(args)
    except ValueError as error:
        return fail(error)
    print(vars(args) | {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}, flush=True)
    base = CoGAConfig.preset("gpt2")
    base = base.replace(max_len=max(base.max_len, args.n))
    if not losses_agree(base.replace(n_layer=4, **ARMS["coga"])):
        print("bench_model: the check is red, no speed is reported", file=sys.stderr)
        return 1
    rows, rates = [], {}
    tokens = torch.randint(base.vocab_size, (args.batch, args.n + 1), device="cuda")
    for name in names:
        backends = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION) if "sdpa" in name else (None,)
        for backend in backends:
            label = name if backend is None else f"{name}-{backend.name.split('_')[0].lower()}"
            with attempt(label):
                model = CoGAGPT(base.replace(**ARMS[name])).cuda()
                size = sum(p.numel() for p in model.parameters())
                step = step_of(model, tokens, compiled=not args.no_compile, graph=False)
                torch.cuda.reset_peak_memory_stats()
                with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
                    launched = median_ms(step, args.repeats, warmup=2)
                    peak = torch.cuda.max_memory_allocated() / 2**20
                    step = step_of(model, tokens, compiled=not args.no_compile)
                    ms = median_ms(step, args.repeats, warmup=4)
                rates[label] = args.batch * args.n / ms * 1e3
                found = row(label, ARMS[name]["layers"], args.n, args.batch, "train step", ms, peak, launched)
                rows.append(found | {"tokens_per_s": round(rates[label]), "parameters": size})
                write_text(args.out / ROWS, json.dumps(rows, indent=1) + "\n")
                print(
                    f"{label:16s}{ms:9.1f} ms ({launched:.1f} launched) {rates[label]:10.0f} tokens/s "
                    f"{peak:8.0f} MiB {size / 1e6:.0f}M"
                )
                del model, step
            torch.compiler.reset()
    dense = max((r for label, r in rates.items() if "sdpa" in label), default=None)
    for label, rate in rates.items():
        if dense:
            print(f"{label:16s}{rate / dense:6.2f} x the faster multi-head twin")
    return 0


if __name__ == "__main__":
    sys.exit(main())
