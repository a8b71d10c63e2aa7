"""Train arms of an ablation on identical batches and seeds, and compare what each of them learned.

    python experiments/ablate.py --preset small --n 4096 --steps 300 --batch 4 --seeds 0,1,2 --out runs/ablate
    python experiments/ablate.py --arms "gumbel,gumbel:sink=false,gumbel:lr_scale=2" --set window=256 ...
    python experiments/ablate.py --steps 4000 --dense-steps 3000 ...                 dense first, then arms
    python experiments/ablate.py --out runs/ablate --resume --time-limit 500 ...     what is missing, in parts
    python experiments/ablate.py --out runs/ablate --report-only                     table and plots again

An arm is a layer pattern (mha, full, near) or a grouping (gumbel, contiguous, kmeans, random) in the layers
of the preset, with any field of CoGAConfig changed after a colon; `lr_scale` multiplies the learning rate,
`prototype_lr` that of the prototypes.
All arms of a seed start from the same weights where they share them, and see the same tokens in the same
order, so they are compared seed by seed with the `--reference`. With `--dense-steps` they share the first
steps, too, on a model with `full` layers: weights and moments of the optimizer are taken over as they are,
and prototypes are found in the text by k-means (`prototypes=random`: they are not). With `dense_latent_dim`
latents are that wide in the dense part, and then shrunk to the arm's (`coga.models.shrink`); with
`dense=plain` the dense part is the unchanged model's, whose sink, gate, reciprocal term or band go or come
then. What is measured is in `_fit.py` and `_copying.py` (a dense model should copy before it is read through
groups), FLOPs are counted in `_flops.py`.

The folder gets rows.jsonl (one line a run, as soon as it is done), table.md, positions.png, losses.png,
flips.png and starts/ (dense models). Exit codes: 0 done or out of time, 1 a run that did not fit into memory,
2 settings or files that do not fit (one line, nothing written), 130 Ctrl-C; rows that are there are kept and
not run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import _ablate_report as report
import torch
from _ablate_settings import (
    Setting,
    checked,
    model_of,
    parser,
    reference_of,
    rows_of,
    same_settings,
    setting_of,
    start_of,
)
from _arms import Arm, plain_config, sharing_start, slug
from _common import choose_device, environment, fail, machine_line, make_folder
from _copying import copying
from _dense_start import dense_twin, kept, load_start, save_start, start_folder
from _evaluate import probe_tokens
from _fit import Fitted, Moments, fit, group_metrics, per_hundred, position_report, validate
from _flops import flops, training_flops
from _rows import ROWS, append_row, clean, provenance, read_rows
from _script import prototype_text, read_as
from tqdm import tqdm

from coga import CoGAConfig
from coga.data import Corpus, batches, contexts, load_corpus, unigram_entropy
from coga.models import CoGAGPT
from coga.models.shrink import shrink_latents

__all__ = ["main"]

COPIED = 8  # held-out contexts on which copying is measured
FREE = ("data", "validation", "beyond")  # what a dense start does not depend on


# --- one run -----------------------------------------------------------------------------------------------


def _options(arm: Arm, setting: Setting, device: torch.device) -> dict[str, Any]:
    """What all steps of a run have in common."""
    return dict(
        lr=setting.lr * arm.lr_scale,
        warmup=setting.warmup,
        floor=setting.final_lr,
        device=device,
        compiled=setting.compile,
        graphed=setting.graph,
    )


def _twin(arm: Arm, seed: int, setting: Setting) -> CoGAConfig:
    """The model of the arm's dense start."""
    return dense_twin(arm.dense_config(setting.preset, setting.model, seed))


def _start_folder(arm: Arm, seed: int, setting: Setting, device: torch.device, starts: Path) -> Path:
    """Where the arm's dense start is kept: named after all that decides its bits."""
    plain = plain_config(setting.preset, setting.model, seed)  # first weights are shared with it
    where = environment(device)
    return start_folder(
        starts,
        _twin(arm, seed, setting),
        plain=dataclasses.asdict(plain),
        lr=setting.lr * arm.lr_scale,
        setting={name: x for name, x in vars(setting).items() if name not in FREE},
        machine=[where["device"], where["torch"]],
    )


