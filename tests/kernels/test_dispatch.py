"""The custom ops: opcheck, float64 gradcheck (oracle 9), compilation of a whole model, the override."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support import F64, assert_close, real_bytes, small_model
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck
from torch.library import opcheck

from coga.grouping import make_grouping, pool
from coga.grouping.gumbel import soft_assignment
from coga.kernels import dispatch, reference
from coga.types import Far

B, H, C, P, W, R = 2, 3, 2, 4, 4, 2
L, G = C + P, W // R
T = 3 * W + 1


def normal(*shape: int, dtype=F64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype)


def far_inputs(opened: int, dtype=F64, shift: float | None = None) -> tuple[torch.Tensor, torch.Tensor, Far]:
    """Queries, latents and the groups of two windows with a given assignment and selection."""
    q, latent = normal(B, T, H, L, dtype=dtype), normal(B, T, L, dtype=dtype)
    # Sizes 2+2, 3+1, 4+0 and 1+3: unequal, one of them empty.
    index = torch.tensor([[[0, 1, 0, 1], [0, 0, 1, 0], [0, 1, 1, 1]], [[0, 0, 0, 0], [1, 0, 1, 1], [1] * 4]])
    grouping = make_grouping(index, G)
    read = 2 * G
    group = pool(latent[:, : 3 * W], grouping)[:, :read]
    log_size = grouping.size_BM[:, :read].to(dtype).log()
    chosen = slot = None
    if opened:
        chosen = dispatch.select(q.mean(2), group, log_size, count=opened, window=W, groups=G)
        slot = dispatch.permute(latent[:, : 3 * W], grouping.order_BS)
    far = Far(
        group_BML=group,
        log_size_BM=log_size,
        far_bias_H=normal(H, dtype=dtype),
        offset_BM=grouping.offset_BM[:, :read].contiguous(),
        size_BM=grouping.size_BM[:, :read].contiguous(),
        slot_BSL=slot,
        open_BTK=chosen,
        groups=G,
        slots=4,
        open_shift=None if shift is None else torch.tensor(shift, dtype=dtype),
    )
    return q, latent, far


@pytest.mark.parametrize("opened", [0, 1, 3])
@pytest.mark.parametrize(("chunk", "shift"), [(256, None), (3, None), (256, -1.5)])
def test_gradcheck_of_attention_with_groups(opened, chunk, shift, monkeypatch):
    """The analytic backward, with assignment and selection given; every input at once."""
    monkeypatch.setattr(reference, "CHUNK", chunk)
    q, latent, far = far_inputs(opened, shift=shift)
    inputs = [q, latent, normal(H), normal(H), far.group_BML, far.far_bias_H]
    if opened:
        inputs.append(far.slot_BSL)

    def function(q, latent, alpha, sink, group, bias, slot=None):
        given = replace(far, group_BML=group, far_bias_H=bias, slot_BSL=slot)
        return dispatch.attend(q, latent, content=C, window=W, band=3, alpha_H=alpha, sink_H=sink, far=given)[
            0
        ]

    assert gradcheck(function, [x.detach().requires_grad_() for x in inputs], fast_mode=opened != 1)


def test_gradcheck_of_attention_with_opened_groups_alone():
    q, latent, far = far_inputs(1, shift=-1.5)
    inputs = [q, latent, normal(H), normal(H), far.slot_BSL]

    def function(q, latent, alpha, sink, slot):
        given = replace(far, group_BML=None, log_size_BM=None, far_bias_H=None, slot_BSL=slot)
        options = dict(content=C, window=W, band=3, alpha_H=alpha, sink_H=sink)
        return dispatch.attend(q, latent, far=given, **options)[0]

    assert gradcheck(function, [x.detach().requires_grad_() for x in inputs])


@pytest.mark.parametrize("window", [None, W])
@pytest.mark.parametrize("sink", [True, False])
def test_gradcheck_of_attention_without_groups(window, sink):
    q, latent, alpha, logit = normal(1, 6, H, L), normal(1, 6, L), normal(H), normal(H)

    def function(q, latent, alpha, logit):
        sink_H = logit if sink else None
        return (
            dispatch.attend(q, latent, content=C, window=window, band=3, alpha_H=alpha, sink_H=sink_H)[0]
            + 0 * logit.sum()
        )

    assert gradcheck(function, [x.requires_grad_() for x in (q, latent, alpha, logit)])


@pytest.mark.parametrize("chunk", [256, 2])
def test_gradcheck_of_group_attention(chunk, monkeypatch):
    monkeypatch.setattr(reference, "CHUNK", chunk)
    size = torch.tensor([[2, 2, 3, 1, 4, 0], [4, 0, 1, 3, 2, 2]]).to(F64).log()

    def function(q, latent, alpha):
        return dispatch.group_attend(q, latent, size, content=C, groups=G, alpha_H=alpha)[0]

    inputs = normal(B, 3 * G, H, L), normal(B, 3 * G, L), normal(H)
    assert gradcheck(function, [x.requires_grad_() for x in inputs])


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_gradcheck_of_the_soft_assignment_alone(steps):
    """With the gradient through all steps; "last" is a straight-through estimate, no derivative."""

    def function(content, prototype):
        unit = torch.nn.functional.normalize(content, dim=-1)
        logits, centroid = soft_assignment(unit, prototype, 3.0, steps, "all")
        return logits.softmax(-1), centroid

    inputs = normal(1, 2, 5, 3), normal(2, 3)
    assert gradcheck(function, [x.requires_grad_() for x in inputs])


@pytest.mark.parametrize("steps", [0, 1])
def test_up_to_one_refinement_step_the_last_gradient_is_the_whole_one(steps):
    unit, prototype = torch.nn.functional.normalize(normal(1, 2, 5, 3), dim=-1), normal(2, 3).requires_grad_()
    found = [
        torch.autograd.grad(
            soft_assignment(unit, prototype, 3.0, steps, through)[0].square().sum(), prototype
        )
        for through in ("last", "all")
    ]
    assert_close(found[0][0], found[1][0])


def test_gradcheck_of_permute():
    order = torch.stack([torch.randperm(7), torch.randperm(7)])
    assert gradcheck(lambda x: dispatch.permute(x, order), [normal(B, 7, 3).requires_grad_()])


# --------------------------------------------------------------------------------------------- opcheck

OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("opened", [0, 2, None])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("summaries", [True, False])
def test_opcheck_attend(opened, dtype, summaries):
    q, latent, far = far_inputs(opened or 0, dtype, shift=-1.5 if opened else None)
    groups: list = [None] * 8
    if opened is not None:
        groups = [far.group_BML, far.far_bias_H, far.slot_BSL, far.log_size_BM]
        groups += [far.offset_BM, far.size_BM, far.open_BTK, far.open_shift]
        if not summaries:
            groups[0] = groups[1] = groups[3] = None
    values = [q, latent, normal(H, dtype=dtype), normal(H, dtype=dtype), *groups]
    differentiable = [x.requires_grad_() if i < 7 and x is not None else x for i, x in enumerate(
        [None if x is None else x.detach().clone() for x in values]
    )]  # fmt: skip
    far_numbers = (0, 0) if opened is None else (G, 4)
    args = (*differentiable, C, W, 3, *far_numbers, "reference")
    opcheck(torch.ops.coga.attend.default, args, test_utils=OPCHECKS)


def test_opcheck_group_attend():
    size = torch.tensor([[2, 2, 3, 1], [4, 0, 1, 3]]).to(F64).log()
    args = normal(B, 4, H, L).requires_grad_(), normal(B, 4, L).requires_grad_(), size
    opcheck(torch.ops.coga.group_attend.default, (*args, normal(H).requires_grad_(), C, G, "reference"))
    opcheck(torch.ops.coga.group_attend.default, (*args, None, C, G, "reference"))


def test_opcheck_select_and_assign():
    q, _, far = far_inputs(0)
    step = reference.rounding_step(F64)
    args = (q.mean(2), far.group_BML, far.log_size_BM, 2, W, G, step, "reference")
    opcheck(torch.ops.coga.select.default, args)
    q, _, far = far_inputs(1)
    args = (q.mean(2), far.slot_BSL, far.offset_BM, far.size_BM, 2, W, G, 4, step, "reference")
    opcheck(torch.ops.coga.select_members.default, args)
    opcheck(torch.ops.coga.assign.default, (normal(3, W, G), 2, step, "reference"))


@pytest.mark.parametrize("steps", [0, 2])
def test_opcheck_refine(steps):
    for prototype in (normal(G, C), normal(B, 3, G, C)):
        args = (normal(B, 3, W, C), prototype, 8.0, steps, "reference")
        opcheck(torch.ops.coga.refine.default, args, test_utils=OPCHECKS)


# ------------------------------------------------------------------------------------------- compiling


@pytest.mark.filterwarnings(
    "ignore:.*autograd.function.Function.*instantiated:DeprecationWarning"
)  # torch's own
def test_a_model_compiles_into_one_graph_forward_and_backward():
    """fullgraph, on a CPU, without code generation: the graph is what is tested."""
    model = small_model(4, layers="4 near", n_layer=2, train=True, grouping="gumbel")
    tokens, step = real_bytes(2, 3 * 16 + 5), torch.tensor(3)
    eager = model(tokens, tokens, noise_step=step)
    eager.total_loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    out = compiled(tokens, tokens, noise_step=step)
    out.total_loss.backward()
    assert_close(out.total_loss, eager.total_loss)
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, expected[name])


@pytest.mark.filterwarnings(
    "ignore:.*autograd.function.Function.*instantiated:DeprecationWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
)  # torch's own, when it looks at a graph's inputs
def test_blocks_of_one_kind_share_their_compiled_code():
    """Eight layers of two kinds: two graphs and the loss; the result of the uncompiled model."""
    config = dict(layers="near 4 4 4", n_layer=8, train=True, grouping="gumbel")
    model, plain = small_model(4, **config), small_model(4, **config)
    counter = CompileCounterWithBackend("aot_eager")
    model.compile_blocks(backend=counter)
    tokens = real_bytes(2, 3 * 16 + 5)
    for step in range(2):
        outs = [m(tokens, tokens, noise_step=torch.tensor(step)) for m in (model, plain)]
        for out in outs:
            out.total_loss.backward()
        assert_close(outs[0].total_loss, outs[1].total_loss)
        assert counter.frame_count == 3
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert_close(a.grad, b.grad)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert_close(model.eval()(tokens).logits, plain.eval()(tokens).logits)
    assert counter.frame_count == 3


# ------------------------------------------------------------------------------------------- the choice


def test_the_backend_is_chosen_by_device_with_an_override():
    cpu = torch.device("cpu")
    assert dispatch.resolve_backend("auto", cpu) == "reference"
    assert dispatch.resolve_backend("reference", torch.device("cuda")) == "reference"
    with pytest.raises(ValueError, match=r"backend='triton'.*CUDA"):
        dispatch.resolve_backend("triton", cpu)
    with pytest.raises(ValueError, match=r"backend='numpy'"):
        dispatch.resolve_backend("numpy", cpu)


def test_the_backend_changes_no_name_of_the_state_dict():
    names = [small_model(backend=b).state_dict().keys() for b in ("auto", "reference", "triton")]
    assert names[0] == names[1] == names[2]
