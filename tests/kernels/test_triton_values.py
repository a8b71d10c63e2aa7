"""The Triton kernels of `gated_values` equal the plain values and their gate (checks in `interpreted/`)."""


def test_values_in_the_interpreter(interpreted):
    interpreted("check_values")
