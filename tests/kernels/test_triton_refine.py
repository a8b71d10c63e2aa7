"""The Triton kernel of `refine` against its plain twin, in the interpreter (checks in `interpreted/`)."""


def test_refine_in_the_interpreter(interpreted):
    interpreted("check_refine")


def test_tiles_follow_from_the_shared_memory_there_is():
    """4 BC (4 BW + 2 BG) bytes, counted by compiling for sm_89 and sm_90: of an H100 and an RTX 4090 here."""
    from coga.kernels.triton_refine import _tile

    large, small = 232448, 101376
    assert [_tile(512, rows, 64, large) for rows in (16, 32, 64)] == [128, 128, 128]
    assert [_tile(512, rows, 64, small) for rows in (16, 32, 64)] == [64, 64, 64]
    assert [_tile(512, rows, 128, small) for rows in (16, 32, 64)] == [32, 32, 16]
    assert [_tile(width, 16, 64, large) for width in (1, 16, 63, 1000)] == [16, 16, 64, 128]
