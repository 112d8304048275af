"""Several teachers of one student. TRL's constructor loads and prepares one; the others get the same treatment."""

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from flashpo._hosts.trl import prepare_deepspeed
from flashpo.trl._replaced import replaced

THE_ONE = "teacher"  # the name of a single teacher


class Teachers:
    """The value of `teacher_model`: one teacher as in TRL, or a dict of teachers by name."""

    def __init__(self, given: Any):
        self.given: dict[str, Any] = dict(given) if isinstance(given, dict) else {THE_ONE: given}
        if not self.given or (isinstance(given, dict) and not all(map(_is_teacher, given.items()))):
            raise ValueError(f"teacher_model must be a model, a path, or a dict of such by name, got {given!r}")
        # TRL's constructor gets a teacher that is a path, if there is one: `constructing` learns how it loads paths
        paths = [name for name, teacher in self.given.items() if isinstance(teacher, str)]
        self.first = (paths or list(self.given))[0]
        self._loaded_with: dict[str, Any] = {}

    @contextlib.contextmanager
    def constructing(self, trl_class: type) -> Iterator[Any]:
        """A block for TRL's constructor. Yields the teacher to pass to it; notes the options that it loads it with."""

        def noting(create_model_from_path):
            def create(path, *args, **options):
                self._loaded_with = options  # of the last call: TRL loads the student first, then the teacher
                return create_model_from_path(path, *args, **options)

            return create

        self._create = importlib.import_module(trl_class.__module__).create_model_from_path  # type: ignore[attr-defined]
        with replaced(importlib.import_module(trl_class.__module__), "create_model_from_path", noting):
            yield self.given[self.first]

    def prepared(self, trainer: Any) -> dict[str, Any]:
        """All teachers by name, each loaded and wrapped as TRL did with the first; empty if TRL has no teacher."""
        if trainer.teacher_model is None:
            return {}
        return {
            name: trainer.teacher_model if name == self.first else self._prepared(trainer, name, teacher)
            for name, teacher in self.given.items()
        }

    def _prepared(self, trainer: Any, name: str, teacher: Any) -> Any:
        if isinstance(teacher, str):
            teacher = self._create(teacher, **self._loaded_with)
        student, other = (model.config.get_text_config().vocab_size for model in (trainer.model, teacher))
        if student != other:
            raise ValueError(f"teacher_model[{name!r}] has a vocabulary of {other} tokens, the student of {student}")
        if trainer.is_deepspeed_enabled:
            return prepare_deepspeed(teacher, trainer.accelerator)
        return trainer.accelerator.prepare_model(teacher, evaluation_mode=True)


def _is_teacher(item: tuple[Any, Any]) -> bool:
    name, teacher = item
    return isinstance(name, str) and isinstance(teacher, (str, nn.Module))


def check_dataset(what: str, dataset: Any, column: str, names: list[str]) -> None:
    """Raise ValueError if a data set has rows that name no teacher of `names`.

    A stream is only checked for its columns, if it knows them: its rows are not read before training.
    """
    if isinstance(dataset, dict):
        for key, part in dataset.items():
            check_dataset(f"{what}[{key!r}]", part, column, names)
    columns = getattr(dataset, "column_names", None)  # a stream may not know its columns, and has None, too
    if isinstance(columns, list) and column not in columns:
        raise ValueError(f"{what} must have a column {column!r} with the name of each row's teacher, has {columns}")
    if isinstance(dataset, Dataset):
        _check_names(what, dataset.unique(column), column, names)


def places(rows: list[dict], column: str, names: list[str]) -> Tensor:
    """(rows,): the index in `names` of each row's teacher."""
    found: list[Any] = [row.get(column) for row in rows]
    _check_names("the batch", found, column, names)
    return torch.tensor([names.index(name) for name in found])


def _check_names(what: str, found: list, column: str, names: list[str]) -> None:
    if unknown := sorted({repr(name) for name in found if name not in names}):
        raise ValueError(f"{what}: column {column!r} names {', '.join(unknown)}; teacher_model has {', '.join(names)}")
