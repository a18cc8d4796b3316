"""Copies from the loader's thread to the net's device. The net does not wait for copies, nor copies for the net."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class HandOver:
    """Copies DALI's outputs, and integers that go with them, to a device: to a GPU from pinned memory, on one stream.

    Args:
        place: the device.
        std: per-channel divisor of byte inputs after their mean is subtracted, in levels, [3].
    """

    def __init__(self, place: torch.device, std: NDArray[np.float32]) -> None:
        self.place = place
        self._factor = torch.from_numpy(1 / std).to(place)
        self._stream = _stream(place) if place.type == "cuda" else None

    def enter_thread(self) -> None:
        """Selects the GPU and the stream for the calling thread. Otherwise a thread starts on GPU 0, where it would
        create a context, and on the net's stream."""
        if self._stream:
            torch.cuda.set_device(self.place)
            torch.cuda.set_stream(self._stream)

    def __call__(self, shown: Sequence[Tensor], *numbers: Tensor) -> list[Tensor]:
        """Returns the inputs, float32 [n, 3, side, side], channels_last, and the numbers. All is complete on the
        device; on a GPU none of it lies in DALI's memory, which DALI reuses.

        Args:
            shown: inputs, float32 [n, side, side, 3]; or bytes of that shape and the mean per sample, float32 [n, 3].
        """
        given = self._inputs([self._brought(tensor) for tensor in (*shown, *numbers)], len(shown))
        if self._stream:
            self._stream.record_event().synchronize()
            for tensor in given:
                tensor.record_stream(torch.cuda.default_stream(self.place))  # the net uses them on that stream
        return given

    def _brought(self, tensor: Tensor) -> Tensor:
        if self._stream is None:
            return tensor.to(self.place)
        if tensor.device == self.place:
            return tensor.clone()
        return tensor.pin_memory().to(self.place, non_blocking=True)

    def _inputs(self, tensors: list[Tensor], shown: int) -> list[Tensor]:
        pixels, numbers = tensors[0], tensors[shown:]
        if shown == 2:  # as crop_mirror_normalize does
            pixels = pixels.float().sub_(tensors[1][:, None, None]).mul_(self._factor)
        return [pixels.permute(0, 3, 1, 2), *numbers]


@cache
def _stream(place: torch.device) -> torch.cuda.Stream:
    """One stream for all loaders of a device: torch does not share cached memory between streams."""
    return torch.cuda.Stream(place)  # type: ignore[no-untyped-call]
