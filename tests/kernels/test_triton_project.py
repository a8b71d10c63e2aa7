"""The Triton kernels of `project` equal the plain projections (checks in `interpreted/`)."""


def test_project_in_the_interpreter(interpreted):
    interpreted("check_project")
