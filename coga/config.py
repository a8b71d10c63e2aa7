"""Configuration of a CoGA model: one frozen, validated dataclass with named presets."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

__all__ = ["PRESETS", "CoGAConfig", "LayerConfig"]

NAMED_LAYERS = ("near", "full", "mha")
GROUPINGS = ("gumbel", "contiguous", "kmeans", "random")
BACKENDS = ("auto", "reference", "triton")
MLPS = ("relu2", "swiglu")
SELECTIONS = ("summary", "members")
LARGEST_SCORE = 1e4
# Groupings whose groups all hold R tokens, so that more slots would stay empty.
EVEN = ("contiguous", "random")
# What a config.json meant that was written before there was such a field.
BEFORE: dict[str, Any] = {"selection": "summary", "summaries": True, "index_weight": 0.0}


def _bad(field: str, value: object, rule: str) -> ValueError:
    return ValueError(f"{field}={value!r}: {rule}")


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """What one layer needs to know, resolved from the pattern and the per-layer values.

    kind         "near", "full", "mha" or "group"
    group_size   R, tokens in a group (0 unless kind is "group")
    groups       G = W/R, groups in a window
    slots        S = ceil(capacity_factor * R), the most tokens a group may hold (R where all hold R)
    """

    index: int
    kind: str
    latent_dim: int
    window: int
    group_size: int
    open_groups: int
    capacity_factor: float
    grouping: str

    @property
    def groups(self) -> int:
        return self.window // self.group_size if self.group_size else 0

    @property
    def slots(self) -> int:
        if self.grouping in EVEN:
            return self.group_size
        return math.ceil(min(self.window, self.capacity_factor * self.group_size) - 1e-9)


@dataclass(frozen=True, kw_only=True)
class CoGAConfig:
    """All settings of a `CoGAGPT`. Frozen: use `replace` for a changed copy.

    A field documented as "one or one per layer" takes a single value or a tuple with `n_layer` values.

    Model
        vocab_size, n_layer, n_head, d_model (D)
        mlp            "relu2" or "swiglu"; mlp_ratio: hidden width over D (for swiglu, 2/3 of it)
        tie_embeddings input and output embedding share one matrix
        max_len        longest sequence accepted, in tokens
        init_std       standard deviation of the initial weights; seed: of initialisation and noise
    Attention
        layers         pattern tiled over the layers: "near", "full", "mha" or a group size R
        latent_dim     C, content width of a token latent; one or one per layer
        rope_dim       P, rotary width of a latent (even; 0 for none); rope_theta: its base
        window         W, tokens in a window; one or one per layer
        band           reach of the reciprocal term in tokens, at most W; reciprocal: on among near tokens
        alpha_warmup   steps over which the reciprocal term is faded in (0: at once)
        gain_init      start of the learned per-head gain on all scores (norms of q and key are fixed)
        sink           a learned per-head logit that lets a head read nothing
        output_gate    y * sigmoid(W_g x) before the output projection
    Groups
        grouping       "gumbel", "contiguous", "kmeans" or "random"; one or one per layer
        open_groups    K, groups a token reads member by member; one, one per layer, or None for 512/R
        selection      what a token opens a group for: the best of its "members", or its "summary"
        index_weight   weight of the loss that teaches the selection which heads to listen to (0: all alike)
        summaries      groups that a token does not open are read through their means (off: not at all; then
                       nothing but the coherence loss moves prototypes); None: where K, selection or
                       refine_groups need them
        capacity_factor  a group holds at most ceil(capacity_factor * R) tokens: 1 makes groups equal and
                       layers faster; with 2, after a dense start, half as many tokens change their group
                       as training goes on; one or one per layer
        refine_steps   soft k-means steps that start from the prototypes; beta: scale of their cosine logits
        refine_gradient "last" (straight through the earlier steps) or "all"
        kmeans_steps   Lloyd steps of the "kmeans" grouping
        refine_groups  groups attend to groups; reciprocal_groups: with the reciprocal term
        far_warmup     steps over which everything far is faded in, geometrically (0: at once)
        far_bias_init  start of the learned per-head bias on group summaries (below 0: they start small)
    Noise and stabilisers (`gumbel` only)
        noise          scale of the Gumbel noise in training (0: none)
        tau_start, tau_end, tau_steps   temperature of the soft assignment, annealed geometrically
        slow_prototypes, slow_decay     groups start from an exponential average of the prototypes
        hysteresis     margin (in logits) by which live prototypes must beat the slow ones' choice (0: off)
        coherence_weight  weight of the loss that pulls members and centroids together (0: off)
        freeze_step    step after which prototypes no longer move (None: never)
        revive         a prototype used below revive/G is moved to a poorly served token (0: off)
        entropy_weight weight of the attention-entropy term (0: off)
    Hardware
        backend        "auto", "reference" or "triton"

    Raises ValueError (field, value, rule) on any value that does not fit.
    """

    vocab_size: int = 256
    n_layer: int = 6
    n_head: int = 8
    d_model: int = 384
    mlp: str = "relu2"
    mlp_ratio: float = 4.0
    tie_embeddings: bool = True
    max_len: int = 131072
    init_std: float = 0.02
    seed: int = 0
    norm_eps: float = 1e-6

    layers: str = "32"
    latent_dim: int | tuple[int, ...] = 64
    rope_dim: int = 32
    rope_theta: float = 10000.0
    window: int | tuple[int, ...] = 512
    band: int = 64
    reciprocal: bool = True
    alpha_warmup: int = 0
    gain_init: float = 2.0
    sink: bool = True
    output_gate: bool = False

    grouping: str | tuple[str, ...] = "gumbel"
    open_groups: int | tuple[int, ...] | None = None
    selection: str = "members"
    index_weight: float = 0.01
    summaries: bool | None = None
    capacity_factor: float | tuple[float, ...] = 2.0
    refine_steps: int = 4
    refine_gradient: str = "last"
    beta: float = 32.0
    kmeans_steps: int = 8
    refine_groups: bool = False
    reciprocal_groups: bool = False
    far_warmup: int = 0
    far_bias_init: float = -2.0

    noise: float = 0.0
    tau_start: float = 1.0
    tau_end: float = 0.3
    tau_steps: int = 1000
    slow_prototypes: bool = False
    slow_decay: float = 0.99
    hysteresis: float = 0.0
    coherence_weight: float = 0.01
    freeze_step: int | None = None
    revive: float = 0.0
    entropy_weight: float = 0.0

    backend: str = "auto"

    def __post_init__(self) -> None:
        self._check_types()
        for name in ("vocab_size", "n_layer", "n_head", "d_model", "max_len"):
            if getattr(self, name) < 1:
                raise _bad(name, getattr(self, name), "must be at least 1")
        if not 0 <= self.seed < 2**63:
            raise _bad("seed", self.seed, "must be in [0, 2**63)")
        if self.d_model % self.n_head:
            raise _bad("n_head", self.n_head, f"must divide d_model={self.d_model}")
        for name, choices in (
            ("mlp", MLPS),
            ("backend", BACKENDS),
            ("selection", SELECTIONS),
            ("refine_gradient", ("last", "all")),
        ):
            if getattr(self, name) not in choices:
                raise _bad(name, getattr(self, name), f"must be one of {', '.join(choices)}")
        if self.rope_dim < 0 or self.rope_dim % 2:
            raise _bad("rope_dim", self.rope_dim, "must be even and at least 0")
        for name in ("rope_theta", "mlp_ratio", "init_std", "norm_eps", "beta", "gain_init"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise _bad(name, getattr(self, name), "must be a finite number above 0")
        for name in ("tau_start", "tau_end"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise _bad(name, getattr(self, name), "must be a finite number above 0")
        for name in ("noise", "hysteresis", "coherence_weight", "revive", "entropy_weight", "index_weight"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise _bad(name, getattr(self, name), "must be a finite number, at least 0")
        for name in ("beta", "noise", "hysteresis"):  # scores are ranked as integers of a fixed step
            if getattr(self, name) > LARGEST_SCORE:
                raise _bad(name, getattr(self, name), f"must be at most {LARGEST_SCORE:g}")
        if self.hysteresis > 0 and not self.slow_prototypes:
            raise _bad("hysteresis", self.hysteresis, "needs slow_prototypes, whose choice it keeps")
        for name in ("refine_steps", "kmeans_steps", "tau_steps", "alpha_warmup", "far_warmup", "band"):
            if getattr(self, name) < 0:
                raise _bad(name, getattr(self, name), "must be at least 0")
        if not math.isfinite(self.far_bias_init):
            raise _bad("far_bias_init", self.far_bias_init, "must be finite")
        if not 0 <= self.slow_decay < 1:
            raise _bad("slow_decay", self.slow_decay, "must be in [0, 1)")
        if self.revive >= 1:
            raise _bad("revive", self.revive, "must be below 1 (a share of the mean use)")
        if self.freeze_step is not None and self.freeze_step < 0:
            raise _bad("freeze_step", self.freeze_step, "must be None or at least 0")
        if not self.layers.split():
            raise _bad("layers", self.layers, "must name at least one layer")
        if not self.reads_summaries and self.selection != "members":
            raise _bad("summaries", False, "needs selection='members', which compares no summaries")
        if not self.reads_summaries and self.refine_groups:
            raise _bad("summaries", False, "needs refine_groups=False: nobody reads what groups refine")
        for i in range(self.n_layer):
            self._check_layer(self.layer(i))

    def _check_types(self) -> None:
        """Reject values of the wrong kind with a message that names the field."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                value = tuple(value)
                object.__setattr__(self, field.name, value)
            kinds = str(field.type)
            items = value if isinstance(value, tuple) and "tuple" in kinds else (value,)
            if value is None and "None" in kinds:
                continue
            base = kinds.split(" ")[0]
            for item in items:
                ok = {
                    "int": isinstance(item, int) and not isinstance(item, bool),
                    "float": isinstance(item, (int, float)) and not isinstance(item, bool),
                    "bool": isinstance(item, bool),
                    "str": isinstance(item, str),
                }[base]
                if not ok:
                    raise _bad(field.name, value, f"must be {kinds}")
            if base == "float":  # an integer is welcome, and becomes what the tensors need
                try:
                    value = tuple(map(float, value)) if isinstance(value, tuple) else float(value)
                except OverflowError as error:
                    raise _bad(field.name, "an integer", "is too large for a float") from error
                object.__setattr__(self, field.name, value)
            if isinstance(value, tuple) and len(value) != self.n_layer:
                raise _bad(field.name, value, f"must hold n_layer={self.n_layer} values, one a layer")

    def _check_layer(self, layer: LayerConfig) -> None:
        if layer.latent_dim < 1:
            raise _bad("latent_dim", self.latent_dim, "must be at least 1")
        if layer.window < 1:
            raise _bad("window", self.window, "must be at least 1")
        if self.band > layer.window:
            raise _bad("band", self.band, f"must be at most window={layer.window}")
        if layer.grouping not in GROUPINGS:
            raise _bad("grouping", self.grouping, f"must be one of {', '.join(GROUPINGS)}")
        if layer.open_groups < 0:
            raise _bad("open_groups", self.open_groups, "must be at least 0")
        learns = layer.kind == "group" and layer.grouping == "gumbel" and self.freeze_step != 0
        if learns and not self.reads_summaries and self.coherence_weight == 0:
            rule = "must be above 0 where summaries are not read: nothing else moves prototypes"
            raise _bad("coherence_weight", self.coherence_weight, rule)
        if layer.kind == "group" and layer.open_groups == 0 and not self.reads_summaries:
            raise _bad("open_groups", self.open_groups, "must be at least 1 where summaries are not read")
        if not (layer.capacity_factor >= 1 and math.isfinite(layer.capacity_factor)):
            raise _bad("capacity_factor", self.capacity_factor, "must be a finite number, at least 1")
        if layer.kind == "group" and layer.window % layer.group_size:
            rule = f"must be a multiple of every group size in layers={self.layers!r}"
            raise _bad("window", layer.window, rule)

    @property
    def reads_summaries(self) -> bool:
        """`summaries`, or what its None stands for."""
        if self.summaries is not None:
            return self.summaries
        layers = map(self.layer, range(self.n_layer))
        unopened = any(one.kind == "group" and one.open_groups == 0 for one in layers)
        return unopened or self.selection == "summary" or self.refine_groups

    def _per_layer(self, name: str, index: int) -> Any:
        value = getattr(self, name)
        return value[index] if isinstance(value, tuple) else value

    def layer(self, index: int) -> LayerConfig:
        """Settings of layer `index`, with the pattern tiled and per-layer values picked."""
        pattern = self.layers.split()
        token = pattern[index % len(pattern)]
        if token in NAMED_LAYERS:
            kind, size = token, 0
        elif token.isascii() and token.isdigit() and int(token) >= 1:
            kind, size = "group", int(token)
        else:
            rule = f"unknown layer {token!r}; use {', '.join(NAMED_LAYERS)} or a group size"
            raise _bad("layers", self.layers, rule)
        opened = self._per_layer("open_groups", index)
        if opened is None:
            opened = max(1, 512 // size) if size else 0
        return LayerConfig(
            index=index,
            kind=kind,
            group_size=size,
            open_groups=opened,
            latent_dim=self._per_layer("latent_dim", index),
            window=self._per_layer("window", index),
            capacity_factor=self._per_layer("capacity_factor", index),
            grouping=self._per_layer("grouping", index),
        )

    def replace(self, **changes: Any) -> CoGAConfig:
        """A validated copy with some fields changed; an unknown field is a ValueError."""
        self._known(changes)
        return dataclasses.replace(self, **changes)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> CoGAConfig:
        """A named preset ("tiny", "small", "gpt2"), with some fields changed."""
        if name not in PRESETS:
            raise _bad("preset", name, f"must be one of {', '.join(PRESETS)}")
        cls._known(changes)
        return cls(**{**PRESETS[name], **changes})

    @classmethod
    def _known(cls, changes: dict[str, Any]) -> None:
        names = {field.name for field in dataclasses.fields(cls)}
        for key, value in changes.items():
            if key not in names:
                raise _bad(key, value, "no such field in CoGAConfig")

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> CoGAConfig:
        """Read `to_json` back; ValueError when it is not a whole CoGA configuration.

        Fields younger than a file have the value that the older code had built in.
        """
        try:
            values = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"config.json: not valid JSON ({error})") from error
        if not isinstance(values, dict):
            raise _bad("config.json", type(values).__name__, "must hold an object")
        cls._known(values)
        values = BEFORE | values
        config = cls(**values)
        missing = [field.name for field in dataclasses.fields(cls) if field.name not in values]
        if missing:  # a default in place of what the weights were trained with would be silently wrong
            raise _bad("config.json", ", ".join(missing), "must not be missing")
        return config


PRESETS: dict[str, dict[str, Any]] = {
    # Trains on two CPU cores in minutes: 0.2M parameters. There, scoring every member would take longest, and
    # the gate, without which larger models learn to copy better, is worth 0.06-0.24 bits; with room in the
    # groups prototypes are used less evenly, and nothing is gained (docs/findings.md).
    "tiny": dict(
        n_layer=3, n_head=2, d_model=64, latent_dim=32, rope_dim=16, window=128, band=32,
        layers="near 16 32", open_groups=4, selection="summary", output_gate=True,
        capacity_factor=1.0,
    ),
    # About 10M parameters, bytes.
    "small": dict(n_layer=6, n_head=8, d_model=384, latent_dim=64, rope_dim=32),
    # The shape of GPT-2 124M.
    "gpt2": dict(
        vocab_size=50304, n_layer=12, n_head=12, d_model=768, latent_dim=64, rope_dim=32,
    ),
}  # fmt: skip
