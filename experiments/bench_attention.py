"""Time whole attention modules on a GPU: CoGA against multi-head attention with the fastest SDPA backend.

    python experiments/bench_attention.py --out runs/bench

A module is timed from input to output: projections, grouping with its capacity assignment, pooling, group
attention, selection, gate and output projection included; forward, and forward with backward; both sides
compiled and recorded as a CUDA graph, so that the GPU is timed and not the host; medians; batch x length
tokens. The time of the same calls launched one by one stands beside it (`launched_ms`).

Before anything is timed, the attention op is compared with the float32 reference at a length the reference
can afford, its error relative to that of plain PyTorch in the same dtype: where that check is red, no speed
is printed. Rows go to DIR/attention_speed.json, those of --parts to DIR/attention_parts.json; a folder that
has rows is refused. Exit codes: 0 done, 1 a check is red, 2 bad input.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import triton
from _arms import parse_integers
from _common import StrictParser, fail, fresh_folder, write_text
from _gpu_time import median_ms, recorded, roofs
from _script import at_least
from _speed_parts import PARTS_HEAD, measure_parts, part_line, parts
from _speed_plot import dense_times, plot_speed
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from coga import CoGAConfig
from coga.kernels import dispatch
from coga.models.attention import AttentionOutput, CoGAAttention
from coga.models.context import CallContext
from coga.models.mha import MultiHeadAttention

DIM, HEADS = 768, 12
ROWS = "attention_speed.json"
PARTS_LENGTH = 32768
FIXED = dict(
    latent_dim=64, rope_dim=32, window=512, layers="32", open_groups=16, capacity_factor=1.0,
    refine_groups=True, reciprocal_groups=True, selection="summary", summaries=True, index_weight=0.0,
    output_gate=True,
)  # fmt: skip
LETTERS = {"C": "latent_dim", "P": "rope_dim", "W": "window", "R": "layers", "K": "open_groups",
           "refine": "refine_groups", "steps": "refine_steps", "members": "selection",
           "index": "index_weight", "summaries": "summaries", "cap": "capacity_factor",
           "gate": "output_gate"}  # fmt: skip
CHOICES = {  # by number, 0 or 1
    "refine_groups": (False, True),
    "selection": ("summary", "members"),
    "index_weight": (0.0, CoGAConfig.index_weight),
    "summaries": (False, True),
    "output_gate": (False, True),
}


def setting_of(name: str) -> dict:
    """ "fixed", "full" and "near", or what differs from fixed: R64-K8, W256, cap1.5. ValueError else."""
    if name in ("fixed", "full", "near"):
        return FIXED | ({} if name == "fixed" else {"layers": name})
    changes: dict = {}
    for part in name.split("-"):
        found = re.fullmatch(r"([A-Za-z]+)(\d+(?:\.\d+)?)", part)
        field = LETTERS.get(found[1]) if found else None
        if found is None or field is None or field in changes:
            rule = "must be fixed, full, near, or parts such as R64-K8-refine0 of " + ", ".join(LETTERS)
            raise ValueError(f"settings={name!r}: {rule}")
        number = float(found[2]) if "." in found[2] else int(found[2])
        if field in CHOICES:
            if number not in (0, 1):
                raise ValueError(f"settings={name!r}: {found[1]} must be 0 or 1, for {CHOICES[field]}")
            changes[field] = CHOICES[field][int(number)]
        else:
            changes[field] = str(number) if field == "layers" else number
    setting = FIXED | changes
    module_of(setting)
    return setting


def module_of(setting: dict, **changes) -> tuple[CoGAAttention, CoGAConfig]:
    config = CoGAConfig(
        **{**dict(vocab_size=256, n_layer=1, n_head=HEADS, d_model=DIM), **setting, **changes}
    )
    torch.manual_seed(0)
    module = CoGAAttention(config, config.layer(0))
    for name, parameter in module.named_parameters():
        if name.endswith("weight"):
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        if name.endswith("up_HCE"):
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        if name.endswith(("alpha_H", "sink_H", "far_bias_H")):
            nn.init.normal_(parameter, std=0.1)
    return module, config


def context_of(config: CoGAConfig, length: int, width: int, dtype: torch.dtype, device: str) -> CallContext:
    return CallContext.of(
        torch.arange(length, device=device),
        {width},
        config.rope_theta,
        dtype,
        length_B=None,
        noise_step=torch.zeros((), dtype=torch.int64, device=device),
        step=torch.zeros((), dtype=torch.int64, device=device),
        training=True,
        backend=config.backend,
    )


def measure(
    module: nn.Module, x: Tensor, context: CallContext, repeats: int
) -> dict[str, tuple[float, float, float]]:
    """(ms, peak MiB, ms launched one by one) of "fwd" (no grad) and "fwd+bwd"."""
    grad = torch.randn_like(x)

    def forward():
        with torch.no_grad():
            return module(x, context)

    def both():
        x.grad = None
        module(x, context).y_BTD.backward(grad)
        for parameter in module.parameters():
            parameter.grad = None

    found = {}
    for name, run in (("fwd", forward), ("fwd+bwd", both)):
        launched = median_ms(run, min(repeats, 5))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        graph = recorded(run)
        found[name] = median_ms(graph.replay, repeats), peak, launched
        del graph
    return found


def inputs_of(module: CoGAAttention, config: CoGAConfig, length: int, dtype: torch.dtype):
    """Real inputs of the attention op: queries, latents, groups and selection of a random sequence."""
    device = "cuda"
    module = module.to(device, torch.float32)
    context = context_of(config.replace(backend="reference"), length, config.rope_dim, torch.float32, device)
    with torch.no_grad():
        x = torch.randn(1, length, DIM, device=device)
        table = context.tables[config.rope_dim]
        q, latent = module.projections.queries(x, table), module.projections.latents(x, table)
        far = module._groups(x, q, latent, context)[1] if module.layer.kind == "group" else None
    return q, latent, far


def check(setting: dict, dtype: torch.dtype, length: int = 4096) -> tuple[bool, dict[str, float]]:
    """Error of the op over the error of plain PyTorch in the same dtype; both against float32."""
    module, config = module_of(setting)
    q, latent, far = inputs_of(module, config, length, dtype)
    window = None if module.layer.kind == "full" else module.layer.window
    grad = torch.randn(*q.shape[:3], config.layer(0).latent_dim, device=q.device)

    names = ["out", "dq", "dlatent"]
    if far is not None:
        names += [n for n, x in (("dgroup", far.group_BML), ("dslot", far.slot_BSL)) if x is not None]

    def run(kind: torch.dtype, backend: str, rounded: bool) -> list[Tensor]:
        def leaf(x: Tensor) -> Tensor:
            x = x.detach().to(dtype) if rounded else x.detach()
            return x.to(kind).requires_grad_()

        a, b = leaf(q), leaf(latent)
        wanted = [a, b]
        here = None
        if far is not None:
            group, slot = (None if x is None else leaf(x) for x in (far.group_BML, far.slot_BSL))
            here = replace(far, group_BML=group, slot_BSL=slot)
            wanted += [x for x in (group, slot) if x is not None]
        out, _ = dispatch.attend(
            a,
            b,
            content=config.layer(0).latent_dim,
            window=window,
            band=config.band,
            alpha_H=module.alpha_H,
            sink_H=module.sink_H,
            far=here,
            backend=backend,
        )
        grads = torch.autograd.grad(out, wanted, grad.to(kind))
        return [out.detach().float(), *[g.float() for g in grads]]

    exact = run(torch.float32, "reference", rounded=True)
    ours = run(dtype, "auto", rounded=True)
    # Plain PyTorch in the dtype: the reference's result, rounded to the dtype, is its best case, so compare
    # with dense attention's own error there: SDPA in the dtype on tensors of the same scale.
    plain = plain_error(dtype)
    ratio = {
        name: float((o - e).norm() / e.norm().clamp_min(1e-20)) / plain
        for name, e, o in zip(names, exact, ours, strict=True)
    }
    return all(r <= 2 and r == r for r in ratio.values()), ratio


def plain_error(dtype: torch.dtype) -> float:
    """Relative error of softmax(q k^T) v written in plain PyTorch in `dtype`."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(4, 512, 64, device="cuda").to(dtype).float() for _ in range(3))
    exact = (q @ k.transpose(1, 2) / 8).softmax(-1) @ v
    a, b, c = (x.to(dtype) for x in (q, k, v))
    return float((((a @ b.transpose(1, 2) / 8).softmax(-1) @ c).float() - exact).norm() / exact.norm())


