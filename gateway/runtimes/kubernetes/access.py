"""Finding a Kubernetes cluster and the right to use it, as kubectl and the cluster's own pods do.

``find_access`` reads files and the given environment, nothing else, and connects nowhere. With a context, that of the
kubeconfig; without one, the service account of the pod the gateway runs in; else the kubeconfig's current context. The
kubeconfig is every file in KUBECONFIG, merged as kubectl merges them, else ``~/.kube/config``.

``Credentials`` say who we are, request by request: tokens in files are read again when they are rotated, and a
credential plugin runs again when what it gave has expired or was refused.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import json
import logging
import os
import ssl
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import attrs
import trio

from gateway.errors import StartFailed
from gateway.trust import private, public_context

__all__ = ["Access", "Credentials", "Plugin", "find_access", "proxy_for", "tls_context"]

log = logging.getLogger("gateway_core")

SERVICE_ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Where a pod finds its token, the cluster's CA and its namespace."""

PLUGIN_LIMIT: Final = 30.0
"""Seconds a credential plugin may take."""
TOKEN_AGE: Final = 10.0
"""Seconds after which a token's file is read again: the kubelet replaces it long before the old one ends."""
EXPIRY_SLACK: Final = 20.0
"""Seconds before its end that a plugin's credential counts as expired."""
MAX_FILE: Final = 4 * 1024 * 1024
"""Bytes of a kubeconfig, a certificate or a plugin's answer."""


@attrs.frozen
class Plugin:
    """A program that prints credentials (client-go's ``exec``). ``cluster`` is what it is told of the cluster."""

    command: str
    args: tuple[str, ...]
    env: tuple[tuple[str, str], ...]
    api_version: str
    hint: str = ""
    cluster: str | None = None


@attrs.frozen
class Access:
    """One cluster's API and what we show there.

    server       its URL, without a slash at the end
    namespace    where to be when nothing else is said
    described    where all this was found, for people
    context      the context's name, "" for a pod's service account
    kubeconfig   the files it came from, as KUBECONFIG has them; "" for a pod's service account
    ca           certificates in PEM that the API's must come from; None: those that this machine trusts
    insecure     its certificate is not checked at all
    server_name  what its certificate is for, where that is not the URL's host
    proxy        the HTTP proxy before it
    certificate  ours and its key, both in PEM
    impersonate  headers that ask to be somebody else
    """

    server: str
    namespace: str
    described: str
    context: str = ""
    kubeconfig: str = ""
    ca: str | None = None
    insecure: bool = False
    server_name: str | None = None
    proxy: str | None = None
    certificate: tuple[str, str] | None = attrs.field(default=None, repr=False)
    token: str | None = attrs.field(default=None, repr=False)
    token_file: Path | None = None
    basic: tuple[str, str] | None = attrs.field(default=None, repr=False)
    plugin: Plugin | None = attrs.field(default=None, repr=False)
    impersonate: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return f"{self.described}, {self.server}"


# ---------------------------------------------------------------------------------------------------------- finding it
def find_access(context: str | None, environ: Mapping[str, str], *, service_account: Path = SERVICE_ACCOUNT) -> Access:
    """Blocks on files. Raises StartFailed, which names everything that was tried."""
    tried: list[str] = []
    if context is None:
        found = _in_cluster(environ, service_account, tried)
        if found is not None:
            return found
    files = _kubeconfig_files(environ)
    if not files:
        tried.append("neither KUBECONFIG nor HOME is set")
    documents = [each for each in (_load(path, tried) for path in files) if each is not None]
    if not documents:
        raise StartFailed(f"No Kubernetes cluster was found: {'; '.join(tried)}")
    return _from_kubeconfig(context, documents, environ)


def _in_cluster(environ: Mapping[str, str], folder: Path, tried: list[str]) -> Access | None:
    host, port = environ.get("KUBERNETES_SERVICE_HOST", ""), environ.get("KUBERNETES_SERVICE_PORT", "443")
    if not host:
        tried.append("not in a pod (KUBERNETES_SERVICE_HOST is not set)")
        return None
    token, ca, namespace = folder / "token", folder / "ca.crt", folder / "namespace"
    try:
        _read_text(token)
    except StartFailed as error:
        tried.append(f"in a pod without a service account token ({error.message})")
        return None
    server = f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"
    return Access(
        server,
        _read_text(namespace).strip() if namespace.exists() else "default",
        "the pod's service account",
        ca=_read_text(ca) if ca.exists() else None,
        proxy=proxy_for(server, environ),
        token_file=token,
    )


def _kubeconfig_files(environ: Mapping[str, str]) -> list[Path]:
    named = [Path(each) for each in environ.get("KUBECONFIG", "").split(os.pathsep) if each]
    if named:
        return list(dict.fromkeys(named))
    home = environ.get("HOME")
    return [Path(home) / ".kube" / "config"] if home else []


