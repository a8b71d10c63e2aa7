"""Every kernel compiles for an H100, with the arguments that a model gives it, on a machine that has none.

The interpreter runs Python: types that do not fit, and what else the compiler refuses, pass there. Here a
driver that knows only its target stands in for the GPU's, and a launch ends when the kernel is compiled. What
a body returns is then not set, so a model runs on the plain twins, and the bodies are called beside them.
"""

from __future__ import annotations

import importlib
import pkgutil

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import coga.kernels
from coga import CoGAConfig
from coga.kernels import dispatch, reference, triton_assign, triton_ops, triton_refine
from coga.kernels import triton_project as project
from coga.kernels import triton_values as values
from coga.models import CoGAGPT

SHARED = 227 * 1024  # bytes that a program may have on an H100


class Driver:
    """As much of a driver as compiling asks for."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def own_kernels() -> set[tuple[str, str]]:
    """Module and name of every kernel of the package that can be launched."""
    found = set()
    for module in pkgutil.iter_modules(coga.kernels.__path__, "coga.kernels."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if isinstance(value, JITFunction) and name.endswith("_kernel"):
                found.add((value.fn.__module__, name))
    return found


@pytest.fixture
def compiled(monkeypatch):
    """Kernels that were compiled, with the shared memory of each variant."""
    found: dict[tuple[str, str], list[int]] = {}
    run = JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **options):
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        found.setdefault((self.fn.__module__, self.fn.__name__), []).append(kernel.metadata.shared)
        return kernel

    driver.set_active(Driver())
    monkeypatch.setattr(JITFunction, "run", compile_only)
    return found


class Beside:
    """The plain bodies, which a model runs on, and those of Triton with the same arguments."""

    def __getattr__(self, name: str):
        plain, ours = getattr(reference, name), getattr(triton_ops, name)

        def both(*arguments, **options):
            ours(*arguments, **options)
            return plain(*arguments, **options)

        return both


@pytest.fixture
def both_bodies(monkeypatch):
    monkeypatch.setattr(dispatch, "_bodies", lambda backend, device: Beside())


EQUAL = dict(capacity_factor=1.0)
MODELS = {  # what is read, and the kernels of unequal and of equal groups
    "members-capacity-2": dict(capacity_factor=2.0),
    "members": EQUAL,
    "members-of-64": EQUAL | dict(layers="64", open_groups=4),
    "summaries": EQUAL | dict(selection="summary", refine_groups=True, reciprocal_groups=True),
    "summaries-capacity-2": dict(capacity_factor=2.0, selection="summary"),
    "full": dict(layers="full"),
}


def run_model(dtype: torch.dtype, **changes) -> None:
    """Forward and backward of one layer, 1,600 tokens in windows of 512."""
    shape = dict(n_layer=1, n_head=2, d_model=128, vocab_size=64, latent_dim=64, rope_dim=32, window=512)
    model = CoGAGPT(CoGAConfig(**{**shape, "layers": "32", **changes})).train()
    tokens = torch.randint(64, (1, 1601), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = model(tokens[:, :-1], targets=tokens[:, 1:])
    out.total_loss.backward()


def run_what_has_no_plain_body(dtype: torch.dtype) -> None:
    """What the plain path does line by line: projections, values, refinement and assignment."""
    heads, content, rotary, length = 2, 64, 32, 70
    width = content + rotary
    x = torch.randn(1, length, (heads + 1) * width).to(dtype)
    cos, sin, gain = torch.randn(length, rotary // 2), torch.randn(length, rotary // 2), torch.ones(heads)
    options = dict(content=content, eps=1e-6)
    for weights in (None, torch.ones(heads)):
        project.project(x, cos, sin, gain, weights, **options)
    dq, dlatent = torch.randn(1, length, heads, width).to(dtype), torch.randn(1, length, width).to(dtype)
    project.project_backward(dq, dlatent, x, cos, sin, gain, **options)
    mixed, up, gate = (torch.randn(*s).to(dtype) for s in ((1, length, 2, 64), (2, 64, 64), (1, length, 128)))
    for given in (gate, None):
        y = values.gated_values(mixed, up, given)
        values.gated_values_backward(y, mixed, up, given)
    unit = torch.nn.functional.normalize(torch.randn(1, 2, 512, content), dim=-1)
    triton_refine.refine(unit, torch.randn(16, content), 32.0, 3)
    score = torch.randn(2, 512, 16)
    for slots in (32, 64):
        triton_assign.assign(score, slots, 2.0**-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "float32"])
def test_every_kernel_compiles_and_fits(dtype, compiled, both_bodies):
    for changes in MODELS.values():
        run_model(dtype, **changes)
    run_what_has_no_plain_body(dtype)
    assert set(compiled) >= own_kernels()
    assert max(max(each) for each in compiled.values()) <= SHARED
