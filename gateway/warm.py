"""``gateway.pyz warm``: start servers once and keep what they list, so that listing them starts nothing."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import trio

from gateway.app import Gateway, HttpOptions, Read, Sources, overrides, read_or_complain, set_up_logs, state_of
from gateway.config.model import ServerSpec
from gateway.directory import Listing
from gateway.directory.shelf import Volume
from gateway.directory.store import Store, encoded
from gateway.errors import GatewayError

__all__ = ["warm"]


def warm(options: HttpOptions, servers: Sequence[str]) -> int:
    """Start these servers once, all without any, and keep what they list: 0 if each of them could be listed."""
    sources = Sources(options.config, overrides(options))
    read = read_or_complain(sources)
    if read is None:
        return 1
    unknown = [server_id for server_id in servers if server_id not in read.catalog.by_id]
    if unknown:
        print(f"error: there is no server {', '.join(unknown)} in {read.catalog.path}", file=sys.stderr)
        return 2
    state = state_of(read.settings)
    if state is None:
        print("error: there is no folder to keep lists in; name one with --state-dir", file=sys.stderr)
        return 1
    set_up_logs(read, options.log_level, "error")
    specs = [read.catalog.by_id[server_id] for server_id in servers] or list(read.catalog.servers)
    return trio.run(_warm, sources, read, state, specs)


async def _warm(sources: Sources, read: Read, state: Path, specs: Sequence[ServerSpec]) -> int:
    house = Gateway(sources, read, state, remember=False)  # what is kept must not stand in for an answer
    store = Store(state)
    failed: list[str] = []
    done = 0
    watched = sys.stdout.isatty()

    async def one(spec: ServerSpec) -> None:
        nonlocal done
        began = trio.current_time()
        shelf = house.supervisor.shelf
        try:
            await house.router.views.list_once(spec)
            counts = [(topic, len(listing.items)) for topic, listing in _listings(shelf.volume(spec)) if listing.items]
            said = ", ".join(f"{count} {topic if count != 1 else topic[:-1]}" for topic, count in counts) or "nothing"
        except GatewayError as error:
            failed.append(spec.id)
            said = f"failed: {error.message}"
        done += 1
        progress = f"[{done}/{len(specs)}] "
        print(f"{chr(13) if watched else ''}{progress}{spec.id}: {said} ({trio.current_time() - began:.1f} s)")
        if watched and done < len(specs):
            print(f"[{done}/{len(specs)}] ...", end="", flush=True)

    async def front() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(house.signals)

            async def until_stopped() -> None:
                await house.stopping.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(until_stopped)
            async with trio.open_nursery() as listing:
                for spec in specs:
                    listing.start_soon(one, spec)
            nursery.cancel_scope.cancel()

    await house.run(front)
    volumes = {spec: house.supervisor.shelf.volume(spec) for spec in specs if spec.id not in failed}
    kept = [store.save(spec, encoded(volume)) for spec, volume in volumes.items() if volume.listings]
    counted = f"{done - len(failed)} of {len(specs)} servers listed"
    if not all(kept):
        print(f"error: {counted}, but not all of it could be kept. {store.trouble}", file=sys.stderr)
        return 1
    print(f"{counted}; kept in {store.folder}")
    return 0 if done == len(specs) and not failed else 1


def _listings(volume: Volume) -> list[tuple[str, Listing]]:
    names = {
        "tools/list": "tools",
        "prompts/list": "prompts",
        "resources/list": "resources",
        "resources/templates/list": "resource templates",
    }
    return [(name, volume.listings[method]) for method, name in names.items() if method in volume.listings]
