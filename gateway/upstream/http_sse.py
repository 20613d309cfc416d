"""HTTP+SSE of 2024-11-05 from the client's side: still what many hosted servers speak."""

from __future__ import annotations

from typing import Any, Final

import httpx
import trio

from gateway.errors import GatewayError, LinkLost, StartFailed
from gateway.exchange import Call
from gateway.protocol import handshake
from gateway.protocol.message import build_notification, build_request
from gateway.protocol.sse import EVENT_STREAM, Decoder, Event
from gateway.upstream.http_link import JSON_BODY, POST_LIMIT, HttpLink, body_of, content_type, encoded

__all__ = ["SseLink"]

ENDPOINT_LIMIT: Final = 10.0
"""Seconds until an event stream has named its endpoint."""
_ANY: Final = (b"accept", b"*/*")


class SseLink(HttpLink):
    """HTTP+SSE of 2024-11-05: one stream brings everything, messages go to the endpoint that it names.

    The stream is the session: when it ends, so does the link.
    """

    transport_name = "http+sse"
    prefers_sole_call = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._endpoint: httpx.URL | None = None

    async def open(self, refusal: GatewayError) -> None:
        """Open the stream and do the handshake. ``refusal`` is why the newer transport was not to be had."""
        terms = self._terms
        with trio.move_on_after(min(terms.timeout, ENDPOINT_LIMIT)):
            await self._nursery.start(self._reader, refusal)
        if self._endpoint is None:
            raise StartFailed(f"{refusal.message}; no event stream named an endpoint within {ENDPOINT_LIMIT:g} s")
        method, params = handshake.opening(terms.capabilities, terms.info, terms.version)
        self.facts = handshake.conclude(await self.request(method, params, timeout=terms.timeout))
        await self._post(build_notification(handshake.INITIALIZED))

    async def _reader(
        self, refusal: GatewayError, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        try:
            async with self._send("GET", self._target.url, [(b"accept", EVENT_STREAM.encode())]) as response:
                if response.status_code != 200 or content_type(response) != EVENT_STREAM:
                    error = await self._refusal(response)
                    raise StartFailed(f"{refusal.message}; asked for an event stream: {error.message}")
                decoder = Decoder(self._max)
                async with body_of(response) as chunks:
                    async for chunk in chunks:
                        for event in decoder.feed(chunk):
                            if type(event) is Event and event.event == "endpoint":
                                self._found(event.data)
                                task_status.started()
                            else:
                                self._event(event, None)
            lost = LinkLost(f"Server '{self.server_id}' at {self._target.name} closed its event stream")
        except GatewayError as error:
            if self._endpoint is None:
                raise
            lost = LinkLost(error.message)
        if self._endpoint is None:
            raise StartFailed(f"{refusal.message}; its event stream ended without naming an endpoint")
        self.lose(lost)

    def _found(self, data: bytes) -> None:
        """The endpoint event: a URI of the same origin, since our credentials go there (2024-11-05, RB53, RB55)."""
        if self._endpoint is not None:
            return
        ours = self._target.url
        try:
            url = ours.join(data.decode("ascii").strip())
        except (httpx.InvalidURL, ValueError):
            raise StartFailed(f"Server '{self.server_id}' named an endpoint that is no URI") from None
        if (url.scheme, url.host, _port(url)) != (ours.scheme, ours.host, _port(ours)) or url.userinfo:
            raise StartFailed(
                f"Server '{self.server_id}' at {self._target.name} named an endpoint on another origin "
                f"({url.scheme}://{url.host}); credentials are not sent there"
            )
        self._endpoint = url.copy_with(fragment=None)

    async def _converse(self, call: Call, id: int, method: str, params: str) -> None:
        # The reply comes on the stream, perhaps before this POST is done with.
        with trio.move_on_after(POST_LIMIT) as scope:
            await self._submit(encoded(build_request(str(id), method, params)))
        if scope.cancelled_caught:
            raise LinkLost(f"Server '{self.server_id}' did not take a request within {POST_LIMIT:g} s")

    async def _post(self, text: str) -> None:
        await self._submit(encoded(text))

    async def _submit(self, body: bytes) -> None:
        assert self._endpoint is not None
        async with self._send("POST", self._endpoint, [_ANY, JSON_BODY], body) as response:
            if response.status_code >= 300:
                error = await self._refusal(response)
                if response.status_code == 404:
                    self.lose(LinkLost(f"{error.message} (its session is over)"))
                raise error
            await self._discard(response)


def _port(url: httpx.URL) -> int:
    return url.port or (443 if url.scheme == "https" else 80)
