"""Runs of the recipes on `RecipeRun`, cut and continued."""

import json

import pytest
import torch
from accelerate import Accelerator

from mesa_train.training import recipe_command, recipe_run
from mesa_train.training.recipe_command import METRICS, Recipe


def made(recipe: Recipe, config, how=""):
    run = recipe.prepare(config, Accelerator(cpu=True))
    recipe_run.resume(run, how, METRICS)
    return run


def trained(recipe, config):
    run = made(recipe, config)
    run.scores = recipe_command.fit(run, recipe)
    return run


def rows(out):
    lines = map(json.loads, (out / METRICS).read_text().splitlines())
    timed = ("images_per_s", "step_ms", "wait_ms")
    return [{k: v for k, v in row.items() if k not in timed} for row in lines]


def continues_exactly(recipe, config, tmp_path, cut):
    """Train whole, and interrupted before step `cut` + 1; weights and step rows must be equal."""
    whole = trained(recipe, config(tmp_path / "whole"))
    run = made(recipe, config(tmp_path / "cut"))
    step = run.step

    def interrupted(batches):
        if run.done == cut:
            raise KeyboardInterrupt
        return step(batches)

    run.step = interrupted
    with pytest.raises(KeyboardInterrupt):
        recipe_command.fit(run, recipe)
    again = made(recipe, config(tmp_path / "cut"), "auto")
    assert 0 < again.done <= cut
    recipe_command.fit(again, recipe)
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key]), key
    steps = [[r for r in rows(tmp_path / name) if r["kind"] == "step"] for name in ("whole", "cut")]
    assert steps[0] == steps[1]
    return whole
