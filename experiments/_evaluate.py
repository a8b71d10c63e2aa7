"""What a run reports: bits per byte by position, how its groups behave, what decoding keeps.

    bits per byte = sum of -ln p / ln 2 / bytes that the predicted tokens stand for

Legend: T tokens, D model width, V vocabulary, N windows, W tokens in a window.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from _common import precision
from _inspect import Caught, catch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from coga import CoGAConfig
from coga.data import Corpus, contexts, unigram_entropy
from coga.grouping.metrics import coherence, flip_rate, prototype_use
from coga.models import CoGAGPT
from coga.models.state import mha_bytes, state_bytes_formula

__all__ = [
    "Probe",
    "by_position",
    "decode_bytes",
    "evaluate",
    "hidden_losses",
    "probe",
    "probe_tokens",
    "sample_text",
    "token_losses",
]

BUCKETS = 16
PROBE = 4096  # tokens of the fixed probe
LOGITS_AT_ONCE = 2**24


def hidden_losses(model: CoGAGPT, hidden_XD: Tensor, targets_X: Tensor) -> Tensor:
    """-ln p of each target from the last hidden states, (X,) float64; logits are made a chunk at a time."""
    rows = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    found = []
    for x, y in zip(hidden_XD.split(rows), targets_X.split(rows)):
        with precision(hidden_XD.device):
            logits = linear(x, model.head_weight)
        found.append(cross_entropy(logits.float(), y, reduction="none").double())
    return torch.cat(found)


def by_position(bits_T: np.ndarray) -> dict[str, Any]:
    """Bits per byte overall and in equal buckets of position."""
    edges = np.unique(np.linspace(0, len(bits_T), BUCKETS + 1).astype(int))
    return {
        "bits_per_byte": float(bits_T.mean()),
        "position_edges": edges.tolist(),
        "position_bits_per_byte": [float(bits_T[a:b].mean()) for a, b in pairwise(edges)],
    }


@torch.no_grad()
def token_losses(model: CoGAGPT, tokens_T: Tensor, targets_T: Tensor) -> Tensor:
    """-ln p of each target, (T,) float64 on the host; logits are made a chunk at a time."""
    hidden: list[Tensor] = []
    hook = model.norm.register_forward_hook(lambda module, inputs, output: hidden.append(output[0]))
    try:
        with precision(tokens_T.device):
            # Ignored targets: this asks for no logits, and the loss is taken from the hidden states below.
            model(tokens_T[None], targets=torch.full_like(tokens_T, -100)[None])
    finally:
        hook.remove()
    return hidden_losses(model, hidden[0], targets_T).cpu()


def evaluate(model: CoGAGPT, corpus: Corpus, n: int, count: int, device: torch.device) -> dict[str, Any]:
    """Bits per byte on held-out contexts of length n, overall and by position; unigram entropy beside it."""
    was_training = model.training
    model.eval()
    tokens_BT, targets_BT = contexts(corpus, n, count)
    rows = [token_losses(model, x.to(device), y.to(device)) for x, y in zip(tokens_BT, targets_BT)]
    model.train(was_training)
    per_token = corpus.validation.bytes / len(corpus.validation)
    bits_T = torch.stack(rows).mean(0).numpy() / math.log(2) / per_token
    found = by_position(bits_T)
    # Of the very bytes that were predicted; with a tokenizer, of the split they come from.
    if corpus.tokenizer is None:
        found["unigram_bits_per_byte"] = unigram_entropy(targets_BT.numpy().astype(np.uint8).ravel())
    else:
        found["unigram_bits_per_byte"] = corpus.validation.entropy
    return found


@dataclass(frozen=True)
class Probe:
    """How the layers with groups treat the same held-out tokens at one moment.

    caught  a `Caught` a layer; metrics: means over the layers, NaN-free (absent where not defined)
    """

    caught: list[Caught]
    metrics: dict[str, float]

    @property
    def index(self) -> dict[str, Tensor]:
        """Group ids by layer, to compare with at the next probe."""
        return {str(one.layer.index): torch.from_numpy(np.array(one.index_NW)) for one in self.caught}


def probe_tokens(corpus: Corpus, n: int) -> Tensor:
    """The first tokens of the first held-out context."""
    return contexts(corpus, min(n, PROBE), 1)[0][0]


def probe(model: CoGAGPT, tokens_T: Tensor, previous: dict[str, Tensor]) -> Probe:
    """Use of prototypes, coherence, and the share of tokens that changed group since the previous probe."""
    was_training = model.training
    model.eval()
    with precision(tokens_T.device):
        caught = [one for one in catch(model, tokens_T) if one.index_NW.size]
    model.train(was_training)
    values: dict[str, list[float]] = {"flip_rate": [], "prototype_use": [], "inside": [], "between": []}
    for one in caught:
        groups, index = one.layer.groups, one.index_NW
        if one.usage_G is not None and float(one.usage_G.sum()) > 0:
            values["prototype_use"].append(prototype_use(one.usage_G))
        for name, value in coherence(one.content_NWC, index, groups).items():
            values[name].append(value)
        before = previous.get(str(one.layer.index))
        if before is not None and tuple(before.shape) == index.shape:
            values["flip_rate"].append(flip_rate(before, index, groups))
    kept = {name: [x for x in each if math.isfinite(x)] for name, each in values.items()}
    return Probe(caught, {name: float(np.mean(each)) for name, each in kept.items() if each})


def decode_bytes(config: CoGAConfig, n: int, element_size: int) -> dict[str, float]:
    """Bytes of decode state a token at length n, all layers, against multi-head attention of this width."""
    own = sum(state_bytes_formula(config, n, element_size=element_size)) / n
    dense = config.n_layer * mha_bytes(config, n, element_size=element_size) / n
    return {"state_bytes_per_token": own, "mha_bytes_per_token": dense, "state_ratio": dense / own}


def sample_text(model: CoGAGPT, corpus: Corpus, settings: Any, device: torch.device) -> str:
    """A held-out prompt and what the model makes of it."""
    room = model.config.max_len - settings.sample
    prompt = contexts(corpus, max(1, min(settings.n, 1024, room)), 1)[0].to(device)
    new = min(settings.sample, model.config.max_len - prompt.shape[1])
    was_training = model.training
    model.eval()
    generator = torch.Generator(device=device).manual_seed(settings.seed)
    with precision(device):
        tokens = model.generate(prompt, new, temperature=0.8, top_k=50, generator=generator)[0]
    model.train(was_training)
    before, after = (corpus.text(part.tolist()) for part in (tokens[: prompt.shape[1]], tokens[-new:]))
    after = after if new else ""
    rule = "-" * 30
    return f"{rule} prompt (held out) {rule}\n{before}\n{rule} sample (temperature 0.8) {rule}\n{after}\n"
