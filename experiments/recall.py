"""Recall beyond the window: associative recall and needles in a haystack, by arm, depth and length.

    python experiments/recall.py
    python experiments/recall.py --preset small --n 4096 --max-length 32768 --window 512 --steps 4000 ...

Arms train on the same batches, half multi-query associative recall, half pairs and questions scattered over
the context (`_recall.py` says what they are). A warm-up on contexts of two windows, where all latent
attention is the same, is trained once, as `full`, and every arm starts from it (an arm with `mha` layers has
its own); then each arm trains at length n. Then it answers, at lengths from n up to --max-length:

    mqar     accuracy inside the window, beyond it, and where no chain of local layers reaches (chance there
             is 1/values for a model without a far field); by distance in windows
    needle   accuracy for each depth and length, one question a sequence

The default is small enough for two CPU cores: a pair is one token (--fused), which takes one attention hop
to read. The dense warm-up may put that hop into any layer, so arms with groups have them in every layer:
with "near 4 4" they stayed at chance. For evidence use --no-fused, a larger model and a GPU.

DIR gets config.json, rows.jsonl (a row an arm), warm-up/, heat-ARM.png, mqar.png and depth.png. Exit codes:
0 done, 1 a loss that is not finite, 2 bad input (one line, nothing written), 130 stopped by Ctrl-C (go on
with --resume).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from typing import Any

import numpy as np
from _arms import Arm, arm_of, check_kinds, check_model, parse_arms, slug
from _common import choose_device
from _dense_start import dense_twin, start_folder
from _fit import Fitted, fit
from _recall import Row, Vocabulary, classes, mqar, needle, recalled, scattered, stack
from _recall_plots import plot_all
from _rows import append_row, clean, provenance
from _script import (
    add_model_arguments,
    add_speed,
    at_least,
    model_changes,
    open_folder,
    parser,
    positive,
    read_as,
    run_script,
    show,
)
from tqdm import tqdm

from coga import CoGAConfig
from coga.models import CoGAGPT

__all__ = ["main"]

TOKENS_AT_ONCE = {"cpu": 2**14, "cuda": 2**18}
# A tiny model finds keys sooner with more heads, rotary parts that turn fast, larger first weights and
# attention that starts soft: with gain 2 it recalls 0.66 where it recalls 0.95 with gain 1.
EASIER = {"tiny": {"n_head": 4, "rope_theta": 100.0, "init_std": 0.1, "gain_init": 1.0}}
EVALUATION = 10**9  # the steps whose random numbers evaluation takes: no training step comes here


def arguments(argv: list[str] | None) -> argparse.Namespace:
    made = parser(__doc__.splitlines()[0], "runs/recall")
    add_model_arguments(made)
    add_speed(made)
    add = made.add_argument
    add(
        "--arms",
        default="near,contiguous,random,gumbel,full",
        help="arms, with fields if wanted: gumbel:beta=4",
    )
    add("--layers", default="4", help='pattern of the arms with groups ("4")')
    add("--window", type=int, default=16, help="tokens in a window (16)")
    add("--open-groups", type=int, default=4, help="groups a token reads member by member (4)")
    add("--n", type=int, default=128, help="tokens of a training context (128)")
    add("--max-length", type=int, help="longest context evaluated (4 n)")
    add("--steps", type=int, default=100, help="optimizer steps at length n (100)")
    add("--warmup-steps", type=int, default=200, help="optimizer steps on short contexts, before (200)")
    add("--warmup-length", type=int, help="their length (two windows, as far as n and the pairs allow)")
    add(
        "--batch", type=int, default=8, help="contexts of length n a step; short ones fill as many tokens (8)"
    )
    add("--lr", type=float, default=2e-3, help="peak learning rate of AdamW (0.002)")
    add("--pairs", type=int, default=8, help="key-value pairs in a context (8)")
    add("--keys", type=int, default=16, help="different keys (16)")
    add("--values", type=int, default=8, help="different values (8)")
    add("--noise", type=int, default=8, help="different filler tokens (8)")
    add("--fused", action=argparse.BooleanOptionalAction, help="a pair is one token (only with preset tiny)")
    add("--depths", type=int, default=5, help="depths of the needle, evenly from start to end (5)")
    add("--samples", type=int, default=32, help="sequences for each length, or length and depth (32)")
    args = made.parse_args(argv)
    args.max_length = 4 * args.n if args.max_length is None else args.max_length
    short = max(4 * args.pairs, 2 * args.window)
    args.warmup_length = min(args.n, short) if args.warmup_length is None else args.warmup_length
    args.fused = args.preset == "tiny" if args.fused is None else args.fused
    return args


def vocabulary(args: argparse.Namespace) -> Vocabulary:
    return Vocabulary(args.keys, args.values, args.noise, args.fused)


def config_of(arm: Arm, args: argparse.Namespace) -> CoGAConfig:
    base = {"vocab_size": vocabulary(args).size, "band": min(16, args.window), **EASIER.get(args.preset, {})}
    base |= model_changes(args, "layers", "window", "open_groups")
    return arm.config(args.preset, base, args.seed)


def check(args: argparse.Namespace) -> list[tuple[Arm, CoGAConfig]]:
    """The arms with their models. ValueError (field, value, rule) on whatever does not fit."""
    at_least(args, 1, "n", "batch", "pairs", "noise", "samples", "steps")
    at_least(args, 2, "values", "depths")
    at_least(args, 0, "warmup_steps", "seed")
    positive(args, "lr")
    if args.keys < args.pairs:
        raise ValueError(f"keys={args.keys}: must be at least pairs={args.pairs}")
    for name in ("n", "warmup_length"):
        if getattr(args, name) < 4 * args.pairs:
            raise ValueError(f"{name}={getattr(args, name)}: must be at least 4 pairs = {4 * args.pairs}")
    if args.warmup_length > args.n:
        raise ValueError(f"warmup_length={args.warmup_length}: must be at most n={args.n}")
    if args.max_length < args.n:
        raise ValueError(f"max_length={args.max_length}: must be at least n={args.n}")
    vocab = vocabulary(args)
    arms = [(arm, config_of(arm, args)) for arm in parse_arms(args.arms)]
    for arm, config in arms:
        if arm.prototypes and not args.warmup_steps:
            raise ValueError(f"prototypes={arm.prototypes!r}: needs --warmup-steps (arm {arm.text})")
        if arm.dense_plain:
            raise ValueError(f"dense='plain': only ablate.py has starts to share (arm {arm.text})")
        if arm.dense_latent_dim is not None:
            rule = f"only ablate.py shrinks latents (arm {arm.text})"
            raise ValueError(f"dense_latent_dim={arm.dense_latent_dim}: {rule}")
        if config.vocab_size < vocab.size:
            raise ValueError(
                f"vocab_size={config.vocab_size}: must be at least {vocab.size}, the tokens of the task"
            )
        if args.max_length > config.max_len:
            name, value = ("n", args.n) if args.n > config.max_len else ("max_length", args.max_length)
            raise ValueError(f"{name}={value}: must be at most max_len={config.max_len} (arm {arm.text})")
    return arms


def lengths_of(n: int, longest: int) -> list[int]:
    """n, 2 n, 4 n ... and the longest."""
    found = []
    while n < longest:
        found.append(n)
        n *= 2
    return [*found, longest]


def training_batch(args: argparse.Namespace, step: int):
    """Tokens and targets of a step, a pure function of the arguments; both kinds of rows by turns."""
    vocab = vocabulary(args)
    short = step < args.warmup_steps
    length = args.warmup_length if short else args.n
    batch = args.batch * args.n // length
    draw = np.random.default_rng([args.seed, step])
    make = (mqar, scattered)
    return stack([make[i % 2](draw, vocab, length, args.pairs) for i in range(batch)])


def _share(hit: np.ndarray, chosen: np.ndarray) -> float | None:
    return float(hit[chosen].mean()) if chosen.any() else None


def summarise(rows: list[Row], hits: list[np.ndarray], config: CoGAConfig) -> dict[str, Any]:
    """Accuracy by class and by distance in windows, with the number of questions behind each."""
    both = [classes(row, config) for row in rows]
    beyond, out_of_reach = (np.concatenate([one[i] for one in both]) for i in (0, 1))
    hit = np.concatenate(hits)
    window = config.layer(config.n_layer - 1).window
    distance = np.concatenate([row.query // window - row.pair // window for row in rows])
    kinds = {"all": np.ones_like(beyond), "inside": ~beyond, "beyond": beyond, "out_of_reach": out_of_reach}
    return {
        **{name: _share(hit, chosen) for name, chosen in kinds.items()},
        "questions": {name: int(chosen.sum()) for name, chosen in kinds.items()},
        "by_windows": {int(d): _share(hit, distance == d) for d in np.unique(distance)},
    }


def measure(model: CoGAGPT, args: argparse.Namespace, device: Any, title: str) -> dict[str, Any]:
    """Both tasks at every length; the sequences are the same for every arm."""
    vocab = vocabulary(args)
    lengths = lengths_of(args.n, args.max_length)
    depths = np.linspace(0, 1, args.depths)
    at_once = TOKENS_AT_ONCE[device.type]
    found: dict[str, Any] = {"lengths": lengths, "depths": depths.tolist(), "mqar": [], "needle": []}
    found["needle_out_of_reach"] = []
    bar = tqdm(total=len(lengths) * (1 + len(depths)), desc=f"{title} answers", unit="cell", leave=False)
    for length in lengths:
        draw = np.random.default_rng([args.seed, EVALUATION, length])
        rows = [mqar(draw, vocab, length, args.pairs) for _ in range(args.samples)]
        summary = summarise(rows, recalled(model, rows, device, at_once), model.config)
        found["mqar"].append({"length": length, **summary})
        bar.update()
        cells, reach = [], []
        for depth in depths:
            rows = [needle(draw, vocab, length, depth, args.pairs) for _ in range(args.samples)]
            cells.append(float(np.mean(recalled(model, rows, device, at_once))))
            reach.append(bool(classes(rows[0], model.config)[1][0]))
            bar.update()
        found["needle"].append(cells)
        found["needle_out_of_reach"].append(reach)
    bar.close()
    return found


def _train(
    model: CoGAGPT,
    args: argparse.Namespace,
    first: int,
    steps: int,
    lr: float,
    title: str,
    prototype_lr: float = 1.0,
) -> Fitted:
    fitted = fit(
        model,
        lambda step: training_batch(args, first + step),
        steps,
        lr=lr,
        warmup=max(1, min(100, steps // 10)),
        prototype_lr=prototype_lr,
        device=model.embedding.weight.device,
        compiled=args.compile,
        graphed=args.graph,
        title=title,
    )
    if fitted.diverged:
        raise FloatingPointError(f"{title}: the loss is not finite after step {fitted.losses[-1][0]}")
    return fitted


def warmed_up(arm: Arm, config: CoGAConfig, args: argparse.Namespace, device: Any) -> CoGAGPT:
    """The arm's model after the warm-up, which is trained once for all arms that share it."""
    twin = dense_twin(config)
    folder = start_folder(args.out / "warm-up", twin)
    if (folder / "config.json").exists():  # written after the weights
        model = CoGAGPT.from_pretrained(folder).to(device)
    else:
        model = CoGAGPT(twin).to(device)
        fitted = _train(model, args, 0, args.warmup_steps, args.lr, "warm-up")
        model.save_pretrained(folder)
        print(f"warm-up: loss {fitted.losses[-1][1]:.4f}, {fitted.seconds:.0f} s", flush=True)
    if twin != config:
        text = None if arm.prototypes == "random" else training_batch(args, args.warmup_steps)[0]
        bias = config.far_bias_init
        model = read_as(model, far_bias=bias, text_BT=text, **dataclasses.asdict(config))
    return model.to(device)