class FlexAttention(MultiHeadAttention):
    """The baseline with FlexAttention and a causal block mask in place of SDPA."""

    def forward(self, x_BTD: Tensor, context: CallContext) -> AttentionOutput:
        q, k, v = (x.transpose(1, 2) for x in self.project(x_BTD, context))
        y = flex_attention(q, k, v, block_mask=self.mask)
        return AttentionOutput(self.out(rearrange(y, "b h t e -> b t (h e)")), None, {})


def dense_rows(lengths: list[int], tokens, repeats: int, dtype, flex: bool) -> list[dict]:
    """The baseline: the module with every SDPA backend that runs, and FlexAttention, compiled."""
    rows = []
    config = CoGAConfig(vocab_size=256, n_layer=1, n_head=HEADS, d_model=DIM, layers="mha")
    kinds = [("sdpa-cudnn", SDPBackend.CUDNN_ATTENTION), ("sdpa-flash", SDPBackend.FLASH_ATTENTION)]
    for length in lengths:
        batch = tokens(length) // length
        for name, backend in kinds + [("flex", None)] * flex:
            torch.manual_seed(0)
            kind = FlexAttention if backend is None else MultiHeadAttention
            module = kind(config, config.layer(0)).to("cuda", dtype)
            x = torch.randn(batch, length, DIM, device="cuda", dtype=dtype, requires_grad=True)
            context = context_of(config, length, module.rotary, dtype, "cuda")
            with attempt(f"{name} {length}"):
                if backend is None:
                    module.mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length)
                chosen = contextlib.nullcontext() if backend is None else sdpa_kernel(backend)
                with chosen:
                    found = measure(torch.compile(module), x, context, repeats)
                rows += [row(name, "12x64", length, batch, p, *v) for p, v in found.items()]
            torch.compiler.reset()
    return rows


