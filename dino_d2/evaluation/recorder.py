"""What the decoder is given and what it says, taken by a hook: the model's code knows nothing of it."""

from __future__ import annotations

import weakref

from torch import nn

from dino_d2.structures import Predictions, Queries


class DecoderRecorder:
    """Keeps the queries and the predictions of the decoder's latest pass.

    The hook stays from `attach` to `detach`, or as long as the recorder lives: one that is forgotten in between,
    by an evaluation that ends in an error, leaves no hook behind.

    Args:
        decoder: takes the queries first, as :class:`DINODecoder` does.
    """

    def __init__(self, decoder: nn.Module):
        self._decoder = decoder
        self._latest: list[tuple[Queries, list[Predictions]]] = []
        self._remove_hook: weakref.finalize | None = None

    def attach(self) -> None:
        """Record from now on. Attaching again changes nothing but forgets what was recorded."""
        self.detach()
        latest = self._latest  # the hook holds the list, not the recorder, which could never be forgotten otherwise

        def record(decoder: nn.Module, inputs: tuple, output: list[Predictions]) -> None:
            latest[:] = [(inputs[0], output)]

        handle = self._decoder.register_forward_hook(record)
        self._remove_hook = weakref.finalize(self, handle.remove)

    def detach(self) -> None:
        """Remove the hook, if there is one, and forget what was recorded."""
        if self._remove_hook is not None:
            self._remove_hook()
        self._latest.clear()

    def take(self) -> tuple[Queries, list[Predictions]]:
        """The queries that the latest pass began with and the predictions of each layer, first to last; only once.

        Raises:
            RuntimeError: the decoder has not run since the last `take`.
        """
        if not self._latest:
            raise RuntimeError(
                "The decoder has not run since it was last asked for: the evaluator must be given the very model that "
                "is evaluated, and reset() must come before the first image"
            )
        return self._latest.pop()
