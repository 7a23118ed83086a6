"""Teacher outputs of a fixed number of augmented draws of each image, on the disk.

Draw d of a run consists of the images in the order of epoch d, augmented and mixed in pairs. Row p
of a draw is the teacher's output for position p of that order. The order depends on (seed, d) and
the number of images alone, so students of any batch size and any number of processes read the same
store. A draw is kept in pieces of `PIECE` positions. Processes label the pieces in turn; a killed
run continues with the pieces that are missing.

Size: with `top` = 16 an image takes 66 bytes (16 classes in int16, 16 probabilities and the rest in
float16; int32 above 32,767 classes), against 2,000 bytes for 1,000 logits in float16.

`store.json` names all that the outputs depend on, and `views.safetensors` has the first pixels of
draw 0. A run whose settings or pixels differ is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mesa_train.training import checkpoints
from mesa_train.training.config_schema import ConfigError
from mesa_train.training.disk import CheckpointError, reading

PIECE, PROBE = 8192, 8
ABOUT, VIEWS = "store.json", "views.safetensors"
# Another version of Pillow or torch may round a pixel otherwise; another view differs far more.
PIXEL_TOLERANCE = 0.05


class Store:
    """Stored outputs of a teacher.

    Args:
        folder: of the store; made if it is missing.
        about: all that the outputs depend on. It must be the same in every run.
        images: positions of a draw.
        classes: of the teacher.
        top: probabilities of an image; 0: all logits.
        temperature: of the stored probabilities.
    """

    def __init__(
        self,
        folder: Path,
        about: Mapping[str, Any],
        images: int,
        classes: int,
        top: int,
        temperature: float,
    ) -> None:
        self.folder, self.about, self.images = folder, dict(about), images
        self.top, self.temperature = (0 if top >= classes else top), temperature
        self.index = torch.int16 if classes <= 2**15 else torch.int32
        self.open: dict[Path, Any] = {}

    def check(self, pixels: Tensor, main: bool) -> None:
        """Write what the store rests on, or compare it with what is there.

        Args:
            pixels: (PROBE, 3, H, W), the first mixed images of draw 0.
            main: true on the process that writes.
        Raises:
            ConfigError: the store was written with other settings or other pixels.
        """
        path, views = self.folder / ABOUT, self.folder / VIEWS
        about = json.loads(json.dumps(self.about))
        if not path.is_file():
            if main:
                self.folder.mkdir(parents=True, exist_ok=True)
                checkpoints.save_weights(views, {"pixels": pixels.half()}, {})
                written = checkpoints.beside(path)
                written.write_text(json.dumps(about, indent=1))
                written.replace(path)
            return
        with reading(path):
            found = json.loads(path.read_text())
        for key, value in about.items():
            if found.get(key) != value:
                raise ConfigError(
                    f"distill.store: {self.folder} was made with {key}={found.get(key)}, this run "
                    f"has {value}; choose another folder"
                )
        then = _tensors(views)["pixels"].float()
        far = then.shape != pixels.shape or (then - pixels).abs().max() > PIXEL_TOLERANCE
        if far:
            raise ConfigError(
                f"distill.store: the views of {self.folder} differ from those of this machine, so "
                "its outputs are of other pixels (another version of Pillow or torchvision?); "
                "choose another folder"
            )

    def piece(self, draw: int, number: int) -> Path:
        """The file of a piece of a draw."""
        return self.folder / f"draw-{draw:05d}-piece-{number:05d}.safetensors"

    def pieces(self) -> int:
        """Number of pieces of a draw."""
        return -(-self.images // PIECE)

    def write(self, draw: int, number: int, outputs: Callable[[range], Iterator[Tensor]]) -> bool:
        """Label a piece if it is missing.

        Args:
            draw: from 0.
            number: of the piece, from 0.
            outputs: gives the teacher's logits of a range of positions, batch by batch.
        Returns:
            Whether the piece was missing.
        """
        path = self.piece(draw, number)
        if path.is_file():
            return False
        positions = range(number * PIECE, min((number + 1) * PIECE, self.images))
        logits = torch.cat([part.float().cpu() for part in outputs(positions)])
        checkpoints.save_weights(path, self._coded(logits), {"draw": str(draw)})
        return True

    def _coded(self, logits: Tensor) -> dict[str, Tensor]:
        """The tensors of a piece."""
        if not self.top:
            return {"logits": logits.half()}
        best = (logits / self.temperature).softmax(1).topk(self.top, 1)
        rest = (1 - best.values.sum(1, keepdim=True)).clamp_min(0)
        return {
            "classes": best.indices.to(self.index),
            "probabilities": torch.cat([best.values, rest], 1).half(),
        }

    def read(self, draw: int, positions: range) -> Tensor:
        """Outputs of a range of positions as one tensor, for a batch.

        Returns:
            (N, classes) logits, or (N, 2 top + 1): classes, their probabilities, the rest.
        """
        rows: list[Tensor] = []
        for number in range(positions.start // PIECE, (positions.stop - 1) // PIECE + 1):
            low = max(positions.start - number * PIECE, 0)
            high = min(positions.stop - number * PIECE, PIECE)
            found = self._opened(self.piece(draw, number))
            with reading(self.piece(draw, number)):
                names = ("classes", "probabilities") if self.top else ("logits",)
                parts = [found.get_slice(name)[low:high].float() for name in names]
            rows.append(torch.cat(parts, 1))
        return torch.cat(rows)

    def _opened(self, path: Path) -> Any:
        """An open file. A few stay open, because batches read it in order."""
        from safetensors import safe_open

        if path not in self.open:
            while len(self.open) >= 4:
                self.open.pop(next(iter(self.open)))
            try:
                self.open[path] = safe_open(path, "pt")
            except Exception as error:  # SafetensorError or OSError
                raise CheckpointError(f"{path} is missing or damaged: {error}") from None
        return self.open[path]

    @staticmethod
    def bytes_of(images: int, classes: int, top: int) -> int:
        """Bytes of a draw."""
        if not top or top >= classes:
            return 2 * images * classes
        return images * (top * (2 if classes <= 2**15 else 4) + 2 * (top + 1))


def _tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file. CheckpointError if it cannot be read."""
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception as error:  # SafetensorError or OSError
        raise CheckpointError(f"{path} is missing or damaged: {error}") from None
