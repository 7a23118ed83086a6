"""The command line in this process."""

from typer.testing import CliRunner

from mesa_train.cli import app

VIT = ["vit_tiny_patch16_224", "--batch-size", "2", "--image-size", "64"]


def run(*arguments, columns=80):
    return CliRunner(env={"COLUMNS": str(columns)}).invoke(app, list(arguments))
