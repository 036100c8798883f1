"""Reading recipes: what is wrong is said all at once, in words, with its place; what is right comes back as written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, model_validator

from polyalign.core.config import Section, dump, find_config, json_schema, load, packaged
from polyalign.core.config_source import parse_value, to_yaml
from polyalign.core.errors import UserError
from polyalign.core.recipe import BetaConfig, JudgeConfig, PairingConfig, TrainSettings


class Logistic(Section):
    name: Literal["logistic"] = "logistic"
    beta: BetaConfig = BetaConfig()
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=0.5)


class Square(Section):
    name: Literal["square"] = "square"
    tau: float = Field(default=0.1, gt=0.0)
    reduction: Literal["sum", "mean"]


Objective = Annotated[Logistic | Square, Field(discriminator="name")]


class Source(Section):
    file: str | None = None
    world: str | None = None

    @model_validator(mode="after")
    def _one(self) -> Source:
        if (self.file is None) == (self.world is None):
            raise ValueError("give either 'file' or 'world'")
        return self


class Recipe(Section):
    modality: Literal["image"] = "image"
    seed: int = 0
    title: str = "untitled"
    shape: tuple[int, int] = (32, 32)
    size: int | list[int] = 8
    verbose: bool = False
    folder: Path = Path("runs")
    train: TrainSettings = TrainSettings()
    pairing: PairingConfig = PairingConfig()
    objective: Objective = Logistic()
    second: Objective | None = None
    arms: dict[str, Objective] = {}
    judges: tuple[JudgeConfig, ...] = ()
    source: Source = Source(world="shapes")


def write(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(path, overrides, Recipe)
    assert caught.value.exit_code == 2
    return str(caught.value)


WRONG = {
    "misspelt top key": ("sed: 3", ["sed: unknown key (found 3), did you mean seed", "recipe.yaml:1"]),
    "misspelt nested key": (
        "train:\n  batchsize: 4",
        ["train.batchsize: unknown key (found 4), did you mean train.batch_size", "recipe.yaml:2"],
    ),
    "capitals": ("Seed: 3", ["Seed: unknown key", "did you mean seed"]),
    "key of another section": ("learning_rate: 0.1", ["learning_rate: unknown", "did you mean train.optimizer.learning_rate"]),
    "key like nothing": ("train: {zzzz: 1}", ["train.zzzz: unknown key (found 1); keys here: steps, batch_size"]),
    "key of another union member": (
        "objective: {name: logistic, tau: 1}",
        ["objective.tau: unknown key (found 1), did you mean second.tau; set"],
    ),
    "misspelt key in a union": (
        "objective:\n  name: logistic\n  betta: 5",
        ["objective.betta: unknown key (found 5), did you mean objective.beta;", "recipe.yaml:3"],
    ),
    "section as number": (
        "objective: {name: logistic, beta: 2000}",
        ["objective.beta: must be a section (keys with values) (found 2000), did you mean objective.beta.value"],
    ),
    "union as text": (
        "objective: logistic",
        ["objective: must be a section", "(found 'logistic'), did you mean objective.name"],
    ),
    "unknown tag": (
        "objective:\n\n  name: logstic",
        ["objective.name: must be one of logistic, square (found 'logstic'), did you mean logistic", "recipe.yaml:3"],
    ),
    "no tag": ("second: {tau: 3}", ["second.name: missing, and it has no default; allowed: logistic, square"]),
    "required": ("objective: {name: square}", ["objective.reduction: missing, and it has no default; set in", "recipe.yaml:1"]),
    "union in a dict": ("arms:\n  a: {name: square, reduction: sum, tua: 1}", ["arms.a.tua: unknown key", "arms.a.tau"]),
    "choice": (
        "train: {optimizer: {name: adamW}}",
        ["train.optimizer.name: must be one of adamw, adamw8bit, adafactor (found 'adamW'), did you mean adamw"],
    ),
    "choice in a union": ("second: {name: square, reduction: summ}", ["second.reduction: must be one of sum, mean"]),
    "text for a number": ("train: {optimizer: {learning_rate: fast}}", ["learning_rate: must be a number (found 'fast')"]),
    "text for a whole number": ("seed: three", ["seed: must be a whole number (found 'three')"]),
    "fraction for a whole number": ("seed: 1.5", ["seed: must be a whole number (found 1.5)"]),
    "true for a number": ("train: {steps: true}", ["train.steps: must be a number, not true or false (found true)"]),
    "true for an optional number": ("train: {clip_norm: false}", ["train.clip_norm: must be a number, not true or false"]),
    "number for text": ("title: 3", ["title: must be text (found 3)"]),
    "text for true or false": ("verbose: maybe", ["verbose: must be true or false (found 'maybe')"]),
    "list for a section": ("train: [1]", ["train: must be a section (keys with values) (found [1])"]),
    "section for a list": ("judges: {name: a}", ["judges: must be a list"]),
    "null": ("seed:", ["seed: must be a whole number (found null)"]),
    "below range": ("train:\n  batch_size: 0", ["train.batch_size: must be greater than or equal to 1 (found 0)"]),
    "above range": (
        "objective: {name: logistic, label_smoothing: 0.5}",
        ["label_smoothing: must be less than 0.5 (found 0.5)"],
    ),
    "not positive": ("objective: {name: logistic, beta: {value: -1}}", ["objective.beta.value: must be greater than 0"]),
    "entry of a list": (
        "judges:\n- name: a\n- {name: b, wieght: 2}",
        ["judges.1.wieght: unknown key", "judges.1.weight", "recipe.yaml:3"],
    ),
    "missing in a list": ("judges:\n- name: a\n- weight: 2", ["judges.1.name: missing, and it has no default"]),
    "too long a list": ("shape: [1, 2, 3]", ["shape: must have at most 2 items"]),
    "neither of two types": ("size: 1.5", ["size: must be a whole number or a list (found 1.5)"]),
    "two that exclude each other": ("source: {file: a, world: b}", ["source: give either 'file' or 'world' (found"]),
    "long value": (f"seed: {'x' * 200}", ["seed: must be a whole number (found 'xxx", "...)"]),
}


@pytest.mark.parametrize("text, parts", WRONG.values(), ids=WRONG.keys())
def test_wrong_recipes_are_explained(tmp_path: Path, text: str, parts: list[str]):
    message = refusal(write(tmp_path, text + "\n"))
    assert "1 error\n" in message
    for part in parts:
        assert part in message
    assert "logistic.beta" not in message.replace("name: logistic", "")  # no tag of a union in a path


def test_all_errors_come_at_once_with_their_places(tmp_path: Path):
    path = write(tmp_path, "sed: 1\ntrain:\n  steps: -1\n  optimizer:\n    name: sgd\n")
    message = refusal(path, "objective.beta.valu=3", "title", "train.schedule.name=cosin", "seed.x=3", "judges=[1")
    assert "8 errors" in message and len(message.splitlines()) == 9
    assert f"sed: unknown key (found 1), did you mean seed; set in {path}:1" in message
    assert f"train.steps: must be greater than or equal to 0 (found -1); set in {path}:3" in message
    assert f"set in {path}:5" in message
    assert "did you mean objective.beta.value; set on the command line" in message
    assert "title: not an override: write it as key=value, for example seed=3 (found 'title')" in message
    assert "did you mean cosine; set on the command line" in message
    assert "judges: not valid YAML" in message


OVERRIDES = {
    "seed=3": lambda recipe: recipe.seed == 3,
    "objective.beta.value=2000": lambda recipe: recipe.objective.beta.value == 2000.0,
    "train.optimizer.learning_rate=1e-5": lambda recipe: recipe.train.optimizer.learning_rate == 1e-5,
    "train.optimizer.learning_rate='1e-5'": lambda recipe: recipe.train.optimizer.learning_rate == 1e-5,
    "title=1.5 metres": lambda recipe: recipe.title == "1.5 metres",
    "title='3'": lambda recipe: recipe.title == "3",
    "title=a=b": lambda recipe: recipe.title == "a=b",
    "train.mixed_precision=no": lambda recipe: recipe.train.mixed_precision == "no",
    "verbose=true": lambda recipe: recipe.verbose is True,
    "train.clip_norm=null": lambda recipe: recipe.train.clip_norm is None,
    "train.clip_norm=": lambda recipe: recipe.train.clip_norm is None,
    "shape=[8, 16]": lambda recipe: recipe.shape == (8, 16),
    "judges.0.weight=-1": lambda recipe: recipe.judges[0].weight == -1.0 and recipe.judges[0].name == "shapes",
    "judges.1={name: other}": lambda recipe: [judge.name for judge in recipe.judges] == ["shapes", "other"],
    "objective={name: square, reduction: sum}": lambda recipe: recipe.objective == Square(reduction="sum"),
    "objective.beta.auto.decay=0.5": lambda recipe: recipe.objective.beta.auto.decay == 0.5,
    "--seed=4": lambda recipe: recipe.seed == 4,
}


@pytest.mark.parametrize("override", OVERRIDES)
def test_overrides(tmp_path: Path, override: str):
    path = write(tmp_path, "judges: [{name: shapes}]\nobjective: {name: logistic}\n")
    recipe, provenance = load(path, [override], Recipe)
    assert OVERRIDES[override](recipe)
    assert provenance.of(override.removeprefix("--").split("=")[0]) == "set on the command line"


def test_the_last_override_wins_and_the_rest_stays(tmp_path: Path):
    path = write(tmp_path, "seed: 7\ntitle: kept\n")
    recipe, provenance = load(path, ["seed=1", "seed=2"], Recipe)
    assert (recipe.seed, recipe.title) == (2, "kept")
    assert provenance.of("title") == f"set in {path}:2"
    assert provenance.of("train.steps") == "default"


def test_overrides_that_lead_nowhere(tmp_path: Path):
    path = write(tmp_path, "seed: 7\njudges: [{name: a}]\n")
    message = refusal(path, "seed.deeper=1", "judges.5.name=b")
    assert "seed.deeper: cannot be set, since seed is the single value 7 and not a section" in message
    assert "judges.5: is not an entry of the list judges, which has 1 entries, counted from 0" in message


def test_extends_merges_sections_and_keeps_places(tmp_path: Path):
    base = write(tmp_path, "seed: 1\ntrain:\n  steps: 10\n  batch_size: 4\njudges: [{name: a}, {name: b}]\n", "base.yaml")
    middle = write(tmp_path, "extends: ../base.yaml\ntrain:\n  steps: 20\n", "sub/middle.yaml")
    top = write(tmp_path, "extends: sub/middle\nseed: 3\njudges: [{name: c}]\n", "top.yaml")
    recipe, provenance = load(top, [], Recipe)
    assert (recipe.seed, recipe.train.steps, recipe.train.batch_size) == (3, 20, 4)
    assert [judge.name for judge in recipe.judges] == ["c"]  # lists replace
    assert [file.name for file in provenance.files] == ["top.yaml", "middle.yaml", "base.yaml"]
    assert provenance.of("train.steps").endswith("middle.yaml:3")
    assert provenance.of("train.batch_size") == f"set in {base}:4"
    assert provenance.of("seed") == f"set in {top}:2"
    assert middle.is_file()


def test_an_error_in_the_parent_names_the_parent(tmp_path: Path):
    base = write(tmp_path, "seed: 1\ntrain: {stepz: 10}\n", "base.yaml")
    message = refusal(write(tmp_path, "extends: base.yaml\nseed: 2\n"))
    assert f"train.stepz: unknown key (found 10), did you mean train.steps; set in {base}:2" in message


def test_replace_takes_the_place_of_the_parents_section(tmp_path: Path):
    write(tmp_path, "objective: {name: logistic, label_smoothing: 0.1}\n", "base.yaml")
    merged = refusal(write(tmp_path, "extends: base.yaml\nobjective: {name: square, reduction: sum}\n"))
    assert "objective.label_smoothing: unknown key" in merged
    path = write(tmp_path, "extends: base.yaml\nobjective: !replace {name: square, reduction: sum}\n")
    assert load(path, [], Recipe)[0].objective == Square(reduction="sum")


BROKEN = {
    "syntax": ("seed: 1\ntrain: [1, 2\nseed: 4\n", ["recipe.yaml:3: not valid YAML"]),
    "tab": ("train:\n\tsteps: 1\n", ["recipe.yaml:2: not valid YAML"]),
    "duplicate": ("seed: 1\ntrain: {}\nseed: 2\n", ["recipe.yaml:3: seed: duplicate key, first in line 1"]),
    "nested duplicate": ("train:\n  steps: 1\n  steps: 2\n", ["recipe.yaml:3: train.steps: duplicate key"]),
    "a list": ("- 1\n", ["recipe.yaml:1: a recipe is a mapping of keys to values, found list"]),
    "text": ("hello\n", ["a recipe is a mapping of keys to values, found str"]),
    "python object": ("seed: !!python/object/apply:os.getcwd []\n", ["recipe.yaml:1: not valid YAML"]),
    "merge key": ("a: &a {x: 1}\nb:\n  <<: *a\n", ["recipe.yaml:3: the YAML merge key '<<' is not supported; use 'extends"]),
    "anchor in itself": ("train: &t\n  steps: *t\n", ["an anchor that contains itself"]),
    "unknown parent": ("seed: 1\nextends: nowhere.yaml\n", ["recipe.yaml:2: extends: the file 'nowhere.yaml' does not exist"]),
    "parent is a number": ("extends: 3\n", ["recipe.yaml:1: extends: must be one file or packaged recipe by name, found 3"]),
    "itself": ("extends: recipe.yaml\n", ["these files extend one another in a circle", "recipe.yaml -> ", "recipe.yaml"]),
    "two documents": ("seed: 1\n---\nseed: 2\n", ["not valid YAML"]),
}


@pytest.mark.parametrize("text, parts", BROKEN.values(), ids=BROKEN.keys())
def test_broken_files(tmp_path: Path, text: str, parts: list[str]):
    message = refusal(write(tmp_path, text))
    for part in parts:
        assert part in message


def test_a_longer_circle_is_refused(tmp_path: Path):
    write(tmp_path, "extends: b.yaml\n", "a.yaml")
    write(tmp_path, "extends: a.yaml\n", "b.yaml")
    assert "circle" in refusal(tmp_path / "a.yaml")


def test_files_that_are_no_text(tmp_path: Path):
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"seed: \xff\xfe")
    assert "is not UTF-8 text (byte 6)" in refusal(path)


def test_an_empty_recipe_is_all_defaults(tmp_path: Path):
    assert load(write(tmp_path, ""), [], Recipe)[0] == Recipe()


def test_setting_one_key_leaves_the_other_defaults(tmp_path: Path):
    class Special(Recipe):
        train: TrainSettings = TrainSettings.model_validate({"steps": 2, "schedule": {"name": "cosine"}})
        objective: Objective = Square(reduction="mean")

    path = write(tmp_path, "train: {schedule: {warmup_steps: 1}}\nobjective: {tau: 3}\n")
    recipe, _ = load(path, ["train.batch_size=4"], Special)
    assert (recipe.train.steps, recipe.train.batch_size) == (2, 4)
    assert (recipe.train.schedule.name, recipe.train.schedule.warmup_steps) == ("cosine", 1)
    assert recipe.objective == Square(reduction="mean", tau=3)
    assert load(path, ["objective={name: logistic}"], Special)[0].objective == Logistic()


def test_dump_reads_back_equal(tmp_path: Path):
    recipe = Recipe(
        seed=3,
        title="no",
        train=TrainSettings.model_validate({"optimizer": {"learning_rate": 1e-5, "epsilon": 1e-30}, "clip_norm": None}),
        objective=Square(reduction="mean", tau=float("inf")),
        second=Logistic(beta=BetaConfig.model_validate({"value": 0.1, "convention": "nats", "auto": {"decay": 0.5}})),
        arms={"sft: 1": Logistic(label_smoothing=0.1)},
        judges=(JudgeConfig(name="1e-5", options={"a": [1, 2.5, None, "true", "2026-01-01", "é"], "b": {"c": True}}),),
    )
    text = dump(recipe)
    assert load(write(tmp_path, text), [], Recipe)[0] == recipe
    assert dump(load(write(tmp_path, text), [], Recipe)[0]) == text


@pytest.mark.parametrize(
    "value", ["1e-5", "no", "on", "010", "1:30", "2026-01-01", "~", "", "null", "0x1f", "1_000", ".inf", "-"]
)
def test_text_that_looks_like_something_else_survives(value: str):
    assert parse_value(to_yaml(value)) == value


@pytest.mark.parametrize(
    "text, value",
    [("1e-5", 1e-5), ("1E3", 1000.0), ("-.5", -0.5), ("010", 10), ("no", "no"), ("1:30", "1:30"), ("true", True), ("~", None)]
    + [("2026-01-01", "2026-01-01"), ("1_000", "1_000"), ("+7", 7), ("[1, a]", [1, "a"]), ("", None)],
)
def test_scalars_are_read_by_yaml_1_2(text: str, value: object):
    assert parse_value(text) == value and type(parse_value(text)) is type(value)


def test_json_schema_describes_the_keys():
    schema = json_schema(Recipe)
    assert "extends" in schema["properties"] and schema["required"] == []
    assert schema["$defs"]["TrainSettings"]["properties"]["steps"]["description"] == "Optimiser steps in all."
    assert schema["additionalProperties"] is False


def test_recipes_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Recipe().seed = 3  # type: ignore[misc]


def test_paths_come_before_packaged_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert find_config(write(tmp_path, "seed: 1\n", "mine.yaml").name).resolve() == (tmp_path / "mine.yaml").resolve()
    assert find_config("mine").resolve() == (tmp_path / "mine.yaml").resolve()
    write(tmp_path, "seed: 1\n", "configs/image/quickstart.yaml")
    assert find_config("configs/image/quickstart.yaml").resolve().is_relative_to(tmp_path)


def test_packaged_recipes_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    known = packaged()
    assert "image/quickstart" in known
    assert not any(name.startswith("accelerate") for name in known)
    for name, path in known.items():
        for spelling in (name, f"{name}.yaml", f"configs/{name}.yaml", f"./configs/{name}.yaml"):
            assert find_config(spelling) == path


def test_unknown_names_list_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    near = {
        "image/quikstart": "image/quickstart",
        "configs/image/sdxl_loar.yaml": "image/sdxl_lora",
        "quickstart": "audio/quickstart or image/quickstart or lidar/quickstart or text/quickstart",
    }
    for name, meant in near.items():
        with pytest.raises(UserError, match=rf"Did you mean {meant}\? Packaged recipes: .*image/quickstart"):
            find_config(name)
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        find_config("folder.yaml")
