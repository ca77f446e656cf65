"""Tasks that are made, not collected: formal languages, MAD, associative recall. Every one a function of its seed."""

from nestlearn.eval.synthetic.languages import LANGUAGES, Example, encode, generate_language, read_language
from nestlearn.eval.synthetic.mad import IGNORED, MAD_TASKS, MadTask, mqar

__all__ = [
    "IGNORED",
    "LANGUAGES",
    "MAD_TASKS",
    "Example",
    "MadTask",
    "encode",
    "generate_language",
    "mqar",
    "read_language",
]
