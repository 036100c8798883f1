"""A modality in small, for the tests of the command line: its pairs are numbers, its model is their sum."""

from __future__ import annotations

import json
import random
import shutil
from typing import Literal

from polyalign.core.config import Section
from polyalign.core.errors import UserError
from polyalign.core.recipe import TrainSettings


class GenerateConfig(Section):
    count: int = 4
    """How many numbers."""


class SumsRecipe(Section):
    modality: Literal["sums"]
    seed: int = 0
    run: str = "runs/sums"
    generate: GenerateConfig = GenerateConfig()
    train: TrainSettings = TrainSettings(steps=2)
    interrupt: bool = False
    """Interrupt the training, as the user's ctrl-C would."""


SCHEMA = SumsRecipe
STAGES = ("generate", "train", "evaluate", "report")


def generate(recipe, run):
    if recipe.generate.count < 1:
        raise UserError("generate.count: nothing to add")
    with run.stage("generate", {"generate": recipe.generate, "seed": recipe.seed}, products=("pairs",)) as stage:
        if stage.todo:
            draw = random.Random(recipe.seed)
            (run / "pairs").mkdir(exist_ok=True)
            (run / "pairs" / "numbers.txt").write_text(" ".join(str(draw.random()) for _ in range(recipe.generate.count)))


def train(recipe, run):
    with run.stage(
        "train", {"train": recipe.train}, after=("generate",), products=("adapter",), scratch=("metrics.jsonl",)
    ) as stage:
        if stage.todo:
            with open(run / "metrics.jsonl", "a") as log:
                log.write("{}\n")
            if recipe.interrupt:
                raise KeyboardInterrupt
            total = sum(float(text) for text in (run / "pairs" / "numbers.txt").read_text().split())
            (run / "adapter").mkdir(exist_ok=True)
            (run / "adapter" / "sum.txt").write_text(str(total * recipe.train.steps))


def evaluate(recipe, run):
    with run.stage("evaluate", {}, after=("train",), products=("evaluation.json",)) as stage:
        if stage.todo:
            (run / "evaluation.json").write_text(json.dumps({"sum": float((run / "adapter" / "sum.txt").read_text())}))


def report(recipe, run):
    (run / "report.html").write_text(f"<p>{json.loads((run / 'evaluation.json').read_text())['sum']}</p>")


def export(recipe, run, destination):
    if not (run / "adapter").is_dir():
        raise UserError(f"{run / 'adapter'}: nothing was trained yet")
    shutil.copytree(run / "adapter", destination)
