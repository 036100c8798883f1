"""``datasets`` is Hugging Face's and ``polyalign.datasets`` is ours, in one process, wherever it was started."""

from __future__ import annotations

from pathlib import Path


def test_both_datasets_import(root: Path) -> None:
    import datasets

    import polyalign.datasets as ours

    assert callable(datasets.load_dataset)
    assert (root / "datasets") not in Path(str(datasets.__file__)).parents
    assert [Path(folder).resolve() for folder in ours.__path__] == [root / "datasets"]


def test_our_modules_import_beside_it() -> None:
    import datasets

    from polyalign.datasets.worlds import shapes

    assert shapes.__name__ == "polyalign.datasets.worlds.shapes"
    assert datasets.Dataset.from_dict({"x": [1, 2]}).num_rows == 2
