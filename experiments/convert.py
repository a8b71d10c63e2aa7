"""Read a dense (`full`) model through groups without training it, then fine-tune briefly.

    python experiments/convert.py --train 300                      # trains its own dense model first
    python experiments/convert.py --checkpoint runs/full --data code.txt --n 4096 --window 512
    python experiments/convert.py --checkpoint runs/full --read summaries=true --read index_weight=0 ...
    python experiments/convert.py --checkpoint runs/full --n 4096 --finetune 100 --finetune-arm kmeans:32:16

CHECKPOINT is a folder of `save_pretrained`, or a run folder of longctx.py. Every grouping is read with each
group size R and number K of opened groups, beside `full` and `near`: a table of nats per byte over the second
half of held-out contexts, and of bits per byte over all of them. `--finetune` then trains one arm, and the
full model as its control, on the same batches.

DIR gets config.json, rows.jsonl (kind "train", "zero_shot" or "finetune"), table.md, zero-shot.png,
finetune.png and the models that were trained (full/, finetuned-ARM/). Exit codes: 0 done, 1 a loss that is
not finite, 2 bad input (one line, nothing written), 130 stopped by Ctrl-C (go on with --resume).
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from pathlib import Path
from typing import Any

from _arms import field_value, parse_integers
from _common import choose_device, names_of, write_text
from _convert import Reading, figures, parse_reading, plot_finetune, plot_table, readings, table
from _copying import copying, copying_line
from _fit import fit, validate
from _rows import append_row, provenance
from _script import (
    add_model_arguments,
    add_speed,
    at_least,
    file_hash,
    load_model,
    model_changes,
    model_folder,
    open_folder,
    parser,
    positive,
    prototype_text,
    run_script,
    share_of_peak,
    show,
)
from _settings import GROUPS_ONLY
from tqdm import tqdm

from coga import CoGAConfig
from coga.config import GROUPINGS
from coga.data import Corpus, batches, contexts, load_corpus
from coga.models import CoGAGPT

__all__ = ["main"]

TOKENS_AT_ONCE = {"cpu": 2**13, "cuda": 2**16}
FINETUNING = 10**6  # the batches of fine-tuning start at this step: not those of --train


def arguments(argv: list[str] | None) -> argparse.Namespace:
    made = parser(__doc__.splitlines()[0], "runs/convert")
    add_model_arguments(made)
    add_speed(made)
    add = made.add_argument
    add("--checkpoint", type=Path, metavar="DIR", help="a `full` model; without it, --train STEPS")
    add("--train", type=int, default=0, metavar="STEPS", help="train a full model first, at length n")
    add(
        "--data",
        default="python",
        help="'python' (the standard library's source), or a file or folder of text",
    )
    add("--n", type=int, default=1024, help="tokens of a context (1024)")
    add("--contexts", type=int, default=8, help="held-out contexts (8)")
    add("--groupings", default="contiguous,random,kmeans,gumbel", help="groupings, separated by commas")
    add("--group-sizes", default="16,32,64", help="group sizes R (16,32,64)")
    add("--open", default="0,4,8,16", help="opened groups K (0,4,8,16)")
    add("--window", type=int, default=128, help="tokens in a window (128)")
    add(
        "--capacity",
        type=float,
        default=1.0,
        help="a group holds at most capacity x R tokens (1: as measured)",
    )
    add("--far-bias", type=float, default=0.0, help="bias on group summaries when read without training (0)")
    add(
        "--read",
        action="append",
        default=[],
        type=field_value,
        metavar="FIELD=VALUE",
        help="a field of CoGAConfig in all readings of groups",
    )
    add(
        "--prototypes",
        choices=("data", "random"),
        default="data",
        help="where learned ones, and the heads of the selection, are found (data)",
    )
    add("--finetune", type=int, default=0, metavar="STEPS", help="then fine-tune an arm, and full beside it")
    add(
        "--finetune-arm",
        default="",
        metavar="GROUPING:R:K",
        help="which (the best that does not open all groups)",
    )
    add("--batch", type=int, default=8, help="contexts a training step (8)")
    add("--lr", type=float, default=4e-3, help="peak learning rate of --train (0.004)")
    add("--finetune-lr", type=float, default=1e-3, help="and of --finetune (0.001)")
    add("--finetune-final-lr", type=float, default=0.1, help="its rate at the end, over its peak (0.1)")
    return made.parse_args(argv)


LATER = {"finetune_final_lr": 0.1}  # before there was the option

# What a dense model has no use for, and what no reading or option of its own (--far-bias) sets.
READ = sorted({*GROUPS_ONLY} - {"grouping", "open_groups", "capacity_factor", "far_warmup", "far_bias_init"})


def _model(args: argparse.Namespace) -> tuple[CoGAGPT | None, CoGAConfig]:
    """The dense model (None: still to be trained) and its configuration."""
    if args.checkpoint is not None:
        if args.train:
            raise ValueError(f"train={args.train}: must be left out with --checkpoint")
        if args.set:
            raise ValueError(f"set={args.set[0][0]}: must be left out with --checkpoint")
        model = load_model(args.checkpoint)
        return model, model.config
    if not args.train:
        raise ValueError("checkpoint: must be given (--checkpoint DIR), or --train STEPS")
    changes = {"layers": "full", "seed": args.seed, "window": args.window, **model_changes(args)}
    return None, CoGAConfig.preset(args.preset, **changes)


def check(args: argparse.Namespace) -> tuple[CoGAGPT | None, CoGAConfig, list[Reading]]:
    """ValueError (field, value, rule) on whatever does not fit."""
    at_least(args, 1, "n", "contexts", "batch", "window")
    at_least(args, 0, "train", "finetune", "seed")
    positive(args, "lr", "finetune_lr")
    share_of_peak(args, "finetune_final_lr")
    if args.n <= 2 * args.window:
        raise ValueError(
            f"n={args.n}: must be above two windows = {2 * args.window}; shorter has no far field"
        )
    if not abs(args.far_bias) < float("inf"):
        raise ValueError(f"far_bias={args.far_bias}: must be finite")
    if args.finetune_arm and not args.finetune:
        raise ValueError(f"finetune_arm={args.finetune_arm!r}: needs --finetune STEPS")
    sizes = parse_integers(args.group_sizes, "group_sizes", 1)
    opened = parse_integers(args.open, "open")
    named = [name for name, _ in args.read]
    for name in named:
        if name not in READ or named.count(name) > 1:
            raise ValueError(f"read={name!r}: must be one of {', '.join(READ)}, each at most once")
    args.read = dict(args.read)
    wanted = readings(names_of(args.groupings, "groupings", GROUPINGS), sizes, opened)
    model, config = _model(args)
    kinds = {config.layer(i).kind for i in range(config.n_layer)}
    if kinds != {"full"}:
        raise ValueError(f"layers={config.layers!r}: must be a `full` model")
    if args.n > config.max_len:
        raise ValueError(f"n={args.n}: must be at most max_len={config.max_len}")
    extra = [parse_reading(args.finetune_arm)] if args.finetune_arm else []
    for reading in (*wanted, *extra):
        reading.config(config, args.window, args.capacity, args.read)
    return model, config, wanted


class Run:
    """One call of the script: its rows, what they already hold, and how more are made."""

    def __init__(self, args: argparse.Namespace, corpus: Corpus, device: Any, rows: list[dict[str, Any]]):
        self.args, self.corpus, self.device, self.rows = args, corpus, device, rows
        self.tokens, self.targets = contexts(corpus, args.n, args.contexts)

    def done(self, kind: str) -> dict[str, dict[str, Any]]:
        return {row["arm"]: row for row in self.rows if row["kind"] == kind}

    def add(self, row: dict[str, Any]) -> None:
        args = self.args
        shared = {"seed": args.seed, "n": args.n, "window": args.window, "capacity_factor": args.capacity}
        shared |= {"prototypes": args.prototypes, "read": args.read}
        row = {**row, **shared, "data": self.corpus.name, "sha256": self.corpus.sha256}
        append_row(args.out, {**row, **provenance(self.device)})
        self.rows.append(row)

    @property
    def at_once(self) -> int:
        return max(1, TOKENS_AT_ONCE[self.device.type] // self.args.n)

    def measure(self, model: CoGAGPT, title: str) -> dict[str, float]:
        """FloatingPointError where a figure is not finite, so that no such row is written."""
        found = figures(validate(model, self.tokens, self.targets, self.device, self.at_once)[0])
        if not all(math.isfinite(value) for value in found.values()):
            raise FloatingPointError(f"{title}: the held-out loss is not finite")
        return found

    def train(
        self, model: CoGAGPT, steps: int, lr: float, first: int, title: str, floor: float = 0.1
    ) -> dict[str, Any]:
        args = self.args
        fitted = fit(
            model,
            lambda step: batches(self.corpus, args.n, args.batch, args.seed, first + step),
            steps,
            lr=lr,
            warmup=max(1, steps // 10),
            floor=floor,
            device=self.device,
            compiled=args.compile,
            graphed=args.graph,
            title=title,
        )
        if fitted.diverged:
            raise FloatingPointError(f"{title}: the loss is not finite after step {fitted.losses[-1][0]}")
        return {
            "steps": steps,
            "lr": lr,
            "final_lr": floor,
            "tokens": fitted.tokens,
            "losses": fitted.losses,
            "seconds": fitted.seconds,
            "tokens_per_second": fitted.tokens_per_second,
            "peak_bytes": fitted.peak_bytes,
        }

    def full(self, config: CoGAConfig) -> CoGAGPT:
        """The dense model, trained here unless an earlier call did."""
        folder = self.args.out / "full"
        if "full" in self.done("train"):
            return load_model(folder).to(self.device)
        model = CoGAGPT(config).to(self.device)
        found = self.train(model, self.args.train, self.args.lr, 0, "training full")
        model.eval().save_pretrained(folder)
        self.add({"kind": "train", "arm": "full", **found})
        return model

    def as_read(self, model: CoGAGPT, reading: Reading) -> CoGAGPT:
        args = self.args
        text = prototype_text(self.corpus, args.n, args.seed) if args.prototypes == "data" else None
        return reading.model(model, args.window, args.capacity, args.far_bias, args.read, text)

    def zero_shot(self, model: CoGAGPT, wanted: list[Reading]) -> list[dict[str, Any]]:
        done = self.done("zero_shot")
        bar = tqdm(wanted, desc="reading", unit="reading", leave=False)
        for reading in bar:
            if reading.text in done:
                continue
            bar.set_postfix_str(reading.text)
            began = time.monotonic()
            row = {"kind": "zero_shot", "arm": reading.text, "name": reading.name}
            row |= {
                "group_size": reading.group_size,
                "opened": reading.opened,
                "far_bias": self.args.far_bias,
            }
            row |= self.measure(self.as_read(model, reading), reading.text)
            if reading.name == "full":
                row["copying"] = copying(model, self.tokens, self.targets, self.device, self.at_once)
            # `full` is read first, so that every row has its distance from it.
            dense = row if reading.name == "full" else self.done("zero_shot")["full"]
            row["above_full"] = row["nats_second_half"] - dense["nats_second_half"]
            self.add({**row, "seconds": time.monotonic() - began})
        done = self.done("zero_shot")
        return [done[reading.text] for reading in wanted]

    def finetune(self, model: CoGAGPT, chosen: Reading) -> list[dict[str, Any]]:
        """The arm, then the full control, on the same batches."""
        arms = [chosen] if chosen.name == "full" else [chosen, Reading("full")]
        for reading in arms:
            if reading.text in self.done("finetune"):
                continue
            other = self.as_read(model, reading)
            title = f"fine-tuning {reading.text}"
            before = self.measure(other, title)
            rate, floor = self.args.finetune_lr, self.args.finetune_final_lr
            found = self.train(other, self.args.finetune, rate, FINETUNING, title, floor)
            other.eval().save_pretrained(self.args.out / f"finetuned-{reading.text.replace(':', '-')}")
            row = {"kind": "finetune", "arm": reading.text, "far_bias": self.args.far_bias}
            self.add({**row, "before": before, "after": self.measure(other, title), **found})
        done = self.done("finetune")
        return [done[reading.text] for reading in arms]


def _choose(args: argparse.Namespace, rows: list[dict[str, Any]]) -> Reading:
    if args.finetune_arm:
        return parse_reading(args.finetune_arm)
    grouped = [row for row in rows if row["group_size"]]
    # Where every far group is opened the reading is exact: it says nothing about groups.
    windows = max(0, (args.n - 1) // args.window - 1)
    partly = [row for row in grouped if row["opened"] < windows * (args.window // row["group_size"])]
    best = min(partly or grouped, key=lambda row: row["nats_second_half"])
    return parse_reading(best["arm"])


def body(argv: list[str] | None) -> None:
    args = arguments(argv)
    model, config, wanted = check(args)
    device = choose_device(args.device, args.graph)
    corpus = load_corpus(args.data, length=args.n)
    if config.vocab_size < corpus.vocab_size:
        raise ValueError(f"vocab_size={config.vocab_size}: must be at least the text's {corpus.vocab_size}")
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "resume", "device")}
    settings |= {"checkpoint": None, "set": dict(args.set), "sha256": corpus.sha256, "weights": None}
    if args.checkpoint is not None:
        folder = model_folder(args.checkpoint)
        settings |= {"checkpoint": str(folder), "weights": file_hash(folder / "model.safetensors")}
    show("convert.py", settings, device, args.out)
    print(f"text    {corpus.describe()}")
    groups = dataclasses.asdict(wanted[-1].config(config, args.window, args.capacity, args.read))
    print(f"groups  {' '.join(f'{name}={groups[name]}' for name in READ)}", flush=True)
    outputs = ("table.md", "zero-shot.png", "finetune.png", "full")
    run = Run(
        args, corpus, device, open_folder(args.out, "convert.py", settings, args.resume, outputs, LATER)
    )
    dense = (run.full(config) if model is None else model.to(device)).eval()
    rows = run.zero_shot(dense, wanted)
    text = (
        f"Nats per byte, second half of {args.contexts} contexts of {args.n} (W={args.window}):\n\n"
        f"{table(rows)}\n\nBits per byte, whole contexts:\n\n{table(rows, 'bits_per_byte')}\n"
    )
    write_text(args.out / "table.md", text)
    plot_table(args.out / "zero-shot.png", rows, args.window)
    print("\n" + text, flush=True)
    if line := copying_line(run.done("zero_shot")["full"].get("copying", {})):
        print(line, flush=True)
    if args.finetune:
        tuned = run.finetune(dense, _choose(args, rows))
        plot_finetune(args.out / "finetune.png", tuned)
        print(
            f"fine-tuned for {args.finetune} steps of {args.batch} x {args.n} (nats per byte, second half):"
        )
        for row in tuned:
            before, after = row["before"]["nats_second_half"], row["after"]["nats_second_half"]
            print(f"  {row['arm']:20s} {before:.4f} -> {after:.4f}")
    print(f"everything is in {args.out}")


def main(argv: list[str] | None = None) -> int:
    """Run with these arguments; returns the exit code."""
    return run_script(body, argv)


if __name__ == "__main__":
    sys.exit(main())
