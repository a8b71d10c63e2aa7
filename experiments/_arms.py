"""Arms of an experiment: a name, and fields of the configuration changed on top of it.

    "gumbel"                                  one of the groupings, in the layers of the run
    "near", "full", "mha"                     every layer of that kind
    "gumbel:noise=1,sink=false"               any field of `CoGAConfig`, values as JSON or text
    "gumbel:lr_scale=2,prototype_lr=0.1"      and the run's own: all rates, and the prototypes' beside it
    "gumbel:prototypes=random"                and where they are after a dense start ("data" if not said)
    "full:latent_dim=32,dense_latent_dim=64"  and how wide latents are in the dense start, to be shrunk then
    "gumbel:sink=false,dense=plain"           and whose dense start it goes on from: the unchanged model's;
                                              what goes is missed then, what comes is new

A list of arms is separated by commas; a part without a name ("sink=false") belongs to the arm before it.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _settings import ARMS, GROUPS_ONLY, override

from coga import CoGAConfig
from coga.config import NAMED_LAYERS
from coga.models import CoGAGPT

# What an arm may change that goes on from the unchanged model: the rest would leave weights without a start.
CARRIED = ("sink", "output_gate", "reciprocal", "band", "entropy_weight", *GROUPS_ONLY)

__all__ = [
    "Arm",
    "arm_of",
    "check_kinds",
    "check_model",
    "different",
    "field_value",
    "parse_arms",
    "parse_integers",
    "plain_config",
    "sharing_start",
    "slug",
]


@dataclass(frozen=True)
class Arm:
    """text: as given, the name of the arm's rows; changes: of the configuration; the rest: of the run."""

    text: str
    name: str
    changes: dict[str, Any]
    lr_scale: float = 1.0
    prototype_lr: float = 1.0
    prototypes: str | None = None
    dense_latent_dim: int | None = None
    dense_plain: bool = False

    def config(self, preset: str, base: Mapping[str, Any], seed: int) -> CoGAConfig:
        """The model: preset, then what all arms share, then the arm. ValueError on what does not fit."""
        return CoGAConfig.preset(preset, **{"seed": seed, **base, **ARMS[self.name], **self.changes})

    def dense_config(self, preset: str, base: Mapping[str, Any], seed: int) -> CoGAConfig:
        """What the arm's dense start is the twin of. ValueError: latents narrower than its own."""
        if self.dense_plain:
            return CoGAConfig.preset(preset, **{"seed": seed, **base, **ARMS[self.name]})
        config = self.config(preset, base, seed)
        if self.dense_latent_dim is None:
            return config
        widest = max(config.layer(i).latent_dim for i in range(config.n_layer))
        if self.dense_latent_dim < widest:
            rule = f"must be at least latent_dim={widest} (arm {self.text})"
            raise ValueError(f"dense_latent_dim={self.dense_latent_dim}: {rule}")
        return config.replace(latent_dim=self.dense_latent_dim)

    def build(self, preset: str, base: Mapping[str, Any], seed: int) -> CoGAGPT:
        """The model, with the weights that it shares with the unchanged one (`base`) at the same start."""
        return sharing_start(self.config(preset, base, seed), plain_config(preset, base, seed))


def plain_config(preset: str, base: Mapping[str, Any], seed: int) -> CoGAConfig:
    """The model that no arm has changed."""
    return CoGAConfig.preset(preset, **{"seed": seed, **base})


def sharing_start(config: CoGAConfig, plain: CoGAConfig) -> CoGAGPT:
    """A model with the first weights of `plain` wherever it has the same ones.

    A module more would otherwise shift all later draws, and arms would differ by their luck as well. Vectors
    keep their own start: they are constants, and an arm may be about one of them.
    """
    model = CoGAGPT(config)
    if (config.init_std, config.n_layer) == (plain.init_std, plain.n_layer):  # what the scale depends on
        own, shared = model.state_dict(), CoGAGPT(plain).state_dict()
        fits = {k: v for k, v in shared.items() if v.ndim >= 2 and k in own and own[k].shape == v.shape}
        model.load_state_dict({**own, **fits})
    return model


def slug(text: str) -> str:
    """An arm's text as part of a file name."""
    return re.sub(r"[^A-Za-z0-9._=-]+", "_", text).strip("_")


def _split(text: str) -> list[str]:
    """At commas outside brackets."""
    parts, depth = [""], 0
    for char in text:
        depth += (char in "[(") - (char in "])")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts]


def field_value(text: str) -> tuple[str, Any]:
    """FIELD and its value, as JSON where it is any, else as text. Raises argparse's own type of error."""
    name, value = override(text)
    if name == "seed":
        raise argparse.ArgumentTypeError(f"{text!r}: seeds have an option of their own")
    return name, value


