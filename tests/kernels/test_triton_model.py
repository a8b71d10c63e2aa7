"""A model through the Triton kernels leaks nothing in training (checks in `interpreted/`)."""


def test_model_in_the_interpreter(interpreted):
    interpreted("check_model")
