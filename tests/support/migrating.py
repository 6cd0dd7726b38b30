"""Snippets of the documentation, run as a training script would be."""

from __future__ import annotations

import io
import os
import sys
import types
from contextlib import redirect_stdout

__all__ = ["on_rank", "said_by", "script"]


def script() -> types.ModuleType:
    """Return a module for snippets to run in; their classes are pickled by its name."""
    return types.ModuleType("train")


def said_by(code: str, module: types.ModuleType) -> str:
    """Return what the code prints, or the last line of the error that it raises."""
    out = io.StringIO()
    before = sys.modules.get(module.__name__)
    sys.modules[module.__name__] = module
    try:
        with redirect_stdout(out):
            exec(compile(code, "snippet", "exec", dont_inherit=True), vars(module))
    except BaseException as error:
        from torch.distributed.checkpoint import CheckpointException

        if not isinstance(error, CheckpointException):
            raise
        return out.getvalue() + str(error).strip().splitlines()[-1]
    finally:
        if before is None:
            del sys.modules[module.__name__]
        else:
            sys.modules[module.__name__] = before
    return out.getvalue().strip()


def on_rank(rank: int, size: int, code: str, folder: str) -> str:
    """Run the code on one rank of a job, in a folder; return its output."""
    before = os.getcwd()  # noqa: PTH109 - the counterpart of chdir
    os.chdir(folder)
    try:
        return said_by(code, script())
    finally:
        os.chdir(before)
