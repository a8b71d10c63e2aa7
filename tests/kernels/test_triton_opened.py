"""Opened groups: the Triton kernels equal the reference in the interpreter (checks in `interpreted/`)."""


def test_opened_in_the_interpreter(interpreted):
    interpreted("check_opened")
