"""A player of recorded steps without a GPU: launches run on the Metal simulator, in an arena of host memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np
import shared_boxes
from kernel_cases import POOL, metal, to_mlx
from metal_sim import kernel as simulator

from mlx_gemma4.gpu.recording import IN_PLACE, RecordedLaunch, Region
from mlx_gemma4.gpu.render import DEVICE_ELEMENTS, build
from mlx_gemma4.model.replay import STARTS


class HostPlayer:
    """Makes recorded launches in host memory, in the order they came in."""

    made: ClassVar[list[HostPlayer]] = []

    def __init__(self) -> None:
        self.arena = np.zeros(0, np.uint8)
        self.launches: Sequence[RecordedLaunch] = []
        self.tokens: list[list[int]] = []
        self.loads = self.chained = self.queued = 0
        self.loaded = False
        HostPlayer.made.append(self)

    def load(
        self, launches: Sequence[RecordedLaunch], nbytes: int, numbers: int, best: Region, several: bool = False
    ) -> None:
        self.arena = np.full(nbytes, 0xCD, np.uint8)  # what nobody wrote is no number
        self.launches, self.best_region, self.loads, self.loaded = list(launches), best, self.loads + 1, True
        self.numbers = numbers

    def forget(self) -> None:
        self.loaded = False

    def box(self, nbytes: int) -> tuple[int, list[int]]:
        return shared_boxes.box(nbytes)

    def opened(self, handle: Sequence[int]) -> int:
        return shared_boxes.opened(handle)

    def write(self, regions: Sequence[Region], arrays: Sequence[mx.array]) -> None:
        for region, a in zip(regions, arrays, strict=True):
            self._at(region)[...] = np.array(a)

    def start(self, numbers: np.ndarray, chained: bool, after: HostPlayer | None = None) -> int:
        assert self.loaded and numbers.dtype == np.int32 and numbers.size == self.numbers
        if chained:
            tokens = self.best_region.shape[-1]
            numbers = np.concatenate([self._at(self.best_region).reshape(-1)[:tokens], numbers[tokens:]])
        if after is not None:
            ids = after._at(after.best_region).reshape(-1)
            numbers = np.concatenate([numbers[:1], ids, numbers[1 + ids.size :]])
        self.chained, self.queued = self.chained + chained, self.queued + (after is not None)
        self.arena[: numbers.nbytes] = numbers.view(np.uint8)
        self.begin()
        for launch in self.launches:
            inputs = [a if isinstance(a, mx.array) else mx.array(self._at(a)) for a in launch.inputs]
            done = self.kernel(launch, inputs)(
                inputs=inputs,
                grid=launch.grid,
                threadgroup=launch.threadgroup,
                output_shapes=[region.shape for region in launch.outputs],
                output_dtypes=[region.dtype for region in launch.outputs],
            )
            for region, name, a in zip(launch.outputs, launch.kernel.outputs, done, strict=True):
                if name in IN_PLACE:  # rows that the kernel leaves alone stay
                    count = int(self._at(launch.inputs[launch.kernel.inputs.index("count")])[0])
                    self._at(region)[..., count, :] = np.array(a)[..., count, :]
                else:
                    self._at(region)[...] = np.array(a)
        self.tokens.append(self._at(self.best_region).reshape(-1).tolist())
        return len(self.tokens) - 1

    def begin(self) -> None:
        """Called before a step's launches."""

    def kernel(self, launch: RecordedLaunch, inputs: Sequence[mx.array]) -> Callable[..., Sequence[mx.array]]:
        """Return what makes a launch with these inputs."""
        made: Callable[..., Sequence[mx.array]] = build(metal, launch.kernel)
        return made

    def best(self, start: int) -> list[int]:
        assert len(self.tokens) - start <= STARTS
        return self.tokens[start]

    def wait(self) -> None: ...

    def copy(self, to: Region, other: HostPlayer, of: Region) -> None:
        self._at(to)[...] = other._at(of)

    def read(self, region: Region) -> mx.array:
        return mx.array(self._at(region).copy())

    def _at(self, region: Any, memory: np.ndarray | None = None) -> np.ndarray:
        names = {mx.float32: np.float32, mx.float16: np.float16, mx.int32: np.int32, mx.uint32: np.uint32}
        memory = self.arena if memory is None else memory
        piece = memory[region.start : region.start + region.nbytes]
        return piece.view(names[region.dtype]).reshape(region.shape)


class EarlyPlayer(HostPlayer):
    """Each launch begins before all others of its step, as on NVIDIA it may.

    Until INPUTS_READY (kernels/cuda.h), which it comes to first of all unless its text says where, a threadgroup finds
    no number in whatever the step's launches write.
    """

    def begin(self) -> None:
        self.at_first = self.arena.copy()
        named = [(n, a) for x in self.launches for n, a in zip(x.kernel.inputs, x.inputs, strict=True)]
        self.pools = {id(a): np.array(a) for n, a in named if n in POOL}

    def kernel(self, launch: RecordedLaunch, inputs: Sequence[mx.array]) -> Callable[..., Sequence[mx.array]]:
        kernel, blobs, at, lines = launch.kernel, [], 0, ["", ""]
        for name, where, array in zip(kernel.inputs, launch.inputs, inputs, strict=True):
            if isinstance(where, mx.array) and id(where) not in self.pools:
                continue
            if array.size < DEVICE_ELEMENTS:  # in the constant address space, where nothing can be written
                continue
            now = np.array(array)
            then = self.pools[id(where)] if isinstance(where, mx.array) else self._at(where, self.at_first)
            words = f"u{now.itemsize}"
            early = np.where(now.view(words) != then.view(words), np.array(-1).astype(words), now.view(words))
            if (early == now.view(words)).all():
                continue
            for moment, content in enumerate((early, now)):
                blobs.append(np.frombuffer(content.tobytes(), np.uint32))
                lines[moment] += (
                    f"for (uint i = 0; i < {blobs[-1].size}; i++) ((device uint*){name})[i] = moments[{at} + i];\n"
                )
                at += blobs[-1].size
        moments = np.concatenate([*blobs, np.zeros(8, np.uint32)])
        first, ready = (
            f"threadgroup_barrier(mem_flags::mem_device);\nif (thread_index_in_threadgroup == 0) {{\n{copies}}}\n"
            "threadgroup_barrier(mem_flags::mem_device);\n"
            for copies in lines
        )
        source = kernel.source if "INPUTS_READY();" in kernel.source else f"INPUTS_READY();\n{kernel.source}"
        made = simulator(
            name=f"early_{kernel.name}",
            input_names=[*kernel.inputs, "moments"],
            output_names=list(kernel.outputs),
            source=first + source.replace("INPUTS_READY();", ready),
            header=kernel.header.replace("#define EAGER 0\n", "#define EAGER 1\n"),  # as for CUDA
            in_place=kernel.inputs,
            seed=2,
        )
        return lambda inputs, **arguments: list(map(to_mlx, made(inputs=[*inputs, mx.array(moments)], **arguments)))
