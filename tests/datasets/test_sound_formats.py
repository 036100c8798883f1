"""Pairs of sounds: in the store, in Audio-alpaca's columns, in lines and folders, and what is wrong with them."""

import io
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

from polyalign.core.errors import UserError
from polyalign.datasets.audio.waves import Wave, decode, encode_flac
from polyalign.datasets.convert import main
from polyalign.datasets.formats.exporting import export_pairs
from polyalign.datasets.formats.table import SOUND_FORMATS, exporter, import_format
from polyalign.datasets.pairs import PairStore
from polyalign.datasets.prompts import load_prompts

RATE = 8000


def tone(hertz, rate=RATE):
    return Wave((0.5 * np.sin(2 * np.pi * hertz * np.arange(rate // 4) / rate)).astype(np.float32), rate)


def row(number):
    return {
        "pair_id": f"p{number}",
        "condition": {"prompt": f"a tone of {number}", "strategy": "3"},
        "chosen": tone(200 + number),
        "rejected": tone(900 + number),
        "chosen_scores": {"clap": 0.6},
        "rejected_scores": {"clap": 0.4},
        "provenance": {"model": "tango", "chosen_seed": 1, "rejected_seed": 2, "sampler": {"steps": 5}, "judges": {}},
    }


@pytest.fixture
def store(tmp_path):
    made = PairStore(tmp_path / "store", "sound")
    made.write_shard(0, [row(number) for number in range(3)])
    return made


def stereo(wave, rate):
    buffer = io.BytesIO()
    soundfile.write(buffer, np.stack([wave.samples, wave.samples], axis=1), rate, format="WAV")
    return buffer.getvalue()


def test_a_store_of_sounds_opens_and_is_one_for_datasets_too(store):
    assert store.validate() == 3 and PairStore(store.folder).kind.name == "sound"
    found = store.rows([1])[0]
    assert isinstance(found["chosen"], Wave) and encode_flac(found["chosen"]) == encode_flac(tone(201))
    table = store.open()
    assert table.features["chosen"].decode is False and table[0]["chosen"]["bytes"][:4] == b"fLaC"


@pytest.mark.parametrize("name", ["alpaca", "jsonl", "folders"])
def test_every_format_there_and_back_loses_nothing(store, tmp_path, name, capsys):
    assert export_pairs(store, exporter(name, SOUND_FORMATS), tmp_path / "out") == 3
    again = PairStore(tmp_path / "again", "sound")
    import_format(name, tmp_path / "out", again, formats=SOUND_FORMATS)
    assert "sounds at 8000 Hz" in capsys.readouterr().err
    for before, after in zip(store.rows(range(3), decode=False), again.rows(range(3), decode=False), strict=True):
        assert after["condition"] == before["condition"] and after["chosen"] == before["chosen"]
        assert after["chosen_scores"] == before["chosen_scores"] and after["provenance"] == before["provenance"]


def test_audio_alpacas_columns_are_written_and_read_without_ours(store, tmp_path):
    export_pairs(store, exporter("alpaca", SOUND_FORMATS), tmp_path / "out")
    file = next((tmp_path / "out").glob("*.parquet"))
    table = pq.read_table(file)
    assert table.schema.names[:4] == ["prompt", "chosen", "rejected", "strategy"]
    pq.write_table(table.drop_columns(["polyalign"]), tmp_path / "theirs.parquet")
    again = PairStore(tmp_path / "again")
    summary = import_format("alpaca", tmp_path / "theirs.parquet", again, formats=SOUND_FORMATS)
    assert again.rows([0])[0]["condition"] == {"prompt": "a tone of 0", "strategy": "3"}
    assert summary["pairs"] == 3 and summary["at_8000_hz"] == 6 and "of_several_channels" not in summary


def bad_folder(place):
    """Three good pairs, one of them in stereo at 44.1 kHz, and one of each thing that can be wrong."""
    good = encode_flac(tone(300))
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(0), RATE, format="WAV")
    files = {
        "a": (good, encode_flac(tone(500)), "a tone"),
        "b": (stereo(tone(300, 44100), 44100), stereo(tone(500, 44100), 44100), "two channels"),
        "c": (encode_flac(tone(310)), encode_flac(tone(510)), "a third"),
        "silent": (good, encode_flac(Wave(np.zeros(2000, dtype=np.float32), RATE)), "silence"),
        "short": (good, encode_flac(tone(500))[:300], "cut short"),
        "empty": (good, buffer.getvalue(), "nothing"),
        "uncaptioned": (good, encode_flac(tone(600)), " "),
        "alone": (good, None, "a winner alone"),
    }
    for side in ("chosen", "rejected"):
        (place / side).mkdir(parents=True)
    for name, (chosen, rejected, caption) in files.items():
        (place / "chosen" / f"{name}.wav").write_bytes(chosen)
        (place / "chosen" / f"{name}.txt").write_text(caption)
        if rejected is not None:
            (place / "rejected" / f"{name}.wav").write_bytes(rejected)
    return place


WRONG = ("silent sound", "does not decode|cut short", "of no length", "caption is empty", "has no rejected/alone")


def test_all_that_is_wrong_with_a_folder_is_said_at_once(tmp_path):
    with pytest.raises(UserError) as refused:
        import_format("folders", bad_folder(tmp_path / "mine"), PairStore(tmp_path / "s", "sound"), formats=SOUND_FORMATS)
    for words in WRONG:
        assert refused.match(words)


def test_bad_rows_are_dropped_and_counted_where_that_is_asked_for(tmp_path, capsys):
    store = PairStore(tmp_path / "s", "sound")
    folder = bad_folder(tmp_path / "mine")
    summary = import_format("folders", folder, store, on_bad_row="drop", formats=SOUND_FORMATS)
    assert summary["pairs"] == 3 and summary["rows_dropped"] == 5
    assert summary["of_several_channels"] == 2 and summary["at_44100_hz"] == 2
    said = capsys.readouterr().err
    assert "2 of 6 sounds have several channels; models hear their mean" in said and "44100" in said
    assert store.rows([1])[0]["chosen"].rate == 44100


def test_lines_with_a_missing_loser_or_no_caption(tmp_path):
    (tmp_path / "a.flac").write_bytes(encode_flac(tone(300)))
    (tmp_path / "b.flac").write_bytes(encode_flac(tone(500)))
    lines = [
        {"prompt": "a tone", "chosen": "a.flac", "rejected": "b.flac"},
        {"prompt": "gone", "chosen": "a.flac", "rejected": "c.flac"},
        {"prompt": "", "chosen": "b.flac", "rejected": "a.flac"},
        {"prompt": "out", "chosen": "../a.flac", "rejected": "b.flac"},
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    with pytest.raises(UserError, match=r"(?s)3 bad row.*line 2: 'c.flac': no such file.*line 3.*empty.*line 4.*climbs out"):
        import_format("jsonl", tmp_path / "pairs.jsonl", PairStore(tmp_path / "one", "sound"), formats=SOUND_FORMATS)


def test_a_store_of_pictures_takes_no_sounds(store, tmp_path):
    with pytest.raises(UserError, match="holds pairs of sounds, and pairs of pictures are needed"):
        import_format("store", store.folder, PairStore(tmp_path / "x", "picture"))


def test_the_command_converts_sounds(store, tmp_path, capsys):
    assert main([str(store.folder), "--to", "alpaca", str(tmp_path / "out")]) == 0
    assert main([str(tmp_path / "again"), "--outputs", "sound", "--from", "alpaca", str(tmp_path / "out")]) == 0
    assert "3 pairs from 3 rows" in capsys.readouterr().out
    assert decode(PairStore(tmp_path / "again").rows([0], decode=False)[0]["rejected"]).rate == RATE


def test_tangos_lines_of_captions_and_location_are_prompts(tmp_path):
    (tmp_path / "val.jsonl").write_text('{"dataset": "audiocaps", "location": "x.wav", "captions": "a dog barks"}\n')
    assert load_prompts(tmp_path / "val.jsonl") == [{"prompt": "a dog barks", "dataset": "audiocaps", "location": "x.wav"}]