def nsa_rows(lengths: list[int], tokens, repeats: int, dtype) -> list[dict]:
    """Native sparse attention of fla-core, where it is installed: compressed and selected parts, core only.

    16 query heads and 1 key/value head of 64, block 64, 16 blocks; its sliding window needs the flash-attn
    package and is left out, which makes these times too good rather than too bad.
    """
    try:
        from fla.ops.nsa import parallel_nsa
    except ImportError as error:
        print(f"nsa: not timed ({error})", flush=True)
        return []
    rows = []
    for length in lengths:
        batch = tokens(length) // length
        q, k, v = (
            torch.randn(batch, length, h, 64, device="cuda", dtype=dtype, requires_grad=True)
            for h in (16, 1, 1)
        )
        gates = [torch.rand(batch, length, 16, device="cuda", dtype=dtype) for _ in range(2)]

        def core(q=q, k=k, v=v, gates=gates):
            return parallel_nsa(q, k, v, *gates, block_counts=16, block_size=64)

        def both(q=q, k=k, v=v, core=core):
            y = core()
            torch.autograd.grad(y, (q, k, v), y)

        for name, run in (("fwd", core), ("fwd+bwd", both)):
            with attempt(f"nsa {length} {name}"), torch.set_grad_enabled(name != "fwd"):
                launched = ms = median_ms(run, repeats)
                with attempt(f"nsa {length} {name}, recorded"):
                    ms = median_ms(recorded(run).replay, repeats)
                rows.append(row("nsa-core", "16/1x64", length, batch, name, ms, 0.0, launched))
    return rows


