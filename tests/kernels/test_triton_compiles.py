"""Every Triton kernel compiles for an H100, without one (checks in `compiled/`)."""


def test_kernels_compile_without_a_gpu(compiled):
    compiled("check_compiles")
