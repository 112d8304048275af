"""Several teachers of one student. TRL's constructor loads and prepares one; the others follow its example."""

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from flashpo._hosts.trl import prepare_deepspeed
from flashpo.trl._replaced import replaced

THE_ONE = "teacher"  # its name where there is but one


class Teachers:
    """What `teacher_model` says: one teacher as in TRL, or a dict of teachers by name."""

    def __init__(self, given: Any):
        self.given: dict[str, Any] = dict(given) if isinstance(given, dict) else {THE_ONE: given}
        if not self.given or (isinstance(given, dict) and not all(map(_is_teacher, given.items()))):
            raise ValueError(f"teacher_model must be a model, a path, or a dict of such by name, got {given!r}")
        # TRL's constructor gets a path where there is one, so that it says how paths are loaded
        paths = [name for name, teacher in self.given.items() if isinstance(teacher, str)]
        self.first = (paths or list(self.given))[0]
        self._loaded_with: dict[str, Any] = {}

    @contextlib.contextmanager
    def constructing(self, trl_class: type) -> Iterator[Any]:
        """Around TRL's constructor, which gets what this yields; notes with which options it loads that teacher."""

        def noting(create_model_from_path):
            def create(path, *args, **options):
                self._loaded_with = options  # the student comes before the teacher
                return create_model_from_path(path, *args, **options)

            return create

        self._create = importlib.import_module(trl_class.__module__).create_model_from_path  # type: ignore[attr-defined]
        with replaced(importlib.import_module(trl_class.__module__), "create_model_from_path", noting):
            yield self.given[self.first]

    def prepared(self, trainer: Any) -> dict[str, Any]:
        """All of them by name, each loaded and wrapped as TRL has done with the first; none where TRL has none."""
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
    """Raise ValueError where a data set does not name a teacher of `names` in every row, as far as that can be told
    before its rows come."""
    if isinstance(dataset, dict):
        for key, part in dataset.items():
            check_dataset(f"{what}[{key!r}]", part, column, names)
    columns = getattr(dataset, "column_names", None)  # None, too, of a stream that does not know them
    if isinstance(columns, list) and column not in columns:
        raise ValueError(f"{what} must have a column {column!r} with the name of each row's teacher, has {columns}")
    if isinstance(dataset, Dataset):
        _check_names(what, dataset.unique(column), column, names)


def places(rows: list[dict], column: str, names: list[str]) -> Tensor:
    """(rows,): the place among `names` of each row's teacher."""
    found: list[Any] = [row.get(column) for row in rows]
    _check_names("the batch", found, column, names)
    return torch.tensor([names.index(name) for name in found])


def _check_names(what: str, found: list, column: str, names: list[str]) -> None:
    if unknown := sorted({repr(name) for name in found if name not in names}):
        raise ValueError(f"{what}: column {column!r} names {', '.join(unknown)}; teacher_model has {', '.join(names)}")
