"""Batches of a data set for one rank: shuffled from any step for training, in order for validation.

The images of a step depend on (seed, step) only. A stream is shuffled through a buffer and divided
over the ranks. A resumed run reads the stream forward to its step.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from .config import DataConfig
from .sources import (
    MISTAKES,
    CorruptImage,
    Sample,
    Samples,
    Sources,
    collate,
    train_order,
    val_order,
)

Batch = tuple[Tensor, Tensor, list[str]]
_SHUFFLE_BUFFER = 10_000


class Loader:
    """Batches of a data set on one rank. A batch is (images, labels, skipped paths).

    Args:
        sources: training and validation records.
        transforms: (for training, for validation), of PIL images.
        data: the section `data` of the configuration.
        batch_size: images of a micro-batch on this rank.
        seed: of the order and the augmentation.
        steps_per_epoch: optimizer steps in an epoch.
        accumulation: micro-batches of a rank in an optimizer step; default 1.
        rank: this process; default 0.
        world: number of processes; default 1.
        pin_memory: default: as in `data`.
    """

    def __init__(
        self,
        sources: Sources,
        transforms: tuple[Any, Any],
        data: DataConfig,
        *,
        batch_size: int,
        seed: int,
        steps_per_epoch: int,
        accumulation: int = 1,
        rank: int = 0,
        world: int = 1,
        pin_memory: bool | None = None,
    ) -> None:
        self.sources, self.batch_size, self.seed = sources, batch_size, seed
        self.transforms, self.data = transforms, data
        self.steps_per_epoch, self.accumulation = steps_per_epoch, accumulation
        self.rank, self.world = rank, world
        self.workers = data.workers
        self.pin_memory = data.pin_memory if pin_memory is None else pin_memory
        common = (data.image_size, seed, data.on_corrupt)
        self.train = Samples(sources.train, transforms[0], *common, replace=True)
        self.val = Samples(sources.val, transforms[1], *common, replace=False)

    def training(self, epoch: int, first: int) -> Iterator[Batch]:
        """The micro-batches of an epoch, from its optimizer step `first`."""
        micro = self.batch_size
        if self.sources.train.stream is not None:
            stream = Stream(
                self.train, epoch, self.rank, self.world, first * self.accumulation * micro
            )
            count = (self.steps_per_epoch - first) * self.accumulation
            batches = self._loader(_Told(stream), batch_size=micro)
            yield from (batch for _, batch in zip(range(count), batches, strict=False))
            return
        order = train_order(
            self.sources.train.count,
            seed=self.seed,
            epoch=epoch,
            first=first,
            rank=self.rank,
            world=self.world,
            micro=micro,
            accum=self.accumulation,
        )
        yield from self._loader(self.train, batch_sampler=list(order))

    def validation(self) -> Iterator[Batch]:
        """This rank's share of the validation images, padded with ignored images."""
        batch = self.batch_size
        if self.sources.val.stream is not None:
            stream = Stream(self.val, 0, self.rank, self.world, 0)
            yield from self._loader(_Told(stream), batch_size=batch)
            return
        order = val_order(self.sources.val.count, rank=self.rank, world=self.world, batch=batch)
        yield from self._loader(self.val, batch_sampler=list(order))

    def of_keys(self, keys: Sequence[Sequence[tuple[int, int]]]) -> Iterator[Batch]:
        """Batches of training images by (epoch, index), as `training` augments them."""
        yield from self._loader(self.train, batch_sampler=[list(batch) for batch in keys])

    def of(self, sources: Sources) -> Loader:
        """A loader of other records with the same transforms, batches and processes."""
        return Loader(
            sources,
            self.transforms,
            self.data,
            batch_size=self.batch_size,
            seed=self.seed,
            steps_per_epoch=self.steps_per_epoch,
            accumulation=self.accumulation,
            rank=self.rank,
            world=self.world,
            pin_memory=self.pin_memory,
        )

    def _loader(self, dataset: Any, **options: Any) -> Iterator[Batch]:
        """Batches of a data set. An error of a worker process is raised here, in one line."""
        # A stream has one worker: several workers would need to divide the rows.
        workers = min(self.workers, 1) if isinstance(dataset, IterableDataset) else self.workers
        loader: DataLoader[Any] = DataLoader(
            dataset,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=self.pin_memory,
            **options,
        )
        for batch in loader:
            if isinstance(batch, Exception):
                raise batch
            yield batch


class _Told(IterableDataset["Sample | Exception"]):
    """A stream that yields its errors instead of raising them, as `Samples.__getitems__` does."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[Sample | Exception]:
        try:
            yield from self.stream
        except MISTAKES as error:
            yield error


class Stream(IterableDataset[Sample]):
    """One rank's samples of a streamed data set in one epoch, from this rank's sample `first`.

    In training, the next valid image replaces an image that cannot be decoded. A stream that ends
    before the epoch starts again in another order. Every position of the epoch is therefore filled.
    """

    def __init__(self, samples: Samples, epoch: int, rank: int, world: int, first: int) -> None:
        self.samples, self.epoch, self.rank, self.world = samples, epoch, rank, world
        self.first = first

    def __iter__(self) -> Iterator[Sample]:
        places, owed, skipped = itertools.count(), list[int](), list[str]()
        for turn in itertools.count():
            rows = own = decoded = 0
            for row in self._rows(turn):
                position, rows = next(places), rows + 1
                if position % self.world != self.rank or position < self.first * self.world:
                    continue
                own += 1
                image, label, missing = self.samples.of_record(self.epoch, position, row)
                skipped += missing
                if image is None:
                    owed.append(position)
                    continue
                decoded += 1
                for place in owed if self.samples.replace else ():
                    stand_in, _, _ = self.samples.of_record(self.epoch, place, row)
                    assert stand_in is not None
                    yield stand_in, label, []
                yield image, label, skipped
                owed, skipped = [], []
            if not self.samples.replace:
                return
            if not rows or own > decoded == 0:
                raise CorruptImage(
                    f"none of {own} images of the stream can be decoded: {self.samples.reason}"
                )

    def _rows(self, turn: int) -> Any:
        """The rows of the stream, shuffled for training. `turn` numbers the pass."""
        stream = self.samples.records.stream
        assert stream is not None
        if not self.samples.replace:
            return stream
        seed = self.samples.seed * 1_000_003 + self.epoch + 7_919 * turn
        return stream.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)