_Document = tuple[Path, Mapping[str, Any]]
_parsed: dict[tuple[str, int, int], Mapping[str, Any]] = {}
"""Kubeconfigs by name, time and size: 100 kB of YAML take a second."""


def _load(path: Path, tried: list[str]) -> _Document | None:
    try:
        status = path.stat()
        key = (str(path), status.st_mtime_ns, status.st_size)
        if key not in _parsed:
            text = _read_text(path)
            if len(_parsed) >= 16:
                _parsed.clear()
            _parsed[key] = _parse(text, path)
        return path, _parsed[key]
    except FileNotFoundError:
        tried.append(f"{path} does not exist")
    except OSError as error:
        tried.append(f"{path} can't be read ({(error.strerror or str(error)).lower()})")
    except StartFailed as error:
        tried.append(error.message)
    return None


def _parse(text: str, path: Path) -> Mapping[str, Any]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        document = YAML(typ="safe", pure=True).load(text)
    except (YAMLError, ValueError) as error:
        where = getattr(error, "problem_mark", None)
        raise StartFailed(f"{path} is no YAML{f' (line {where.line + 1})' if where is not None else ''}") from None
    if document is None:
        return {}
    if not isinstance(document, Mapping):
        raise StartFailed(f"{path} is no kubeconfig")
    return document


def _from_kubeconfig(context: str | None, documents: Sequence[_Document], environ: Mapping[str, str]) -> Access:
    shown = os.pathsep.join(str(path) for path, _ in documents)
    if context is None:
        context = next((str(each["current-context"]) for _, each in documents if each.get("current-context")), None)
        if context is None:
            raise StartFailed(f"{shown}: there is no current-context; name one with `context` in the catalog")
    found = _entry(documents, "contexts", "context", context)
    if found is None:
        known = [str(each.get("name")) for _, document in documents for each in _entries(document, "contexts")]
        raise StartFailed(f"{shown}: there is no context {context!r}; there are {', '.join(known) or 'none'}")
    path, chosen = found
    described = f"context {context!r} of {path}"
    cluster = _entry(documents, "clusters", "cluster", str(chosen.get("cluster", "")))
    if cluster is None:
        raise StartFailed(f"{described}: there is no cluster {chosen.get('cluster')!r}")
    user = None
    if chosen.get("user"):
        user = _entry(documents, "users", "user", str(chosen["user"]))
        if user is None:
            raise StartFailed(f"{described}: there is no user {chosen['user']!r}")
    access = _cluster_access(cluster, described, environ)
    access = attrs.evolve(access, namespace=str(chosen.get("namespace") or "default"), context=context)
    access = attrs.evolve(access, kubeconfig=shown)
    return access if user is None else _with_user(access, user)


def _entries(document: Mapping[str, Any], kind: str) -> Iterator[Mapping[str, Any]]:
    found = document.get(kind)
    return (each for each in found if isinstance(each, Mapping)) if isinstance(found, list) else iter(())


def _entry(documents: Sequence[_Document], kind: str, key: str, name: str) -> _Document | None:
    """The first file's that has one: that is how kubectl merges."""
    for path, document in documents:
        for each in _entries(document, kind):
            if str(each.get("name")) == name:
                value = each.get(key)
                return path, value if isinstance(value, Mapping) else {}
    return None


def _cluster_access(cluster: _Document, described: str, environ: Mapping[str, str]) -> Access:
    path, fields = cluster
    server = str(fields.get("server") or "").rstrip("/")
    try:
        parts = urlsplit(server)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise StartFailed(f"{described}: the cluster's server is no http(s) URL: {server!r}")
    ca = _inline(fields, "certificate-authority", path, described)
    insecure = fields.get("insecure-skip-tls-verify") is True
    if insecure and ca is not None:
        raise StartFailed(
            f"{described}: the cluster has both a certificate-authority and insecure-skip-tls-verify; remove one"
        )
    return Access(
        server,
        "default",
        described,
        ca=ca,
        insecure=insecure and server.startswith("https:"),
        server_name=str(fields["tls-server-name"]) if fields.get("tls-server-name") else None,
        proxy=str(fields["proxy-url"]) if fields.get("proxy-url") else proxy_for(server, environ),
    )