def _copying(model: CoGAGPT, setting: Setting, corpus: Corpus, device: torch.device) -> dict[str, float]:
    """On contexts as long as the dense start's: what it is there and what it is at the end compare."""
    many = setting.batch * setting.n // setting.dense_n
    held_out = contexts(corpus, setting.dense_n, min(setting.validation, COPIED))
    return copying(model.to(device), *held_out, device, many)


def _start(
    arm: Arm, seed: int, setting: Setting, corpus: Corpus, device: torch.device, starts: Path
) -> tuple[CoGAGPT, Moments | None, Fitted, dict[str, float]]:
    """The arm's model, its optimizer's moments, its dense start, how that copies (empty: from scratch)."""
    config, how = arm.config(setting.preset, setting.model, seed), start_of(arm, setting)
    if how is None:
        return arm.build(setting.preset, setting.model, seed), None, Fitted(), {}
    folder = _start_folder(arm, seed, setting, device, starts)
    twin = _twin(arm, seed, setting)
    if not kept(folder):
        plain = plain_config(setting.preset, setting.model, seed)
        model = sharing_start(twin, plain).to(device)
        many = setting.batch * setting.n // setting.dense_n
        drawn = partial(batches, corpus, setting.dense_n, many, seed)
        title = f"dense start of {arm.text} seed {seed}"
        rest = dict(last=setting.dense_steps, keep_moments=True, title=title)
        save_start(folder, model, fit(model, drawn, setting.steps, **rest, **_options(arm, setting, device)))
    model, moments, dense = load_start(folder)
    model = model.to(device)  # where prototypes are found, too
    copied = _copying(model, setting, corpus, device)
    if model.config == config:
        return model, moments, dense, copied
    text = prototype_text(corpus, setting.n, seed)
    if model.config.latent_dim != config.latent_dim:
        model = shrink_latents(model, config.latent_dim, text.to(device))
        shapes = {name: p.shape for name, p in model.named_parameters()}
        # What has shrunk has another basis, too: its moments start anew.
        moments = {name: x for name, x in moments.items() if x["exp_avg"].shape == shapes[name]}
    # A dense part that has diverged has no content to find groups in; the run goes on to say so.
    sound = all(map(math.isfinite, copied.values()))
    found_in = text if how["prototypes"] == "data" and sound else None
    model = read_as(model, far_bias=how["far_bias"], text_BT=found_in, **dataclasses.asdict(config))
    return model, moments, dense, copied


