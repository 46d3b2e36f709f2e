"""Runs the source of a Gluon kernel for Hopper on a CPU, since Triton's interpreter does not know Gluon.

What a warp group does to a tile becomes one operation of torch, a partition of a warp-specialised kernel a thread.
Memory barriers (mbarrier) count arrivals and bytes as the hardware does, so phases, stages and ranges are tested, and a
kernel that waits for what never comes fails; layouts, fences and the order of asynchronous operations are not. Half
precision is kept in float32 unless said, so that results are exact but for the order of sums.
"""

from __future__ import annotations

import importlib.util
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

PATIENCE = 60  # seconds that a partition may wait


class Pointer:
    """Into a tensor's numbers as they lie in memory."""

    def __init__(self, base: Tensor, offset: Any = 0) -> None:
        self.base, self.offset = base, offset

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.base, self.offset + more)

    def flat(self) -> tuple[Tensor, Tensor]:
        return self.base.reshape(-1), torch.as_tensor(self.offset).long()


class Descriptor:
    """A tensor and the size of its tiles."""

    def __init__(self, x: Tensor, shape: list[int], strides: list[int], block: list[int], layout: Any) -> None:
        assert list(x.shape) == shape
        assert list(x.stride()) == strides
        self.x, self.block_shape = x.detach(), block

    def overlap(self, coordinates: list[Any]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Where a tile lies in the tensor, and which part of the tile that is."""
        first = [int(c) for c in coordinates]
        low = [max(0, c) for c in first]
        high = [min(n, c + b) for n, c, b in zip(self.x.shape, first, self.block_shape, strict=True)]
        inside = tuple(slice(a, max(a, b)) for a, b in zip(low, high, strict=True))
        return inside, tuple(slice(s.start - c, s.stop - c) for s, c in zip(inside, first, strict=True))


class Memory:
    """Shared memory, or a view of it."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def index(self, i: Any) -> Memory:
        assert 0 <= int(i) < len(self.x)
        return Memory(self.x[int(i)])

    def permute(self, order: tuple[int, ...]) -> Memory:
        return Memory(self.x.permute(order))

    def reshape(self, shape: list[int]) -> Memory:
        return Memory(self.x.view(shape))

    def load(self, layout: Any) -> Tensor:
        return self.x.clone()

    def store(self, x: Tensor) -> None:
        self.x.copy_(x)


class Barrier:
    """An mbarrier: a phase ends when all have arrived and all bytes have come."""

    def __init__(self, count: int, changed: threading.Condition, raised: list[BaseException]) -> None:
        self.count, self.changed, self.raised = count, changed, raised
        self.pending, self.bytes, self.phase, self.used = count, 0, 0, False

    def change(self, arrivals: int, more: int) -> None:
        with self.changed:
            self.pending -= arrivals
            self.bytes += more
            self.used = True
            assert self.pending >= 0
            if self.pending == 0 and self.bytes == 0:
                self.phase, self.pending = self.phase ^ 1, self.count
                self.changed.notify_all()

    def wait(self, phase: int) -> None:
        with self.changed:
            if not self.changed.wait_for(lambda: self.phase != phase or self.raised, PATIENCE) or self.raised:
                raise TimeoutError("a partition waits for a barrier that no other one completes")


class Kernel:
    """What `gluon.jit` makes of a function: it can be called by others, and launched."""

    def __init__(self, function: Callable[..., Any], machine: Machine) -> None:
        self.function, self.machine = function, machine

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self.function(*arguments, **options)

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*arguments: Any, num_warps: int, maxnreg: int, **constants: Any) -> None:
            given = [Pointer(x.detach()) if isinstance(x, Tensor) else x for x in arguments]
            self.machine.programs = grid[0]
            written = [x.x if isinstance(x, Descriptor) else x for x in arguments]
            written = [x for x in written if isinstance(x, Tensor)]
            results = []
            for order in (range(grid[0]), reversed(range(grid[0]))):  # whoever writes what is another's: see who wins
                for program in order:
                    self.machine.program, self.machine.barriers = program, {}
                    self.function(*given, **constants)
                    self.machine.check_barriers()
                results.append([x.clone() for x in written])
            for first, second in zip(*results, strict=True):
                torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)

        return launch


