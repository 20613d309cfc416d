"""Finding a cluster and credentials (K24, K28, RB63): kubeconfigs, a pod's service account, credential plugins."""

from __future__ import annotations

import base64
import json
import os
import re
import ssl
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
import trio

from gateway.errors import StartFailed
from gateway.runtimes.kubernetes import access as cluster_access
from gateway.runtimes.kubernetes.access import Access, Credentials, Plugin, find_access, proxy_for, tls_context
from gateway.runtimes.kubernetes.api import on_cluster
from tests.fixtures.http_scripted import Answer, Request, serve

TLS = Path(__file__).parents[1] / "fixtures" / "tls"
CA = (TLS / "ca.pem").read_text()
NOWHERE = Path("/nonexistent/serviceaccount")


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def kubeconfig(path: Path, **parts: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"apiVersion": "v1", "kind": "Config", **parts}))
    return path


def one(path: Path, user: dict[str, Any] | None = None, cluster: dict[str, Any] | None = None) -> Path:
    """A kubeconfig with one context."""
    return kubeconfig(
        path,
        clusters=[{"name": "c", "cluster": {"server": "https://k:6443/", **(cluster or {})}}],
        users=[{"name": "u", "user": user or {}}],
        contexts=[{"name": "dev", "context": {"cluster": "c", "user": "u", "namespace": "team"}}],
        **{"current-context": "dev"},
    )


def found(path: Path, context: str | None = None) -> Access:
    return find_access(context, {"KUBECONFIG": str(path)}, service_account=NOWHERE)


# ----------------------------------------------------------------------------------------------------------- kubeconfig
def test_K24_the_current_context_is_used(tmp_path: Path) -> None:
    path = one(tmp_path / "config", {"token": "t0ken"}, {"certificate-authority-data": encoded(CA)})
    access = found(path)
    assert (access.server, access.namespace, access.context) == ("https://k:6443", "team", "dev")
    assert (access.token, access.ca, access.kubeconfig) == ("t0ken", CA, str(path))
    assert access.described == f"context 'dev' of {path}"
    assert "t0ken" not in repr(access) and "t0ken" not in str(access)


def test_K24_files_are_merged_as_kubectl_does(tmp_path: Path) -> None:
    """The first file that has an entry wins; relative paths are relative to the file that names them."""
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "ca.crt").write_text(CA)
    first = kubeconfig(
        tmp_path / "a" / "config",
        contexts=[{"name": "two", "context": {"cluster": "c", "user": "u"}}],
        clusters=[],
        users=[{"name": "u", "user": {"token": "first"}}],
    )
    second = kubeconfig(
        tmp_path / "b" / "config",
        clusters=[{"name": "c", "cluster": {"server": "https://second", "certificate-authority": "ca.crt"}}],
        users=[{"name": "u", "user": {"token": "second"}}],
        contexts=[{"name": "two", "context": {"cluster": "x", "user": "y"}}],
        **{"current-context": "two"},
    )
    missing = tmp_path / "missing"
    environ = {"KUBECONFIG": os.pathsep.join(map(str, (missing, first, second)))}
    access = find_access(None, environ, service_account=NOWHERE)
    assert (access.server, access.ca, access.token, access.namespace) == ("https://second", CA, "first", "default")
    assert access.kubeconfig == f"{first}{os.pathsep}{second}"


def test_K24_home_is_where_the_kubeconfig_is(tmp_path: Path) -> None:
    one(tmp_path / ".kube" / "config")
    assert find_access(None, {"HOME": str(tmp_path)}, service_account=NOWHERE).context == "dev"


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        ({"username": "me", "password": "pw"}, [("Authorization", "Basic " + encoded("me:pw"))]),
        ({"token": "t"}, [("Authorization", "Bearer t")]),
        (
            {"token": "t", "as": "you", "as-groups": ["g1", "g2"], "as-uid": "7"},
            [
                ("Impersonate-User", "you"),
                ("Impersonate-Uid", "7"),
                ("Impersonate-Group", "g1"),
                ("Impersonate-Group", "g2"),
                ("Authorization", "Bearer t"),
            ],
        ),
        ({}, []),
    ],
)
async def test_K24_every_kind_of_user(tmp_path: Path, user: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert await Credentials(found(one(tmp_path / "config", user)), {}).headers() == expected


def test_K24_certificates_inline_and_in_files(tmp_path: Path) -> None:
    certificate, key = (TLS / "server.pem").read_text(), (TLS / "server.key").read_text()
    inline = {"client-certificate-data": encoded(certificate), "client-key-data": encoded(key)}
    files = {"client-certificate": str(TLS / "server.pem"), "client-key": str(TLS / "server.key")}
    for user in (inline, files):
        access = found(one(tmp_path / "config", user))
        assert access.certificate == (certificate, key)
        assert key not in repr(access)
    before = set(os.listdir("/proc/self/fd"))
    context = tls_context(access, access.certificate, {"SSL_CERT_FILE": str(TLS / "ca.pem")})
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert set(os.listdir("/proc/self/fd")) == before


def test_K24_strict_pythons_take_what_a_cluster_s_own_authority_has_made(tmp_path: Path, strict_tls: None) -> None:
    """Many clusters' certificates lack an Authority Key Identifier. Public authorities' do not."""
    own = found(one(tmp_path / "own", None, {"certificate-authority": str(TLS / "ca.pem")}))
    public = found(one(tmp_path / "public", None, {}))
    assert not tls_context(own, None, {}).verify_flags & ssl.VERIFY_X509_STRICT
    assert tls_context(public, None, {}).verify_flags & ssl.VERIFY_X509_STRICT


def test_K24_without_memory_files_a_key_is_on_disk_for_a_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "memfd_create")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with cluster_access._as_file("secret") as name:
        assert Path(name).read_text() == "secret"
        assert stat.S_IMODE(os.stat(name).st_mode) == 0o600
    assert os.listdir(tmp_path) == []


