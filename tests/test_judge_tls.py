"""https with a certificate that nobody knows, and proxies: requests' own variables, and one clear line when they fail."""

import json
import shutil
import ssl
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from hov2.config import JudgeConfig
from hov2.judge import Judge, JudgeError
from hov2.prompts import load_prompts
from tests.test_judge import Server, ask, chat, judged

NAMES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    """Whatever the machine's own settings are."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


def judge_of(url, **config):
    config = {"url": url, "max_retries": 0, "timeout": 5.0} | config
    return Judge(JudgeConfig(**config), load_prompts(), first_delay=0.001)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """The files of a key and of its self-signed certificate for 127.0.0.1."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    folder = tmp_path_factory.mktemp("tls")
    key, certificate = folder / "key.pem", folder / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", key, "-out", certificate, "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(command, check=True, capture_output=True)
    return key, certificate


@pytest.fixture
def tls_url(certificate):
    """The URL of a judge behind TLS."""
    key, chain = certificate
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain, key)
    server = Server([chat("4")])
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server.url.replace("http:", "https:")
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_private_certificate_is_trusted_by_requests_own_variable(tls_url, certificate, monkeypatch):
    with pytest.raises(JudgeError) as error:
        judge_of(tls_url).check()
    assert "its certificate is not trusted (self-signed certificate); REQUESTS_CA_BUNDLE can name" in str(error.value)
    assert "\n" not in str(error.value)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate[1]))
    judge = judge_of(tls_url)
    judge.check()
    assert ask(judge).score == 0.8
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nowhere.pem")
    assert ask(judge_of(tls_url)).error.endswith(": REQUESTS_CA_BUNDLE or CURL_CA_BUNDLE names no file")


def test_http_where_https_was_said():
    with judged(chat("4")) as (_, server):
        error = ask(judge_of(server.url.replace("http:", "https:"))).error
    assert "no TLS there (" in error


class Proxy(BaseHTTPRequestHandler):
    """Answers for every host, or refuses to."""

    def do_POST(self):
        self.server.asked.append(self.path)
        self.rfile.read(int(self.headers["Content-Length"]))
        body = chat("3")[2].encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_CONNECT(self):
        self.server.asked.append(self.path)
        self.send_error(407)

    def log_message(self, *args):
        pass


@pytest.fixture
def proxy():
    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as server:
        server.asked = []
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


def test_a_proxy_is_used_except_for_this_machine_and_no_proxy(proxy, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy.server_port}")
    judge = judge_of("http://judge.invalid/v1")
    assert ask(judge).score == 0.6
    assert proxy.asked == ["http://judge.invalid/v1/chat/completions"]
    with judged(chat("4")) as (judge, _):
        assert ask(judge).score == 0.8
    monkeypatch.setenv("NO_PROXY", "judge.invalid")
    assert ask(judge_of("http://judge.invalid/v1")).is_down
    assert len(proxy.asked) == 1


def test_a_proxy_that_fails_is_named_as_such(proxy, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.server_port}")
    error = ask(judge_of("https://judge.invalid/v1")).error
    assert error == "judge.invalid: at the proxy that the environment names: HTTP 407"
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    error = ask(judge_of("https://judge.invalid/v1")).error
    assert error == "judge.invalid: at the proxy that the environment names: ConnectionRefusedError"


def test_no_password_of_a_netrc_file_replaces_the_key(tmp_path, monkeypatch):
    netrc = tmp_path / "netrc"
    netrc.write_text("default login me password hush\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("JUDGE_KEY", "sk-key")
    with judged(chat("4"), chat("4")) as (judge, server):
        ask(judge)
        ask(judge_of(server.url, api_key_env="JUDGE_KEY"))
        assert "hush" not in json.dumps([request[2] for request in server.requests])
        assert "Authorization" not in server.requests[0][2]
        assert server.requests[1][2]["Authorization"] == "Bearer sk-key"
