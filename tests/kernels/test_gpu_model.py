"""The oracles of the model on a CUDA device, through the Triton kernels; training mode and eval.

Float32 unless said otherwise: dense identity, no leak by bits and by gradient, decode parity, compilation,
deterministic bits, checkpointing, CUDA graphs of a decode step, and a training run against the reference.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from support import READINGS, opened_path, other_layers, perturb, read_by, real_bytes

from coga import CoGAConfig
from coga.kernels import dispatch
from coga.models import CoGAGPT
from coga.models.graph import GraphedDecoder
from coga.models.train_graph import GraphedStep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

W = 64
LENGTH = 5 * W + 7
GROUPINGS = ("gumbel", "contiguous", "kmeans", "random")


def gpu_model(train: bool = True, seed: int = 0, **changes) -> CoGAGPT:
    """Three layers of widths that differ, every parameter set, on the GPU with the Triton backend."""
    values = dict(
        n_layer=3, n_head=3, d_model=48, latent_dim=32, rope_dim=16, window=W, band=20, open_groups=3,
        layers="near 8 16", mlp_ratio=2.0, max_len=1024, noise=1.0, backend="triton",
        refine_groups=True, reciprocal_groups=True, coherence_weight=0.01, revive=0.1,
        selection="summary", summaries=True, slow_prototypes=True, output_gate=True, capacity_factor=1.0,
    )  # fmt: skip
    model = perturb(CoGAGPT(CoGAConfig(**{**values, **changes})), seed)
    return model.cuda().train(train)


def one_worker_each(*values: str) -> list:
    """Cases that share their kernels, for `pytest -n 8 --dist loadgroup`: compiling is most of the time."""
    return [pytest.param(value, marks=pytest.mark.xdist_group(value)) for value in values]


# Equal groups and unequal ones, whose kernels differ.
ROOM = pytest.mark.parametrize("room", [1.0, 2.0], ids=["equal", "room"])


@pytest.fixture(autouse=True)
def quiet():
    """Warnings of compilers are theirs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("grouping", "room"), [*((name, 1.0) for name in GROUPINGS), ("gumbel", 2.0), ("kmeans", 2.0)]
)
@pytest.mark.parametrize("layers", one_worker_each("near 8 16", "8 full 64", "mha 16 near"))
def test_no_leak(layers, grouping, train, room):
    """A changed suffix leaves earlier logits as they are, to the bit; and no gradient comes from later on."""
    selection = READINGS[(GROUPINGS.index(grouping) + train) % len(READINGS)]
    case = read_by(dict(layers=layers, grouping=grouping, selection=selection))
    model = gpu_model(train, capacity_factor=room, **case)
    row = real_bytes(1, LENGTH).cuda()
    for cut in (1, W - 1, W, 2 * W + 1, 3 * W, 4 * W + 5, LENGTH - 1):
        other = row.clone()
        other[:, cut:] = (other[:, cut:] + 1 + torch.arange(LENGTH - cut, device="cuda") % 200) % 256
        with torch.no_grad():
            for autocast in (False, True):
                with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                    a, b = (model(x, noise_step=3).logits for x in (row, other))
                assert torch.equal(a[:, :cut], b[:, :cut])
                assert not torch.equal(a[:, cut:], b[:, cut:])
        hidden = []
        hook = model.embedding.register_forward_hook(lambda m, i, o, kept=hidden: kept.append(o))
        logits = model(row, noise_step=3).logits
        hook.remove()
        grad = torch.autograd.grad(logits[:, :cut].square().sum(), hidden[0])[0]
        assert grad[:, cut:].abs().max() == 0
        assert grad[:, :cut].abs().sum() > 0 and grad.isfinite().all()


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_opening_every_group_equals_full_attention(grouping):
    model = gpu_model(layers="8", grouping=grouping, open_groups=99)
    dense = other_layers(model, "full").train()
    row = real_bytes(2, LENGTH).cuda()
    with torch.no_grad(), opened_path(model):
        ours, exact = (m(row, noise_step=1).logits for m in (model, dense))
    assert (ours - exact).norm() / exact.norm() < 2e-5


@ROOM
@pytest.mark.parametrize("selection", READINGS)
@pytest.mark.parametrize("layers", ["near 8 16", "8 full 64"])
def test_the_kernels_give_the_logits_and_gradients_of_the_reference(layers, selection, room):
    """Whole model, choices included: float32 scores are rounded so that both backends choose alike."""
    ours = gpu_model(capacity_factor=room, **read_by(dict(layers=layers, selection=selection)))
    plain = other_layers(ours, layers, backend="reference").train()
    row = real_bytes(2, LENGTH).cuda()
    found = []
    for model in (ours, plain):
        out = model(row, row, noise_step=1, return_logits=True)
        out.total_loss.backward()
        found.append((out.logits, {n: p.grad for n, p in model.named_parameters()}))
    (logits, grads), (exact, expected) = found
    assert (logits - exact).norm() / exact.norm() < 1e-4
    assert {n for n, g in grads.items() if g is None} == {n for n, g in expected.items() if g is None}
    for name, grad in grads.items():
        if grad is not None:
            assert (grad - expected[name]).norm() <= 2e-3 * expected[name].norm() + 1e-7, name


