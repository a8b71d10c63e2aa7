"""The Triton kernel of `select` equals the reference in the interpreter (checks in `interpreted/`)."""


def test_select_in_the_interpreter(interpreted):
    interpreted("check_select")