def _with_user(access: Access, user: _Document) -> Access:
    path, fields = user
    described = access.described
    if "auth-provider" in fields and "exec" not in fields:
        raise StartFailed(
            f"{described}: the user's auth-provider was removed from Kubernetes in 1.26; use an exec plugin or a token"
        )
    certificate = _inline(fields, "client-certificate", path, described)
    key = _inline(fields, "client-key", path, described)
    if (certificate is None) != (key is None):
        raise StartFailed(f"{described}: the user has a client certificate or its key, but not both")
    token_file = path.parent / str(fields["tokenFile"]) if fields.get("tokenFile") else None
    names = {"as": "Impersonate-User", "as-uid": "Impersonate-Uid"}
    impersonate = [(header, str(fields[name])) for name, header in names.items() if fields.get(name)]
    impersonate += [("Impersonate-Group", str(group)) for group in fields.get("as-groups") or ()]
    return attrs.evolve(
        access,
        certificate=None if certificate is None or key is None else (certificate, key),
        token=str(fields["token"]) if fields.get("token") else None,
        token_file=token_file,
        basic=(str(fields["username"]), str(fields.get("password") or "")) if fields.get("username") else None,
        plugin=_plugin(fields["exec"], access, path) if isinstance(fields.get("exec"), Mapping) else None,
        impersonate=tuple(impersonate),
    )


def _plugin(fields: Mapping[str, Any], access: Access, path: Path) -> Plugin:
    command, version = str(fields.get("command") or ""), str(fields.get("apiVersion") or "")
    if not command or not version.startswith("client.authentication.k8s.io/"):
        raise StartFailed(f"{access.described}: the user's exec plugin has no command, or an unknown apiVersion")
    if fields.get("interactiveMode") == "Always":
        raise StartFailed(f"{access.described}: the credential plugin {command!r} asks questions, and nobody is there")
    cluster = None
    if fields.get("provideClusterInfo") is True:
        told: dict[str, Any] = {"server": access.server, "insecure-skip-tls-verify": access.insecure}
        if access.ca is not None:
            told["certificate-authority-data"] = base64.b64encode(access.ca.encode()).decode()
        cluster = json.dumps(told)
    return Plugin(
        str(path.parent / command) if "/" in command else command,
        tuple(str(each) for each in fields.get("args") or ()),
        tuple((str(each.get("name")), str(each.get("value", ""))) for each in fields.get("env") or ()),
        version,
        str(fields.get("installHint") or ""),
        cluster,
    )


def _inline(fields: Mapping[str, Any], name: str, path: Path, described: str) -> str | None:
    """What stands in ``NAME-data``, else in the file that ``NAME`` means, relative to the kubeconfig's folder."""
    data = fields.get(f"{name}-data")
    if data:
        try:
            return base64.b64decode(str(data), validate=True).decode("ascii")
        except (binascii.Error, ValueError):
            raise StartFailed(f"{described}: {name}-data is no PEM in base64") from None
    if not fields.get(name):
        return None
    file = path.parent / str(fields[name])
    try:
        return _read_text(file)
    except StartFailed as error:
        raise StartFailed(f"{described}: {name}: {error.message}") from None


def _read_text(path: Path) -> str:
    """Raises StartFailed, never OSError."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE + 1)
    except OSError as error:
        raise StartFailed(f"{path} can't be read ({(error.strerror or str(error)).lower()})") from None
    if len(data) > MAX_FILE:
        raise StartFailed(f"{path} is over {MAX_FILE} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise StartFailed(f"{path} is no text") from None


def proxy_for(server: str, environ: Mapping[str, str]) -> str | None:
    """The proxy that HTTPS_PROXY, HTTP_PROXY and NO_PROXY send requests to this URL through; None: none."""
    url = urlsplit(server)
    name = "https_proxy" if url.scheme == "https" else "http_proxy"
    proxy = environ.get(name) or environ.get(name.upper())
    host = (url.hostname or "").lower()
    if not proxy or host == "localhost":
        return None
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        address = None
    if address is not None and address.is_loopback:
        return None
    for each in (environ.get("no_proxy") or environ.get("NO_PROXY") or "").lower().split(","):
        rule = each.strip()
        if rule == "*" or rule in (host, f"{host}:{url.port or 443}"):
            return None
        if rule and address is None and host.endswith("." + rule.removeprefix("*").lstrip(".")):
            return None
        if "/" in rule and address is not None:
            try:
                if address in ipaddress.ip_network(rule, strict=False):
                    return None
            except ValueError:
                continue
    return proxy


# ----------------------------------------------------------------------------------------------------------------- TLS
def tls_context(access: Access, certificate: tuple[str, str] | None, environ: Mapping[str, str]) -> ssl.SSLContext:
    """How to speak TLS with the API. Blocks for a moment. Raises StartFailed for certificates that are none."""
    try:
        if access.ca is not None:
            context = private(ssl.create_default_context(cadata=access.ca))
        else:
            context = public_context(environ)
    except (ssl.SSLError, ValueError, OSError) as error:
        raise StartFailed(f"{access.described}: the certificate authority can't be used: {error}") from None
    if access.insecure:
        log.warning("Kubernetes (%s): insecure-skip-tls-verify is set, so anybody may answer in its place", access)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["http/1.1"])
    if certificate is not None:
        with _as_file("\n".join(certificate)) as path:
            try:
                context.load_cert_chain(path, password="")
            except (ssl.SSLError, ValueError, OSError) as error:
                reason = getattr(error, "reason", None) or error
                raise StartFailed(f"{access.described}: the client certificate can't be used: {reason}") from None
    return context


@contextmanager
def _as_file(text: str) -> Iterator[str]:
    """A name to open the text by, as OpenSSL wants it: of no file but memory where the system has that."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("certificate", os.MFD_CLOEXEC)
        try:
            os.write(fd, text.encode())
            yield f"/proc/self/fd/{fd}"
        finally:
            os.close(fd)
        return
    fd, path = tempfile.mkstemp()
    try:
        os.write(fd, text.encode())
        yield path
    finally:
        os.close(fd)
        os.unlink(path)


