"""Decoding speed on a GPU: a token of one sequence, the gpt2 shape with CoGA layers and its multi-head twin.

    python experiments/bench_decode.py --lengths 8192,32768 --out runs/bench

bf16, a step captured as a CUDA graph (`coga.models.graph`), with and without Inductor's fusion (`compiled`).
The context is random tokens: a step reads all that is stored whatever it says. Median over the steps in
milliseconds, half of them before the length and half after; and the mean, which holds the step that closes a
window where the length is a multiple of one. Before anything is timed, steps around the end of a window are
compared with `model.step`: where they differ by more than bf16 noise, no speed is printed. Rows go to
DIR/decode_speed.json. Exit codes: 0 done, 1 a check is red or nothing ran, 2 bad input.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from _arms import parse_integers
from _common import fresh_folder, names_of, write_text
from _script import at_least, run_script
from bench_attention import attempt, row
from tqdm import tqdm

from coga import CoGAConfig
from coga.models import CoGAGPT
from coga.models.decode import DecodeState
from coga.models.graph import GraphedDecoder

ARMS = {"mha": dict(layers="mha"), "coga": dict(layers="near 32 32 32", latent_dim=64, capacity_factor=1.0)}
MODES = ("captured", "compiled")
TOLERANCE = 0.03  # of the logits' norm; bf16 rounds to 0.004, a dozen layers one after the other


def arguments(argv: list[str] | None) -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--lengths", default="8192,32768", help="tokens in the state (8192,32768)")
    made.add_argument("--arms", default=",".join(ARMS), help=f"of {', '.join(ARMS)} (all)")
    made.add_argument("--modes", default="captured,compiled", help="compiled: fused before it is captured")
    made.add_argument("--steps", type=int, default=200, help="timed (200)")
    made.add_argument("--layers", type=int, default=12, help="(12)")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--out", type=Path, default=Path("runs/bench"))
    return made.parse_args(argv)


def filled(model: CoGAGPT, tokens_BT: torch.Tensor, room: int) -> DecodeState:
    """The state after these tokens, with room for more that a graph can write to."""
    state = model.new_state(tokens_BT.shape[0], tokens_BT.shape[1] + room)
    model.step(tokens_BT, state, last_only=True)
    return state


def error(model: CoGAGPT, tokens_BT: torch.Tensor, compiled: bool, steps: int = 8) -> float:
    """Largest distance of a captured step's logits from those of `model.step`, over their norm."""
    prompt, rest = tokens_BT[:, :-steps], tokens_BT[:, -steps:]
    plain, state = filled(model, prompt, steps), filled(model, prompt, steps)
    decoder, worst = GraphedDecoder(model, state, compiled=compiled), 0.0
    for token_B in rest.unbind(1):
        expected = model.step(token_B[:, None], plain)[0].logits[:, -1].float()
        gap = (decoder(token_B).float() - expected).norm() / expected.norm()
        worst = max(worst, float(gap) if gap == gap else float("inf"))
    return worst


def time_steps(decoder: GraphedDecoder, token_B: torch.Tensor, steps: int) -> list[float]:
    """Milliseconds of each step, the host waiting for each."""
    taken = []
    for _ in range(steps):
        torch.cuda.synchronize()
        began = time.perf_counter()
        decoder(token_B)
        torch.cuda.synchronize()
        taken.append(1e3 * (time.perf_counter() - began))
    return taken


def check(args: argparse.Namespace) -> list[int]:
    at_least(args, 1, "steps", "layers")
    at_least(args, 0, "seed")
    lengths = parse_integers(args.lengths, "lengths", 1)
    if min(lengths) <= args.steps // 2:
        raise ValueError(f"lengths={min(lengths)}: must be above half of steps={args.steps}")
    args.arms, args.modes = names_of(args.arms, "arms", ARMS), names_of(args.modes, "modes", MODES)
    if not torch.cuda.is_available():
        raise ValueError("device: needs a CUDA GPU")
    fresh_folder(args.out, "decode_speed.json")
    return lengths


def body(argv: list[str] | None) -> None:
    args = arguments(argv)
    lengths = check(args)
    base = CoGAConfig.preset("gpt2", n_layer=args.layers, seed=args.seed)
    base = base.replace(max_len=max(base.max_len, max(lengths) + args.steps))
    print(vars(args) | {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}, flush=True)
    generator = torch.Generator().manual_seed(args.seed)
    known = 3 * base.window + 4  # of the check: its last steps close a window, when others are read as groups
    tokens = torch.randint(base.vocab_size, (1, max(known, *lengths)), generator=generator).cuda()
    rows: list[dict] = []
    red: list[str] = []
    todo = [(name, mode) for name in args.arms for mode in args.modes]
    for name, mode in tqdm(todo, desc="decoding", unit="arm", leave=False):
        label, compiled = f"{name} {mode}", mode == "compiled"
        with attempt(label), torch.no_grad():
            model = CoGAGPT(base.replace(**ARMS[name])).cuda().to(torch.bfloat16).eval()
            gap = error(model, tokens[:, :known], compiled)
            if gap > TOLERANCE:
                red.append(label)
                raise RuntimeError(f"captured logits are {gap:.3f} from the plain ones, no speed is reported")
            for length in lengths:
                state = filled(model, tokens[:, : length - args.steps // 2], args.steps)
                decoder = GraphedDecoder(model, state, compiled=compiled)
                taken = sorted(time_steps(decoder, tokens[:, 0], args.steps))
                ms, mean = taken[len(taken) // 2], sum(taken) / len(taken)
                stored = sum(x.nbytes for layer in state.layers for x in layer.tensors.values()) / 2**20
                made = row(name, ARMS[name]["layers"], length, 1, "decode", ms, stored, mean)
                made["state_mib"], made["mean_ms"] = made.pop("peak_mib"), made.pop("launched_ms")
                rows.append(made | {"mode": mode, "layers": args.layers, "error": round(gap, 5)})
                write_text(args.out / "decode_speed.json", json.dumps(rows, indent=1) + "\n")
                tqdm.write(
                    f"{label:16s}{length:8d}{ms:9.3f} ms (mean {mean:.3f}){stored:9.0f} MiB  check {gap:.4f}"
                )
                del state, decoder
            del model
            torch.compiler.reset()
    if red or not rows:
        raise FloatingPointError(f"the check is red: {', '.join(red)}" if red else "nothing could be timed")
    best: dict[tuple[str, int], float] = {}
    for one in rows:
        key = one["implementation"], one["length"]
        best[key] = min(one["ms"], best.get(key, one["ms"]))
    for (name, length), ms in best.items():
        if name != "mha" and ("mha", length) in best:
            print(f"{name:16s}{length:8d}{best['mha', length] / ms:9.2f} x the multi-head twin")


def main(argv: list[str] | None = None) -> int:
    """Run with these arguments; returns the exit code."""
    return run_script(body, argv)


if __name__ == "__main__":
    sys.exit(main())