class Machine:
    """The modules that a kernel imports."""

    def __init__(self, half: torch.dtype) -> None:
        self.half = half
        self.program = self.programs = 0
        self.barriers: dict[int, tuple[Memory, Barrier]] = {}
        self.changed = threading.Condition()
        self.raised: list[BaseException] = []

    def jit(self, function: Any = None, **_: Any) -> Any:
        return Kernel(function, self) if function else lambda found: Kernel(found, self)

    def barrier(self, memory: Memory) -> Barrier:
        return self.barriers[memory.x.data_ptr()][1]

    def init(self, memory: Memory, count: int) -> None:
        self.barriers[memory.x.data_ptr()] = memory, Barrier(count, self.changed, self.raised)

    def check_barriers(self) -> None:
        """None is made that no partition uses.

        The compiler gives its memory to others, and the hardware writes it back when a program is preempted.
        """
        used: dict[int, bool] = {}
        for memory, barrier in self.barriers.values():
            place = memory.x.untyped_storage().data_ptr()
            used[place] = used.get(place, False) or barrier.used
        assert all(used.values()) or not any(used.values()), "barriers are made that nobody uses"

    def fetch(self, desc: Descriptor, coordinates: list[Any], bar: Memory, tile: Memory) -> None:
        inside, part = desc.overlap(coordinates)
        tile.x.zero_()
        tile.x[part] = desc.x[inside].float()
        size = 4 if desc.x.dim() == 3 else 2  # running sums, or what is bf16 on a GPU
        self.barrier(bar).change(0, -tile.x.numel() * size)

    @staticmethod
    def send(desc: Descriptor, coordinates: list[Any], tile: Memory) -> None:
        inside, part = desc.overlap(coordinates)
        desc.x[inside] = tile.x[part].to(desc.x.dtype)

    def specialize(self, partitions: list[tuple[Any, tuple[Any, ...]]], warps: list[int], registers: list[int]) -> None:
        assert len(partitions) == len(warps) + 1 == len(registers) + 1

        def run(function: Any, arguments: tuple[Any, ...]) -> None:
            try:
                function(*arguments)
            except BaseException as error:  # handed on below
                with self.changed:
                    self.raised.append(error)
                    self.changed.notify_all()

        threads = [threading.Thread(target=run, args=partition) for partition in partitions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.raised:
            raise self.raised[0]

    def modules(self) -> dict[str, types.ModuleType]:
        gl, hopper = types.ModuleType("gl"), types.ModuleType("hopper")
        mbarrier, tma = types.ModuleType("mbarrier"), types.ModuleType("tma")
        for name in ("BlockedLayout", "NVMMASharedLayout", "NVMMADistributedLayout", "DotOperandLayout", "SliceLayout"):
            setattr(gl, name, lambda *_, **__: None)

        def load(pointer: Pointer, mask: Tensor | None = None, other: float = 0.0) -> Tensor:
            base, offset = pointer.flat()
            mask = torch.ones_like(offset, dtype=torch.bool) if mask is None else mask.expand(offset.shape)
            assert not mask.any() or 0 <= int(offset[mask].min()) <= int(offset[mask].max()) < len(base)
            found = torch.full(offset.shape, other, dtype=base.dtype)
            found[mask] = base[offset[mask]]
            return found

        def store(pointer: Pointer, x: Tensor, mask: Tensor | None = None) -> None:
            base, offset = pointer.flat()
            mask = torch.ones_like(offset, dtype=torch.bool) if mask is None else mask.expand(offset.shape)
            assert not mask.any() or 0 <= int(offset[mask].min()) <= int(offset[mask].max()) < len(base)
            base[offset[mask]] = x[mask].to(base.dtype)

        def pair(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
            return lambda x, y: function(torch.as_tensor(x), torch.as_tensor(y))

        vars(gl).update(
            constexpr=lambda x: x, bfloat16=self.half, float32=torch.float32, int32=torch.int32, int64=torch.int64,
            static_range=range, exp2=torch.exp2, where=torch.where, load=load, store=store,
            minimum=pair(torch.minimum), maximum=pair(torch.maximum),
            arange=lambda low, high, layout: torch.arange(low, high),
            zeros=lambda shape, dtype, layout: torch.zeros(shape),
            expand_dims=lambda x, axis: x.unsqueeze(axis), sum=lambda x, axis: x.sum(axis),
            min=lambda x, axis: x.amin(axis), cdiv=lambda x, y: -(-x // y), convert_layout=lambda x, layout: x,
            program_id=lambda axis: torch.tensor(self.program), num_programs=lambda axis: self.programs,
            allocate_shared_memory=lambda dtype, shape, layout: Memory(torch.full(shape, torch.nan).to(dtype)),
            warp_specialize=self.specialize, barrier=lambda: None, thread_barrier=lambda: None,
        )  # fmt: skip
        vars(mbarrier).update(
            MBarrierLayout=lambda: None, init=self.init,
            wait=lambda memory, phase: self.barrier(memory).wait(phase),
            expect=lambda memory, size: self.barrier(memory).change(1, size),
            arrive=lambda memory, count: self.barrier(memory).change(count, 0),
        )  # fmt: skip
        vars(tma).update(
            async_load=self.fetch, async_copy_global_to_shared=self.fetch, async_store=self.send,
            async_copy_shared_to_global=self.send, store_wait=lambda pendings: None,
        )  # fmt: skip

        def product(x: Any, y: Memory, acc: Tensor, *, use_acc: bool = True, is_async: bool) -> Tensor:
            left = x.x if isinstance(x, Memory) else x
            return left.float() @ y.x.float() + (acc if use_acc else 0)

        vars(hopper).update(
            fence_async_shared=lambda: None, mbarrier=mbarrier, tma=tma, warpgroup_mma=product,
            warpgroup_mma_wait=lambda num_outstanding, deps: deps if len(deps) > 1 else deps[0],
            TensorDescriptor=Descriptor,
        )  # fmt: skip
        gluon = types.ModuleType("gluon")
        vars(gluon).update(jit=self.jit, language=gl)
        root = "triton.experimental.gluon"
        found = {root: gluon, f"{root}.language": gl, f"{root}.nvidia": types.ModuleType("nvidia")}
        found[f"{root}.language.nvidia"] = types.ModuleType("nvidia")
        found[f"{root}.language.nvidia.hopper"] = found[f"{root}.nvidia.hopper"] = hopper
        return found


def emulated(*files: Path, half: torch.dtype = torch.float32) -> types.ModuleType:
    """The module in the last of the files, which may import from those before it, their kernels emulated."""
    machine = Machine(half)
    import triton.experimental

    modules = machine.modules()
    package = types.ModuleType("emulated")
    package.__path__ = []
    with (
        mock.patch.dict(sys.modules, modules | {"emulated": package}),
        mock.patch.object(triton.experimental, "gluon", modules["triton.experimental.gluon"], create=True),
    ):
        for file in files:
            spec = importlib.util.spec_from_file_location(f"emulated.{file.stem}", file)
            assert spec is not None
            assert spec.loader is not None
            module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
            vars(module)["range"] = lambda *bounds: (torch.tensor(i) for i in range(*bounds))  # a number of the device
            spec.loader.exec_module(module)
    return module