def test_K24_an_unchecked_certificate_is_said_loudly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    access = found(one(tmp_path / "config", None, {"insecure-skip-tls-verify": True}))
    context = tls_context(access, None, {})
    assert context.verify_mode is ssl.CERT_NONE
    assert "insecure-skip-tls-verify is set, so anybody may answer in its place" in caplog.text


@pytest.mark.parametrize(
    ("user", "cluster", "told"),
    [
        ({}, {"server": "ftp://k"}, "the cluster's server is no http(s) URL: 'ftp://k'"),
        ({}, {"server": ""}, "the cluster's server is no http(s) URL"),
        (
            {},
            {"insecure-skip-tls-verify": True, "certificate-authority-data": encoded(CA)},
            "both a certificate-authority and insecure-skip-tls-verify",
        ),
        ({}, {"certificate-authority": "gone.crt"}, r"certificate-authority: .*/gone.crt can't be read \(no such file"),
        ({}, {"certificate-authority-data": "%%%"}, "certificate-authority-data is no PEM in base64"),
        ({"client-certificate-data": encoded(CA)}, {}, "a client certificate or its key, but not both"),
        ({"auth-provider": {"name": "gcp"}}, {}, "auth-provider was removed from Kubernetes in 1.26"),
        ({"exec": {"command": "x"}}, {}, "no command, or an unknown apiVersion"),
        (
            {"exec": {"command": "x", "apiVersion": "client.authentication.k8s.io/v1", "interactiveMode": "Always"}},
            {},
            "asks questions, and nobody is there",
        ),
    ],
)
def test_K28_a_bad_kubeconfig_is_told(tmp_path: Path, user: Any, cluster: Any, told: str) -> None:
    path = one(tmp_path / "config", user, cluster)
    with pytest.raises(StartFailed, match=told if "\\" in told else re.escape(told)) as caught:
        found(path)
    assert caught.value.message.startswith(f"context 'dev' of {path}: ")


def test_K28_what_is_missing_is_named(tmp_path: Path) -> None:
    path = one(tmp_path / "config")
    with pytest.raises(StartFailed, match="there is no context 'prod'; there are dev"):
        found(path, "prod")
    kubeconfig(path, contexts=[{"name": "dev", "context": {"cluster": "x"}}])
    with pytest.raises(StartFailed, match="there is no current-context; name one with `context`"):
        found(path)
    with pytest.raises(StartFailed, match="there is no cluster 'x'"):
        found(path, "dev")
    path.write_text("a: [")
    with pytest.raises(StartFailed, match=r"config is no YAML \(line 1\)"):
        found(path)
    path.write_text("- a")
    with pytest.raises(StartFailed, match="config is no kubeconfig"):
        found(path)


def test_K28_no_cluster_names_all_that_was_tried(tmp_path: Path) -> None:
    with pytest.raises(StartFailed) as caught:
        find_access(None, {"HOME": str(tmp_path)}, service_account=NOWHERE)
    assert caught.value.message == (
        "No Kubernetes cluster was found: not in a pod (KUBERNETES_SERVICE_HOST is not set); "
        f"{tmp_path}/.kube/config does not exist"
    )
    with pytest.raises(StartFailed, match="neither KUBECONFIG nor HOME is set"):
        find_access(None, {}, service_account=NOWHERE)


