"""The tiny language models of tests/text/tiny_texts.py, built once a session, and rows for them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from polyalign.modalities.text.adapter import TextAdapter
from polyalign.modalities.text.settings import TextModelSettings

sys.path.insert(0, str(Path(__file__).resolve().parent))

from tiny_texts import FAMILIES, save_model  # noqa: E402


@pytest.fixture(scope="session")
def tiny_texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("text_models")
    return {family: save_model(family, root / family) for family in FAMILIES}


@pytest.fixture
def make_adapter(tiny_texts: dict[str, Path]) -> Callable[..., TextAdapter]:
    """``make_adapter(family, **settings)``; a family or any other base."""

    def make(family: str, **settings: Any) -> TextAdapter:
        base = str(tiny_texts.get(family, family))
        return TextAdapter(TextModelSettings(**{"base": base, "device": "cpu", "rank": 4, **settings}))

    return make


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    texts = [
        ("The patient was", " given a drug", " home, and went, and it is good"),
        ("", "yes", "no no"),
        ("Größe: 5 µg — 日本", " naïve 🙂", ""),
    ]
    return [
        {"pair_id": f"p{place}", "condition": {"prompt": prompt}, "chosen": chosen, "rejected": rejected}
        for place, (prompt, chosen, rejected) in enumerate(texts)
    ]


@pytest.fixture
def conversations() -> list[dict[str, Any]]:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is it?"}]
    longer = [*turns, {"role": "assistant", "content": "It is news."}, {"role": "user", "content": "Good?"}]
    return [
        {
            "pair_id": f"c{place}",
            "condition": {"prompt": messages[-1]["content"], "messages": messages},
            "chosen": "yes, it is",
            "rejected": "no",
        }
        for place, messages in enumerate((turns, longer))
    ]
