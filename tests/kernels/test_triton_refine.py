"""The Triton kernel of `refine` against its plain twin, in the interpreter (checks in `interpreted/`)."""


def test_refine_in_the_interpreter(interpreted):
    interpreted("check_refine")
