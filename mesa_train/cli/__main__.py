"""Run `python -m mesa_train.cli`."""

from . import app

if __name__ == "__main__":
    app()
