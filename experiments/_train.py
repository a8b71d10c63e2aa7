"""The training loop of one run, with checkpoints it can go on from exactly.

A run folder holds `config.json` (settings, model, corpus, machine), `metrics.jsonl` (one line a step; nothing
in it depends on the clock), `checkpoint/` (model as `save_pretrained`, and `train.safetensors`: optimizer,
random state, last probe, counters) and, at the end, what `_report` writes.

Batches, noise and learning rate are functions of (settings, step), so a checkpoint needs little. Killed at
any moment, the run goes on from the last checkpoint; lines of metrics beyond it are dropped and computed
again, to the bit on a CPU. A checkpoint is written beside the old one, then takes its name.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import torch
from _common import precision, write_text
from _copying import copying, copying_line, hardly_copies
from _dense_start import dense_twin
from _evaluate import Probe, probe, probe_tokens
from _script import prototype_text, read_as
from _settings import Settings, model_config
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from coga import CoGAConfig
from coga.data import Corpus, batches, contexts
from coga.models import CoGAGPT

__all__ = ["NonFinite", "Stop", "Trainer"]

PROBES = 20  # over a run
COPIED = 8  # held-out contexts on which copying is measured
CLIP = 1.0


class NonFinite(Exception):
    """The loss or the gradient of a step is not finite."""


class Stop(Exception):
    """A signal asked to stop; the checkpoint is up to date."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


