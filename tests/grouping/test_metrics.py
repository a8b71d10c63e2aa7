"""Oracle 10: metrics of groups on cases whose answer is known."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from coga.grouping.metrics import (
    TOKEN_CLASSES,
    WORD_CLASSES,
    agreement,
    coherence,
    flip_rate,
    group_coherence,
    indentation_blocks,
    member_cosines,
    prototype_use,
    sentence_blocks,
    silhouette,
    token_classes,
    word_classes,
)


def pieces(classes: np.ndarray, text: bytes, names: tuple[str, ...]) -> list[tuple[str, bytes]]:
    """Runs of equal class with the bytes they cover."""
    assert classes.shape == (len(text),)
    out, at = [], 0
    for name, run in itertools.groupby(classes):
        length = len(list(run))
        out.append((names[name], text[at : at + length]))
        at += length
    return out


def test_flip_rate_of_equal_partitions_with_permuted_ids_is_zero():
    before = torch.randint(5, (3, 40), generator=torch.Generator().manual_seed(0))
    swap = torch.tensor([[3, 1, 4, 0, 2], [0, 1, 2, 3, 4], [4, 3, 2, 1, 0]])
    assert flip_rate(before, swap.gather(1, before), 5) == 0  # each window may be permuted its own way
    assert flip_rate(before.numpy(), before.numpy(), 5) == 0


@pytest.mark.parametrize(
    ("after", "rate"),
    [
        ([0, 0, 0, 0, 1, 1, 1, 1], 0),
        ([0, 0, 0, 1, 1, 1, 1, 1], 1 / 8),
        ([1, 1, 1, 1, 0, 0, 0, 1], 1 / 8),
        ([0, 0, 1, 1, 1, 1, 0, 0], 4 / 8),
        ([0, 1, 0, 1, 0, 1, 0, 1], 4 / 8),
        ([2, 2, 2, 2, 2, 2, 2, 2], 4 / 8),  # merged: the best match keeps one of the two groups
    ],
)
def test_flip_rate_of_known_moves(after, rate):
    before = [0, 0, 0, 0, 1, 1, 1, 1]
    assert flip_rate(before, after, 3) == pytest.approx(rate)
    assert flip_rate([before, before], [before, after], 3) == pytest.approx(rate / 2)


def test_flip_rate_uses_the_best_one_to_one_matching():
    """Greedy matching would keep 0-0 (3) and 1-1 (0); the best keeps 0-1 and 1-0 (2 + 2)."""
    before = [0] * 5 + [1] * 2
    after = [0] * 3 + [1] * 2 + [0] * 2
    assert flip_rate(before, after, 2) == pytest.approx(3 / 7)


@pytest.mark.parametrize(
    ("usage", "use"), [([0.25] * 4, 1), ([1, 0, 0, 0], 1 / 4), ([3, 3, 0, 0], 1 / 2), ([7], 1)]
)
def test_prototype_use(usage, use):
    assert prototype_use(torch.tensor(usage)) == pytest.approx(use)


def test_coherence_of_orthogonal_groups():
    content = torch.eye(3)[torch.tensor([[0, 1, 2, 0, 1, 2]])] * torch.arange(1, 7)[None, :, None]
    got = coherence(content, torch.tensor([[0, 1, 2, 0, 1, 2]]), 4)  # the fourth group is empty
    assert got == pytest.approx({"inside": 1, "between": 0})
    mixed = coherence(torch.eye(2)[[0, 1, 0, 1]], torch.tensor([0, 0, 1, 1]), 2)
    assert mixed == pytest.approx({"inside": math.sqrt(0.5), "between": math.sqrt(0.5)})


def test_coherence_equals_a_plain_loop():
    g = torch.Generator().manual_seed(0)
    content, index = torch.randn(2, 10, 3, generator=g), torch.randint(3, (2, 10), generator=g)
    inside, between = [], []
    for n, t, m in itertools.product(range(2), range(10), range(3)):
        members = content[n][index[n] == m]
        if len(members):
            cosine = torch.cosine_similarity(content[n, t], members.mean(0), dim=0).item()
            (inside if index[n, t] == m else between).append(cosine)
    got = coherence(content, index, 3)
    assert got == pytest.approx({"inside": np.mean(inside), "between": np.mean(between)}, rel=1e-6)
    each = group_coherence(content[0], index[0], 3)
    assert np.average(each, weights=np.bincount(index[0], minlength=3)) == pytest.approx(
        coherence(content[0], index[0], 3)["inside"]
    )


def test_coherence_with_one_group_and_with_empty_groups():
    content = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    got = coherence(content, torch.zeros(6, dtype=torch.long), 2)
    assert math.isnan(got["between"])
    assert got["inside"] > 0
    assert np.isnan(member_cosines(content, torch.zeros(6, dtype=torch.long), 2)[0, :, 1]).all()
    assert np.isnan(group_coherence(content, [0] * 6, 2)).tolist() == [False, True]


def test_silhouette_of_tight_and_of_swapped_groups():
    content = torch.tensor([[1.0, 0.01], [1, 0], [0, 1], [0.01, 1]])
    assert silhouette(content, [0, 0, 1, 1]) > 0.99
    assert silhouette(content, [0, 1, 0, 1]) < -0.4
    assert math.isnan(silhouette(content, [0, 0, 0, 0]))
    assert math.isnan(silhouette(content, [0, 1, 2, 3]))


def test_agreement_of_equal_refined_independent_and_unlabelled():
    labels = [0, 0, 1, 1, 2, 2]
    assert agreement([5, 5, 3, 3, 4, 4], labels) == pytest.approx({"ami": 1, "homogeneity": 1})
    refined = agreement([0, 1, 2, 3, 4, 5], labels)
    assert refined["homogeneity"] == pytest.approx(1)
    assert refined["ami"] < 0.5
    assert agreement([0, 1] * 50, [0] * 50 + [1] * 50) == pytest.approx(
        {"ami": 0, "homogeneity": 0}, abs=0.02
    )
    assert all(math.isnan(x) for x in agreement([0, 1], [3, 3]).values())
    both = agreement([[5, 5, 3, 3, 4, 4], [0, 1, 0, 1, 0, 1]], [labels, [0] * 6])
    assert both == pytest.approx({"ami": 1, "homogeneity": 1})  # a window of one label is left out


def test_token_classes_of_source():
    text = b'def f(x):\n\treturn "\xc3\xa9" + x_1 # \xff\r\n    1.5\n'
    assert pieces(token_classes(text), text, TOKEN_CLASSES) == [
        ("keyword", b"def"),
        ("space", b" "),
        ("name", b"f"),
        ("operator", b"("),
        ("name", b"x"),
        ("operator", b"):"),
        ("newline", b"\n"),
        ("space", b"\t"),
        ("keyword", b"return"),
        ("space", b" "),
        ("string", b'"\xc3\xa9"'),
        ("space", b" "),
        ("operator", b"+"),
        ("space", b" "),
        ("name", b"x_1"),
        ("space", b" "),
        ("comment", b"# \xff"),
        ("newline", b"\r\n"),
        ("space", b"    "),
        ("number", b"1.5"),
        ("newline", b"\n"),
    ]


def test_token_classes_of_a_string_over_lines_and_of_source_that_stops_tokenizing():
    text = b'x = """a\n b\n"""\ny = """ open\nif z:\n  w = 1\n'
    got = pieces(token_classes(text), text, TOKEN_CLASSES)
    assert ("string", b'"""a\n b\n"""') in got
    assert got[-4:] == [("operator", b"="), ("space", b" "), ("number", b"1"), ("newline", b"\n")]
    assert ("keyword", b"if") in got  # read again after the line that fails


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\n",
        b"\r",
        b"a\rb\n",
        b"\0",
        b"x\0y\n",
        b"  a\n b\n",
        b"(",
        b")",
        b"'",
        b"\\",
        b"a \\\nb",
        b"\xff" * 9,
        b"# coding: nonsense\nx\n",
        b"\f\nif 1:\n\tx\n        y\n",
        b"0777 1__0 2if 3else 4\n",
        bytes(range(256)) * 2,
    ],
    ids=repr,
)
def test_structure_of_any_bytes_is_total(text):
    for classes, names in ((token_classes(text), TOKEN_CLASSES), (word_classes(text), WORD_CLASSES)):
        assert classes.shape == (len(text),)
        assert ((classes >= 0) & (classes < len(names))).all()
    for blocks in (indentation_blocks(text), sentence_blocks(text)):
        assert blocks.shape == (len(text),)
        assert (blocks >= 0).all()