def _arm(text: str, name: str, fields: list[str]) -> Arm:
    if name not in ARMS:
        raise ValueError(f"arms={name!r}: must be one of {', '.join(ARMS)}, or NAME:FIELD=VALUE")
    changes: dict[str, Any] = {}
    for field in fields:
        try:
            key, value = field_value(field)
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"arms={text!r}: {error}") from error
        if key in changes:
            raise ValueError(f"arms={text!r}: names {key} twice")
        changes[key] = value
    rates = {"lr_scale": 1.0, "prototype_lr": 1.0}
    for key in rates:
        rate = changes.pop(key, 1.0)
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < float("inf"):
            raise ValueError(f"arms={text!r}: {key}={rate!r} must be a finite number above 0")
        rates[key] = float(rate)
    prototypes = changes.pop("prototypes", None)
    if prototypes not in (None, "data", "random"):
        raise ValueError(f"arms={text!r}: prototypes={prototypes!r} must be data or random")
    width = changes.pop("dense_latent_dim", None)
    if width is not None and (isinstance(width, bool) or not isinstance(width, int) or width < 1):
        raise ValueError(f"arms={text!r}: dense_latent_dim={width!r} must be a whole number above 0")
    dense = changes.pop("dense", "own")
    if dense not in ("own", "plain"):
        raise ValueError(f"arms={text!r}: dense={dense!r} must be own or plain")
    foreign = sorted({*changes} - {*CARRIED}) + ["dense_latent_dim"] * (width is not None)
    if dense == "plain" and foreign:
        raise ValueError(f"arms={text!r}: dense='plain' must stand without {foreign[0]}")
    rest = dict(prototypes=prototypes, dense_latent_dim=width, dense_plain=dense == "plain")
    return Arm(text, name, changes, **rates, **rest)


def arm_of(row: Mapping[str, Any], folder: Path) -> Arm:
    """The one arm of a row. ValueError where its name means nothing today."""
    try:
        arms = parse_arms(row["arm"])
    except ValueError:
        arms = []
    fields = {field.name for field in dataclasses.fields(CoGAConfig)}
    if len(arms) != 1 or not fields.issuperset(arms[0].changes):
        rule = f"holds a row of arm {row['arm']!r}, which means nothing today; use another --out"
        raise ValueError(f"out={str(folder)!r}: {rule}")
    return arms[0]


def check_kinds(row: Mapping[str, Any], kinds: Mapping[str, type], folder: Path) -> None:
    """ValueError unless the row has these fields, each of its kind."""
    if not all(isinstance(row.get(name), kind) for name, kind in kinds.items()):
        raise ValueError(f"out={str(folder)!r}: holds rows of another experiment; use another --out")


def check_model(
    row: Mapping[str, Any], theirs: Mapping[str, Any], today: Mapping[str, Any], folder: Path
) -> None:
    """ValueError where the row's model, as it stands there, is `different`."""
    differ = different(theirs, today)
    if differ:
        raise ValueError(f"arms={row['arm']!r}: its row in {str(folder)!r} has {differ}; use another --out")


def different(theirs: Mapping[str, Any], today: Mapping[str, Any]) -> str:
    """The first field in which a row's model is not what its arm means today, and both values; else "".

    What groups alone make use of does not part models without groups.
    """
    grouped = any(layer not in NAMED_LAYERS for layer in str(theirs.get("layers")).split())
    for name in sorted({*theirs, *today} - (set() if grouped else {*GROUPS_ONLY})):
        mine, own = theirs.get(name, "nothing"), today.get(name, "nothing")
        if mine != own:
            return f"{name}={mine!r}, a run of today {own!r}"
    return ""


def parse_arms(text: str) -> list[Arm]:
    """All arms of a comma-separated list. ValueError (field, value, rule) on what cannot be read."""
    groups: list[list[str]] = []
    for part in _split(text):
        starts = "=" not in part or ":" in part.split("=")[0]
        if starts:
            groups.append([part])
        elif groups and ":" in groups[-1][0]:
            groups[-1].append(part)
        else:
            raise ValueError(f"arms={text!r}: {part!r} has no arm before it; write NAME:FIELD=VALUE")
    arms = []
    for first, *rest in groups:
        name, colon, field = first.partition(":")
        arms.append(_arm(",".join([first, *rest]), name, [field, *rest] if colon else []))
    names = [arm.text for arm in arms]
    if len(set(names)) != len(names):
        raise ValueError(f"arms={text!r}: names an arm twice")
    return arms


def parse_integers(text: str, name: str, least: int = 0) -> list[int]:
    """ "0,1,2" as integers, each at least `least` and none twice."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{name}={text!r}: must be integers separated by commas") from error
    if min(values) < least:
        raise ValueError(f"{name}={min(values)}: must be at least {least}")
    if len(set(values)) != len(values):
        raise ValueError(f"{name}={text!r}: names a value twice")
    return values
