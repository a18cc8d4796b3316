"""From the loader's thread to the device of the net: the net waits for no copy, and no copy for the net."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class HandOver:
    """Brings what DALI put out, and numbers beside it, to a device: on a GPU from pinned memory, on one stream.

    Args:
        place: the device.
        std: what bytes are divided by once their mean is subtracted, in levels, [3].
    """

    def __init__(self, place: torch.device, std: NDArray[np.float32]) -> None:
        self.place = place
        self._factor = torch.from_numpy(1 / std).to(place)
        self._stream = _stream(place) if place.type == "cuda" else None

    def enter_thread(self) -> None:
        """Let what the calling thread does be done by the GPU, and by the stream. A thread begins with GPU 0, where it
        would leave a context, and with the stream of the net."""
        if self._stream:
            torch.cuda.set_device(self.place)
            torch.cuda.set_stream(self._stream)

    def __call__(self, shown: Sequence[Tensor], *numbers: Tensor) -> list[Tensor]:
        """The inputs, float32 [n, 3, side, side], channels_last, and the numbers: on the device, complete, and none of
        it in DALI's memory on a GPU, which it uses again.

        Args:
            shown: inputs, float32 [n, side, side, 3]; or bytes of that shape and the mean of each, float32 [n, 3].
        """
        given = self._inputs([self._brought(tensor) for tensor in (*shown, *numbers)], len(shown))
        if self._stream:
            self._stream.record_event().synchronize()
            for tensor in given:
                tensor.record_stream(torch.cuda.default_stream(self.place))  # where the net uses them
        return given

    def _brought(self, tensor: Tensor) -> Tensor:
        if self._stream is None:
            return tensor.to(self.place)
        if tensor.device == self.place:
            return tensor.clone()
        return tensor.pin_memory().to(self.place, non_blocking=True)

    def _inputs(self, tensors: list[Tensor], shown: int) -> list[Tensor]:
        pixels, numbers = tensors[0], tensors[shown:]
        if shown == 2:  # what crop_mirror_normalize does
            pixels = pixels.float().sub_(tensors[1][:, None, None]).mul_(self._factor)
        return [pixels.permute(0, 3, 1, 2), *numbers]


@cache
def _stream(place: torch.device) -> torch.cuda.Stream:
    """The same for all loaders of a device: torch keeps the memory of each stream apart."""
    return torch.cuda.Stream(place)  # type: ignore[no-untyped-call]