@contextlib.contextmanager
def attempt(what: str):
    """Report a configuration that cannot run instead of losing the whole benchmark."""
    try:
        yield
    except Exception as error:
        print(f"{what}: did not run ({type(error).__name__}: {str(error).splitlines()[0][:160]})", flush=True)
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def row(implementation, setting, length, batch, kind, ms, peak, launched) -> dict:
    return {
        "implementation": implementation,
        "setting": setting,
        "length": length,
        "batch": batch,
        "pass": kind,
        "ms": round(ms, 4),
        "launched_ms": round(launched, 4),
        "peak_mib": round(peak, 1),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "gpu": torch.cuda.get_device_name(),
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
    }


HEAD = (
    f"{'implementation':16s}{'setting':14s}{'length':>8s} {'pass':8s}{'ms':>9s}{'launched':>9s}{'MiB':>7s}"
    f"{'x dense':>9s}"
)


def line(row: dict, best: dict) -> str:
    """One row, with its speed-up over the faster dense backend at the same length and pass."""
    dense = best.get((row.get("commit"), row["length"], row["pass"]))
    speed = f"{dense / row['ms']:9.2f}" if dense else f"{'-':>9s}"
    return (
        f"{row['implementation']:16s}{row['setting']:14s}{row['length']:8d} {row['pass']:8s}"
        f"{row['ms']:9.3f}{row['launched_ms']:9.3f}{row['peak_mib']:7.0f}{speed}"
    )


def report(rows: list[dict], folder: Path) -> None:
    """The table, on stdout, and the picture."""
    print(HEAD)
    best = dense_times(rows)
    for one in sorted(rows, key=lambda r: (r["pass"], r["length"], r["implementation"], r["setting"])):
        print(line(one, best))
    plot_speed(rows, folder / "attention_speed.png")


