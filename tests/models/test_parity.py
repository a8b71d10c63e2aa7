"""Oracle 6: full forward = chunked prefill = token-by-token decode, whatever the chunks; greedy generation.

Real bytes have many equal tokens, hence equal latents and ties: what a chunk length could move.
"""

from __future__ import annotations

import pytest
import torch
from support import (
    GROUPINGS,
    LENGTHS,
    LONGEST,
    PATTERNS,
    READINGS,
    W,
    assert_close,
    case_id,
    make_tokens,
    pairwise,
    read_by,
    real_bytes,
    small_model,
)
from torch import Tensor

from coga.models import CoGAGPT, decode
from coga.models.graph import compiled_advance

CASES = pairwise(
    dict(
        layers=PATTERNS,
        grouping=GROUPINGS,
        chunks=("ones", "windows", "odd", "pieces", "whole"),
        open_groups=(2, 0, 99),
        capacity_factor=(1.0, 1.5, 2.0),
        refine_groups=(True, False),
        reciprocal=(True, False),
        window=(W, (W, 2 * W, W)),
        band=(7, 16, 0),
        max_len=(None, 64),
        sink=(True, False),
        output_gate=(True, False),
        far_warmup=(0, 3),
        selection=READINGS,
    )
)


def chunks_of(kind: str, length: int) -> list[int]:
    if kind == "ones":
        return [1] * length
    step = {"windows": [W], "odd": [5, 17, 1, 34, 3], "pieces": [37, 16], "whole": [length]}[kind]
    sizes: list[int] = []
    while sum(sizes) < length:
        sizes.append(min(step[len(sizes) % len(step)], length - sum(sizes)))
    return sizes


def stepped(model: CoGAGPT, tokens: Tensor, sizes: list[int], max_len: int | None = None) -> Tensor:
    """Logits of `tokens` fed chunk by chunk."""
    state, out, done = model.new_state(tokens.shape[0], max_len), [], 0
    for size in sizes:
        result, state = model.step(tokens[:, done : done + size], state)
        out.append(result.logits)
        done += size
    assert done == tokens.shape[1] and state.lengths == [done] * tokens.shape[0]
    return torch.cat(out, 1)


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda i: case_id(CASES[i]))
def test_any_chunks_give_the_logits_of_the_full_forward(number, monkeypatch):
    case = read_by(CASES[number])
    kind, max_len = case.pop("chunks"), case.pop("max_len")
    if kind == "pieces":
        monkeypatch.setattr(decode, "PIECE", 7)  # a step is cut into pieces itself
    model = small_model(number, **case)
    tokens = real_bytes(2, LONGEST, number)
    with torch.no_grad():
        full = model(tokens).logits
    assert_close(stepped(model, tokens, chunks_of(kind, LONGEST), max_len), full)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", ["ones", "odd"])
def test_short_and_odd_lengths(length, kind):
    model = small_model(7, layers="near 4 8", grouping=("gumbel", "gumbel", "kmeans"))
    tokens = real_bytes(3, length, 5)
    with torch.no_grad():
        assert_close(stepped(model, tokens, chunks_of(kind, length)), model(tokens).logits)


def test_state_that_grows_over_many_windows():
    """Without max_len the storage doubles at 256 tokens; dense, near, grouped and multi-head layers."""
    model = small_model(3, layers="near 4 full mha 8", n_layer=5)
    tokens = real_bytes(1, 300, 1)
    with torch.no_grad():
        assert_close(stepped(model, tokens, [250, 1, 1, 1, 1, 1, 1, 1, 43]), model(tokens).logits)


def padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Rows of unequal length as one batch, and its mask; the padding is no special token."""
    width = max(len(r) for r in rows)
    tokens, mask = torch.full((len(rows), width), 97), torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        place = slice(width - len(row), None) if side == "left" else slice(0, len(row))
        tokens[i, place], mask[i, place] = row, 1
    return tokens, mask


PADDED = pairwise(
    dict(
        layers=("near 4 8", "8 mha 4", "full 4", "16 near"),
        grouping=GROUPINGS,
        side=("left", "right"),
        open_groups=(2, 0, 99),
        refine_groups=(True, False),
        capacity_factor=(1.0, 1.5, 2.0),
    )
)


@pytest.mark.parametrize("number", range(len(PADDED)), ids=lambda i: case_id(PADDED[i]))
def test_padded_rows_are_read_as_if_they_were_alone(number):
    """Forward, prefill and the steps after it, in which rows close their windows at their own time."""
    case = dict(PADDED[number])
    side = case.pop("side")
    model = small_model(number, **case)
    lengths, more = [LONGEST, 2, W + 1, 2 * W, W - 1], 2 * W + 3
    whole = [real_bytes(1, n + more, i + number)[0] for i, n in enumerate(lengths)]
    tokens, mask = padded([row[:n] for row, n in zip(whole, lengths, strict=True)], side)
    later = torch.stack([row[n:] for row, n in zip(whole, lengths, strict=True)])
    with torch.no_grad():
        alone = [model(row[None]).logits[0] for row in whole]
        batch = model(tokens, attention_mask=mask).logits
        state = model.new_state(len(lengths))
        prefilled = model.step(tokens, state, attention_mask=mask)[0].logits
        last = model.step(tokens, model.new_state(len(lengths)), attention_mask=mask, last_only=True)[
            0
        ].logits
        assert state.lengths == lengths
        steps = [model.step(later[:, i : i + 5], state)[0].logits for i in range(0, more, 5)]
    after = torch.cat(steps, 1)
    for i, n in enumerate(lengths):
        # A row alone is shorter than the batch: the route to the exact kernel may differ, so not the bits.
        real = mask[i].bool()
        assert_close(batch[i][real], alone[i][:n])
        assert_close(prefilled[i][real], alone[i][:n])
        assert_close(last[i, 0], alone[i][n - 1])
        assert_close(after[i], alone[i][n:])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_the_loss(side):
    model = small_model(2, layers="near 4 8")
    rows = [real_bytes(1, n + 1, n)[0] for n in (LONGEST, W + 3, 2)]
    tokens, mask = padded([r[:-1] for r in rows], side)
    targets, _ = padded([r[1:] for r in rows], side)  # padded places hold a token, not -100
    with torch.no_grad():
        total = sum(model(r[None, :-1], targets=r[None, 1:]).loss * (len(r) - 1) for r in rows)
        assert_close(model(tokens, targets, mask).loss, total / mask.sum())


@pytest.mark.parametrize(
    ("layers", "grouping"), [("near 4 8", "gumbel"), ("8 4 16", "kmeans"), ("mha 4 full", "random")]
)
def test_greedy_generation_is_the_argmax_of_full_forwards(layers, grouping):
    model = small_model(8, layers=layers, grouping=grouping, tie_embeddings=False)
    tokens = real_bytes(2, W + 5, 3)
    found = model.generate(tokens, max_new_tokens=3 * W, temperature=0)
    expected = tokens
    with torch.no_grad():
        for _ in range(3 * W):
            expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, expected)
    assert len(found[:, W + 5 :].unique()) > 12  # no short cycle: the argmax is tried on many contexts


@pytest.mark.parametrize("side", ["left", "right"])
def test_greedy_generation_of_padded_prompts(side):
    model = small_model(11, layers="near 4 8")
    rows = [real_bytes(1, n, n)[0] for n in (W + 5, 3, 2 * W)]
    tokens, mask = padded(rows, side)
    found = model.generate(tokens, max_new_tokens=W, temperature=0, attention_mask=mask)
    for i, row in enumerate(rows):
        alone = model.generate(row[None], max_new_tokens=W, temperature=0)
        assert torch.equal(found[i, tokens.shape[1] :], alone[0, len(row) :])


def test_sampling_follows_the_generator_and_the_options():
    model = small_model(5)
    tokens = make_tokens("bytes", 2, 9)

    def draw(seed: int, **options) -> Tensor:
        return model.generate(tokens, 20, generator=torch.Generator().manual_seed(seed), **options)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert torch.equal(draw(1, top_k=1), model.generate(tokens, 20, temperature=0))
    stop = int(draw(1)[0, 12])
    after = draw(1, eos_token=stop)[0, 9:].tolist()
    first = after.index(stop)
    assert set(after[first:]) == {stop}


def test_a_state_that_is_full_or_of_another_batch_is_refused():
    model = small_model(1)
    state = model.new_state(2, max_len=20)
    model.step(real_bytes(2, 20), state)
    with pytest.raises(ValueError, match=r"tokens=21.*max_len=20"):
        model.step(real_bytes(2, 1), state)
    with pytest.raises(ValueError, match=r"tokens=1 rows.*batch_size=2"):
        model.step(real_bytes(1, 1), model.new_state(2))
    with pytest.raises(ValueError, match=r"max_len=513"):
        model.new_state(1, max_len=513)
    with pytest.raises(ValueError, match=r"max_new_tokens=505"):
        model.generate(real_bytes(1, 9), max_new_tokens=505)


@pytest.mark.parametrize("selection", READINGS)
@pytest.mark.parametrize("layers", ["near 8", "8 full", "mha 8"])
def test_a_step_that_reads_all_storage_is_one_graph(layers, selection):
    """What `GraphedDecoder` captures: no break, and the bits of the same step without a compiler."""
    config = read_by(dict(layers=layers, selection=selection, n_layer=2))
    model = small_model(**config).eval()
    row = real_bytes(2, 3 * W + 9, seed=4)
    states = [model.new_state(2, max_len=4 * W) for _ in range(2)]
    compiled = compiled_advance("aot_eager")
    with torch.no_grad():
        for state in states:
            model.step(row[:, : 3 * W], state)
        for i in range(3 * W, 3 * W + 4):
            a, b = (
                run(model, row[:, i : i + 1], state, [1, 1], static=True)
                for run, state in zip((decode.advance, compiled), states)
            )
            assert torch.equal(a, b)
    for one, other in zip(states[0].layers, states[1].layers, strict=True):
        assert all(torch.equal(x, other[name]) for name, x in one.tensors.items())
    torch.compiler.reset()


def test_a_process_may_have_many_compiled_decoders():
    """More than Dynamo recompiles one function for."""
    model = small_model(layers="full", n_layer=1).eval()
    token = torch.zeros(1, 1, dtype=torch.int64)
    with torch.no_grad():
        for n in range(torch._dynamo.config.recompile_limit + 2):
            compiled_advance("eager")(model, token, model.new_state(1, max_len=20 + n), [1], static=True)
    torch.compiler.reset()


@pytest.mark.parametrize("size", [16, 5, 3])
def test_stores_keep_what_is_not_written(size):
    """Rows of different lengths and counts, a chunk wider than the store, wrapping round: as a loop does."""
    length, count = torch.tensor([0, 2, 9]), torch.tensor([3, 0, 1])
    chunk = torch.randn(3, 4, 2)
    for write, ring in ((decode._write, False), (decode._push, True)):
        store = torch.randn(3, size, 2)
        store[:, -1] = torch.nan  # what is not touched is not computed with
        expected = store.clone()
        if not ring and size < 10:  # a store indexed by position has room for all of a row
            length = torch.tensor([0, 2, size - 1])
        for row in range(3):
            for i in range(int(count[row])):
                expected[row, (int(length[row]) + i) % size] = chunk[row, i]
        write(store, chunk, length, count)
        assert torch.equal(store.nan_to_num(7), expected.nan_to_num(7))
