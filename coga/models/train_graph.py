"""A training step as one CUDA graph: the host launches it once instead of some hundred kernels a layer.

    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(1e-3, device="cuda"), capturable=True)
    step = GraphedStep(model, optimizer, clip=1.0)
    for tokens_BT, targets_BT in batches:        # always the same shape
        loss, norm = step(tokens_BT, targets_BT)

A step is forward, backward, clipping, `optimizer.step()` and `model.update_groups`. The first calls run
kernel by kernel, which compiles what has to be compiled; then the step is recorded, and every call is a
replay. Replayed or not, the numbers are the same. It helps where the host is slower than the GPU; by how much
it helped where is in docs/performance.md.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from coga.models.gpt import CoGAGPT

__all__ = ["GraphedStep", "train_step"]

WARM = 3  # calls before the recording


def train_step(
    model: CoGAGPT,
    optimizer: torch.optim.Optimizer,
    tokens_BT: Tensor,
    targets_BT: Tensor,
    noise_step: Tensor | int,
    *,
    clip: float | None = None,
    autocast: AbstractContextManager,
) -> tuple[Tensor, Tensor]:
    """One step, launched: loss and gradient norm before clipping. Forward runs under `autocast`."""
    with autocast:
        out = model(tokens_BT, targets_BT, noise_step=noise_step)
        total = out.total_loss
    total.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, float("inf") if clip is None else clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    model.update_groups(out)
    assert out.loss is not None
    return out.loss.detach(), norm.detach()


class GraphedStep:
    """Callable (tokens, targets) -> (loss, gradient norm before clipping), both on the GPU.

    clip        largest gradient norm; None: no clipping
    dtype       of autocast; None: the parameters' own
    noise_step  int64 on the GPU, the step of the noise; counts the calls

    A learning rate that changes must be a tensor on the GPU, changed in place (`group["lr"].fill_(rate)`).
    ValueError: no CUDA device, an optimizer that cannot be captured, a freeze step, another shape later on.
    """

    def __init__(
        self,
        model: CoGAGPT,
        optimizer: torch.optim.Optimizer,
        *,
        clip: float | None = None,
        dtype: torch.dtype | None = torch.bfloat16,
    ) -> None:
        self.device = model.step_count.device
        if self.device.type != "cuda":
            raise ValueError(f"model={self.device}: a CUDA graph needs a model on a CUDA device")
        if not all(group.get("capturable", False) for group in optimizer.param_groups):
            raise ValueError("optimizer: a CUDA graph needs capturable=True")
        if model.config.freeze_step is not None:
            rule = "cannot be recorded, for what a step does would change; use freeze_step=None"
            raise ValueError(f"freeze_step={model.config.freeze_step}: {rule}")
        self.model, self.optimizer, self.clip, self.dtype = model, optimizer, clip, dtype
        self.noise_step = torch.zeros((), dtype=torch.int64, device=self.device)
        self.calls = 0
        self.tokens: Tensor | None = None
        self.targets: Tensor | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.found: tuple[Tensor, Tensor] | None = None
        self.stream = torch.cuda.Stream(self.device)

    def _run(self) -> tuple[Tensor, Tensor]:
        on = nullcontext() if self.dtype is None else torch.autocast("cuda", self.dtype)
        assert self.tokens is not None and self.targets is not None
        given = self.model, self.optimizer, self.tokens, self.targets, self.noise_step
        found = train_step(*given, clip=self.clip, autocast=on)
        self.noise_step += 1
        return found

    def _take(self, tokens_BT: Tensor, targets_BT: Tensor) -> None:
        """Into the storage that the graph reads."""
        if self.tokens is None or self.targets is None:
            self.tokens = tokens_BT.to(self.device, copy=True)
            self.targets = targets_BT.to(self.device, copy=True)
        elif tokens_BT.shape != self.tokens.shape or targets_BT.shape != self.targets.shape:
            rule = f"must keep the shape of the first call, {tuple(self.tokens.shape)}"
            raise ValueError(f"tokens={tuple(tokens_BT.shape)}: {rule}")
        else:
            self.tokens.copy_(tokens_BT, non_blocking=True)
            self.targets.copy_(targets_BT, non_blocking=True)

    def launch(self, tokens_BT: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
        """The same step, kernel by kernel."""
        self._take(tokens_BT, targets_BT)
        here = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            found = self._run()
        here.wait_stream(self.stream)
        return found

    def __call__(self, tokens_BT: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        if self.calls <= WARM:
            return self.launch(tokens_BT, targets_BT)
        self._take(tokens_BT, targets_BT)
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.found = self._run()
        self.graph.replay()
        assert self.found is not None
        loss, norm = self.found
        return loss.clone(), norm.clone()