# --------------------------------------------------------------------------------------------------------- credentials
class Credentials:
    """Who we are towards one API. Nothing of it is ever logged or part of an error."""

    def __init__(self, access: Access, environ: Mapping[str, str]) -> None:
        self.certificate = access.certificate
        self._access = access
        self._environ = environ
        self._token = access.token
        self._expires = float("-inf")
        self._running = trio.Lock()

    async def headers(self) -> list[tuple[str, str]]:
        """What every request carries. Raises StartFailed when there are no credentials any more."""
        access = self._access
        if access.plugin is not None or access.token_file is not None:
            async with self._running:
                if trio.current_time() >= self._expires:
                    await self._renew()
        found = list(access.impersonate)
        if self._token:
            found.append(("Authorization", f"Bearer {self._token}"))
        elif access.basic is not None:
            found.append(("Authorization", f"Basic {base64.b64encode(':'.join(access.basic).encode()).decode()}"))
        return found

    def refused(self) -> bool:
        """The API does not know us (401): forget what can be had anew. Returns whether anything can."""
        self._expires = float("-inf")
        return self._access.plugin is not None or self._access.token_file is not None

    async def _renew(self) -> None:
        access = self._access
        if access.plugin is not None:
            await self._run(access.plugin)
        elif access.token_file is not None:
            try:
                self._token = (await trio.to_thread.run_sync(_read_text, access.token_file)).strip()
            except StartFailed as error:
                if not self._token:
                    raise StartFailed(f"{access.described}: no token: {error.message}") from None
            self._expires = trio.current_time() + TOKEN_AGE

    async def _run(self, plugin: Plugin) -> None:
        spec: dict[str, Any] = {"interactive": False}
        if plugin.cluster is not None:
            spec["cluster"] = json.loads(plugin.cluster)
        told = {"apiVersion": plugin.api_version, "kind": "ExecCredential", "spec": spec}
        variables = {**self._environ, **dict(plugin.env), "KUBERNETES_EXEC_INFO": json.dumps(told)}
        named = f"{self._access.described}: the credential plugin {plugin.command!r}"
        done = None
        try:
            with trio.move_on_after(PLUGIN_LIMIT):
                done = await trio.run_process(
                    [plugin.command, *plugin.args],
                    stdin=subprocess.DEVNULL,
                    capture_stdout=True,
                    capture_stderr=True,
                    check=False,
                    env=variables,
                )
        except OSError as error:
            hint = f"; {plugin.hint.strip()}" if plugin.hint else ""
            raise StartFailed(f"{named} can't be run: {(error.strerror or str(error)).lower()}{hint}") from None
        if done is None:
            raise StartFailed(f"{named} did not end within {PLUGIN_LIMIT:g} s")
        if done.returncode:
            said = done.stderr.decode("utf-8", "replace").strip().splitlines()[-3:]
            raise StartFailed(f"{named} failed with code {done.returncode}: {' | '.join(said)[-500:]}")
        try:
            status = json.loads(done.stdout)["status"]
            token = status.get("token")
            certificate = status.get("clientCertificateData"), status.get("clientKeyData")
            ends = status.get("expirationTimestamp")
            seconds = _seconds_until(ends) if ends else float("inf")
        except (ValueError, LookupError, TypeError, AttributeError):
            raise StartFailed(f"{named} printed no ExecCredential with a status") from None
        if not token and not all(certificate):
            raise StartFailed(f"{named} gave neither a token nor a client certificate with its key")
        self._token = token or None
        if all(certificate):
            self.certificate = (str(certificate[0]), str(certificate[1]))
        # At least a moment, so that a plugin with a wrong clock does not run before every request.
        self._expires = trio.current_time() + max(1.0, seconds - EXPIRY_SLACK)


def _seconds_until(stamp: str) -> float:
    """Of an RFC 3339 time."""
    return (datetime.fromisoformat(stamp) - datetime.now(UTC)).total_seconds()