def test_hopeless_input_is_read_in_bounded_time():
    assert token_classes(b'it\'s """ not (code\n' * 3000).shape == (3000 * 19,)


def test_indentation_blocks():
    lines = [
        (b"a:\n", 0),
        (b"  b\n", 1),
        (b"\n", 1),
        (b"  c:\n", 1),
        (b"\td\n", 2),
        (b"  e\n", 1),
        (b"f:\n", 0),
    ]
    lines += [(b"  g\n", 3), (b"        h", 4)]
    text = b"".join(line for line, _ in lines)
    want = [block for line, block in lines for _ in line]
    assert indentation_blocks(text).tolist() == want


def test_indentation_blocks_of_a_text_cut_inside_a_block():
    assert indentation_blocks(b"    a\nb\n  c\n").tolist() == [0] * 6 + [1] * 2 + [2] * 4


def test_word_classes_and_sentences_of_prose():
    text = b"Don't pay 3.5 \xc3\xa9us (now).\nGo"
    assert pieces(word_classes(text), text, WORD_CLASSES) == [
        ("word start", b"D"),
        ("word", b"on't"),
        ("space", b" "),
        ("word start", b"p"),
        ("word", b"ay"),
        ("space", b" "),
        ("number", b"3"),
        ("punctuation", b"."),
        ("number", b"5"),
        ("space", b" "),
        ("word start", b"\xc3"),
        ("word", b"\xa9us"),
        ("space", b" "),
        ("punctuation", b"("),
        ("word start", b"n"),
        ("word", b"ow"),
        ("punctuation", b")"),
        ("sentence end", b"."),
        ("newline", b"\n"),
        ("word start", b"G"),
        ("word", b"o"),
    ]
    assert sentence_blocks(b"A b. C\n\nD").tolist() == [0] * 4 + [1] * 4 + [2]


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda: flip_rate([0, 1], [0, 1, 1], 2), "after"),
        (lambda: flip_rate([0, 2], [0, 1], 2), "before"),
        (lambda: flip_rate([0.5, 1], [0, 1], 2), "before"),
        (lambda: prototype_use([0.0, 0.0]), "usage_G"),
        (lambda: prototype_use([1.0, float("nan")]), "usage_G"),
        (lambda: coherence(torch.ones(4, 2), [0, 0, 1], 2), "content_NWC"),
        (lambda: silhouette(torch.ones(4, 2), [0, 0, 1]), "content_WC"),
        (lambda: agreement([0, 1], [0, 1, 1]), "labels"),
    ],
)
def test_bad_input_names_the_field(call, field):
    with pytest.raises(ValueError, match=field):
        call()
