"""Settings of an ablation: read from the command line, checked, compared with the rows that are there."""

from __future__ import annotations

import argparse
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _arms import Arm, arm_of, check_kinds, check_model, field_value, parse_arms, parse_integers
from _common import StrictParser, environment, holds_run
from _dense_start import dense_twin
from _rows import clean, read_rows
from _script import share_of_peak
from _settings import TRAINING

from coga import CoGAConfig
from coga.config import PRESETS
from coga.data import Corpus

__all__ = [
    "Setting",
    "checked",
    "model_of",
    "parser",
    "reference_of",
    "rows_of",
    "same_settings",
    "setting_of",
    "start_of",
]

ARMS = "gumbel,full,near,contiguous,random,kmeans,mha"
VALIDATION = 2**18  # held-out tokens, in at most 64 contexts


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all rows of a folder share.

    model      fields of `CoGAConfig` changed from the preset in every arm
    beyond     positions from here on count as beyond the window: 2W, where the first group is read
    final_lr   learning rate at the end over its peak
    dense_*    the first steps are those of the arm's dense twin, on contexts of this length
    """

    preset: str
    n: int
    steps: int
    batch: int
    lr: float
    warmup: int
    final_lr: float
    dense_steps: int
    dense_n: int
    validation: int
    compile: bool
    graph: bool
    precision: str
    model: dict[str, Any]
    beyond: int
    data: str
    sha256: str


def parser(description: str) -> argparse.ArgumentParser:
    made = StrictParser(description=description)
    add = made.add_argument
    add("--arms", default=ARMS, metavar="ARM,ARM", help=f"NAME or NAME:FIELD=VALUE,... ({ARMS})")
    add("--seeds", default="0,1,2", help="of weights, noise and batches (0,1,2)")
    add("--n", type=int, default=4096, help="context length in bytes (4096)")
    add("--steps", type=int, default=300, help="optimizer steps (300)")
    add("--batch", type=int, default=4, help="contexts a step (4)")
    add("--preset", default="small", help=f"{', '.join(PRESETS)} (small)")
    add("--set", type=field_value, action="append", default=[], metavar="FIELD=VALUE",
        help="a field of CoGAConfig, in every arm")  # fmt: skip
    add("--data", default="python", help="'python' (the standard library's source), or a file or folder")
    add("--lr", type=float, help="peak learning rate of AdamW (the preset's)")
    add("--warmup", type=int, help="steps over which it rises (a tenth, at most 100)")
    add("--final-lr", type=float, default=0.1, help="learning rate at the end, over its peak (0.1)")
    add("--dense-steps", type=int, default=0, help="first steps of each arm, on a dense (`full`) model (0)")
    add("--dense-n", type=int, help="context length of these, with as many bytes a step (n)")
    add("--starts", type=Path, metavar="DIR", help="where dense models are kept for other calls (OUT/starts)")
    add("--validation", type=int, help="held-out contexts of length n (2**18 bytes, at most 64)")
    add("--compile", action="store_true", help="compile the blocks for training (torch.compile)")
    add("--graph", action="store_true", help="record the training step as a CUDA graph (GPU only)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:INDEX")
    add("--out", type=Path, default=Path("runs/ablate"), metavar="DIR", help="folder (runs/ablate)")
    add("--reference", metavar="ARM", help="arm that the others are compared with (gumbel)")
    add("--resume", action="store_true", help="go on with the rows in the folder")
    add("--time-limit", type=float, metavar="SECONDS", help="start no run that should end later")
    add("--save-models", action="store_true", help="keep every trained model in DIR/models/ARM-SEED")
    add("--report-only", action="store_true", help="draw table and plots from the rows in the folder")
    return made


def checked(args: argparse.Namespace) -> tuple[list[Arm], list[int]]:
    """Arms and seeds; ValueError (field, value, rule) on whatever can be seen without reading the data."""
    arms, seeds = parse_arms(args.arms), parse_integers(args.seeds, "seeds")
    if args.preset not in PRESETS:
        raise ValueError(f"preset={args.preset!r}: must be one of {', '.join(PRESETS)}")
    args.lr = TRAINING[args.preset]["lr"] if args.lr is None else args.lr
    args.warmup = max(1, min(100, args.steps // 10)) if args.warmup is None else args.warmup
    for name in ("n", "steps", "batch"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name}={getattr(args, name)}: must be at least 1")
    if args.validation is None:
        args.validation = max(1, min(64, VALIDATION // args.n))
    if args.validation < 1:
        raise ValueError(f"validation={args.validation}: must be at least 1")
    if args.warmup < 0:
        raise ValueError(f"warmup={args.warmup}: must be at least 0")
    if not (math.isfinite(args.lr) and args.lr > 0):
        raise ValueError(f"lr={args.lr}: must be a finite number above 0")
    if args.time_limit is not None and not args.time_limit >= 0:
        raise ValueError(f"time_limit={args.time_limit}: must be a number of seconds, at least 0")
    share_of_peak(args, "final_lr")
    _check_dense(args)
    CoGAConfig.preset(args.preset, **dict(args.set))
    for arm in arms:
        config = arm.config(args.preset, dict(args.set), seeds[0])
        if args.n > config.max_len:
            raise ValueError(f"n={args.n}: must be between 1 and max_len={config.max_len} (arm {arm.text})")
        for name in ("far_warmup", "alpha_warmup"):  # some arms would count it anew, others go on
            value = getattr(config, name)
            if args.dense_steps and value:
                raise ValueError(f"{name}={value}: must be 0 with --dense-steps (arm {arm.text})")
        if arm.prototypes and not args.dense_steps:
            raise ValueError(f"prototypes={arm.prototypes!r}: needs --dense-steps (arm {arm.text})")
        for name, value in (
            ("dense", arm.dense_plain and "plain"),
            ("dense_latent_dim", arm.dense_latent_dim),
        ):
            if value and not args.dense_steps:
                raise ValueError(f"{name}={value!r}: needs --dense-steps (arm {arm.text})")
        if args.dense_steps:
            _check_twin(arm, args, seeds[0])
        if config.vocab_size < 256:
            raise ValueError(f"vocab_size={config.vocab_size}: must be at least the data's 256")
    return arms, seeds


def _check_twin(arm: Arm, args: argparse.Namespace, seed: int) -> None:
    """ValueError where the arm's dense start cannot be built, or would not be dense."""
    twin = dense_twin(arm.dense_config(args.preset, dict(args.set), seed))
    if arm.dense_plain and any(twin.layer(i).kind == "mha" for i in range(twin.n_layer)):
        raise ValueError(f"dense='plain': must have no layers of kind mha (arm {arm.text})")


