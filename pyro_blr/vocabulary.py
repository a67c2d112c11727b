"""What a torch function asks of a tensor or does to it, by its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["ALIASES", "FORM", "SIZES", "VALUES", "function_name", "identity", "nested_stack", "writes"]

# Queries of a tensor's form, not of its value: answering them is no departure from the tape.
FORM = frozenset(
    "dim size shape numel nelement ndim dtype device layout stride is_floating_point is_complex is_contiguous "
    "requires_grad is_leaf is_cuda is_sparse is_quantized is_meta is_mkldnn is_mps is_nested names storage_offset "
    "grad grad_fn _version retains_grad is_signed element_size data_ptr get_device __len__ __repr__ __format__ __hash__ "
    "ndimension type is_inference is_conj is_neg _is_view is_shared is_pinned itemsize nbytes has_names "
    "is_same_size can_cast result_type is_tensor is_storage get_default_dtype output_nr _base __dir__ __deepcopy__ "
    "is_cpu is_xla is_ipu is_xpu is_vulkan is_maia is_mtia is_sparse_csr real_if_close register_hook _backward_hooks".split()
)
SIZES = frozenset("shape size numel nelement __len__ stride is_same_size nbytes".split())
ALIASES = frozenset({"detach", "data", "requires_grad_", "retain_grad", "contiguous"})
# Attributes of a tensor whose setting changes its value.
VALUES = frozenset({"data", "real", "imag"})


def function_name(function: Callable) -> str:
    name = getattr(function, "__name__", "")
    if name == "__get__":
        return getattr(getattr(function, "__self__", None), "__name__", name)
    return name


def writes(name: str) -> bool:
    if name in ("__setitem__", "__set__"):
        return True
    if name.startswith("__i") and name.endswith("__"):
        return name not in ("__invert__", "__int__", "__index__", "__iter__")
    return name.endswith("_") and not name.endswith("__") and name not in ALIASES


def identity(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


def nested_stack(items: Any, **options: Any) -> Tensor:
    """`torch.tensor` of a nested list of scalar tensors, followed by derivatives as torch's is not."""
    options.pop("requires_grad", None)
    if isinstance(items, (tuple, list)):
        return torch.stack([nested_stack(item, **options) for item in items])
    return torch.as_tensor(items, **options)