def _run(
    arm: Arm,
    seed: int,
    setting: Setting,
    corpus: Corpus,
    device: torch.device,
    models: Path | None,
    starts: Path,
) -> dict[str, Any]:
    """Train and measure one arm with one seed: its row. The model goes to a folder in `models`."""
    config = arm.config(setting.preset, setting.model, seed)
    model, moments, dense, dense_copying = _start(arm, seed, setting, corpus, device, starts)
    began = time.monotonic()
    model = model.to(device)
    probe_T = probe_tokens(corpus, setting.n).to(device)
    fitted = fit(
        model,
        partial(batches, corpus, setting.n, setting.batch, seed),
        setting.steps,
        first=setting.dense_steps,
        prototype_lr=arm.prototype_lr,
        moments=moments,
        probe_T=probe_T,
        title=f"{arm.text} seed {seed}",
        **_options(arm, setting, device),
    )
    fitted.follows(dense)
    if models is not None:
        model.save_pretrained(models / f"{slug(arm.text)}-{seed}")
    tokens_BT, targets_BT = contexts(corpus, setting.n, setting.validation)
    loss_T, used = validate(model, tokens_BT, targets_BT, device, setting.batch)
    parts = flops(config, setting.n)
    trained = training_flops(config, setting.n) * fitted.tokens
    trained += training_flops(_twin(arm, seed, setting), setting.dense_n) * dense.tokens
    speed = fitted.tokens_per_second
    metrics: dict[str, Any] = {
        **position_report(loss_T, setting.beyond),
        "unigram_bits_per_byte": unigram_entropy(targets_BT.numpy().astype("uint8").ravel()),
        "diverged": fitted.diverged or not bool(loss_T.isfinite().all()),
        "worst_rise": fitted.worst_rise,
        "grad_norm_max": max(fitted.grad_norms),
        "train_loss": fitted.losses[-1][1],
        **fitted.flips,
        "dense_tokens": dense.tokens,
        "dense_seconds": dense.seconds,
        "dense_copying": dense_copying,
        "copying": _copying(model, setting, corpus, device),
        "seconds": fitted.seconds,
        "tokens_per_second": speed,
        "forward_flops_per_token": parts,
        "training_flops": trained,
        "flops_per_second": training_flops(config, setting.n) * speed if speed else None,
        "peak_bytes": fitted.peak_bytes,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    # Content that is not finite has no coherence, and the metrics refuse it.
    if all(bool(p.isfinite().all()) for p in model.parameters()):
        metrics |= group_metrics(model, used, probe_T)
    return {
        "experiment": "ablate",
        "arm": arm.text,
        "seed": seed,
        "tokens": fitted.tokens + dense.tokens,
        "setting": dataclasses.asdict(setting),
        "model": model_of(arm, setting, seed),
        "start": start_of(arm, setting),
        "metrics": metrics | {"wall_seconds": time.monotonic() - began},
        "curves": {
            "loss": fitted.losses,
            "flip_rate_100": [(step, per_hundred(gap, rate)) for step, gap, rate in fitted.flip_curve],
        },
        **provenance(device),
    }


# --- all runs ----------------------------------------------------------------------------------------------


def _took(row: dict[str, Any], warm: bool) -> float:
    """Seconds of a run; `warm`: at its steady speed, for kernels are built once a process."""
    found = row["metrics"]
    if not warm or not found["tokens_per_second"]:
        return found["wall_seconds"]
    own = row["tokens"] - found["dense_tokens"]
    return found["wall_seconds"] - found["seconds"] + own / found["tokens_per_second"]


def _expected(rows: list[dict[str, Any]], arm: Arm, warm: bool) -> float:
    """Seconds a run of this arm will take: as long as its last one did, or the longest of all."""
    own = [_took(row, warm) for row in rows if row["arm"] == arm.text]
    return own[-1] if own else max((_took(row, warm) for row in rows), default=0.0)


def _show(arms: list[Arm], seeds: list[int], setting: Setting, corpus: Corpus, device: Any) -> None:
    print(machine_line(environment(device)))
    print(f"text    {corpus.describe()}")
    print(f"arms    {len(arms)}: {'  '.join(arm.text for arm in arms)}")
    print(f"seeds   {', '.join(map(str, seeds))}")
    print(f"model   {setting.preset}, changed in every arm: {json.dumps(setting.model)}")
    base = dataclasses.asdict(CoGAConfig.preset(setting.preset, **setting.model))
    print(f"        {' '.join(f'{name}={value}' for name, value in base.items() if name != 'seed')}")
    print(
        f"run     {setting.steps} steps of {setting.batch} x {setting.n:,} tokens; AdamW lr {setting.lr:g}, "
        f"warm-up {setting.warmup} steps; {setting.validation} held-out contexts; "
        f"compile {setting.compile}, CUDA graph {setting.graph}"
    )
    if setting.dense_steps:
        print(
            f"        the first {setting.dense_steps} steps dense, on contexts of {setting.dense_n:,} tokens"
        )
    print(f"        parameters and forward FLOPs a token ({setting.n:,} tokens):")
    for arm in arms:
        config = arm.config(setting.preset, setting.model, seeds[0])
        with torch.device("meta"):
            size = sum(p.numel() for p in CoGAGPT(config).parameters())
        rate = setting.lr * arm.lr_scale
        print(f"        {arm.text}: {size:,}, {sum(flops(config, setting.n).values()):.3g}, lr {rate:g}")


def _run_all(
    todo: list[tuple[Arm, int]],
    rows: list[dict[str, Any]],
    setting: Setting,
    corpus: Corpus,
    device: torch.device,
    folder: Path,
    deadline: float,
    models: Path | None,
    starts: Path,
) -> tuple[list[str], list[str]]:
    """Append a row a run. Returns the runs that are left for lack of time, and those that did not fit."""
    failed: list[str] = []
    with tqdm(total=len(todo), desc="runs", unit="run", dynamic_ncols=True) as bar:
        for i, (arm, seed) in enumerate(todo):
            expected = _expected(rows, arm, i > 0)
            if setting.dense_steps and not kept(_start_folder(arm, seed, setting, device, starts)):
                expected += max((row["metrics"]["dense_seconds"] for row in rows), default=0.0)
            if time.monotonic() + expected > deadline:
                return [f"{one.text} seed {other}" for one, other in todo[i:]], failed
            try:
                row = clean(_run(arm, seed, setting, corpus, device, models, starts))
            except torch.OutOfMemoryError as error:
                failed.append(f"{arm.text} seed {seed}")
                bar.write(f"{failed[-1]}: out of memory, no row ({str(error).splitlines()[0]})")
            else:
                append_row(folder, row)
                rows.append(row)
                found = row["metrics"]
                bits = report.number(found["bits_per_byte"], ".4f")
                note = ", DIVERGED" if found["diverged"] else ""
                bar.write(f"{arm.text} seed {seed}: {bits} bits/byte, {found['wall_seconds']:.1f} s{note}")
            if device.type == "cuda":
                torch.cuda.empty_cache()
            bar.update()
    return [], failed


def _report_only(args: argparse.Namespace) -> int:
    rows = [row for row in read_rows(args.out) if row.get("experiment") == "ablate"]
    if not rows:
        raise ValueError(f"out={str(args.out)!r}: holds no {ROWS} of an ablation to report on")
    reference = reference_of(args.reference, list(dict.fromkeys(row["arm"] for row in rows)))
    report.write(args.out, rows, reference)
    return 0


def _main(argv: list[str] | None) -> int:
    began = time.monotonic()
    args = parser(__doc__.splitlines()[0]).parse_args(argv)
    if args.report_only:
        return _report_only(args)
    arms, seeds = checked(args)
    device = choose_device(args.device, args.graph)
    rows = rows_of(args.out, args.resume)
    names = list(dict.fromkeys([arm.text for arm in arms] + [str(row.get("arm")) for row in rows]))
    reference = reference_of(args.reference, names)
    corpus = load_corpus(args.data, length=args.n)
    setting = setting_of(args, corpus, device)
    same_settings(rows, arms, setting, args.out)
    if setting.dense_steps:
        make_folder(args.starts, "starts")
    make_folder(args.out)
    _show(arms, seeds, setting, corpus, device)
    print(f"out     {args.out}, reference {reference}", flush=True)
    done = {(row["arm"], row["seed"]) for row in rows}
    # A seed at a time, so that a run that is cut short leaves whole pairs.
    todo = [(arm, seed) for seed in seeds for arm in arms if (arm.text, seed) not in done]
    if len(todo) < len(arms) * len(seeds):
        print(f"resume  {len(arms) * len(seeds) - len(todo)} runs are already there, {len(todo)} to go")
    deadline = math.inf if args.time_limit is None else began + args.time_limit
    models = args.out / "models" if args.save_models else None
    left, failed = _run_all(todo, rows, setting, corpus, device, args.out, deadline, models, args.starts)
    if rows:
        report.write(args.out, rows, reference)
    print(f"{time.monotonic() - began:.0f} s; everything is in {args.out}")
    if left:
        print(f"time limit of {args.time_limit:g} s: {len(left)} runs left, go on with --resume")
        print(f"left    {'  '.join(left)}")
    if failed:
        return fail(f"out of memory: {', '.join(failed)}", 1)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run with these arguments; returns the exit code."""
    try:
        return _main(argv)
    except (ValueError, OSError) as error:
        return fail(error, 2)
    except KeyboardInterrupt:
        print("stopped; finished runs are kept, go on with --resume", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
