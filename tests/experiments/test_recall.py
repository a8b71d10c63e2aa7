"""recall.py: targets that a plain reading of the sequence gives, what is out of reach, rows, bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import _recall
import numpy as np
import pytest
import recall
import torch
from _recall import Vocabulary, classes, mqar, needle, recalled, scattered, stack

from coga import CoGAConfig
from coga.models import CoGAGPT

SCRIPT = recall

VOCAB = Vocabulary(keys=12, values=5, noise=3)
FUSED = Vocabulary(keys=12, values=5, noise=3, fused=True)
TINY = [
    "--n", "64", "--max-length", "128", "--window", "16", "--layers", "near 4", "--open-groups", "2",
    "--steps", "2", "--warmup-steps", "2", "--batch", "2", "--pairs", "4", "--keys", "8", "--values", "4",
    "--noise", "4", "--samples", "3", "--depths", "3", "--set", "band=8", "--set", "d_model=16",
    "--set", "latent_dim=8", "--set", "rope_dim=4", "--device", "cpu",
]  # fmt: skip


def read_plainly(tokens: list[int], query: int) -> tuple[int, int]:
    """The answer to the key at `query` and where it stands: look for the key further up."""
    place = next(i for i in range(query) if tokens[i] == tokens[query])
    return tokens[place + 1], place + 1


@pytest.mark.parametrize("length", [40, 41, 97])
@pytest.mark.parametrize("kind", ["mqar", "scattered", "needle"])
def test_targets_are_what_a_plain_reading_gives(kind, length):
    for seed in range(10):
        draw = np.random.default_rng(seed)
        if kind == "needle":
            row = needle(draw, VOCAB, length, seed / 9, 10)
            assert row.query.tolist() == [length - 1]
        else:
            row = {"mqar": mqar, "scattered": scattered}[kind](draw, VOCAB, length, 10)
            assert len(row.query) == 10
        tokens, targets = (x[0].tolist() for x in stack([row]))
        assert len(tokens) == length
        assert all(0 <= t < VOCAB.size for t in tokens)
        asked = [i for i, t in enumerate(targets) if t != -100]
        assert sorted(row.query.tolist()) == asked
        keys = [t for t in tokens if t < VOCAB.keys]
        assert all(keys.count(tokens[i]) == 2 for i in asked)  # once in its pair, once asked
        assert len(set(keys)) == 10
        for query, pair in zip(row.query.tolist(), row.pair.tolist()):
            answer, place = read_plainly(tokens, query)
            assert (targets[query], pair) == (answer, place)
            assert VOCAB.keys <= answer < VOCAB.keys + VOCAB.values
            if query + 1 < length:
                assert tokens[query + 1] == answer  # what the model reads next is the answer


@pytest.mark.parametrize("make", [mqar, scattered])
def test_fused_pairs_hold_key_and_value_in_one_token(make):
    row = make(np.random.default_rng(2), FUSED, 50, 10)
    targets = stack([row])[1][0].tolist()
    for query, pair in zip(row.query.tolist(), row.pair.tolist()):
        key, value = divmod(int(row.tokens[pair]) - 20, 5)
        assert 0 <= pair < query and key == row.tokens[query]
        assert targets[query] == 12 + value
    assert (row.tokens >= 20).sum() == 10 and row.tokens.max() < FUSED.size == 80


def test_mqar_asks_late_questions_at_the_end_and_early_ones_after_the_pairs():
    row = mqar(np.random.default_rng(0), VOCAB, 100, 8)
    assert row.query.tolist() == [16, 18, 88, 90, 92, 94, 96, 98]
    assert (row.tokens[20:88] >= VOCAB.keys + VOCAB.values).all()


@pytest.mark.parametrize("length", [64, 65])
def test_depth_runs_from_the_start_to_right_before_the_question(length):
    first, middle, last = (needle(np.random.default_rng(1), VOCAB, length, d, 4).pair[0] for d in (0, 0.5, 1))
    assert first in (1, 2)
    assert abs(middle - length / 2) <= 2
    assert last == length - 2


def test_batches_are_a_function_of_seed_and_step():
    args = recall.arguments(TINY)
    (a, ta), (b, tb) = recall.training_batch(args, 3), recall.training_batch(args, 3)
    assert torch.equal(a, b) and torch.equal(ta, tb)
    assert not torch.equal(a, recall.training_batch(args, 4)[0])
    assert recall.training_batch(args, 0)[0].shape == (4, 32)  # short contexts, as many tokens
    assert a.shape == (2, 64)


def test_out_of_reach_is_where_a_local_model_has_no_gradient():
    """The logit of a question depends on nothing that is out of reach, and on something just inside it."""
    config = CoGAConfig.preset("tiny", n_layer=2, layers="near", window=8, band=4, vocab_size=VOCAB.size)
    model = CoGAGPT(config)
    length, query = 61, 50
    embedded: list[torch.Tensor] = []

    def keep(module, inputs, output):
        output.requires_grad_()
        output.retain_grad()
        embedded.append(output)

    model.embedding.register_forward_hook(keep)
    model(torch.zeros(1, length, dtype=torch.int64)).logits[0, query].square().sum().backward()
    reached = embedded[0].grad[0].abs().sum(-1) > 0
    row = _recall.Row(np.zeros(length), np.full(length, query), np.arange(length), np.zeros(length))
    beyond, out_of_reach = classes(row, config)
    assert (~reached[: query + 1].numpy() == out_of_reach[: query + 1]).all()
    assert out_of_reach.sum() == 32 and beyond.sum() == 40


def test_recalled_counts_the_models_own_choices():
    """A head that always says one value is right exactly where that value is asked for."""
    config = CoGAConfig.preset("tiny", layers="near", vocab_size=VOCAB.size, tie_embeddings=False)
    model = CoGAGPT(config)
    rows = [mqar(np.random.default_rng(i), VOCAB, 40, 10) for i in range(5)]
    said = VOCAB.keys + 2
    logits = model(stack(rows)[0]).logits
    found = recalled(model, rows, torch.device("cpu"), 80)
    assert [len(one) for one in found] == [10] * 5
    for row, one, logit in zip(rows, found, logits):
        best = logit.argmax(-1).numpy()
        assert (one == (best[row.query] == row.answer)).all()
    model.norm = Constant(config.d_model)
    torch.nn.init.zeros_(model.head.weight)
    with torch.no_grad():
        model.head.weight[said] = 1
    for row, one in zip(rows, recalled(model, rows, torch.device("cpu"), 80)):
        assert (one == (row.answer == said)).all()
        assert one.sum() < 10


class Constant(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x):
        return torch.ones_like(x)


# --- a run -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recall") / "run"
    assert recall.main([*TINY, "--arms", "near,gumbel:beta=4,mha", "--out", str(folder)]) == 0
    return folder


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_what_a_run_leaves(run):
    names = {path.name for path in run.iterdir()}
    pictures = {"mqar.png", "depth.png", "heat-near.png", "heat-gumbel_beta=4.png", "heat-mha.png"}
    assert names == pictures | {"config.json", "rows.jsonl", "warm-up"}
    assert all((run / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    assert len(list((run / "warm-up").iterdir())) == 2  # one for near and gumbel, one for mha
    rows = rows_of(run)
    assert [row["arm"] for row in rows] == ["near", "gumbel:beta=4", "mha"]
    for row in rows:
        assert row["lengths"] == [64, 128]
        assert np.shape(row["needle"]) == (2, 3)
        assert row["chance"] == 0.25
        for one in row["mqar"]:
            asked = one["questions"]
            assert asked["inside"] + asked["beyond"] == asked["all"] == 12
            assert 0 <= asked["out_of_reach"] <= asked["beyond"]
        assert row["mqar"][1]["questions"]["out_of_reach"] > 0
        assert {"device", "torch", "date", "command", "seed"} <= row.keys()
    questions = [[one["questions"] for one in row["mqar"]] for row in rows]
    assert questions[0] == questions[1] == questions[2]


def test_resume_keeps_rows_and_adds_the_missing_arm(run, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(run, folder)
    kept = (run / "rows.jsonl").read_text().splitlines(keepends=True)
    (folder / "rows.jsonl").write_text(kept[0] + kept[1][:40])  # killed while the second was written
    arms = "near,gumbel:beta=4,mha"
    assert recall.main([*TINY, "--arms", arms, "--out", str(folder), "--resume"]) == 0
    again, before = rows_of(folder), rows_of(run)
    assert again[0] == before[0]
    for key in ("losses", "mqar", "needle"):
        assert [row[key] for row in again] == [row[key] for row in before]


MALFORMED = [({"arm": None}, "another experiment"), ({"mqar": None}, "another experiment"),
             ({"model": []}, "says nothing"), ({"arm": "foo"}, "'foo', which means nothing today"),
             ({"arm": "gumbel,near"}, "means nothing today")]  # fmt: skip


@pytest.mark.parametrize("arms", ["gumbel:beta=4", "full"])
def test_rows_of_other_models_are_refused(arms, run, tmp_path, refused):
    """Of an arm that is asked for, and of another: a default that has changed would part them in silence."""
    folder = tmp_path / "copy"
    shutil.copytree(run, folder)
    path = folder / "rows.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    again = [*TINY, "--arms", arms, "--out", str(folder), "--resume"]
    for row in rows:
        row["model"]["capacity_factor"] = 3.0
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "capacity_factor=3.0" in refused(again)
    for row in rows:
        del row["model"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "says nothing of its model" in refused(again)
    for broken, expected in MALFORMED:
        path.write_text(json.dumps(rows[0] | {"model": {}} | broken) + "\n")
        assert expected in refused(again)


def test_an_existing_run_is_left_alone(run, refused):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert "already holds" in refused([*TINY, "--out", str(run)])
    assert "steps=3" in refused([*TINY, "--out", str(run), "--resume", "--steps", "3"])
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


# --- bad input ---------------------------------------------------------------------------------------------

BAD = {
    "n-0": (["--n", "0"], "n=0"),
    "n-above-max-len": (["--n", "200000", "--max-length", "200000"], "max_len=131072"),
    "length-above-max-len": (["--max-length", "200000"], "max_length=200000"),
    "length-below-n": (["--max-length", "32"], "max_length=32"),
    "arm": (["--arms", "near,magic"], "'magic'"),
    "arm-twice": (["--arms", "near,near"], "twice"),
    "arm-field": (["--arms", "near:colour=1"], "colour"),
    "arm-shrinks": (["--arms", "near:dense_latent_dim=64"], "dense_latent_dim=64: only ablate.py"),
    "arm-starts": (["--arms", "near:sink=false,dense=plain"], "dense='plain': only ablate.py"),
    "keys": (["--keys", "3"], "keys=3"),
    "pairs": (["--pairs", "17", "--keys", "20"], "n=64"),
    "values": (["--values", "1"], "values=1"),
    "depths": (["--depths", "1"], "depths=1"),
    "window": (["--window", "18"], "multiple of every group size"),
    "preset": (["--preset", "huge"], "preset='huge'"),
    "device": (["--device", "abacus"], "device='abacus'"),
    "graph": (["--graph", "--device", "cpu"], "graph=True: needs a CUDA device"),
    "lr": (["--lr", "nan"], "lr=nan"),
    "seed": (["--seed", "-1"], "seed=-1"),
    "vocabulary": (["--set", "vocab_size=4"], "vocab_size=4"),
    "flag": (["--colour"], "--colour"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_writes_nothing(name, refused_and_nothing_written):
    arguments, expected = BAD[name]
    assert expected in refused_and_nothing_written([*TINY, *arguments])


def test_a_folder_that_cannot_be_written(tmp_path, refused):
    (tmp_path / "file").write_text("kept")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        assert "out=" in refused([*TINY, "--out", str(place)])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "kept"


def test_a_folder_of_something_else_is_left_alone(tmp_path, refused):
    (tmp_path / "config.json").write_text("{}")
    for more in ([], ["--resume"]):
        assert "config.json" in refused([*TINY, "--out", str(tmp_path), *more])
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_text() == "{}"