# ------------------------------------------------------------------------------------------------------------- in a pod
def account(folder: Path, token: str = "first") -> Path:
    folder.mkdir()
    (folder / "token").write_text(token + "\n")
    (folder / "ca.crt").write_text(CA)
    (folder / "namespace").write_text("mine")
    return folder


def test_K24_in_a_pod_its_service_account_is_used(tmp_path: Path) -> None:
    folder = account(tmp_path / "sa")
    environ = {"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "6443"}
    access = find_access(None, environ, service_account=folder)
    assert (access.server, access.namespace, access.context) == ("https://[fd00::1]:6443", "mine", "")
    assert (access.ca, access.token_file) == (CA, folder / "token")


def test_K24_in_a_pod_a_context_means_the_kubeconfig(tmp_path: Path) -> None:
    environ = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "KUBECONFIG": str(one(tmp_path / "config"))}
    assert find_access("dev", environ, service_account=account(tmp_path / "sa")).context == "dev"


def test_K28_a_pod_without_a_token_says_so(tmp_path: Path) -> None:
    with pytest.raises(StartFailed, match="in a pod without a service account token"):
        find_access(None, {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, service_account=tmp_path)


async def test_RB63_a_rotated_token_is_read_again(tmp_path: Path) -> None:
    """When its time has come, and at once when the old one is refused."""
    folder = account(tmp_path / "sa")
    given = []

    async def api(request: Request, answer: Answer) -> None:
        given.append(request.headers["authorization"])
        good = given[-1] == "Bearer second"
        await answer.json({"ok": good}, 200 if good else 401)

    async with serve(api) as server:
        access = Access(server.url(""), "mcp", "a test", token_file=folder / "token")
        async with on_cluster(access, {}) as cluster:
            (folder / "token").write_text("second")
            assert await cluster.get("/x") == {"ok": True}
            with pytest.raises(StartFailed, match="401"):
                (folder / "token").write_text("third")
                cluster._credentials.refused()
                await cluster.get("/x")
    assert given == ["Bearer first", "Bearer second", "Bearer third", "Bearer third"]


async def test_RB63_a_token_is_read_again_in_time(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    folder = account(tmp_path / "sa")
    credentials = Credentials(Access("https://k", "mcp", "a test", token_file=folder / "token"), {})
    assert await credentials.headers() == [("Authorization", "Bearer first")]
    (folder / "token").write_text("second")
    assert await credentials.headers() == [("Authorization", "Bearer first")]
    await trio.sleep(cluster_access.TOKEN_AGE)
    assert await credentials.headers() == [("Authorization", "Bearer second")]
    (folder / "token").unlink()
    await trio.sleep(cluster_access.TOKEN_AGE)
    assert await credentials.headers() == [("Authorization", "Bearer second")], "while it is being replaced"


# -------------------------------------------------------------------------------------------------------------- plugins
def plugin(tmp_path: Path, code: str, **more: Any) -> Plugin:
    script = tmp_path / "plugin.py"
    script.write_text(f"import json, os, sys\n{code}")
    return Plugin(sys.executable, (str(script),), (("OWN", "yes"),), "client.authentication.k8s.io/v1", **more)


GIVE = """
with open(os.environ['COUNT'], 'a') as file:
    file.write('x')
told = json.loads(os.environ['KUBERNETES_EXEC_INFO'])
assert told['kind'] == 'ExecCredential' and told['spec']['interactive'] is False, told
assert os.environ['OWN'] == 'yes' and sys.stdin.read() == ''
number = os.path.getsize(os.environ['COUNT'])
status = {'token': f"t{number}-{told['spec'].get('cluster', {}).get('server')}"}
if os.environ.get('EXPIRES'):
    status['expirationTimestamp'] = os.environ['EXPIRES']
print(json.dumps({'apiVersion': told['apiVersion'], 'kind': 'ExecCredential', 'status': status}))
"""


async def test_K24_a_credential_plugin_is_run_and_its_answer_kept(tmp_path: Path) -> None:
    environ = {**os.environ, "COUNT": str(tmp_path / "count")}
    made = plugin(tmp_path, GIVE, cluster=json.dumps({"server": "https://k"}))
    credentials = Credentials(Access("https://k", "mcp", "a test", plugin=made), environ)
    for _ in range(3):
        assert await credentials.headers() == [("Authorization", "Bearer t1-https://k")]
    assert credentials.refused()
    assert await credentials.headers() == [("Authorization", "Bearer t2-https://k")]


async def test_K24_an_expired_credential_is_asked_for_again(tmp_path: Path) -> None:
    environ = {**os.environ, "COUNT": str(tmp_path / "count"), "EXPIRES": "2020-01-01T00:00:00Z"}
    credentials = Credentials(Access("https://k", "mcp", "a test", plugin=plugin(tmp_path, GIVE)), environ)
    assert await credentials.headers() == [("Authorization", "Bearer t1-None")]
    assert await credentials.headers() == [("Authorization", "Bearer t1-None")], "not before every request"
    await trio.sleep(1.1)
    assert await credentials.headers() == [("Authorization", "Bearer t2-None")]


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("sys.exit('please log in with acme login')", "failed with code 1: please log in with acme login"),
        ("print('hello')", "printed no ExecCredential with a status"),
        ("print('{\"status\": {}}')", "gave neither a token nor a client certificate"),
        ("print(json.dumps({'status': {'token': 't', 'expirationTimestamp': 'soon'}}))", "printed no ExecCredential"),
    ],
)
async def test_K28_a_plugin_that_fails_is_told(tmp_path: Path, code: str, told: str) -> None:
    credentials = Credentials(Access("https://k", "mcp", "a test", plugin=plugin(tmp_path, code)), dict(os.environ))
    with pytest.raises(StartFailed, match=re.escape(told)):
        await credentials.headers()


