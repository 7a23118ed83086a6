"""One of two processes: transformers' Trainer without the callback, and with it."""

import logging
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from test_trainer_callbacks import EIGHT, trainer

logging.basicConfig(level=logging.INFO)
for number, policy in enumerate((None, EIGHT)):
    folder = Path(sys.argv[1]) / str(number)
    trainer(folder, policy, max_steps=2, save_steps=2).train()
