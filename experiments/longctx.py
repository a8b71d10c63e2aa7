"""Train a CoGA language model on real text at a long context, and report what came out. The main job.

    python experiments/longctx.py --n 32768
    python experiments/longctx.py --n 32768 --compare mha,near,contiguous,gumbel --out runs/arms
    python experiments/longctx.py --resume --out runs/longctx-32768-tiny-0

The default text is the source of the running interpreter's standard library, as bytes; the default model is
tiny, so that two CPU cores do it in minutes: a warm-up on short contexts, then a few steps at full length.
With --dense-warmup the warm-up is of a dense model, whose groups are then found in the text.
The run folder gets config.json, metrics.jsonl, checkpoint/, report.json, loss.png, positions.png, groups.png
and sample.txt; with --compare one such folder an arm, and report.json and compare.png of them all.

Exit codes: 0 done, 1 a loss that is not finite, 2 settings or files that do not fit (one line, nothing
written), 130 stopped by Ctrl-C, to be resumed.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import _report
from _common import (
    FINISHED,
    OTHER_FILES,
    RUN_FILES,
    choose_device,
    environment,
    fail,
    holds_run,
    machine_line,
    make_folder,
    peak_memory,
    read_json,
    reset_peak_memory,
    write_json,
    write_text,
)
from _evaluate import decode_bytes, evaluate, probe, probe_tokens, sample_text
from _plots import plot_groups, plot_loss, plot_positions, plot_runs
from _settings import Settings, complete, model_config, parse, stored
from _train import NonFinite, Stop, Trainer

from coga.data import Corpus, load_corpus

__all__ = ["main"]


def _prepare(argv: list[str] | None) -> tuple[Settings, Any, Path, bool]:
    """Settings, the rest of the arguments, the run folder, and whether it holds a run to go on with."""
    given, rest = parse(argv, __doc__.splitlines()[0])
    if rest.resume and "n" not in given and not rest.out:
        raise ValueError("out: --resume needs --out DIR, or --n and what else named the folder")
    if rest.out and "n" not in given:
        settings, folder = None, Path(rest.out)
        if not (rest.resume and (folder / "config.json").exists()):
            if not rest.resume:
                raise ValueError("n: must be given (--n N)")
            raise ValueError(f"out={rest.out!r}: holds no run to resume")
    else:
        settings = complete(given)
        folder = Path(rest.out or f"runs/longctx-{settings.n}-{settings.preset}-{settings.seed}")
    if not (rest.resume and (folder / "config.json").exists()):
        # A new run, or one that was killed before it wrote anything.
        assert settings is not None
        rule = "already holds a run; use --resume or another --out"
        if rest.resume:
            rule = "holds parts of a run; its folder has no config.json"
        for place in (folder, *(folder / arm for arm in settings.compare)):
            if holds_run(place, (*RUN_FILES, *OTHER_FILES)):
                raise ValueError(f"out={str(place)!r}: {rule}")
        return settings, rest, folder, False
    content = read_json(folder / "config.json")
    settings = stored(content, given)
    return settings, rest, folder, True


def _describe(settings: Settings, corpus: Corpus, device: Any) -> dict[str, Any]:
    """What config.json holds."""
    return {
        "settings": dataclasses.asdict(settings),
        "model": dataclasses.asdict(model_config(settings, corpus.vocab_size)),
        "corpus": {
            "name": corpus.name,
            "python": corpus.version,
            "sha256": corpus.sha256,
            "train_bytes": corpus.train.bytes,
            "validation_bytes": corpus.validation.bytes,
            "validation_documents": list(corpus.validation.names)[:1000],
        },
        "environment": environment(device),
    }


def _show(settings: Settings, content: dict[str, Any], corpus: Corpus, folder: Path) -> None:
    print(machine_line(content["environment"]))
    print(f"text    {corpus.describe()}")
    shown = ("n_layer", "d_model", "n_head", "latent_dim", "rope_dim", "window", "band", "open_groups")
    fields = " ".join(f"{name}={content['model'][name]}" for name in shown)
    print(f"model   {settings.preset}: layers={content['model']['layers']!r} {fields}")
    print(
        f"        grouping={content['model']['grouping']} vocab_size={content['model']['vocab_size']}"
        f" changed={json.dumps(settings.model)}"
    )
    dense = "dense " if settings.dense_warmup else ""
    print(
        f"run     {dense}warm-up: {settings.warmup_steps} steps of {settings.warmup_batch} x "
        f"{settings.warmup_len:,}; then {settings.steps} steps of {settings.batch} x {settings.n:,}; "
        f"AdamW lr {settings.lr:g}, seed {settings.seed}"
    )
    print(f"out     {folder}", flush=True)


def _finish(trainer: Trainer) -> dict[str, Any]:
    """Evaluate, draw, sample, and write the report last: a folder that has it is complete."""
    settings, corpus, device, folder = trainer.settings, trainer.corpus, trainer.device, trainer.folder
    model = trainer.model
    print(f"evaluating on {settings.validation} held-out context(s) of {settings.n:,} tokens", flush=True)
    report = evaluate(model, corpus, settings.n, settings.validation, device)
    report |= trainer.last_metrics
    report |= decode_bytes(model.config, settings.n, 2 if device.type == "cuda" else 4)
    report["tokens_per_second"] = trainer.tokens / trainer.seconds if trainer.seconds else None
    report["parameters"] = sum(p.numel() for p in model.parameters())
    report["peak_bytes"] = peak_memory(device)
    report["environment"] = environment(device)
    records = trainer.records()
    tokens = probe_tokens(corpus, settings.n).to(device)
    caught = probe(model, tokens, {}).caught
    plot_loss(folder / "loss.png", {"loss": records})
    plot_positions(folder / "positions.png", {"model": report})
    plot_groups(folder / "groups.png", caught, tokens.tolist(), -1)
    write_text(folder / "sample.txt", sample_text(model, corpus, settings, device))
    write_json(folder / FINISHED, report)
    return report


def _train(settings: Settings, corpus: Corpus, folder: Path, rest: Any, resume: bool) -> dict[str, Any]:
    """One run from wherever it stands to its report."""
    device = choose_device(rest.device)
    if resume and (folder / FINISHED).exists():
        print(f"{folder}: already finished")
        return read_json(folder / FINISHED)
    if not resume and holds_run(folder):
        raise ValueError(f"out={str(folder)!r}: already holds a run; use --resume or another --out")
    trainer = Trainer(settings, corpus, device, folder, rest.save_every)
    if trainer.step:
        print(f"going on after step {trainer.step} of {settings.total}", flush=True)
    make_folder(folder)
    if not resume:
        write_json(folder / "config.json", _describe(settings, corpus, device))
    trainer.run()
    return _finish(trainer)


def _compare(settings: Settings, corpus: Corpus, folder: Path, rest: Any, resume: bool) -> None:
    """Train the arms one after the other on the same batches; draw and print them together."""
    device = choose_device(rest.device)
    make_folder(folder)
    if not resume:
        write_json(folder / "config.json", _describe(settings, corpus, device))
    reports, runs = {}, {}
    for name in settings.compare:
        arm, place = settings.arm(name), folder / name
        print(f"\narm     {name}: {json.dumps(arm.model)}", flush=True)
        going_on = resume and (place / "config.json").exists()
        if going_on:
            _same_run(place, arm, corpus)
        reset_peak_memory(device)
        reports[name] = _train(arm, corpus, place, rest, going_on)
        lines = (place / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        runs[name] = [json.loads(line) for line in lines]
    plot_runs(folder / "compare.png", runs, reports)
    write_json(folder / FINISHED, reports)
    _report.print_tables(reports)


def _same_run(folder: Path, settings: Settings, corpus: Corpus) -> None:
    """ValueError unless the folder's run has these settings and this text."""
    content = read_json(folder / "config.json")
    try:
        theirs = content["corpus"]["sha256"]
        settled = stored(content, {}) == settings
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'}: holds no settings of a longctx run") from error
    if not settled:
        raise ValueError(f"{folder / 'config.json'}: its settings are not those of this run")
    if theirs != corpus.sha256:
        raise ValueError(
            f"data={corpus.name!r}: has sha256 {corpus.sha256[:16]}, the run to resume {theirs[:16]}"
        )


def main(argv: list[str] | None = None) -> int:
    """Run with these arguments; returns the exit code."""
    began = time.monotonic()
    try:
        settings, rest, folder, resume = _prepare(argv)
        device = choose_device(rest.device)
        corpus = load_corpus(settings.data, length=settings.n, tokenizer=settings.tokenizer)
        content = _describe(settings, corpus, device)
        if resume:
            _same_run(folder, settings, corpus)
        _show(settings, content, corpus, folder)
        if settings.compare:
            _compare(settings, corpus, folder, rest, resume)
        else:
            _report.print_tables({"model": _train(settings, corpus, folder, rest, resume)})
        print(f"{time.monotonic() - began:.0f} s; everything is in {folder}")
    except ValueError as error:
        return fail(error, 2)
    except NonFinite as error:
        return fail(error, 1)
    except Stop as stop:
        print(f"stopped by {stop}; go on with --resume --out {folder}", file=sys.stderr)
        return stop.code
    except KeyboardInterrupt:
        print("stopped; a run that had begun goes on with --resume", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
