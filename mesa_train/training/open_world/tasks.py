"""Tasks of open-world detection: which classes are learnt in which order.

`OWOD` is the benchmark of ORE (arXiv 2103.02603), `SOWODB` the one of OW-DETR (arXiv 2112.01513),
which splits by super-category. Both have the 80 classes of COCO in four tasks. Names are VOC's where
VOC has the class. The order within a task decides the labels; that of `SOWODB` is ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mesa_train.training.config_schema import ConfigError

_T1 = (
    "aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable, dog, horse, "
    "motorbike, person, pottedplant, sheep, sofa, train, tvmonitor"
)
_T2 = (
    "truck, traffic light, fire hydrant, stop sign, parking meter, bench, elephant, bear, zebra, "
    "giraffe, backpack, umbrella, handbag, tie, suitcase, microwave, oven, toaster, sink, refrigerator"
)
_T3 = (
    "frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, "
    "surfboard, tennis racket, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, "
    "donut, cake"
)
_T4 = (
    "bed, toilet, laptop, mouse, remote, keyboard, cell phone, book, clock, vase, scissors, "
    "teddy bear, hair drier, toothbrush, wine glass, cup, fork, knife, spoon, bowl"
)
_S1 = (
    "aeroplane, bicycle, bird, boat, bus, car, cat, cow, dog, horse, motorbike, sheep, train, "
    "elephant, bear, zebra, giraffe, truck, person"
)
_S2 = (
    "traffic light, fire hydrant, stop sign, parking meter, bench, backpack, umbrella, handbag, tie, "
    "suitcase, microwave, oven, toaster, sink, refrigerator, chair, diningtable, pottedplant, bed, "
    "toilet, sofa"
)
_S4 = (
    "laptop, mouse, remote, keyboard, cell phone, book, clock, vase, scissors, teddy bear, "
    "hair drier, toothbrush, wine glass, cup, fork, knife, spoon, bowl, tvmonitor, bottle"
)
# COCO's names of VOC's classes, where the two differ.
TO_VOC = {
    "airplane": "aeroplane",
    "dining table": "diningtable",
    "motorcycle": "motorbike",
    "potted plant": "pottedplant",
    "couch": "sofa",
    "tv": "tvmonitor",
}


@dataclass(frozen=True)
class Tasks:
    """Classes by task.

    Attributes:
        classes: names of each task's classes.
        others: names of classes that no task has. Their objects are unknown in every evaluation.
    """

    classes: tuple[tuple[str, ...], ...]
    others: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The classes of all tasks; the position is the label."""
        return tuple(name for task in self.classes for name in task)

    def seen(self, task: int) -> int:
        """Number of classes known after a task, counted from 1; 0 for task 0."""
        return sum(len(names) for names in self.classes[:task])

    def of(self, task: int) -> range:
        """The labels of a task, counted from 1."""
        return range(self.seen(task - 1), self.seen(task))

    def label(self, name: str) -> int:
        """The label of a class by VOC's or COCO's name; the number of classes if no task has it.

        Raises:
            ConfigError: the name is none of the classes.
        """
        name = TO_VOC.get(name, name) if name not in self.names else name
        if name in self.names:
            return self.names.index(name)
        if name in self.others:
            return len(self.names)
        raise ConfigError(f"class {name!r} is in no task, nor among the other classes")


def _names(text: str) -> tuple[str, ...]:
    return tuple(" ".join(name.split()) for name in text.split(",") if name.strip())


OWOD = Tasks(tuple(map(_names, (_T1, _T2, _T3, _T4))))
SOWODB = Tasks(tuple(map(_names, (_S1, _S2, _T3, _S4))))
BENCHMARKS = {"owod": OWOD, "sowodb": SOWODB}


def tasks_of(text: str, names: Iterable[str]) -> Tasks:
    """The tasks of a configuration.

    Args:
        text: "owod", "sowodb", or class names: `;` ends a task, `,` a name. An example is
            "cat, dog; horse".
        names: the classes of the data set. Classes that no task names are others.
    Raises:
        ConfigError: a name is not among `names`, or occurs twice.
    """
    names = tuple(names)
    if text in BENCHMARKS:
        return BENCHMARKS[text]
    classes = classes_of(text)
    every = [name for task in classes for name in task]
    for name in every:
        if name not in names:
            raise ConfigError(
                f"data.tasks: no class {name!r} in the data; classes: {', '.join(names)}"
            )
        if every.count(name) > 1:
            raise ConfigError(f"data.tasks has class {name!r} twice")
    return Tasks(classes, tuple(name for name in names if name not in every))


def classes_of(text: str) -> tuple[tuple[str, ...], ...]:
    """The names of each task's classes, without a look at the data.

    Args:
        text: as for `tasks_of`.
    Raises:
        ConfigError: the text names no class.
    """
    if text in BENCHMARKS:
        return BENCHMARKS[text].classes
    classes = tuple(found for part in text.split(";") if (found := _names(part)))
    if not classes:
        raise ConfigError(f"data.tasks must be owod, sowodb or class names, got {text!r}")
    return classes
