"""`tests.addresses` finds the int32 products that may overflow in the address of an element, and allows harmless ones.

They overflow in tensors of more than 2^31 elements. A line that must be found ends in "# fault". The project's own
kernels are checked where they are compiled anyway: tests/test_compiles.py.
"""

import json

import pytest

from tests import scripts
from unipad.kernels.backend import tl, triton


@triton.jit
def narrow(x_ptr, row_idx_ptr, N, C, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(row_idx_ptr + i, mask=i < N, other=0)  # int32, as the name of its pointer says
    tl.store(x_ptr + row * C, 0.0, mask=i < N)  # fault


@triton.jit
def widened_too_late(x_ptr, row_idx_ptr, N, C, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(row_idx_ptr + i, mask=i < N, other=0)
    tl.store(x_ptr + (3 * row).to(tl.int64), 0.0, mask=i < N)  # fault


@triton.jit
def carried(x_ptr, row_idx_ptr, N, C, BLOCK: tl.constexpr):
    at = tl.zeros((BLOCK,), tl.int32)  # an address that a loop carries and a branch changes
    for i in range(N):
        if i > 2:
            at = at + i * C  # fault
    tl.store(x_ptr + at, 0.0)


@triton.jit
def wide(x_ptr, row_idx_ptr, N, C, BLOCK: tl.constexpr):
    for block in range(tl.program_id(0), tl.cdiv(N, BLOCK), 8):  # with 8 programs, every eighth block
        i = block * BLOCK + tl.arange(0, BLOCK)  # allowed: block * BLOCK is less than N
        row = tl.load(row_idx_ptr + i, mask=i * C < N * C, other=0)  # allowed: in the mask, not in the address
        c = tl.arange(0, BLOCK) // 4 * 4  # allowed: both factors are bounded at compile time
        tl.store(x_ptr + row.to(tl.int64) * C + c, 0.0, mask=i < N)


KERNELS = [narrow, widened_too_late, carried, wide]


@pytest.fixture(scope="module")
def products():
    """kernel -> its int32 products, as printed by a process without Triton's interpreter."""
    pytest.importorskip("triton", reason="Triton has wheels for Linux only")
    done = scripts.run("-m", "tests.test_addresses")
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", ["narrow", "widened_too_late", "carried"])
def test_an_int32_product_is_found(name, products):
    (line,) = products[name]
    assert line.startswith("test_addresses.py: ") and line.endswith("# fault")


def test_int64_products_and_harmless_int32_products_are_allowed(products):
    assert products["wide"] == []


if __name__ == "__main__":
    from tests.addresses import int32_products
    from tests.ahead_of_time import Launch, compile_launch

    compiled = {k.__name__: compile_launch(k, Launch(k.__name__, dict(BLOCK=16)), "fp32", "sm_80") for k in KERNELS}
    print(json.dumps({name: int32_products(kernel.asm["ttir"]) for name, kernel in compiled.items()}))
