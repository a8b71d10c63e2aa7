"""The Triton kernel of `select` equals the reference in the interpreter (checks in `interpreted/`)."""


def test_select_in_the_interpreter(interpreted):
    interpreted("check_select")


def test_addresses_outside_of_a_tensor_are_seen_in_the_interpreter(interpreted):
    interpreted("check_addresses")