async def test_K28_a_plugin_that_hangs_or_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_access, "PLUGIN_LIMIT", 0.3)
    hangs = plugin(tmp_path, "import time\ntime.sleep(600)")
    with pytest.raises(StartFailed, match=r"did not end within 0\.3 s"):
        await Credentials(Access("https://k", "mcp", "a test", plugin=hangs), dict(os.environ)).headers()
    absent = Plugin("/no/such/login", (), (), "client.authentication.k8s.io/v1", "install it with acme")
    with pytest.raises(StartFailed, match="can't be run: no such file or directory; install it with acme"):
        await Credentials(Access("https://k", "mcp", "a test", plugin=absent), {}).headers()


async def test_K24_a_plugins_certificate_is_used_and_renewed(tmp_path: Path) -> None:
    """A client certificate is asked for by the API; when it is refused the plugin gives another one."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(TLS / "server.pem", TLS / "server.key")
    environ = {**os.environ, "COUNT": str(tmp_path / "count"), "CERT": str(TLS / "server.pem")}
    environ["KEY"] = str(TLS / "server.key")
    code = """
with open(os.environ['COUNT'], 'a') as file:
    file.write('x')
again = '\\n' * os.path.getsize(os.environ['COUNT'])
pair = {'clientCertificateData': open(os.environ['CERT']).read() + again}
pair['clientKeyData'] = open(os.environ['KEY']).read()
print(json.dumps({'status': pair}))
"""
    connections = []

    async def api(request: Request, answer: Answer) -> None:
        connections.append(request.connection)
        await answer.json({"n": len(connections)}, 401 if len(connections) == 1 else 200)

    async with serve(api, tls=context) as server:
        access = Access(server.url(""), "mcp", "a test", ca=CA, plugin=plugin(tmp_path, code))
        async with on_cluster(access, environ) as cluster:
            assert await cluster.get("/x") == {"n": 2}
    assert (tmp_path / "count").read_text() == "xx"
    assert connections == [1, 2], "a new certificate needs a new connection"


# -------------------------------------------------------------------------------------------------------------- proxies
@pytest.mark.parametrize(
    ("server", "environ", "proxy"),
    [
        ("https://k:6443", {"HTTPS_PROXY": "http://p:1"}, "http://p:1"),
        ("https://k:6443", {"https_proxy": "http://q:1", "HTTPS_PROXY": "http://p:1"}, "http://q:1"),
        ("http://k:8080", {"HTTPS_PROXY": "http://p:1"}, None),
        ("https://k:6443", {"HTTPS_PROXY": "http://p:1", "NO_PROXY": "a, k"}, None),
        ("https://api.k.example", {"HTTPS_PROXY": "http://p:1", "NO_PROXY": ".k.example"}, None),
        ("https://apik.example", {"HTTPS_PROXY": "http://p:1", "NO_PROXY": "k.example"}, "http://p:1"),
        ("https://10.1.2.3", {"HTTPS_PROXY": "http://p:1", "no_proxy": "10.0.0.0/8"}, None),
        ("https://10.1.2.3", {"HTTPS_PROXY": "http://p:1", "no_proxy": "192.168.0.0/16,nonsense/x"}, "http://p:1"),
        ("https://127.0.0.1:6443", {"HTTPS_PROXY": "http://p:1"}, None),
        ("https://k", {"HTTPS_PROXY": "http://p:1", "NO_PROXY": "*"}, None),
        ("https://k", {}, None),
    ],
)
def test_K24_proxies_are_those_of_the_environment(server: str, environ: dict[str, str], proxy: str | None) -> None:
    assert proxy_for(server, environ) == proxy
