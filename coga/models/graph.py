"""Decoding one token at a time from a captured CUDA graph.

    decoder = GraphedDecoder(model, state)        # state made with max_len, so that its storage never moves
    logits_BV = decoder(tokens_B)

The graph holds a step in which no row closes a window; it reads all storage under masks, so one capture
serves every length. A step that closes a window (one in W for each row) runs eagerly. Results are those of
`model.step`, up to rounding. A step is up to some two hundred small kernels a layer: `compiled` lets Inductor
fuse them before they are captured.
"""

from __future__ import annotations

from types import FunctionType

import torch
from torch import Tensor
from torch.nn.functional import linear

from coga.models.decode import advance, step
from coga.models.gpt import CoGAGPT
from coga.models.state import DecodeState

__all__ = ["GraphedDecoder"]


def compiled_advance(backend: str = "inductor"):
    """`advance`, compiled for one state.

    A copy of its code: Dynamo counts recompilations by code object, and a process may have more decoders than
    it allows.
    """
    code = advance.__code__.replace()
    own = FunctionType(code, advance.__globals__, advance.__name__, advance.__defaults__)
    return torch.compile(own, fullgraph=True, dynamic=False, backend=backend)


class GraphedDecoder:
    """Callable (B,) tokens -> (B, V) logits of the next position; the state advances by one token a row.

    compiled  torch.compile the captured step, which takes some seconds a layer
    Raises ValueError: a state on another device than CUDA, or made without max_len; windows of one token.
    """

    def __init__(self, model: CoGAGPT, state: DecodeState, *, compiled: bool = False) -> None:
        if not state.length_B.is_cuda:
            raise ValueError(f"state={state.length_B.device}: a CUDA graph needs a state on a CUDA device")
        if state.max_len is None:
            raise ValueError(
                "state.max_len=None: a graph needs storage that never moves; pass max_len to new_state"
            )
        self.model, self.state = model, state
        self._advance = compiled_advance() if compiled else advance
        self.tokens = torch.zeros(len(state.lengths), 1, dtype=torch.int64, device=state.length_B.device)
        self.graph, self.logits = self._capture()

    @torch.no_grad()
    def _run(self) -> Tensor:
        rows = [1] * len(self.state.lengths)
        hidden = self._advance(self.model, self.tokens, self.state, rows, static=True)
        return linear(hidden[:, -1], self.model.head_weight)

    def _capture(self) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Warm up and capture on a copy of the numbers, then put the state back as it was."""
        kept = [{k: v.clone() for k, v in layer.tensors.items()} for layer in self.state.layers]
        length, lengths = self.state.length_B.clone(), list(self.state.lengths)
        # Any length at which nothing closes will do for the capture; 0 closes nothing unless W = 1.
        self.state.lengths[:] = [0] * len(lengths)
        if self._closes():
            raise ValueError("window=1: every step closes a window, there is nothing to capture")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self._run()
        for layer, saved in zip(self.state.layers, kept, strict=True):
            for name, tensor in saved.items():
                layer.tensors[name].copy_(tensor)
        self.state.length_B.copy_(length)
        self.state.lengths[:] = lengths
        return graph, logits

    def _closes(self) -> bool:
        windows = {x.layer.window for x in self.state.layers if x.layer.kind == "group"}
        return any((n + 1) % window == 0 for n in self.state.lengths for window in windows)

    @torch.no_grad()
    def __call__(self, tokens_B: Tensor) -> Tensor:
        if self._closes():
            return step(self.model, tokens_B[:, None], self.state)[:, -1]
        self.state.reserve(max(self.state.lengths) + 1)
        self.tokens.copy_(tokens_B[:, None])
        self.graph.replay()
        self.state.lengths[:] = [n + 1 for n in self.state.lengths]
        return self.logits.clone()
