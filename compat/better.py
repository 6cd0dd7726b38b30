"""What is better than torch's, what takes other parameters, and what is missing, by name.

Names are those of the places in `shardkeep.dcp` where the objects are defined. An entry that no
public name needs is an error.
"""

from __future__ import annotations

BETTER: dict[str, str] = {}
"""One short sentence each."""

EXPLAINED: dict[str, str] = {}
"""Why a signature differs from that of some release."""

MISSING: dict[str, str] = {}
"""Why it is missing: by module and name."""
