import base64
import hashlib
import json
import re
import shutil
import subprocess
import tempfile
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from polyalign.core.errors import UserError
from polyalign.evaluation.report import charts, comparison, pictures, write_report
from polyalign.evaluation.report.markup import duration, number, signed, size, text
from polyalign.evaluation.statistics import paired_win_rate

PARTS = (
    "wins",
    "grid",
    "worst",
    "tasks",
    "alarms",
    "curves",
    "diagnosis",
    "timesteps",
    "data",
    "recipe",
    "cost",
    "environment",
    "again",
)


def page_of(run) -> str:
    return write_report(run).read_text(encoding="utf-8")


def tree_of(page: str) -> ElementTree.Element:
    """The page as XML, which is stricter than HTML: every element closed, every attribute quoted, every text escaped."""
    bare = re.sub(r"<(style|script)>.*?</\1>", "", page, flags=re.DOTALL).removeprefix("<!DOCTYPE html>")
    return ElementTree.fromstring(bare)


class Addresses(HTMLParser):
    """Collects every attribute that could make a browser fetch something."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.found += [
            value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action", "poster", "xlink:href")
        ]


@pytest.mark.parametrize("kind", ["improved", "no change", "over-optimised", "diverged"])
def test_the_page_is_well_formed_self_contained_and_small(make_run, kind):
    run = make_run(kind)
    page = page_of(run)
    tree_of(page)
    addresses = Addresses()
    addresses.feed(page)
    assert addresses.found and all(address.startswith(("data:image/png;base64,", "#")) for address in addresses.found)
    assert (
        "http://" not in page and "https://" not in page and "@import" not in page and "url(" not in page.split("</style>")[0]
    )
    assert (run / "report.html").stat().st_size < 8_000_000
    assert f'<h1 id="verdict-title">{kind.capitalize()}</h1>' in page


def test_the_policy_allows_this_style_and_script_and_nothing_else(make_run):
    page = page_of(make_run())
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)
    assert policy and "default-src 'none'" in policy[1] and "unsafe" not in policy[1]
    for tag in ("style", "script"):
        content = re.search(rf"<{tag}>(.*?)</{tag}>", page, flags=re.DOTALL)
        assert content
        assert f"sha256-{base64.b64encode(hashlib.sha256(content[1].encode()).digest()).decode()}" in policy[1]
    assert not re.search(r"<[^>]+ (style|on\w+)=", page.split("</style>")[1]), "inline styles and handlers would be refused"


def test_all_parts_stand_in_order_with_the_verdict_first(make_run):
    tree = tree_of(page_of(make_run()))
    ids = [element.get("id") for element in tree.iter("section")]
    assert ids == [None, *PARTS]
    first = tree.find("body/main/section")
    assert first is not None and first.get("class") == "verdict good"
    assert len(tree.findall(".//svg[@class='chart']")) == 10
    assert [button.text for button in tree.iter("button")] == ["Biggest gains", "Worst regressions", "By prompt", "Show all 24"]


def test_pictures_and_charts_have_words_for_those_who_do_not_see_them(make_run):
    tree = tree_of(page_of(make_run()))
    images = list(tree.iter("img"))
    assert images and all(image.get("alt") and image.get("width") == "32" and image.get("class") == "crisp" for image in images)
    assert all(svg.get("aria-label") or svg.get("aria-hidden") for svg in tree.iter("svg"))
    references = [node.get("id") for node in tree.iter() if node.get("id")]
    assert len(references) == len(set(references))


def test_prompts_are_escaped_everywhere(make_run):
    run = make_run(count=24)
    evil = "<script>alert(1)</script>\"'&\u202e\x00<img src=http://x/y onerror=alert(2)>"
    block = json.loads((run / "evaluation.json").read_text())
    for item in block["items"]:
        item["prompt"] = item["task"] = evil
    block["judge"]["name"] = evil
    block["other_judges"] = {evil: block["win_rate"]}
    block["arms"] = {evil: block["arms"]["sft"]}
    block["tasks"] = {evil: {"base": 0.1, "aligned": 0.2, "n": 24}}
    (run / "evaluation.json").write_text(json.dumps(block))
    (run / "config.yaml").write_text("report: {title: '<b>bold</b>'}\n'<i>': '<u>'\n")
    (run / "environment.json").write_text(json.dumps({"<i>": evil, "argv": ["x", "align", evil.replace("\x00", "")]}))
    page = page_of(run)
    tree = tree_of(page)
    assert "<script>alert" not in page and "<img src=http" not in page and "<b>bold" not in page and "\x00" not in page
    assert page.count("<script>") == 1 and not list(tree.iter("i"))
    assert any(evil.replace("\x00", "\ufffd") in "".join(node.itertext()) for node in tree.iter("bdi"))


@pytest.mark.parametrize(
    "gone", ["evaluation.json", "metrics.jsonl", "pairs", "stages.json", "environment.json", "config.yaml", "samples"]
)
def test_a_missing_part_is_said(make_run, gone):
    run = make_run()
    target = run / gone
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    page = page_of(run)
    tree_of(page)
    facts = json.loads((run / "report.json").read_text())
    if gone == "samples":
        assert "pictures are missing or unreadable" in page
    else:
        assert any(gone in line for line in facts["missing"]) and "Not found in this run" in page
    if gone == "evaluation.json":
        assert facts["verdict"]["state"] == "not evaluated" and "The run has no evaluation" in page


def test_broken_files_are_said_and_do_not_stop_the_report(make_run):
    run = make_run()
    (run / "stages.json").write_text("{not json")
    (run / "pairs" / "pairs-00000.parquet").write_bytes(b"PAR1 broken")
    (run / "samples" / "base" / "00000.png").write_bytes(b"no picture")
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 240, "loss": 0.25}\n{"step": 241, "lo')
    page = page_of(run)
    facts = json.loads((run / "report.json").read_text())
    said = " ".join(facts["missing"])
    assert "stages.json: unreadable" in said and "pairs-00000.parquet: unreadable" in said and "1 line(s)" in said
    assert facts["training"]["steps"] == 240
    tree_of(page)


def test_no_folder_and_an_empty_folder_are_refused(tmp_path):
    with pytest.raises(UserError, match="there is no run folder"):
        write_report(tmp_path / "absent")
    with pytest.raises(UserError, match="holds nothing of a run"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_report_json_holds_the_numbers_of_the_page(make_run):
    run = make_run()
    page_of(run)
    raw = (run / "report.json").read_text()
    facts = json.loads(raw, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    block = json.loads((run / "evaluation.json").read_text())
    assert facts["verdict"]["state"] == "improved" and facts["evaluation"]["win_rate"] == block["win_rate"]
    assert facts["displacement"]["title"] == "the hoped-for picture"
    assert facts["command"] == "polyalign align configs/image/quickstart.yaml seed=1 objective.beta.value=500"
    assert facts["thresholds"]["loss_growth"] == 1.5 and len(facts["rules"]) == 11
    weights = "adapter/pytorch_lora_weights.safetensors"
    assert facts["files"][weights] == hashlib.sha256((run / weights).read_bytes()).hexdigest()
    assert page_of(run) == page_of(run), "the same run gives the same page"


def test_the_page_tells_pairs_kept_aside_from_pairs_trained_on(make_run):
    run = make_run()
    assert "of them trained on" not in page_of(run)
    file = run / "pairs" / "summary.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "pairs": 240}))
    assert "240" in page_of(run) and "169 of them trained on" in page_of(run)


def test_changes_against_the_stored_recipe(make_run):
    run = make_run()
    page = page_of(run)
    recipe = json.loads((run / "report.json").read_text())["recipe"]
    assert recipe["how"] == "stored" and recipe["unstated"] == 0
    assert recipe["changes"] == [["seed", "0", "1"], ["objective.beta.value", "2000.0", "500.0"]]
    assert "objective.beta.value" in page


def test_a_section_in_a_list_may_state_only_what_it_needs_and_folders_stay_private(make_run):
    run = make_run(count=24)
    with (run / "recipe.yaml").open("a") as stream:
        stream.write("evaluate: {judges: [{name: shapes}, {name: clipping}]}\nmodel: {base: tiny}\n")
    with (run / "config.yaml").open("a") as stream:
        stream.write("evaluate: {judges: [{name: shapes, weight: 1.0}, {name: saturation, weight: 1.0}]}\n")
        stream.write("model: {base: /home/somebody/models/mine}\n")
    page = page_of(run)
    changes = {key: (theirs, ours) for key, theirs, ours in json.loads((run / "report.json").read_text())["recipe"]["changes"]}
    assert changes["model.base"] == ("tiny", "mine") and "somebody" not in page
    assert changes["evaluate.judges"][0] == "- name: shapes - name: clipping"
    text_of_run = (run / "config.yaml").read_text().replace("saturation", "clipping")
    (run / "config.yaml").write_text(text_of_run)
    page_of(run)
    assert "evaluate.judges" not in {key for key, *_ in json.loads((run / "report.json").read_text())["recipe"]["changes"]}


def edited(run, name, change):
    path = run / name
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        change(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def caption_of(page, title):
    """The words under the chart with that title; empty if there is no such chart."""
    captions = [node.find("figcaption") for node in tree_of(page).iter("figure") if node.findtext("h3") == title]
    return "".join(word for caption in captions if caption is not None for word in caption.itertext())


def head_of(page):
    head = tree_of(page).find("body/main/section")
    assert head is not None
    return head


def test_the_loss_of_an_anchored_objective_says_what_its_level_is_worth(make_run):
    run = make_run(count=24)
    said = caption_of(page_of(run), "Loss")
    assert "includes the winner anchor (anchor 0.3)" in said and "Read accuracy and margin instead" in said
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("anchor: 0.3", "anchor: 0.0, sft: 0.5"))
    assert "includes added SFT (sft 0.5)" in caption_of(page_of(run), "Loss")
    (run / "config.yaml").write_text(config.replace("anchor: 0.3", "anchor: 0.0, sft: 0.0"))
    assert "includes" not in caption_of(page_of(run), "Loss")


def test_the_preference_part_of_the_loss_is_drawn_where_it_is_logged(make_run):
    run = make_run(count=24)
    assert caption_of(page_of(run), "Preference part of the loss") == ""
    edited(run, "metrics.jsonl", lambda row: row.update({"loss/preference": 0.7 - 0.001 * row["step"], "loss": 31.0}))
    page = page_of(run)
    assert caption_of(page, "Preference part of the loss").startswith("It fell: 0.688 in the first tenth")
    assert "drawn by itself" in caption_of(page, "Loss") and "loss/preference at the end 0.47" in page


def test_many_ties_are_seen_at_once(make_run):
    run = make_run(count=24)
    block = json.loads((run / "evaluation.json").read_text())
    scores = [0.0] * 44 + [1.0] + [0.0] * 315, [1.0] * 44 + [0.0] * 316
    block["win_rate"] = paired_win_rate(*scores, seed=0).as_json()
    (run / "evaluation.json").write_text(json.dumps(block))
    page = page_of(run)
    head = "".join(head_of(page).itertext())
    assert "44 won, 1 lost, 315 tied." in head and "44 / 1 / 315" in head and "of 360 comparisons" in head
    assert "of 45 decided" in head


def test_arms_stand_beside_the_aligned_model(make_run):
    run = make_run()
    tables = [table for table in tree_of(page_of(run)).iter("table") if "aligned against it" in "".join(table.itertext())]
    assert len(tables) == 1
    rows = [["".join(cell.itertext()) for cell in row] for row in tables[0].iter("tr")]
    block = json.loads((run / "evaluation.json").read_text())
    arm = block["arms"]["sft"]
    won = f"{arm['wins']} won, {arm['losses']} lost, {arm['ties']} tied"
    assert [row[0] for row in rows] == ["model", "aligned", "sft"]
    assert rows[1][1].startswith(f"{block['win_rate']['rate']:.3f} [") and rows[1][4] == "\u2013"
    assert rows[2][2] == won and rows[2][3] == f"{arm['scores']['mean']:.3f}"
    assert f"{arm['aligned_over_this']['wins']} won" in rows[2][4]
    block["arms"] = {"bare": {key: arm[key] for key in block["win_rate"]}}
    (run / "evaluation.json").write_text(json.dumps(block))
    assert tree_of(page_of(run)) is not None, "the contract's smallest arm is shown too"
    block["arms"] = {}
    (run / "evaluation.json").write_text(json.dumps(block))
    assert "aligned against it" not in page_of(run)


def test_a_statistic_that_decides_is_not_shown_as_better_or_worse(make_run):
    run = make_run()
    block = json.loads((run / "evaluation.json").read_text())
    block["judge"] = {"name": "-1 clipping", "version": "1", "parts": ["clipping"]}
    (run / "evaluation.json").write_text(json.dumps(block))
    page = page_of(run)
    tree = tree_of(page)
    assert head_of(page).get("class") == "verdict even"
    assert "A statistic is no judge of quality" in page and "aligned better" not in page and ", the deciding judge" not in page
    assert not [node for node in tree.iter("line") if node.get("class") in ("span good", "span bad")]


def test_three_steps_say_nothing_about_divergence(make_run):
    run = make_run("diverged")
    lines = (run / "metrics.jsonl").read_text().splitlines()[:3]
    (run / "metrics.jsonl").write_text("\n".join(lines))
    (run / "evaluation.json").unlink()
    page = page_of(run)
    facts = json.loads((run / "report.json").read_text())
    assert facts["verdict"]["state"] == "not evaluated"
    assert facts["displacement"]["title"] == "too few steps to tell"
    assert "Too few margins were logged" in page or "no range" in page


def test_the_grid_holds_both_ends_when_it_must_choose():
    items = [{"prompt": f"p{i}", "seed": i, "base_score": 0.0, "aligned_score": (i - 100) / 100} for i in range(200)]
    chosen = comparison.select(items, 30)
    gains = [comparison.gain(item) for item in chosen]
    assert len(chosen) == 30 and gains == sorted(gains, reverse=True)
    assert gains[:10] == [(99 - i) / 100 for i in range(10)] and gains[-10:] == [(i - 100) / 100 for i in range(9, -1, -1)]
    assert comparison.select(items, 30) == chosen
    assert len(comparison.select(items, 1000)) == 200 and comparison.select(items, 0) == []
    assert [item["seed"] for item in comparison.regressions(items)] == list(range(8))


def test_large_pictures_are_made_to_fit(tmp_path):
    noise = np.random.default_rng(0)
    names = [f"{i}.png" for i in range(8)]
    for name in names:
        Image.fromarray(noise.integers(0, 256, (300, 400, 3), dtype=np.uint8)).save(tmp_path / name)
    roomy = pictures.album(tmp_path, names)
    assert roomy.side == 256 and roomy.left_out == 0 and roomy.pictures["0.png"].width == 256
    tight = pictures.album(tmp_path, names, budget=300_000)
    assert tight.side == 96 and sum(len(picture.uri) for picture in tight.pictures.values()) <= 300_000
    tiny = pictures.album(tmp_path, names, budget=40_000)
    assert tiny.left_out > 0 and sum(len(picture.uri) for picture in tiny.pictures.values()) <= 40_000


def test_pictures_outside_the_run_are_not_read(tmp_path):
    inside = tmp_path / "run"
    inside.mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    assert pictures.album(inside, ["../secret.png", str(tmp_path / "secret.png")]).unreadable == 2


def test_pictures_left_in_their_folder_when_the_recipe_says_so(make_run):
    run = make_run()
    config = (run / "config.yaml").read_text().replace("embed_images: true", "embed_images: false")
    (run / "config.yaml").write_text(config)
    page = page_of(run)
    assert "report.embed_images" in page and "no picture" in page


def test_ticks_and_smoothing():
    assert charts.nice_ticks(0, 1000) == [0, 250, 500, 750, 1000]
    assert charts.nice_ticks(-0.07, 0.12) == [-0.05, 0, 0.05, 0.1]
    assert charts.nice_ticks(0.4, 0.72) == [0.4, 0.5, 0.6, 0.7]
    assert charts.smoothed(np.full(100, 3.0)) == pytest.approx(3.0)
    x, y = charts.thin(np.arange(10_000.0), np.arange(10_000.0))
    assert len(x) == charts.MOST_POINTS and y.mean() == pytest.approx(4999.5, rel=1e-3)


@pytest.mark.parametrize("values", [[0.5], [0.0, 0.0], [1e-9, 2e-9], [-1e6, 1e6], list(range(5000))])
def test_charts_of_any_length_and_scale_are_well_formed(values):
    line = charts.Line("loss", "policy", np.arange(len(values), dtype=float), np.array(values, dtype=float))
    drawing = charts.line_chart("x", [line], x_label="step", y_label="loss", level=(0.5, "a < b"))
    ElementTree.fromstring(drawing)
    assert "nan" not in drawing and "inf" not in drawing


def test_numbers_read_well():
    assert [number(v) for v in (0, 0.693147, 12.5, 4200, 3e-5, -0.05, 1.2e7, 999.6)] == [
        "0", "0.693", "12.5", "4,200", "3e-5", "\u22120.05", "1.2e7", "1,000",
    ]  # fmt: skip
    assert (signed(0.25), signed(-0.25), signed(0.0)) == ("+0.25", "\u22120.25", "0")
    assert [duration(v) for v in (4.26, 45, 200, 7500)] == ["4.3 s", "45 s", "3 min 20 s", "2 h 5 min"]
    assert [size(v) for v in (12, 1500, 1.46e9)] == ["12 B", "1.5 kB", "1.5 GB"]
    assert text("a" * 400)[-1] == "\u2026" and len(text("a" * 400)) == 300


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on this machine")
@pytest.mark.parametrize("width", [1280, 500])
def test_a_browser_shows_it_without_sideways_scrolling_and_without_refusals(make_run, tmp_path, width):
    """500 is the narrowest window a headless chromium opens; 390 is looked at through a frame of that width."""
    page = write_report(make_run())
    frame = tmp_path / "frame.html"
    shown = 390 if width == 500 else width
    probe = (
        "const d=document.querySelector('iframe').contentDocument.documentElement;"
        "document.title='measured '+d.scrollWidth+' '+d.ownerDocument.querySelectorAll('.scripted,#cards>li').length"
    )
    frame.write_text(
        f"<!DOCTYPE html><title>none</title><iframe src='{page.as_uri()}' width='{shown}' height='900' frameborder='0'>"
        "</iframe>"
        f"<script>onload=()=>{{{probe}}}</script>"
    )
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        done = subprocess.run(
            [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
            + ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr"]
            + ["--allow-file-access-from-files", f"--user-data-dir={profile}", f"--window-size={width},1000"]
            + ["--virtual-time-budget=4000", "--dump-dom", frame.as_uri()],
            capture_output=True,
            text=True,
            timeout=90,
        )
    measured = re.search(r"<title>measured (\d+) (\d+)</title>", done.stdout)
    assert measured, done.stdout[:300] + done.stderr[-800:]
    assert int(measured[1]) <= shown
    assert int(measured[2]) == 1 + 24, "the script ran and the grid is whole"
    assert "Content Security Policy" not in done.stderr and "Uncaught" not in done.stderr