def run_arm(arm: Arm, config: CoGAConfig, args: argparse.Namespace, device: Any) -> dict[str, Any]:
    model = warmed_up(arm, config, args, device) if args.warmup_steps else CoGAGPT(config).to(device)
    lr = args.lr * arm.lr_scale
    fitted = _train(model, args, args.warmup_steps, args.steps, lr, arm.text, arm.prototype_lr)
    return {
        "arm": arm.text,
        "seed": args.seed,
        "n": args.n,
        "chance": 1 / args.values,
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": config.layers,
        "window": config.window,
        "open_groups": config.open_groups,
        "model": clean(dataclasses.asdict(config)),
        "losses": fitted.losses,
        "tokens": fitted.tokens,
        "warmup_tokens": args.warmup_steps * training_batch(args, 0)[0].numel() if args.warmup_steps else 0,
        "train_seconds": fitted.seconds,
        "tokens_per_second": fitted.tokens_per_second,
        "peak_bytes": fitted.peak_bytes,
        **measure(model, args, device, arm.text),
    }


KINDS = {"arm": str, "lengths": list, "mqar": list, "needle": list, "losses": list}  # of a row


def same_models(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """ValueError unless every row is of the model that its arm, named or not, means today."""
    for row in rows:
        check_kinds(row, KINDS, args.out)
        if not isinstance(row.get("model"), dict):
            rule = "says nothing of its model, whose defaults may have been others; use another --out"
            raise ValueError(f"arms={row['arm']!r}: its row in {str(args.out)!r} {rule}")
        config = config_of(arm_of(row, args.out), args)
        check_model(row, row["model"], clean(dataclasses.asdict(config)), args.out)


def print_table(rows: list[dict[str, Any]]) -> None:
    """Accuracy of each arm and length; `-` where no question is of the kind."""
    number = lambda x: "     -" if x is None else f"{x:6.3f}"  # noqa: E731
    print(f"\n{'':24s}        |   mqar: window              | needle, from the start to the end")
    print(f"{'arm':24s} length | inside beyond out of reach | by depth")
    for row in rows:
        for found, cells in zip(row["mqar"], row["needle"]):
            inside, beyond, out = (number(found[kind]) for kind in ("inside", "beyond", "out_of_reach"))
            name = f"{row['arm'][:24]:24s} {found['length']:6d}"
            print(f"{name} | {inside} {beyond}       {out} | {' '.join(map(number, cells))}")
    print(f"chance {rows[0]['chance']:.3f}")


def body(argv: list[str] | None) -> None:
    args = arguments(argv)
    arms = check(args)
    device = choose_device(args.device, args.graph)
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "resume", "device", "arms")}
    settings["set"] = dict(args.set)
    show("recall.py", {"arms": [arm.text for arm, _ in arms], **settings}, device, args.out)
    outputs = ["warm-up", "mqar.png", "depth.png", *(f"heat-{slug(arm.text)}.png" for arm, _ in arms)]
    rows = open_folder(args.out, "recall.py", settings, args.resume, outputs)
    same_models(rows, args)
    done = {row["arm"] for row in rows}
    for arm, config in arms:
        if arm.text in done:
            print(f"{arm.text}: already in {args.out}")
            continue
        began = time.monotonic()
        row = run_arm(arm, config, args, device)
        row = {**row, "seconds": time.monotonic() - began, "settings": settings, **provenance(device)}
        append_row(args.out, row)
        rows.append(row)
        print(f"{arm.text}: loss {row['losses'][-1][1]:.4f}, {row['seconds']:.0f} s", flush=True)
    plot_all(args.out, rows)
    print_table(rows)
    print(f"everything is in {args.out}")


def main(argv: list[str] | None = None) -> int:
    """Run with these arguments; returns the exit code."""
    return run_script(body, argv)


if __name__ == "__main__":
    sys.exit(main())