def _check_dense(args: argparse.Namespace) -> None:
    if not 0 <= args.dense_steps < args.steps:
        raise ValueError(f"dense_steps={args.dense_steps}: must be at least 0 and below steps={args.steps}")
    if not args.dense_steps:
        for name in ("dense_n", "starts"):
            if getattr(args, name) is not None:
                raise ValueError(f"{name}={str(getattr(args, name))!r}: needs --dense-steps")
    args.dense_n = args.n if args.dense_n is None else args.dense_n
    args.starts = args.out / "starts" if args.starts is None else args.starts
    if not 1 <= args.dense_n <= args.n or args.batch * args.n % args.dense_n:
        rule = f"must divide the bytes of a step, batch x n = {args.batch * args.n}, and be at most n"
        raise ValueError(f"dense_n={args.dense_n}: {rule}")


def rows_of(folder: Path, resume: bool) -> list[dict[str, Any]]:
    """Rows already there; ValueError where the folder holds something else, or rows and no --resume."""
    if holds_run(folder):
        raise ValueError(f"out={str(folder)!r}: holds another experiment's run; use another --out")
    rows = read_rows(folder)
    if rows and not resume:
        raise ValueError(f"out={str(folder)!r}: holds {len(rows)} rows; use --resume or another --out")
    return rows


def setting_of(args: argparse.Namespace, corpus: Corpus, device: torch.device) -> Setting:
    base = CoGAConfig.preset(args.preset, **dict(args.set))
    names = ("preset", "n", "steps", "batch", "lr", "warmup", "final_lr", "dense_steps", "dense_n",
             "validation", "compile", "graph")  # fmt: skip
    return Setting(
        **{name: getattr(args, name) for name in names},
        precision=environment(device)["precision"],
        model=dict(args.set),
        beyond=2 * max(base.layer(i).window for i in range(base.n_layer)),
        data=corpus.name,
        sha256=corpus.sha256,
    )


def model_of(arm: Arm, setting: Setting, seed: int) -> dict[str, Any]:
    """The configuration of a run as it stands in its row."""
    return clean(dataclasses.asdict(arm.config(setting.preset, setting.model, seed)))


def start_of(arm: Arm, setting: Setting) -> dict[str, Any] | None:
    """How an arm reads the dense model that it goes on from, as it stands in its row; None: from scratch.

    Summaries start without a bias, for a dense model has no opinion on them, unless one was asked for.
    """
    if not setting.dense_steps:
        return None
    asked = {**setting.model, **arm.changes}
    width = {} if arm.dense_latent_dim is None else {"latent_dim": arm.dense_latent_dim}
    return {
        "prototypes": arm.prototypes or "data",
        "far_bias": float(asked.get("far_bias_init", 0.0)),
        **width,
        **({"dense": "plain"} if arm.dense_plain else {}),
    }


KINDS = {"arm": str, "seed": int, "setting": dict, "model": dict, "metrics": dict}  # of a row


def same_settings(rows: list[dict[str, Any]], arms: list[Arm], setting: Setting, folder: Path) -> None:
    """ValueError unless every row comes from this setting, and what its arm, named or not, means today."""
    wanted, known = clean(dataclasses.asdict(setting)), {arm.text: arm for arm in arms}
    for row in rows:
        check_kinds(row, KINDS, folder)
        theirs = row["setting"]
        # Where the text came from does not matter as long as it is the same text.
        for name in wanted:
            if name != "data" and theirs.get(name) != wanted[name]:
                rule = f"the rows of {str(folder)!r} have {theirs.get(name)!r}; use that or another --out"
                raise ValueError(f"{name}={wanted[name]!r}: {rule}")
        arm = known.get(row["arm"]) or arm_of(row, folder)
        model = model_of(arm, setting, row["seed"]) | {"start": start_of(arm, setting)}
        check_model(row, row["model"] | {"start": row.get("start")}, model, folder)


def reference_of(asked: str | None, names: list[str]) -> str:
    """The arm to compare with: the one asked for, else gumbel, else the first."""
    if asked is not None and asked not in names:
        raise ValueError(f"reference={asked!r}: must be one of the arms {', '.join(names)}")
    return asked or ("gumbel" if "gumbel" in names else names[0])