def parts_of(name: str, setting: dict, dtype: torch.dtype, tokens: int, repeats: int) -> Iterator[dict]:
    """The parts of a setting beside their floors, printed as well; a row as soon as it is there."""
    module, config = module_of(setting)
    module = module.to("cuda", dtype)
    batch = max(1, tokens // PARTS_LENGTH)
    x = torch.randn(batch, PARTS_LENGTH, DIM, device="cuda", dtype=dtype)
    context = context_of(config, PARTS_LENGTH, config.rope_dim, dtype, "cuda")
    roof = roofs(dtype)
    rates = f"{roof[0] / 1e12:.0f} TFLOP/s, {roof[1] / 1e12:.2f} TB/s"
    print(f"parts of {name} at {batch} x {PARTS_LENGTH:,}; this GPU: {rates}")
    print(PARTS_HEAD)

    def time_ms(run) -> float:
        return median_ms(recorded(run).replay, repeats)

    pieces = parts(module, config, x, context)
    for one in measure_parts(pieces, batch * PARTS_LENGTH, roof, time_ms, attempt):
        print(part_line(one), flush=True)
        some = {k: round(one[k], 4) for k in ("floor_ms", "gflop", "mb")}
        made = row("coga", name, PARTS_LENGTH, batch, one["pass"], one["ms"], 0.0, 0.0)
        del made["peak_mib"], made["launched_ms"]
        reached = {"reached_flops": roof[0], "reached_bytes_per_s": roof[1]}
        yield made | {"part": one["part"].strip(), "bound": one["bound"]} | some | reached


def report_only(folder: Path) -> int:
    path = folder / ROWS
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        wanted = {"implementation", "setting", "length", "pass", "ms", "launched_ms", "peak_mib"}
        if not isinstance(rows, list) or not all(isinstance(r, dict) and wanted <= r.keys() for r in rows):
            raise ValueError("not the rows of this benchmark")
        report(rows, folder)
    except (OSError, ValueError) as error:
        return fail(f"out={str(folder)!r}: no readable {path.name} ({error})")
    return 0


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = StrictParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="4096,8192,16384,32768,65536,131072")
    parser.add_argument("--settings", default="fixed", help="fixed, full, near, or changes: R64-K8,W256,C128")
    parser.add_argument("--tokens", type=int, default=65536, help="tokens a batch (a longer length: one row)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--peers", action="store_true", help="also time FlexAttention and fla-core's NSA")
    parser.add_argument(
        "--parts",
        default="",
        metavar="SETTINGS",
        help="of these settings, also time the parts beside their floors, at 32K",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--report-only", action="store_true", help="table and picture of the rows in DIR")
    return parser.parse_args(argv)


def check_arguments(args: argparse.Namespace) -> tuple[list[int], dict[str, dict], list[str]]:
    """Lengths, settings by name, and which of them to time part by part. ValueError: field, value, rule."""
    at_least(args, 1, "tokens", "repeats")
    lengths = parse_integers(args.lengths, "lengths", 1)
    settings = {name: setting_of(name) for name in args.settings.split(",")}
    divided = [name for name in args.parts.split(",") if name]
    for name in divided:
        if name not in settings or name in ("full", "near"):
            raise ValueError(f"parts={name!r}: must be one of settings, and have groups")
    if not torch.cuda.is_available():
        raise ValueError("device: needs a CUDA GPU")
    fresh_folder(args.out, ROWS)
    return lengths, settings, divided


def main(argv: list[str] | None = None) -> int:
    try:
        args = arguments(argv)
        if args.report_only:
            return report_only(args.out)
        lengths, settings, divided = check_arguments(args)
    except ValueError as error:
        return fail(error)
    print(vars(args) | {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}, flush=True)
    dtype = getattr(torch, args.dtype)

    def tokens(length: int) -> int:
        return max(args.tokens, length)

    def save() -> None:
        write_text(args.out / ROWS, json.dumps(rows, indent=1) + "\n")

    rows = dense_rows(lengths, tokens, args.repeats, dtype, args.peers)
    if args.peers:
        rows += nsa_rows(lengths, tokens, args.repeats, dtype)
    save()  # what was timed stays, whatever comes
    red, timed = [], []
    best = dense_times(rows)
    print(HEAD)
    for name, setting in settings.items():
        good, ratio = False, {}
        with attempt(f"check {name}"):
            good, ratio = check(setting, dtype)
        shown = {k: round(v, 2) for k, v in ratio.items()}
        print(f"check {name}: {'ok' if good else 'RED'}, error over plain PyTorch's: {shown}", flush=True)
        if not good:
            red.append(name)
            continue
        if name in divided:
            with attempt(f"parts {name}"):
                for one in parts_of(name, setting, dtype, args.tokens, args.repeats):
                    timed.append(one)
                    write_text(args.out / "attention_parts.json", json.dumps(timed, indent=1) + "\n")
            torch.compiler.reset()
            print(HEAD)
        for length in lengths:
            batch = tokens(length) // length
            module, config = module_of(setting)
            module = module.to("cuda", dtype)
            x = torch.randn(batch, length, DIM, device="cuda", dtype=dtype, requires_grad=True)
            context = context_of(config, length, config.rope_dim, dtype, "cuda")
            with attempt(f"coga {name} {length}"):
                compiled = torch.compile(module, fullgraph=True)
                found = measure(compiled, x, context, args.repeats)
                new = [row("coga", name, length, batch, p, *v) for p, v in found.items()]
                rows += new
                save()
                print(*(line(one, best) for one in new), sep="\n", flush=True)
            torch.compiler.reset()
    save()
    report(rows, args.out)
    if red:
        print(f"no speed for {', '.join(red)}: the check is red", file=sys.stderr)
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
