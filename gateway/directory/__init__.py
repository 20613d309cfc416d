"""What clients may list, and where a listed name leads: listings, their names, their shape, and merged tables."""

from __future__ import annotations

from gateway.directory.listing import LISTS, LISTS_OF, Listing, Route, topic_of
from gateway.directory.merge import UNAVAILABLE, Merged, Plan, merge, render, with_names
from gateway.directory.names import NAME_LIMIT, fit, prefix_of
from gateway.directory.selection import servers_of
from gateway.directory.shaping import shape_of
from gateway.directory.shelf import Shelf

__all__ = [
    "LISTS",
    "LISTS_OF",
    "NAME_LIMIT",
    "UNAVAILABLE",
    "Listing",
    "Merged",
    "Plan",
    "Route",
    "Shelf",
    "fit",
    "merge",
    "prefix_of",
    "render",
    "servers_of",
    "shape_of",
    "topic_of",
    "with_names",
]
