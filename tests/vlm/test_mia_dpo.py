"""MIA-DPO's pairs: of the world with the embedded base, of files with tiny random models."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from colour_questions import COLOURS, write_colours
from pydantic import ValidationError

from polyalign.core.adapter import Model
from polyalign.core.errors import UserError
from polyalign.datasets.multi_image import grid, sequence
from polyalign.datasets.multi_image.rows import check_row
from polyalign.datasets.worlds.scenes_questions import asked
from polyalign.modalities.vlm.adapter import VlmAdapter
from polyalign.modalities.vlm.filters import perplexity
from polyalign.modalities.vlm.mia_dpo import MiaDpo
from polyalign.modalities.vlm.mia_dpo_config import NUMBERS, OF_THE_WORLD, PUBLISHED, MultiImageConfig
from polyalign.modalities.vlm.mia_dpo_figures import merged, new_kind
from polyalign.modalities.vlm.mia_dpo_questions import source_of
from polyalign.modalities.vlm.settings import VlmModelSettings

Opened = tuple[VlmAdapter, Model]
Made = tuple[list[dict[str, Any]], dict[str, Any]]
SEQUENCES: dict[Any, Any] = {"sequence": {2: 1, 4: 2}}


def of_scenes(count: int = 60, **given: Any) -> MultiImageConfig:
    filters = {"perplexity": None, **given.pop("filter", {})}  # the small base is surer of itself than 1.1
    return MultiImageConfig.model_validate(
        {"world": "scenes", "count": count, "formats": SEQUENCES, "filter": filters, **given}
    )


def of_files(folder: Path, **given: Any) -> MultiImageConfig:
    return MultiImageConfig.model_validate({"questions": str(folder), **given})


@pytest.fixture(scope="module")
def tiny() -> Opened:
    adapter = VlmAdapter(VlmModelSettings("tiny", device="cpu", max_new_tokens=24, sample_batch=64))
    return adapter, adapter.load()


@pytest.fixture(scope="module")
def standard(tiny: Opened) -> Made:
    return all_of(MiaDpo(*tiny, None, of_scenes(), seed=3))


@pytest.fixture(scope="module")
def qwen(tiny_vlms: Callable[[str], Path]) -> Opened:
    adapter = VlmAdapter(VlmModelSettings(str(tiny_vlms("qwen2_vl")), device="cpu", max_new_tokens=6))
    return adapter, adapter.load()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_colours(tmp_path_factory.mktemp("questions"))


def all_of(maker: MiaDpo) -> Made:
    return maker.make(range(len(maker)))


def by_kind(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    return {
        name: [row for row in rows if row["provenance"]["sampler"]["rejected"] == words]
        for name, words in (("mistakes", "own"), ("balanced", "of another image"))
    }


class TestOfTheWorld:
    def test_pairs_say_what_is_true(self, tiny: Opened) -> None:
        """Chosen answers are right, rejected ones are not; what is told of them adds up."""
        maker = MiaDpo(*tiny, None, of_scenes(single=0.2), seed=3)
        rows, note = all_of(maker)
        kinds = by_kind(rows)
        assert len(rows) == note["pairs"] and len({row["pair_id"] for row in rows}) == len(rows)
        for row in rows:
            check_row(row)
            judged = asked(row["condition"])
            assert judged.verdict(row["chosen"]) == "right" != judged.verdict(row["rejected"])
            assert row["condition"]["prompt"].endswith("?") and "\n" not in row["condition"]["prompt"]
        for row in kinds["balanced"]:
            assert row["rejected"] in row["condition"]["confusions"]
            assert asked(row["condition"]).verdict(row["provenance"]["sampler"]["answer"]) == "right"
            assert row["provenance"]["rejected_seed"] is None
        for row in kinds["mistakes"]:
            assert row["rejected"] == row["provenance"]["sampler"]["answer"] == row["rejected"].strip()
        figures = MiaDpo.summary([note])
        assert sum(kind["questions"] for kind in figures["kinds"].values()) == 60 == figures["questions"]
        right = sum(kind["right"] for kind in figures["kinds"].values())
        assert figures["audit"]["balanced"]["pairs"] == right - note["right_without_pair"]
        assert figures["audit"]["mistakes"]["pairs"] == 60 - right > 0
        for part, found in kinds.items():
            audit = figures["audit"][part]
            assert audit["kept"] == len(found) == sum(kind[part] for kind in figures["kinds"].values())
            assert audit["pairs"] == audit["kept"] + sum(audit["dropped"].values())
        assert {name: kind["questions"] for name, kind in figures["kinds"].items()} == {
            "sequence 2": 16,
            "sequence 4": 32,
            "single": 12,
        }
        assert len(kinds["balanced"]) > len(kinds["mistakes"]) > 0

    def test_perplexity_is_of_the_answer_as_it_is_trained(self, tiny: Opened, standard: Made) -> None:
        adapter, model = tiny
        own = by_kind(standard[0])["mistakes"]
        for row in own:
            scores = adapter.score(model, adapter.prepare(model, [row], step=0), None)
            values = scores.values[0, 1][scores.mask[0, 1]].detach()
            assert row["provenance"]["sampler"]["perplexity"] == pytest.approx(perplexity(values), rel=1e-4)

    def test_any_part_alone(self, tiny: Opened, standard: Made) -> None:
        """Pairs depend on the number of their question and not on what was made before it."""
        rows, note = standard
        parts = [MiaDpo(*tiny, None, of_scenes(), seed=3).make(part) for part in (range(40, 60), range(40))]

        def shown(rows: list[dict[str, Any]]) -> list[Any]:
            pictures = [[image.tobytes() for image in row["condition"]["images"]] for row in rows]
            return [
                (row["pair_id"], row["chosen"], row["rejected"], row["condition"]["messages"], seen)
                for row, seen in zip(rows, pictures, strict=True)
            ]

        assert shown(rows) == shown(parts[1][0] + parts[0][0])
        whole = MiaDpo.summary([note])
        together = MiaDpo.summary([json.loads(json.dumps(parts[1][1])), json.loads(json.dumps(parts[0][1]))])
        assert whole == together and whole["audit"]["mistakes"] == merged([parts[0][1]["mistakes"], parts[1][1]["mistakes"]])
        other, _ = MiaDpo(*tiny, None, of_scenes(), seed=4).make(range(4))
        assert shown(other) != shown(rows)[: len(other)]

    def test_mistakes_only(self, tiny: Opened, standard: Made) -> None:
        balanced, _ = standard
        rows, note = all_of(MiaDpo(*tiny, None, of_scenes(balance=False), seed=3))
        assert [row["pair_id"] for row in rows] == [row["pair_id"] for row in by_kind(balanced)["mistakes"]]
        right = sum(kind["right"] for kind in note["kinds"].values())
        assert note["right_without_pair"] == right > 0 == note["balanced"]["pairs"]

    def test_selection_by_attention(self, tiny: Opened) -> None:
        """Of mistakes only those stay that looked elsewhere; balanced pairs are not asked where they looked."""
        others: dict[str, Any] = {"edit_distance": None}
        free, _ = all_of(MiaDpo(*tiny, None, of_scenes(filter={"attention": None, **others}), seed=3))
        kept, note = all_of(MiaDpo(*tiny, None, of_scenes(filter={"attention": "not_first", **others}), seed=3))
        before, after = by_kind(free), by_kind(kept)
        expected = [row["pair_id"] for row in before["mistakes"] if not row["provenance"]["sampler"]["target_is_first"]]
        assert [row["pair_id"] for row in after["mistakes"]] == expected
        assert note["mistakes"]["refused_alone"]["attention"] == len(before["mistakes"]) - len(expected) > 0
        assert [row["pair_id"] for row in before["balanced"]] == [row["pair_id"] for row in after["balanced"]]
        tight = of_scenes(filter={"thresholds": {"sequence": {2: 0.2, 4: 0.2}}, **others})
        few = by_kind(all_of(MiaDpo(*tiny, None, tight, seed=3))[0])["mistakes"]
        assert [row["pair_id"] for row in few] == [
            row["pair_id"] for row in before["mistakes"] if row["provenance"]["sampler"]["ratio"] <= 0.2
        ]

    def test_layers(self, tiny: Opened, standard: Made) -> None:
        last, every = (MiaDpo(*tiny, None, of_scenes(**given), seed=3) for given in ({"layer": 3}, {"every_layer": True}))
        notes = [standard[1], *(all_of(maker)[1] for maker in (last, every))]
        assert [sorted(MiaDpo.summary([note])["auc"]) for note in notes] == [["2"], ["3"], ["0", "1", "2", "3"]]
        ratios = [note["kinds"]["sequence 4"]["ratios"] for note in notes]
        assert ratios[2]["2"] == ratios[0]["2"] and ratios[2]["3"] == ratios[1]["3"] != ratios[0]["2"]
        with pytest.raises(UserError, match="layer 4: the language model has the layers 0 to 3"):
            MiaDpo(*tiny, None, of_scenes(layer=4), seed=3)

    def test_temperature(self, tiny: Opened) -> None:
        hot = of_scenes(16, rejected={"temperature": 1.5, "max_new_tokens": 8}, formats={"grid": {2: 1}})
        first, second = (all_of(MiaDpo(*tiny, None, hot, seed=3))[0] for _ in range(2))
        own = [row["rejected"] for row in by_kind(first)["mistakes"]]
        assert own and own == [row["rejected"] for row in by_kind(second)["mistakes"]]
        greedy = hot.model_copy(update={"rejected": hot.rejected.model_copy(update={"temperature": 0.0})})
        assert own != [row["rejected"] for row in by_kind(all_of(MiaDpo(*tiny, None, greedy, seed=3))[0])["mistakes"]]

    def test_lines(self, standard: Made) -> None:
        note = standard[1]
        shown = "\n".join(MiaDpo.lines(MiaDpo.summary([json.loads(json.dumps(note))])))
        assert "60 questions" in shown and "attention: " in shown and "AUC" in shown and "sequence 4: 0." in shown


class TestFigures:
    def note(self, **ratios: dict[str, list[float]]) -> dict[str, Any]:
        right, wrong = (sum(len(given[side]) for given in ratios.values()) for side in ("right", "wrong"))
        kind = {**new_kind(), "questions": right + wrong, "right": right, "elsewhere_wrong": 1, "ratios": {"5": ratios}}
        empty = merged([])
        counts = {"questions": right + wrong, "pairs": 0, "unusable": 0, "broken_answers": 0, "right_without_pair": right}
        return {**counts, "layer": 5, "mistakes": empty, "balanced": empty, "kinds": {"grid 2": kind}}

    def test_areas(self) -> None:
        """By hand: within tasks the ratio tells nothing here, and what it seems to tell over both is that one is harder."""
        one = self.note(easy={"right": [0.9, 0.7], "wrong": [0.8]})
        two = self.note(hard={"right": [0.3], "wrong": [0.2, 0.4]})
        found = MiaDpo.summary([one, two])
        assert found["auc"]["5"] == found["kinds"]["grid 2"]["auc"]["5"] == pytest.approx(6 / 9, abs=1e-4)
        assert found["auc_within_tasks"]["5"] == 0.5
        area = 6 / 9
        squared = area * (1 - area) + 2 * (area / (2 - area) - area**2) + 2 * (2 * area**2 / (1 + area) - area**2)
        assert found["auc_error"]["5"] == pytest.approx((squared / 9) ** 0.5, abs=1e-4)
        assert found["target_not_first"] == {"right": 0.0, "wrong": 0.6667}
        assert "layer 5: 0.67 +- 0.47, within tasks 0.50" in "\n".join(MiaDpo.lines(found))

    def test_without_wrong_answers(self) -> None:
        found = MiaDpo.summary([self.note(easy={"right": [0.9, 0.7], "wrong": []})])
        assert found["auc"] == found["auc_error"] == {"5": None} and found["target_not_first"]["wrong"] is None
        assert MiaDpo.lines(found)[0] == "2 questions, 0 pairs"


class TestOfAFile:
    def test_every_kind_of_question(self, qwen: Opened, folder: Path) -> None:
        """A random model is wrong everywhere: each kind makes pairs of mistakes, and none is balanced."""
        config = of_files(
            folder,
            count=40,
            formats={"sequence": {2: 1, 3: 1}, "grid": {2: 1, 4: 1}, "picture_in_picture": {2: 1}},
            levels={"compare": 0.2, "search": 0.2},
            single=0.1,
            filter={"attention": "not_first", "perplexity": None, "length_ratio": None},
            noise=True,
        )
        maker = MiaDpo(*qwen, None, config, seed=0)
        rows, note = all_of(maker)
        kinds = Counter(" ".join(name.split()[:-1]) or name for name in note["kinds"])
        assert set(kinds) == {
            "single",
            "sequence",
            "grid",
            "picture_in_picture",
            "compare sequence",
            "compare grid",
            "search sequence",
            "search grid",
        }
        assert note["questions"] == len(maker) and note["kinds"]["single"]["ratios"] == {}
        assert note["kinds"]["single"]["mistakes"] == note["kinds"]["single"]["questions"]
        assert not note["balanced"]["pairs"] and rows
        for row in rows:
            check_row(row)
            assert row["chosen"] != row["rejected"]
        clean = maker.source.row(0)["condition"]["images"]
        shown = [row for row in rows if row["pair_id"] == maker.source.row(0)["pair_id"]]
        assert all(row["condition"]["images"][0].tobytes() == clean[0].tobytes() for row in shown)

    def test_noise_is_what_the_model_sees(self, qwen: Opened, folder: Path) -> None:
        plain, noised = (
            MiaDpo(*qwen, None, of_files(folder, formats={"grid": {2: 1}}, noise=noise), seed=0) for noise in (False, True)
        )
        perplexities = [[row["provenance"]["sampler"]["perplexity"] for row in all_of(maker)[0]] for maker in (plain, noised)]
        assert perplexities[0] and perplexities[0] != perplexities[1]

    def test_single_questions_know_other_answers(self, folder: Path) -> None:
        source = source_of(of_files(folder, single=0.5), 0)
        rows = [row for row in map(source.row, range(len(source))) if row["condition"]["layout"]["format"] == "single"]
        assert rows
        for row in rows:
            assert row["confusions"] and set(row["confusions"]) < set(COLOURS) - {row["chosen"]}
            assert source.right(row, f" The {row['chosen'].upper()}.") and not source.right(row, row["confusions"][0])
            assert len(row["condition"]["images"]) == 1

    def test_pictures_that_cannot_be_used(self, qwen: Opened, tmp_path: Path) -> None:
        folder = write_colours(tmp_path)
        broken = sorted((tmp_path / "coco").iterdir())[0]
        broken.write_bytes(broken.read_bytes()[:60])
        given: dict[str, Any] = {"formats": {"sequence": {2: 1}}, "filter": {"perplexity": None}}
        with pytest.raises(UserError, match=rf"{broken.name}.*pairs\.multi_image\.on_bad_row: drop"):
            all_of(MiaDpo(*qwen, None, of_files(folder, **given), seed=0))
        _, note = all_of(MiaDpo(*qwen, None, of_files(folder, on_bad_row="drop", **given), seed=0))
        assert note["unusable"] > 0 and note["questions"] == 12 - note["unusable"]

    def test_of_a_conversation_the_first_turn_is_asked(self, qwen: Opened, tmp_path: Path) -> None:
        entries = []
        for line in (write_colours(tmp_path) / "questions.jsonl").read_text().splitlines():
            one = json.loads(line)
            said = ("<image>\n" + one["question"], one["answer"], "Is it large?", "Yes.")
            turns = [{"from": ("human", "gpt")[place % 2], "value": value} for place, value in enumerate(said)]
            entries.append({"image": one["image"], "conversations": turns})
        (tmp_path / "llava.json").write_text(json.dumps(entries))
        config = of_files(tmp_path / "llava.json", formats={"sequence": {2: 1}}, filter={"perplexity": None})
        maker = MiaDpo(*qwen, None, config, seed=0)
        assert all("large" not in json.dumps(maker.source.row(place)["condition"]["messages"]) for place in range(len(maker)))
        summary = maker.summary([maker.make(range(2))[1], maker.make(range(2, 4))[1]])
        assert summary["conversations"] == len(entries)
        assert any(f"{len(entries)} entries of the data are conversations" in line for line in maker.lines(summary))

    def test_inputs_follow_the_data(self, qwen: Opened, tmp_path: Path) -> None:
        found = []
        for name, count in (("a", 12), ("b", 11), ("c", 12)):
            maker = MiaDpo(*qwen, None, of_files(write_colours(tmp_path / name, count), formats={"sequence": {2: 1}}), seed=0)
            found.append(json.dumps(maker.inputs(), sort_keys=True))
        assert found[0] == found[2] != found[1]

    def test_a_processor_that_cuts_images_away(self, folder: Path, tiny_vlms: Callable[[str], Path]) -> None:
        """The settings that the error asks for help."""
        base, config = str(tiny_vlms("llava")), of_files(folder, formats={"grid": {3: 1}}, count=4)
        cutting = VlmAdapter(VlmModelSettings(base, device="cpu", max_new_tokens=3))
        with pytest.raises(UserError, match="cuts Image1"):
            all_of(MiaDpo(cutting, cutting.load(), None, config, seed=0))
        options = {"do_center_crop": False, "size": {"height": 28, "width": 28}}
        whole = VlmAdapter(VlmModelSettings(base, device="cpu", max_new_tokens=3, picture_options=options))
        _, note = all_of(MiaDpo(whole, whole.load(), None, config, seed=0))
        assert len(note["kinds"]["grid 3"]["ratios"]["1"][""]["wrong"]) == 4


class TestConfig:
    def test_published_proportions(self) -> None:
        shares = MultiImageConfig(questions="x").shares
        total = sum(sum(given.values()) for given in shares.values())
        assert total == pytest.approx(28.9) and sum(shares["sequence"].values()) == pytest.approx(15.1)
        assert shares["grid"][2] / shares["grid"][9] == pytest.approx(3800 / 900)
        of_world = MultiImageConfig(world="scenes", count=1).shares
        assert {name: tuple(given) for name, given in of_world.items()} == OF_THE_WORLD

    def test_as_the_builders_have_it(self) -> None:
        assert PUBLISHED["sequence"] == sequence.COUNTS and PUBLISHED["grid"] == grid.COUNTS
        assert NUMBERS["sequence"] == tuple(sequence.NUMBERS) and NUMBERS["grid"] == tuple(grid.SHAPES)

    def test_without_torch(self) -> None:
        code = (
            "import sys, polyalign.modalities.vlm.mia_dpo_config; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
        )
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

    @pytest.mark.parametrize(
        ("given", "said"),
        [
            ({}, "either 'world'"),
            ({"world": "scenes"}, "needs 'count'"),
            ({"world": "scenes", "count": 9, "questions": "x"}, "give one of them"),
            ({"world": "scenes", "count": 9, "levels": {"compare": 0.1}}, "'levels' belongs to 'questions'"),
            ({"world": "scenes", "count": 9, "formats": {"sequence": {5: 1}}}, "no sequence of 5 images here"),
            ({"world": "scenes", "count": 9, "formats": {"picture_in_picture": {2: 1}}}, "no picture_in_picture of 2"),
            ({"questions": "x", "formats": {"grid": {5: 1}}}, "no grid of 5 images here. Allowed: .*grid: 2, 3, 4, 6, 9"),
            ({"questions": "x", "tasks": ["colour"]}, "'tasks' belongs to 'world'"),
            ({"questions": "x", "formats": {"grid": {2: 0}}}, "at least one of formats"),
            ({"questions": "x", "levels": {"compare": 0.7}, "single": 0.4}, "at most 1"),
            ({"questions": "x", "formats": {"picture_in_picture": {2: 1}}, "levels": {"search": 1}}, "sequences or collages"),
            ({"questions": "x", "formats": {"sequence": {7: 1}}}, "no threshold is known for sequence of 7"),
        ],
    )
    def test_wrong_settings(self, given: dict[str, Any], said: str) -> None:
        with pytest.raises(ValidationError, match=said):
            MultiImageConfig.model_validate(given)

    def test_wrong_tasks(self) -> None:
        for tasks in (["colour", "smell"], ["alt"], []):
            with pytest.raises(UserError, match="tasks: the world 'scenes' asks what, colour"):
                source_of(of_scenes(tasks=tasks), 0)