@ROOM
@pytest.mark.parametrize("selection", READINGS)
@pytest.mark.parametrize("layers", ["near 8 16", "8 full", "mha 8"])
def test_decode_equals_the_full_forward(layers, selection, room):
    options = dict(output_gate=layers == "8 full", capacity_factor=room)
    model = gpu_model(train=False, **options, **read_by(dict(layers=layers, selection=selection)))
    row = real_bytes(2, LENGTH, seed=3).cuda()
    with torch.no_grad():
        full = model(row).logits
    state = model.new_state(2)
    pieces = []
    for start, end in ((0, 1), (1, W), (W, 2 * W + 3), *((i, i + 1) for i in range(2 * W + 3, LENGTH))):
        pieces.append(model.step(row[:, start:end], state)[0].logits)
    found = torch.cat(pieces, 1)
    assert (found - full).norm() / full.norm() < 1e-4


@pytest.mark.parametrize("compiled", [False, True], ids=["launched", "compiled"])
@pytest.mark.parametrize("selection", READINGS)
def test_a_captured_decode_step_equals_the_eager_one(selection, compiled):
    model = gpu_model(train=False, output_gate=not compiled, **read_by(dict(selection=selection)))
    row = real_bytes(2, LENGTH, seed=5).cuda()
    eager, graphed = (model.new_state(2, max_len=LENGTH + 1) for _ in range(2))
    for state in (eager, graphed):
        model.step(row[:, : 2 * W + 9], state)
    decoder = GraphedDecoder(model, graphed, compiled=compiled)
    for i in range(2 * W + 9, LENGTH):
        a, b = model.step(row[:, i : i + 1], eager)[0].logits[:, -1], decoder(row[:, i])
        assert (a - b).norm() / a.norm() < 1e-4, f"token {i}"
    torch.compiler.reset()


def test_one_graph_and_no_recompilation():
    """fullgraph, forward and backward; later steps of the same shape compile nothing."""
    model = gpu_model(n_layer=2, layers="8 near")
    row = real_bytes(2, LENGTH).cuda()
    expected = model(row, row, noise_step=torch.tensor(1)).total_loss
    compiled = torch.compile(model, fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for number in range(4):
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            out = compiled(row, row, noise_step=torch.tensor(number))
            out.total_loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            model.update_groups(out)
        if number == 0:
            first = out.total_loss
    again = gpu_model(n_layer=2, layers="8 near")(row, row, noise_step=torch.tensor(0)).total_loss
    assert torch.allclose(first, again, rtol=1e-4)
    assert expected.isfinite() and out.total_loss.isfinite()
    torch.compiler.reset()


def test_compiled_blocks_train_like_eager_ones():
    """Regional compilation through Inductor, with checkpointing and the gate on and off."""
    for on in (False, True):
        models = [gpu_model(n_layer=4, layers="near 8", output_gate=on) for _ in range(2)]
        models[1].compile_blocks()
        row, losses = real_bytes(2, LENGTH).cuda(), []
        for model in models:
            model.set_activation_checkpointing(on)
            out = model(row, row, noise_step=torch.tensor(1, device="cuda"))
            out.total_loss.backward()
            losses.append(out.total_loss)
        assert torch.allclose(*losses, rtol=1e-4)
        for a, b in zip(*(m.parameters() for m in models), strict=True):
            assert (a.grad - b.grad).norm() <= 2e-3 * a.grad.norm() + 1e-7
    torch.compiler.reset()


@ROOM
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_recorded_training_step_equals_the_launched_one(compiled, room):
    """Losses and weights of 8 steps with a learning rate that changes: replayed, and kernel by kernel."""
    found = []
    for graphed in (True, False):
        model = gpu_model(layers="near 8 mha", output_gate=not compiled, capacity_factor=room)
        if compiled:
            model.compile_blocks()
        rate = torch.tensor(1e-3, device="cuda")
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, fused=True, capturable=True)
        step = GraphedStep(model, optimizer, clip=1.0)
        losses = []
        for number in range(8):
            for group in optimizer.param_groups:
                group["lr"].fill_(1e-3 * (number + 1))
            row = real_bytes(2, LENGTH + 1, seed=number).cuda()
            run = step if graphed else step.launch
            losses.append(torch.stack(run(row[:, :-1], row[:, 1:])))
        assert (step.graph is not None) == graphed
        assert int(model.step_count) == int(step.noise_step) == 8
        found.append((torch.stack(losses), [p.detach() for p in model.parameters()]))
    (losses, parameters), (expected, others) = found
    assert torch.allclose(losses, expected, rtol=1e-3)
    assert losses[-1, 0] < losses[0, 0]
    assert all((a - b).norm() <= 1e-2 * b.norm() + 1e-6 for a, b in zip(parameters, others, strict=True))
    with pytest.raises(ValueError, match="shape of the first call"):
        step(row, row)
    torch.compiler.reset()


