"""The private operations behind the Gram products: schemas and fakes. They add to a total they are given."""

import torch

library = torch.library.Library("sdfast", "FRAGMENT")  # outlives the operations: they end with it
library.define("_gram_add(Tensor(a!) total, Tensor product, Tensor? factor, int? diagonal) -> ()")
library.define("_gram_rows(Tensor(a!) total, Tensor left, Tensor? right) -> ()")
library.define("_gram_factors(Tensor(a!) total, Tensor a, Tensor b, Tensor? other_a, Tensor? other_b, bool bias) -> ()")
library.define("_gram_product_triton(Tensor(a!) total, Tensor left, Tensor right, str precision, bool triangle) -> ()")
library.define(
    "_gram_hadamard_triton(Tensor(a!) total, Tensor left_a, Tensor left_b, Tensor right_a, Tensor right_b, "
    "int[] widths, int[] outputs, str precision, bool triangle) -> ()"
)
for _name in ("add", "rows", "factors", "product_triton", "hadamard_triton"):
    torch.library.register_fake(f"sdfast::_gram_{_name}", lambda *_: None)


def _triton_product(*arguments):
    from sdfast.ops.gram import triton_impl  # triton is imported by its first call, never before

    triton_impl.product(*arguments)


def _triton_hadamard(*arguments):
    from sdfast.ops.gram import triton_impl

    triton_impl.hadamard(*arguments)


for _key in ("CPU", "CUDA", "XPU"):  # CPU tensors: in Triton's interpreter
    library.impl("_gram_product_triton", _triton_product, _key)
    library.impl("_gram_hadamard_triton", _triton_hadamard, _key)

add = torch.ops.sdfast._gram_add.default
rows = torch.ops.sdfast._gram_rows.default
factors = torch.ops.sdfast._gram_factors.default
product_triton = torch.ops.sdfast._gram_product_triton.default
hadamard_triton = torch.ops.sdfast._gram_hadamard_triton.default
