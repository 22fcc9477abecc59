"""A GPU that is not there: runs the package's code on fake CUDA tensors, without any memory, and
notes where the code would make the CPU wait for the GPU.

Fake tensors have shapes, types and a device, but no values. Tensors on the CPU are real ones. An
operation on tensors of both devices raises, as it would on a GPU.
"""

import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
DEVICE = torch.device("cuda", 0)
# what reads a GPU's values on the CPU although torch's tags lack that
READING = {aten.multinomial.default}
WAITING_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
LIBRARY = str(Path(torch.__file__).parent)


class FakeGPU(TorchDispatchMode):
    """Within it the device "cuda" exists. `waits` gets a line for each operation that makes the
    CPU wait for the GPU: reading a value (which is then 0), a shape that depends on values, and a
    copy between the two, unless it comes from pinned memory and is asked not to block.

    >>> with FakeGPU() as gpu:
    ...     with torch.device("cuda"):
    ...         model = FlexTok(config)
    ...     model.decode(indices)
    >>> gpu.waits
    ["flextok/tokenizers/flextok.py:358 aten._to_copy.default"]
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.pinned: dict[int, Tensor] = {}  # by storage, and so kept alive
        self.stack = ExitStack()

    def __enter__(self) -> Any:
        self.stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.stack.close()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if func is aten._pin_memory.default:
            with _disable_current_modes():
                copy = args[0].clone()
            self.pinned[copy.untyped_storage()._cdata] = copy
            return copy
        if func is aten.is_pinned.default:
            return args[0].untyped_storage()._cdata in self.pinned
        if self.is_waiting(func, tensors, kwargs):
            self.waits.append(f"{source_line()} {func}")
        device = kwargs.get("device")
        on_cpu = device is None or torch.device(device).type == "cpu"
        if on_cpu and not any(isinstance(x, FakeTensor) for x in tensors):
            with _disable_current_modes():
                return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            x = tensors[0]
            return False if x.dtype is torch.bool else 0.0 if x.is_floating_point() else 0
        return func(*args, **kwargs)

    def is_waiting(self, func: Any, tensors: list[Tensor], kwargs: dict[str, Any]) -> bool:
        on_gpu = [x.device.type == "cuda" for x in tensors]
        if func is aten._to_copy.default and kwargs.get("device") is not None:
            if (torch.device(kwargs["device"]).type == "cuda") == on_gpu[0]:
                return False
            return not (kwargs.get("non_blocking") and self.is_pinned(tensors[0]))
        if func is aten.copy_.default:
            return on_gpu[0] != on_gpu[1] and not self.is_pinned(tensors[1])
        if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
            return any(x.is_cuda and x.dtype in (torch.bool, torch.uint8) for x in tensors[1:])
        return any(on_gpu) and (func in READING or bool(WAITING_TAGS & set(func.tags)))

    def is_pinned(self, x: Tensor) -> bool:
        return x.untyped_storage()._cdata in self.pinned


def source_line() -> str:
    """The innermost line of the stack outside torch and this file."""
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith((LIBRARY, __file__)):
            break
    return f"{frame.filename}:{frame.lineno}"


@contextmanager
def autocast(dtype: torch.dtype) -> Iterator[None]:
    """torch.autocast on the fake GPU: torch's own turns itself off without a real one."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
