"""The Triton kernel of `assign` equals the reference in the interpreter (checks in `interpreted/`)."""


def test_assign_in_the_interpreter(interpreted):
    interpreted("check_assign")
