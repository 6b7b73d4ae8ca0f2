"""What is given to one of TRL's trainers: arguments by name, datasets, and which of them a cache can't serve."""

import inspect
from collections.abc import Iterator
from typing import Any

from datasets import Dataset

EVALUATED_TRAIN = "evaluation's train"  # one of several evaluation sets, where it is called as the training set is
PRECOMPUTED = {"ref_chosen_logps", "ref_rejected_logps", "ref_logps", "ref_KL_logps"}  # TRL's columns


def by_name(kind: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a constructor by name. Raises TypeError for those that Python itself would refuse."""
    names = list(inspect.signature(kind.__init__).parameters)[1:]  # type: ignore[misc]
    if len(args) > len(names):
        raise TypeError(f"{len(args)} positional arguments were given; {kind.__name__} takes {len(names)}.")
    given = dict(zip(names, args, strict=False))
    if twice := sorted(given.keys() & kwargs.keys()):
        raise TypeError(f"{', '.join(twice)} was given by position and again by name.")
    return given | kwargs


def datasets_of(given: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The datasets among a trainer's arguments, with their names."""
    for name in ("train", "eval"):
        dataset = given.get(f"{name}_dataset")
        if isinstance(dataset, dict):
            for key, one in dataset.items():
                yield EVALUATED_TRAIN if key == "train" else key, one
        elif dataset is not None:
            yield name, dataset


def refuse_dataset(name: str, dataset: Any) -> None:
    """ValueError for a dataset whose rows a cache can't answer."""
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"The {name} set is a {type(dataset).__name__}; a datasets.Dataset is needed, whose rows are looked up "
            "before the first step. For streams give TRL's own trainer ref_model=CachedReference(...)."
        )
    if not len(dataset):
        raise ValueError(f"The {name} set is empty, of which TRL can't make batches. Leave it out.")
    if {"image", "images"} & set(dataset.column_names):
        raise ValueError(f"The {name} set has images; a reference cache holds log-probs of text alone.")
    if own := sorted(PRECOMPUTED & set(dataset.column_names)):
        raise ValueError(
            f"The {name} set brings {', '.join(own)}, and reference_cache was given: the values are of one or of "
            f"the other. Remove these columns: dataset.remove_columns({own})."
        )
