"""`python -m mesa_train.cli`."""

from mesa_train.cli import app

if __name__ == "__main__":
    app()