class Trainer:
    """One model on one corpus. Construction is cheap to fail: it writes nothing."""

    def __init__(
        self, settings: Settings, corpus: Corpus, device: torch.device, folder: Path, save_every: float
    ) -> None:
        self.settings, self.corpus, self.device, self.folder = settings, corpus, device, folder
        self.save_every = save_every
        self.config: CoGAConfig = model_config(settings, corpus.vocab_size)
        self.dense_config = dense_twin(self.config) if settings.dense_warmup else self.config
        self.step = 0
        self.seconds, self.tokens = 0.0, 0  # of steps at full length, without the first
        self.previous: dict[str, torch.Tensor] = {}
        self.last_metrics: dict[str, float] = {}
        model = self._load() if self._recover() else None
        self._resumed = model is not None
        self._take(CoGAGPT(self.dense_config) if model is None else model)
        if self._resumed:
            self._load_training_state()
        self.probe_tokens = probe_tokens(corpus, settings.n).to(device)

    def _take(self, model: CoGAGPT) -> None:
        """This is the model to train from now on, with an optimizer of its own."""
        self.model = model.to(self.device).train()
        self.model.set_activation_checkpointing(self.settings.activation_checkpointing)
        if self.settings.compile:
            self.model.compile_blocks()
        # Matrices are decayed, gains and biases are not.
        matrices = [p for p in self.model.parameters() if p.ndim >= 2]
        others = [p for p in self.model.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=self.settings.lr, betas=(0.9, 0.98))

    def _open_groups(self) -> None:
        """From the dense model to the run's own: the same weights and moments, groups found in the text."""
        named = self.model.named_parameters()
        moments = {name: self.optimizer.state[p] for name, p in named if p in self.optimizer.state}
        text = prototype_text(self.corpus, self.settings.n, self.settings.seed)
        self._take(read_as(self.model, far_bias=0.0, text_BT=text, **dataclasses.asdict(self.config)))
        for name, p in self.model.named_parameters():
            if name in moments:
                self.optimizer.state[p] = moments[name]

    def _how_well_it_copies(self) -> str:
        """For the terminal, of the dense model that is to be read through groups."""
        held_out = contexts(self.corpus, self.settings.warmup_len, COPIED)
        found = copying(self.model, *held_out, self.device, self.settings.warmup_batch)
        line = copying_line(found)
        if hardly_copies(found):
            line += ": it hardly copies yet, and groups may lag; a longer dense warm-up may help"
        return line

    # --- the loop ------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train to the end. Raises `NonFinite` and `Stop`."""
        self._trim_metrics()
        total = self.settings.total
        every = max(1, total // PROBES)
        asked: list[int] = []
        signals = (signal.SIGINT, signal.SIGTERM)
        old = {number: signal.getsignal(number) for number in signals}

        def remember(number: int, frame: object) -> None:
            if asked:  # a second time: the last checkpoint will do
                raise KeyboardInterrupt
            asked.append(number)

        saved_at = time.monotonic()
        bar = tqdm(total=total, initial=self.step, unit="step", dynamic_ncols=True, mininterval=0.5)
        try:
            for number in signals:
                signal.signal(number, remember)
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as log:
                while self.step < total:
                    record = self._one_step(bar)
                    if self.step % every == 0 or self.step == total:
                        record |= self._probe().metrics
                    log.write(json.dumps(record) + "\n")
                    log.flush()
                    due = time.monotonic() - saved_at >= self.save_every
                    if due or asked or self.step in (total, self.settings.warmup_steps):
                        self.save()
                        saved_at = time.monotonic()
                    if asked and self.step < total:
                        raise Stop(asked[0])
        finally:
            bar.close()
            for number, handler in old.items():
                signal.signal(number, handler)
        if asked:
            raise Stop(asked[0])

    def _one_step(self, bar: tqdm) -> dict[str, Any]:
        step, began = self.step, time.monotonic()
        if step == self.settings.warmup_steps and self.model.config != self.config:
            bar.set_description("finding groups")
            if line := self._how_well_it_copies():
                bar.write(line)
            self._open_groups()
        length, batch = self.settings.shape(step)
        rate = self.settings.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        tokens, targets = batches(self.corpus, length, batch, self.settings.seed, step)
        with precision(self.device):
            out = self.model(tokens.to(self.device), targets.to(self.device), noise_step=step)
            total_loss = out.total_loss
        total_loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        loss, norm = float(out.loss.detach()), float(norm)
        if not (math.isfinite(loss) and math.isfinite(float(total_loss.detach())) and math.isfinite(norm)):
            raise NonFinite(
                f"step {step + 1}: loss {loss}, gradient norm {norm}: not finite; "
                f"the last good checkpoint stays in {self.folder / 'checkpoint'}"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.update_groups(out)
        self.step += 1
        elapsed = time.monotonic() - began
        short = step < self.settings.warmup_steps
        # The first step at full length is left out of the speed: on a GPU it compiles kernels.
        if not short and (step > self.settings.warmup_steps or self.settings.steps == 1):
            self.seconds += elapsed
            self.tokens += length * batch
        bits = loss / math.log(2) * len(self.corpus.train) / self.corpus.train.bytes
        bar.set_description("warm-up" if short else "training", refresh=False)
        bar.set_postfix_str(
            f"loss {loss:.3f}, {bits:.3f} bits/byte, {length * batch / elapsed:,.0f} tok/s", False
        )
        bar.update(1)
        record = {"step": self.step, "phase": "warm-up" if short else "training", "tokens": length * batch}
        record |= {"loss": loss, "bits_per_byte": bits, "lr": rate, "grad_norm": norm}
        return record | {f"aux_{name}": float(value.detach()) for name, value in out.aux.items()}

    def _probe(self) -> Probe:
        found = probe(self.model, self.probe_tokens, self.previous)
        self.previous = found.index
        self.last_metrics = found.metrics
        return found

    # --- metrics -------------------------------------------------------------------------------------------

    def records(self) -> list[dict[str, Any]]:
        """Whole lines of metrics.jsonl up to the current step."""
        path = self.folder / "metrics.jsonl"
        found = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
            try:
                record = json.loads(line)
                if record["step"] <= self.step:
                    found.append(record)
            except (json.JSONDecodeError, TypeError, KeyError):
                break  # the line that was being written when the run was killed, or one that is damaged
        return found

    def _trim_metrics(self) -> None:
        kept = self.records()
        if len(kept) != self.step:
            raise ValueError(f"{self.folder / 'metrics.jsonl'}: lacks steps that the checkpoint has")
        write_text(self.folder / "metrics.jsonl", "".join(json.dumps(one) + "\n" for one in kept))

    # --- checkpoints ---------------------------------------------------------------------------------------

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    def _recover(self) -> bool:
        """Whether there is a checkpoint; finishes an exchange that was cut off between two renames."""
        old = self.folder / "checkpoint.old"
        if not self.checkpoint.exists() and old.exists():
            os.rename(old, self.checkpoint)
        return self.checkpoint.exists()

    def save(self) -> None:
        """Write a checkpoint under a temporary name, then exchange it with the last one."""
        new, old = self.folder / "checkpoint.tmp", self.folder / "checkpoint.old"
        shutil.rmtree(new, ignore_errors=True)
        self.model.save_pretrained(new)
        tensors = {f"probe.{name}": value for name, value in self.previous.items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
        tensors["rng"] = torch.get_rng_state()
        counters = {
            "step": self.step,
            "seconds": self.seconds,
            "tokens": self.tokens,
            "metrics": self.last_metrics,
        }
        tensors = {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}
        save_file(tensors, new / "train.safetensors", {"counters": json.dumps(counters)})
        for path in new.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        shutil.rmtree(old, ignore_errors=True)
        if self.checkpoint.exists():
            os.rename(self.checkpoint, old)
        os.rename(new, self.checkpoint)
        shutil.rmtree(old, ignore_errors=True)

    def _load(self) -> CoGAGPT:
        model = CoGAGPT.from_pretrained(self.checkpoint)
        # The dense model of a run keeps what belonged to groups when the run began; it makes no use of it.
        dense = self.settings.dense_warmup and model.config.layers == self.dense_config.layers
        if model.config != self.config and not (dense and dense_twin(model.config) == self.dense_config):
            raise ValueError(f"{self.checkpoint}: its config.json does not fit the run's settings")
        return model

    def _load_training_state(self) -> None:
        path = self.checkpoint / "train.safetensors"
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        state: dict[int, dict[str, torch.Tensor]] = {}
        try:
            with safe_open(path, "pt") as file:
                counters = json.loads(file.metadata()["counters"])
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    kind, _, rest = name.partition(".")
                    if kind == "adam":
                        index, _, field = rest.partition(".")
                        state.setdefault(int(index), {})[field] = file.get_tensor(name)
                    elif kind == "probe":
                        self.previous[rest] = file.get_tensor(name)
                torch.set_rng_state(file.get_tensor("rng"))
            self.step, self.seconds = int(counters["step"]), float(counters["seconds"])
            self.tokens, self.last_metrics = int(counters["tokens"]), dict(counters["metrics"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path}: not a readable training state ({error})") from error
        for index, one in state.items():
            if index >= len(parameters) or one["exp_avg"].shape != parameters[index].shape:
                raise ValueError(f"{path}: does not fit the model (state {index})")
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
