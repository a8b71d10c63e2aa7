"""CoGAGPT: a decoder-only language model of CoGA layers.

    config = CoGAConfig.preset("tiny", layers="near 16 32", open_groups=8)
    model = CoGAGPT(config)
    out = model(tokens_BT, targets_BT, noise_step=step)
    out.total_loss.backward(); optimizer.step(); model.update_groups(out)

Legend: B batch, T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from coga.config import CoGAConfig
from coga.grouping import GumbelGrouping
from coga.models.attention import CoGAAttention
from coga.models.block import Block
from coga.models.context import Alignment, CallContext
from coga.models.decode import DecodeState, generate, step
from coga.models.latent import LatentProjections
from coga.models.loss import IGNORE, chunk_sum, linear_cross_entropy
from coga.models.pretrained import load_pretrained, save_pretrained
from coga.types import Grouping, GroupingStats

__all__ = ["CoGAGPT", "ModelOutput"]


@dataclass(frozen=True)
class ModelOutput:
    """logits (B, T, V) or None; loss: mean cross-entropy in nats a token, or None without targets.

    aux       weighted extra losses by name, training only; `total_loss` is what to train on
    grouping  with return_grouping: a `Grouping` a layer, None for layers without groups
    stats     a `GroupingStats` a layer, or None; read by `update_groups`
    """

    logits: Tensor | None
    loss: Tensor | None = None
    aux: dict[str, Tensor] = field(default_factory=dict)
    grouping: list[Grouping | None] | None = None
    stats: list[GroupingStats | None] = field(default_factory=list)

    @property
    def total_loss(self) -> Tensor:
        """loss + the sum of aux. ValueError without targets."""
        if self.loss is None:
            raise ValueError("targets=None: total_loss needs targets in the forward call")
        return self.loss + sum(self.aux.values(), torch.zeros_like(self.loss))


class CoGAGPT(nn.Module):
    """Embedding, pre-norm blocks in the pattern of `config.layers`, final norm, (tied) head."""

    def __init__(self, config: CoGAConfig) -> None:
        super().__init__()
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.embedding = nn.Embedding(config.vocab_size, config.d_model)
            self.blocks = nn.ModuleList(Block(config, config.layer(i)) for i in range(config.n_layer))
            self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
            self.head = None
            if not config.tie_embeddings:
                self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
            self._init_weights()
        self.register_buffer("step_count", torch.zeros((), dtype=torch.int64))
        self.step_count: Tensor
        self.activation_checkpointing = False
        self._compiled: list[Callable] = []
        self._chunk_sum: Callable = chunk_sum

    def _init_weights(self) -> None:
        """Normal(0, init_std); what writes into the residual stream is scaled by 1/sqrt(2 n_layer)."""
        std = self.config.init_std
        inner = std / (2 * self.config.n_layer) ** 0.5
        nn.init.normal_(self.embedding.weight, std=std)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                last = name.endswith((".out", ".down"))
                nn.init.normal_(module.weight, std=inner if last else module.in_features**-0.5)
            if isinstance(module, LatentProjections):
                nn.init.normal_(module.up_HCE, std=module.content**-0.5)
        for block in self.stack:
            if isinstance(block.attention, CoGAAttention) and block.attention.group_level is not None:
                nn.init.zeros_(block.attention.group_level.residual.weight)

    @property
    def stack(self) -> list[Block]:
        """The blocks, typed."""
        return cast("list[Block]", list(self.blocks))

    @property
    def head_weight(self) -> Tensor:
        return self.embedding.weight if self.head is None else self.head.weight

    def set_activation_checkpointing(self, on: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.activation_checkpointing = on

    def compile_blocks(self, **options) -> None:
        """Compile each block, and the loss, by itself (`torch.compile`, static shapes), for training steps.

        Blocks of one kind share their code, so the time it takes follows the kinds of layers, not the depth.
        Evaluation and decoding stay uncompiled. `options` go to `torch.compile`.
        """
        # One code object serves all blocks, at every length of a run; torch's own limit of 8 would end that.
        limits = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, 64)
        whole = self.config.entropy_weight == 0  # the entropy term stays uncompiled
        options = {"fullgraph": whole, "dynamic": False, **options}
        self._compiled = [torch.compile(block, **options) for block in self.stack]
        self._chunk_sum = torch.compile(chunk_sum, **options)

    def call_context(
        self, position: Tensor, length_B: Tensor | None, noise_step: Tensor | int, training: bool
    ) -> CallContext:
        widths = {block.attention.rotary for block in self.stack}
        return CallContext.of(
            position,
            widths,
            self.config.rope_theta,
            self.embedding.weight.dtype,
            length_B=length_B,
            noise_step=noise_step,
            step=self.step_count,
            training=training,
            backend=self.config.backend,
        )

    def check_tokens(self, tokens_BT: Tensor) -> None:
        """ValueError on a wrong shape or dtype, an empty sequence, one above max_len, or an unknown id."""
        if tokens_BT.ndim != 2 or tokens_BT.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"tokens={tuple(tokens_BT.shape)} {tokens_BT.dtype}: must be a (batch, tokens) integer tensor"
            )
        if tokens_BT.shape[0] < 1:
            raise ValueError(f"tokens={tuple(tokens_BT.shape)}: must hold at least one row")
        if not 1 <= tokens_BT.shape[1] <= self.config.max_len:
            raise ValueError(
                f"tokens={tokens_BT.shape[1]} a row: must be between 1 and max_len={self.config.max_len}"
            )
        self._check_range("tokens", tokens_BT)

    def _check_range(self, name: str, tokens_BT: Tensor, ignore: int | None = None) -> None:
        """ValueError on an id outside the vocabulary; left out where reading values back is not possible."""
        if torch.compiler.is_compiling() or (tokens_BT.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        ids = tokens_BT if ignore is None else tokens_BT.masked_fill(tokens_BT == ignore, 0)
        low, high = (int(x) for x in torch.aminmax(ids))
        if low < 0 or high >= self.config.vocab_size:
            bad = low if low < 0 else high
            raise ValueError(f"{name}={bad}: must be in [0, vocab_size={self.config.vocab_size})")

    def forward(
        self,
        tokens_BT: Tensor,
        targets: Tensor | None = None,
        attention_mask: Tensor | None = None,
        noise_step: Tensor | int = 0,
        return_grouping: bool = False,
        return_logits: bool | None = None,
    ) -> ModelOutput:
        """Logits of every position, or the loss when targets are given.

        targets         (B, T), already shifted: targets[t] is the token after tokens[t]; -100 is ignored
        attention_mask  (B, T), 1 for real tokens; each row padded on the left or on the right
        noise_step      step of the Gumbel noise in training; a tensor under torch.compile of the whole model
        return_logits   None: logits only when there are no targets
        Windows are counted from each row's first real token. Raises ValueError on bad tokens or masks.
        """
        self.check_tokens(tokens_BT)
        if targets is not None and targets.shape != tokens_BT.shape:
            raise ValueError(
                f"targets={tuple(targets.shape)}: must have the shape of tokens, {tuple(tokens_BT.shape)}"
            )
        if targets is not None:
            if targets.dtype not in (torch.int64, torch.int32):
                raise ValueError(f"targets={targets.dtype}: must be integers")
            targets = targets.long()
            self._check_range("targets", targets, ignore=IGNORE)
        align = None
        if attention_mask is not None:
            align = Alignment.of(attention_mask, tokens_BT)
            tokens_BT = align.enter(tokens_BT)
        length = tokens_BT.shape[1]
        position = torch.arange(length, device=tokens_BT.device)
        lengths = None if align is None else align.length_B
        if not isinstance(noise_step, Tensor):
            # A number would be a constant of a compiled block, and every step a compilation of its own.
            noise_step = torch.full((), noise_step, dtype=torch.int64, device=position.device)
        context = self.call_context(position, lengths, noise_step, self.training)
        x = self.embedding(tokens_BT)
        outputs = []
        for block in self._compiled if self._compiled and self.training else self.stack:
            if self.activation_checkpointing and self.training:
                x, attended = checkpoint(block, x, context, use_reentrant=False, preserve_rng_state=False)
            else:
                x, attended = block(x, context)
            outputs.append(attended)
        x = self.norm(x)
        loss = None
        if targets is not None:
            if align is not None:
                targets = align.enter(targets).masked_fill(~align.real(length), IGNORE)
            chunk = self._chunk_sum if self.training else chunk_sum
            loss = linear_cross_entropy(x, self.head_weight, targets, chunk)
        logits = None
        if return_logits or (return_logits is None and targets is None):
            logits = linear(x if align is None else align.leave(x), self.head_weight)
        groupings = [out.grouping for out in outputs]
        return ModelOutput(
            logits=logits,
            loss=loss,
            aux=self._weighted([out.losses for out in outputs]),
            grouping=groupings if return_grouping else None,
            stats=[None if g is None else g.stats for g in groupings],
        )

    def _weighted(self, losses: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Mean over the layers that have the loss, times its weight; a weight of 0 leaves it out."""
        weights = {
            "coherence": self.config.coherence_weight,
            "entropy": self.config.entropy_weight,
            "index": self.config.index_weight,
        }
        found = {name: [one[name] for one in losses if name in one] for name, w in weights.items() if w > 0}
        return {name: weights[name] * torch.stack(each).mean() for name, each in found.items() if each}

    @torch.no_grad()
    def update_groups(self, out: ModelOutput) -> None:
        """After optimizer.step(): unit and slow prototypes, revival, freezing; advances the schedules."""
        # Reading the step back would wait for the GPU: do it only where the answer matters.
        now = 0 if self.config.freeze_step is None else int(self.step_count)
        for block, stats in zip(self.stack, out.stats, strict=True):
            if isinstance(block.attention, CoGAAttention) and block.attention.grouping is not None:
                block.attention.grouping.update(stats, now)
        self.step_count += 1

    def _freeze_if_due(self) -> None:
        """A loaded model past its freeze step keeps its prototypes still from the first step on."""
        limit = self.config.freeze_step
        if limit is not None:
            for module in self.modules():
                if isinstance(module, GumbelGrouping):
                    module.prototypes_GC.requires_grad_(int(self.step_count) <= limit)

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        found = super().load_state_dict(state_dict, strict=strict, assign=assign)
        self._freeze_if_due()
        return found

    def with_layers(self, layers: str, **changes) -> CoGAGPT:
        """The same weights under another pattern (and other config fields, if given).

        Names are shared between patterns. What is missing is freshly initialised, except that a missing far
        bias starts at 0, so that a dense model is read through groups as it is; what is missing or unused is
        reported as a UserWarning. With fresh prototypes the schedules of the groups start anew;
        `coga.models.fit_groups` finds better ones in a text.
        """
        other = CoGAGPT(self.config.replace(layers=layers, **changes))
        other = other.to(self.embedding.weight.device, self.embedding.weight.dtype)
        mine, theirs = self.state_dict(), other.state_dict()
        fits = {k: v for k, v in mine.items() if k in theirs and theirs[k].shape == v.shape}
        missing = sorted(theirs.keys() - fits.keys())
        unused = sorted(mine.keys() - fits.keys())
        fresh = {k: torch.zeros_like(theirs[k]) for k in missing if k.endswith("far_bias_H")}
        if any(k.endswith("prototypes_GC") for k in missing):
            fits["step_count"] = torch.zeros_like(self.step_count)
        other.load_state_dict({**theirs, **fresh, **{k: v.clone() for k, v in fits.items()}})
        other.train(self.training)
        other.set_activation_checkpointing(self.activation_checkpointing)
        if missing or unused:
            warnings.warn(
                f"with_layers({layers!r}): freshly initialised: {missing or 'nothing'}; "
                f"unused: {unused or 'nothing'}",
                UserWarning,
                stacklevel=2,
            )
        return other

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, each under a temporary name first."""
        save_pretrained(self, folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> CoGAGPT:
        """Read `save_pretrained` back, in eval mode. ValueError on whatever is missing or does not fit."""
        return load_pretrained(cls, folder)

    def new_state(self, batch_size: int, max_len: int | None = None) -> DecodeState:
        """An empty decode state; with max_len it is allocated once, without it grows as needed."""
        return DecodeState.new(self, batch_size, max_len)

    def step(
        self,
        tokens_BT: Tensor,
        state: DecodeState,
        attention_mask: Tensor | None = None,
        last_only: bool = False,
    ) -> tuple[ModelOutput, DecodeState]:
        """Append tokens, any number at a time, and return their logits: prefill and decode are one call.

        last_only returns the logits of each row's last real token only, (B, 1, V). The state is updated in
        place and returned. No gradient, no noise.
        """
        logits = step(self, tokens_BT, state, attention_mask, last_only)
        return ModelOutput(logits=logits), state

    def generate(self, tokens_BT: Tensor, max_new_tokens: int = 64, **options) -> Tensor:
        """Continue each row; see `coga.models.decode.generate`."""
        return generate(self, tokens_BT, max_new_tokens, **options)
