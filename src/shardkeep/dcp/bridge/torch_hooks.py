"""Torch's own hooks around public functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch.distributed.checkpoint.logger import _dcp_method_logger
from torch.distributed.checkpoint.utils import _api_bc_check

__all__ = ["hooked"]

F = TypeVar("F", bound=Callable[..., Any])


def hooked(function: F) -> F:
    """The function, with torch's log of its start, end and errors; storage may be positional."""
    positional: Callable[[F], F] = _api_bc_check
    return cast(F, _dcp_method_logger(log_exceptions=True)(positional(function)))
