"""Near, far and group attention: the Triton kernels equal the reference in the interpreter."""


def test_flash_in_the_interpreter(interpreted):
    interpreted("check_flash")