def test_deterministic_mode_gives_the_same_bits_twice():
    torch.use_deterministic_algorithms(True)
    try:
        found = []
        for _ in range(2):
            model = gpu_model()
            row = real_bytes(2, LENGTH).cuda()
            with torch.autocast("cuda", torch.bfloat16):
                out = model(row, row, noise_step=1)
            out.total_loss.backward()
            found.append([p.grad for p in model.parameters() if p.grad is not None])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_checkpointing_changes_no_gradient():
    row = real_bytes(2, LENGTH).cuda()
    grads = []
    for on in (False, True):
        model = gpu_model()
        model.set_activation_checkpointing(on)
        model(row, row, noise_step=2).total_loss.backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        assert (a - b).norm() <= 1e-5 * a.norm() + 1e-8


def test_opcheck_of_the_triton_bodies():
    model = gpu_model(layers="8", n_layer=1)
    row = real_bytes(1, 4 * W).cuda()
    calls = []
    for name in ("_attend", "_group_attend", "_select", "_refine", "_assign"):
        op = getattr(dispatch, name)

        def keep(*args, op=op):
            calls.append((op, args))
            return op(*args)

        setattr(dispatch, name, keep)
    try:
        model(row, noise_step=1)
    finally:
        for op, _ in calls:
            setattr(dispatch, f"_{op._name}", op)
    assert len({op._name for op, _ in calls}) == 5
    for op, args in calls:
        args = [
            a.detach().clone().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a
            for a in args
        ]
        torch.library.opcheck(
            op, tuple(args), test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
        )


def test_training_follows_the_reference():
    """200 steps, the same batches. 100 steps are the same curve. After them the text begins to be copied, and
    what rounding alone does grows a hundredfold: three references tell how far."""
    curves = []
    for backend, half, rounded in (
        ("reference", False, False),
        ("reference", True, False),
        ("reference", True, True),
        ("triton", True, False),
    ):
        model = CoGAGPT(CoGAConfig.preset("tiny", backend=backend, seed=1)).cuda()
        if rounded:
            with torch.no_grad():
                for p in model.parameters():
                    p.copy_(p.bfloat16())
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        curve = []
        for number in range(200):
            row = real_bytes(4, 801, seed=number).cuda()
            with torch.autocast("cuda", torch.bfloat16, enabled=half):
                out = model(row[:, :-1], row[:, 1:], noise_step=number)
            out.total_loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            model.update_groups(out)
            curve.append(out.loss.detach())
        curves.append(torch.stack(curve).float().cpu().view(10, 20).mean(1))
    exact, reference, rounded, ours = curves
    noise = torch.stack([reference - exact, rounded - exact, rounded - reference]).abs().amax(0)
    gap = (ours - reference).abs()
    print("means of 20 steps:", *(x.tolist() for x in (exact, reference, rounded, ours)))
    assert reference[-1] < reference[0] - 1
    assert gap[:5].max() <= 2 * noise[:5].max() + 0.01
    assert gap.max() <= 2 * noise.max() + 0.02


def test_131072_tokens_and_offsets_past_2_to_the_31():
    """15 rows of 131,072 tokens: 2.3e9 elements of queries; the last row equals the row alone, to the bit."""
    rows, length, heads, content, width, window, size, count = 15, 131072, 12, 64, 96, 512, 32, 16
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GiB of free GPU memory")
    draw = torch.Generator("cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, device="cuda", dtype=torch.bfloat16) * width**-0.25

    q, latent, group = (
        normal(rows, length, heads, width),
        normal(rows, length, width),
        normal(rows, length // size, width),
    )
    assert q.numel() > 2**31
    far_bias = torch.zeros(heads, device="cuda")
    total = length // size
    sizes = torch.full((rows, total), size, device="cuda")
    offset = sizes.cumsum(1) - sizes
    log_size = sizes.float().log()
    opened = dispatch.select(
        q.mean(2), group, log_size, count=count, window=window, groups=window // size, backend="triton"
    )

    def run(part: slice):
        x = [t[part].detach().requires_grad_() for t in (q, latent, group)]
        far = dispatch.Far(
            group_BML=x[2], log_size_BM=log_size[part], far_bias_H=far_bias, slot_BSL=x[1],
            offset_BM=offset[part], size_BM=sizes[part], open_BTK=opened[part],
            groups=window // size, slots=size,
        )  # fmt: skip
        out, _ = dispatch.attend(
            x[0], x[1], content=content, window=window, far=far, sink_H=far_bias, backend="triton"
        )
        out.backward(q[part, ..., :content])
        return out.detach()[-1], x[0].grad[-1], x[1].grad[-1], x[2].grad[-1]

    last = run(slice(rows - 1, rows))
    found = run(slice(0, rows))
    for name, a, b in zip(("out", "dq", "dlatent", "dgroup"), found, last, strict=True):
        assert b.isfinite().all() and b.float().norm() > 0
        assert (a - b).float().norm() <= 5e-3 * b.float().norm(), name
    assert torch.equal(found[0], last[0]) and torch.equal(found[1], last[1])
