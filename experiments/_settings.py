"""Settings of a training run: read from the command line, checked, stored, compared on resume."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

from _common import StrictParser

from coga import CoGAConfig
from coga.config import GROUPINGS, PRESETS

__all__ = ["ARMS", "GROUPS_ONLY", "Settings", "complete", "model_config", "override", "parse", "stored"]

# A named arm changes the layers of the run, or how its layers group.
ARMS: dict[str, dict[str, str]] = {
    **{kind: {"layers": kind} for kind in ("mha", "full", "near")},
    **{name: {"grouping": name} for name in GROUPINGS},
}

# Per preset: steps at full length, after a warm-up on short contexts.
TRAINING: dict[str, dict[str, Any]] = {
    "tiny": dict(steps=25, batch=1, lr=6e-3, warmup_steps=200, warmup_len=1024, warmup_batch=4),
    "small": dict(steps=100, batch=1, lr=2e-3, warmup_steps=200, warmup_len=2048, warmup_batch=8),
    "gpt2": dict(steps=20, batch=1, lr=6e-4, warmup_steps=40, warmup_len=4096, warmup_batch=4),
}


# Fields that change nothing in a model without groups.
GROUPS_ONLY = (
    "grouping", "open_groups", "selection", "index_weight", "summaries", "capacity_factor", "refine_steps",
    "refine_gradient", "beta", "kmeans_steps", "refine_groups", "reciprocal_groups", "far_bias_init",
    "far_warmup", "noise", "tau_start", "tau_end", "tau_steps", "slow_prototypes", "slow_decay", "hysteresis",
    "coherence_weight", "freeze_step", "revive",
)  # fmt: skip

TEXTS = {field.name for field in dataclasses.fields(CoGAConfig) if str(field.type) == "str"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides a run's figures.

    n, batch, steps      full-length contexts: tokens in one, contexts a step, optimizer steps
    warmup_*             the same for the short contexts that come first
    dense_warmup         train them with `full` layers, and find groups in the text afterwards
    model                fields of `CoGAConfig` that differ from the preset
    validation           held-out contexts of length n at the end
    compare              arms, each trained like this run with its own layers or grouping
    """

    n: int
    preset: str
    data: str
    tokenizer: str
    seed: int
    steps: int
    batch: int
    lr: float
    warmup_steps: int
    warmup_len: int
    warmup_batch: int
    validation: int
    sample: int
    activation_checkpointing: bool
    compile: bool
    model: dict[str, Any]
    compare: list[str]
    dense_warmup: bool = False  # configurations that are older do not name it

    @property
    def total(self) -> int:
        """Optimizer steps, warm-up included."""
        return self.warmup_steps + self.steps

    def shape(self, step: int) -> tuple[int, int]:
        """Length and batch of a step."""
        if step < self.warmup_steps:
            return self.warmup_len, self.warmup_batch
        return self.n, self.batch

    def learning_rate(self, step: int) -> float:
        """A linear rise over the first tenth (at most 50 steps), then a cosine down to a tenth.

        Progress counts steps of both phases alike in length of the schedule: half of the decay is in each.
        """
        rise = min(50, max(1, self.total // 10))
        share = 0.0
        if step < self.warmup_steps:
            share = 0.5 * step / self.warmup_steps
        elif self.steps:
            first = 0.5 if self.warmup_steps else 0.0
            share = first + (1 - first) * (step - self.warmup_steps) / self.steps
        return self.lr * min(1.0, (step + 1) / rise) * (0.1 + 0.45 * (1 + math.cos(math.pi * share)))

    def arm(self, name: str) -> Settings:
        """The settings of one arm of a comparison."""
        return dataclasses.replace(self, model={**self.model, **ARMS[name]}, compare=[])


def override(text: str) -> tuple[str, Any]:
    """FIELD=VALUE, the value as JSON where it is any, else as text. Raises argparse's own type of error."""
    name, found, value = text.partition("=")
    if not (found and name):
        raise argparse.ArgumentTypeError(f"{text!r}: must be FIELD=VALUE")
    if name in TEXTS:  # a single group size is a pattern of layers too, not a number
        return name, value
    try:
        return name, json.loads({"True": "true", "False": "false", "None": "null"}.get(value, value))
    except json.JSONDecodeError:
        return name, value


def _parser(description: str) -> argparse.ArgumentParser:
    parser = StrictParser(description=description, argument_default=argparse.SUPPRESS)
    add = parser.add_argument
    add("--n", type=int, help="context length in tokens (bytes, unless --tokenizer)")
    add("--preset", help=f"{', '.join(PRESETS)} (tiny)")
    add("--data", help="'python' (the standard library's source), or a file or folder of text")
    add("--tokenizer", metavar="FILE", help="a tokenizer.json; without it, bytes")
    add("--seed", type=int, help="of weights, noise and batches (0)")
    add("--steps", type=int, help="optimizer steps at full length")
    add("--batch", type=int, help="contexts a step at full length")
    add("--lr", type=float, help="peak learning rate of AdamW")
    add("--warmup-steps", type=int, help="optimizer steps on short contexts, before")
    add("--warmup-len", type=int, help="their length")
    add("--warmup-batch", type=int, help="contexts a step there")
    add("--dense-warmup", action="store_true", help="with dense layers there, and groups from then on")
    add("--validation", type=int, help="held-out contexts of length n (1)")
    add("--sample", type=int, help="tokens to generate at the end (256)")
    add("--layers", help='pattern, for example "near 16 32"')
    add("--grouping", help=", ".join(GROUPINGS))
    add("--window", type=int, help="tokens in a window")
    add("--open-groups", type=int, help="groups a token reads member by member")
    add("--set", type=override, action="append", metavar="FIELD=VALUE", help="any other field of CoGAConfig")
    add("--activation-checkpointing", action="store_true", help="recompute blocks in the backward pass")
    add("--compile", action="store_true", help="compile the blocks for training (torch.compile)")
    add("--compare", metavar="ARM,ARM", help=f"train these on the same batches: {', '.join(ARMS)}")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:INDEX")
    add("--out", metavar="DIR", default="", help="run folder (runs/longctx-N-PRESET-SEED)")
    add("--resume", action="store_true", default=False, help="go on with the run in the folder")
    add("--save-every", type=float, default=20.0, metavar="SECONDS", help="between checkpoints (20)")
    return parser


def parse(argv: list[str] | None, description: str) -> tuple[dict[str, Any], argparse.Namespace]:
    """(what was asked for of `Settings`, the rest). ValueError on arguments that cannot be read."""
    values = vars(_parser(description).parse_args(argv))
    rest = argparse.Namespace(**{k: values.pop(k) for k in ("device", "out", "resume", "save_every")})
    model = dict(values.pop("set", []))
    for name in ("layers", "grouping", "window", "open_groups"):
        if name in values:
            model[name] = values.pop(name)
    if model:
        values["model"] = model
    if "compare" in values:
        values["compare"] = [name.strip() for name in values["compare"].split(",")]
    if not rest.save_every >= 0:
        raise ValueError(f"save_every={rest.save_every}: must be at least 0")
    return values, rest


def complete(given: dict[str, Any]) -> Settings:
    """Fill in defaults and check. ValueError (field, value, rule)."""
    if "n" not in given:
        raise ValueError("n: must be given (--n N)")
    preset = given.get("preset", "tiny")
    if preset not in PRESETS:
        raise ValueError(f"preset={preset!r}: must be one of {', '.join(PRESETS)}")
    values: dict[str, Any] = dict(
        preset=preset, data="python", tokenizer="", seed=0, validation=1, sample=256,
        activation_checkpointing=False, compile=False, model={}, compare=[],
    )  # fmt: skip
    values |= TRAINING[preset]
    values["warmup_len"] = max(1, min(values["warmup_len"], given["n"]))
    return check(Settings(**{**values, **given}))


def check(settings: Settings) -> Settings:
    for name in ("n", "batch", "warmup_len", "warmup_batch", "validation"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name}={getattr(settings, name)}: must be at least 1")
    for name in ("steps", "warmup_steps", "sample", "seed"):
        if getattr(settings, name) < 0:
            raise ValueError(f"{name}={getattr(settings, name)}: must be at least 0")
    if not (math.isfinite(settings.lr) and settings.lr > 0):
        raise ValueError(f"lr={settings.lr}: must be a finite number above 0")
    if settings.warmup_len > settings.n:
        raise ValueError(f"warmup_len={settings.warmup_len}: must be at most n={settings.n}")
    if settings.dense_warmup and not (settings.warmup_steps and settings.steps):
        raise ValueError(
            f"dense_warmup=True: needs warmup_steps and steps of at least 1, not {settings.warmup_steps} "
            f"and {settings.steps}"
        )
    for name in settings.compare:
        if name not in ARMS:
            raise ValueError(f"compare={name!r}: must be one of {', '.join(ARMS)}")
    if len(set(settings.compare)) != len(settings.compare):
        raise ValueError(f"compare={','.join(settings.compare)!r}: names an arm twice")
    for arm in [settings.arm(name) for name in settings.compare] or [settings]:
        config = model_config(arm)
        kinds = {config.layer(i).kind for i in range(config.n_layer)}
        if settings.dense_warmup and kinds >= {"mha", "group"}:
            raise ValueError(f"dense_warmup=True: layers={config.layers!r} must not mix mha with groups")
        if settings.n > config.max_len:
            raise ValueError(f"n={settings.n}: must be between 1 and max_len={config.max_len}")
    return settings


def model_config(settings: Settings, vocab_size: int = 0) -> CoGAConfig:
    """The model of a run. A tokenizer sets the vocabulary; bytes fit the preset's."""
    changes = {"seed": settings.seed, **settings.model}
    if settings.tokenizer and vocab_size:
        changes = {"vocab_size": vocab_size, **changes}
    config = CoGAConfig.preset(settings.preset, **changes)
    if vocab_size > config.vocab_size:
        raise ValueError(f"vocab_size={config.vocab_size}: must be at least the data's {vocab_size}")
    return config


def stored(content: Any, given: dict[str, Any]) -> Settings:
    """Settings of a run to go on with, from its config.json; ValueError where what was asked for differs.

    A default of the model that has changed since the run began becomes a setting of its own.
    """
    content = content if isinstance(content, dict) else {}
    values, model = content.get("settings"), content.get("model")
    fields = dataclasses.fields(Settings)
    later = {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}
    values = {**later, **values} if isinstance(values, dict) else values
    if not isinstance(values, dict) or set(values) != {field.name for field in fields}:
        raise ValueError("config.json: holds no settings of a longctx run")
    for name, value in given.items():
        same = all(values[name].get(k) == v for k, v in value.items()) if name == "model" else None
        if same is False or (same is None and values[name] != value):
            raise ValueError(f"{name}={value!r}: the run to resume has {values[name]!r}; leave it out")
    try:
        settings = check(Settings(**values))
    except TypeError as error:
        raise ValueError(f"config.json: a setting has the wrong type ({error})") from error
    if model is None:
        return settings
    begun = CoGAConfig.from_json(json.dumps(model))
    now = model_config(settings, begun.vocab_size if settings.tokenizer else 0)
    names = [field.name for field in dataclasses.fields(CoGAConfig)]
    own = {name: getattr(begun, name) for name in names if getattr(begun, name) != getattr(now, name)}
    return dataclasses.replace(settings, model={**settings.model, **own})
