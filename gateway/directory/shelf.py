"""What is known of each server, whether it runs or not: what it said at its last handshake, and its lists.

Lists are answered from here, so that nobody starts a server only to list it. What has been put here by this process is
verified; what was ``remembered`` from an earlier one is not, until the server has really been asked again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import attrs

from gateway.config.model import ServerSpec
from gateway.directory.listing import Listing

__all__ = ["Shelf", "Volume"]


@attrs.define(eq=False)
class Volume:
    """One server. ``verified`` has the list methods that this process has seen answered, and for each what the client
    could be asked that the server had then (its capabilities as text; "" for a server that is everybody's).
    """

    facts: Mapping[str, Any] | None = None
    listings: dict[str, Listing] = attrs.field(factory=dict)
    verified: dict[str, str] = attrs.field(factory=dict)


class Shelf:
    """All servers. ``version`` moves with every change of a list; ``on_change`` is told which server has changed."""

    def __init__(self) -> None:
        self.version = 0
        self.on_change: Callable[[ServerSpec], None] = lambda spec: None
        self._volumes: dict[ServerSpec, Volume] = {}

    def volume(self, spec: ServerSpec) -> Volume:
        """What is known of one server; empty where nothing is."""
        found = self._volumes.get(spec)
        if found is None:
            found = self._volumes[spec] = Volume()
        return found

    def facts(self, spec: ServerSpec) -> Mapping[str, Any] | None:
        """What the server said of itself at its last handshake (``Link.facts``), None before the first."""
        found = self._volumes.get(spec)
        return None if found is None else found.facts

    def listing(self, spec: ServerSpec, method: str) -> Listing | None:
        """Its last list, None where it never gave one."""
        found = self._volumes.get(spec)
        return None if found is None else found.listings.get(method)

    def put_facts(self, spec: ServerSpec, facts: Mapping[str, Any]) -> None:
        """The server has just said this of itself."""
        volume = self.volume(spec)
        if volume.facts != facts:
            volume.facts = facts
            self.on_change(spec)

    def put(self, spec: ServerSpec, listing: Listing, askable: str = "") -> bool:
        """The server has just answered with this list. Whether it is another one than before."""
        volume = self.volume(spec)
        former = volume.listings.get(listing.method)
        volume.verified[listing.method] = askable
        if former == listing and former is not None and former.terms == listing.terms:
            return False  # the former stays, and with it what was made of it
        volume.listings[listing.method] = listing
        self.version += 1
        self.on_change(spec)
        return former != listing

    def remember(self, spec: ServerSpec, facts: Mapping[str, Any] | None, listings: Collection[Listing]) -> None:
        """Take over what an earlier process knew. What this one knows already is better, and stays."""
        volume = self.volume(spec)
        if volume.facts is None:
            volume.facts = facts
        for listing in listings:
            volume.listings.setdefault(listing.method, listing)
        self.version += 1

    def keep(self, specs: Collection[ServerSpec]) -> None:
        """Forget all other servers, after a reload.

        An entry that is new, but defined as another one was, begins with what was known of that one: its limits were
        edited, or its id.
        """
        former = {_definition(spec): volume for spec, volume in self._volumes.items()}
        kept = {spec: volume for spec, volume in self._volumes.items() if spec in specs}
        for spec in specs:
            known = former.get(_definition(spec))
            if spec not in kept and known is not None:
                kept[spec] = Volume(known.facts, dict(known.listings))
        self._volumes = kept
        self.version += 1


def _definition(spec: ServerSpec) -> tuple[object, ...]:
    return spec.runtime_type, spec.runtime, spec.env, spec.inherit_env, spec.era
