"""Torch's own decorators of public functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch.distributed.checkpoint.logger import _dcp_method_logger
from torch.distributed.checkpoint.utils import _api_bc_check

__all__ = ["hooked"]

F = TypeVar("F", bound=Callable[..., Any])


def hooked(function: F) -> F:
    """Return a function that torch logs, and that accepts storage as a positional argument."""
    positional: Callable[[F], F] = _api_bc_check
    return cast(F, _dcp_method_logger(log_exceptions=True)(positional(function)))
