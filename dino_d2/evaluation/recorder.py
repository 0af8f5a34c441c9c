"""Record the decoder's inputs and outputs with a hook, without changes to the model."""

from __future__ import annotations

import weakref

from torch import nn

from dino_d2.structures import Predictions, Queries


class DecoderRecorder:
    """Records the queries and predictions of the decoder's last forward pass.

    The hook is active from `attach` to `detach`. It is also removed with the recorder, for instance after an error.

    Args:
        decoder: takes the queries as its first argument, like :class:`DINODecoder`.
    """

    def __init__(self, decoder: nn.Module):
        self._decoder = decoder
        self._latest: list[tuple[Queries, list[Predictions]]] = []
        self._remove_hook: weakref.finalize | None = None

    def attach(self) -> None:
        """Start recording. Discards earlier records."""
        self.detach()
        latest = self._latest  # the hook must not reference the recorder, which could not be garbage-collected then

        def record(decoder: nn.Module, inputs: tuple, output: list[Predictions]) -> None:
            latest[:] = [(inputs[0], output)]

        handle = self._decoder.register_forward_hook(record)
        self._remove_hook = weakref.finalize(self, handle.remove)

    def detach(self) -> None:
        """Remove the hook, if any, and discard the records."""
        if self._remove_hook is not None:
            self._remove_hook()
        self._latest.clear()

    def pop(self) -> tuple[Queries, list[Predictions]]:
        """Return and discard the initial queries and the predictions of each layer, first to last.

        Raises:
            RuntimeError: the decoder has not run since the last `pop`.
        """
        if not self._latest:
            raise RuntimeError(
                "The decoder has not run since the last pop(): give the evaluator the evaluated model, and call "
                "reset() before the first image"
            )
        return self._latest.pop()
