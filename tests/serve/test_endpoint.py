"""The endpoint, asked by the openai client and by plain HTTP: answers are those of generate, and errors are OpenAI's."""

import contextlib
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")

from served import make_models, running

import minilora
import minilora.generate as loop
from minilora.generate import generate
from minilora.sampling import GREEDY, Sampling, random_of
from minilora.serve.app import Guards

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def url(models):
    with running(models) as (url, _):
        yield url


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def answer(models, tmp_path_factory):
    """answer(name, ids, max_tokens, ...): the ids that generate gives, each model loaded by itself."""
    loaded = {}

    def ids(name: str, prompt: list[int], max_tokens: int, stop=frozenset({258}), sampling=GREEDY, generator=None):
        folder = next(p for p in tmp_path_factory.getbasetemp().glob("served*"))
        if name not in loaded:
            loaded[name] = minilora.load_model(folder / "tiny", device="cpu")
            if name != "tiny":
                minilora.load_adapter(loaded[name], folder / name)
            loaded[name].eval()
        return list(generate(loaded[name], prompt, set(stop), max_tokens, sampling, generator))

    return ids


def prompt_of(models, text: str = "hello") -> list[int]:
    return models.base.tokenizer.render([{"role": "user", "content": text}], prompt=True)[0]


def test_the_base_and_each_adapter_are_models(client):
    found = client.models.list().data
    assert [m.id for m in found] == ["tiny", "red", "blue"]
    assert client.models.retrieve("red").parent == "tiny"
    with pytest.raises(openai.NotFoundError, match="no such model"):
        client.models.retrieve("green")


@pytest.mark.parametrize("name", ["tiny", "red", "blue"])
def test_an_answer_is_that_of_the_model_alone(client, models, answer, name):
    wanted = answer(name, prompt_of(models), 20)
    found = client.chat.completions.create(model=name, messages=HELLO, max_tokens=20, temperature=0)
    assert found.choices[0].message.content == models.base.tokenizer.answer(wanted)
    assert found.usage.completion_tokens == len(wanted) and found.usage.prompt_tokens == len(prompt_of(models))
    assert found.choices[0].finish_reason == ("length" if len(wanted) == 20 else "stop")


def test_models_of_one_batch_do_not_touch_each_other(client, models, answer):
    """Twelve at once to three models on four slots, of several lengths: passes hold requests to all of them."""
    asked = [(name, f"hello {n}", 5 + 3 * n) for n in range(4) for name in ("tiny", "red", "blue")]

    def ask(case):
        name, text, most = case
        messages = [{"role": "user", "content": text}]
        return client.chat.completions.create(model=name, messages=messages, max_tokens=most).choices[0].message.content

    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(ask, asked))
    wanted = [models.base.tokenizer.answer(answer(name, prompt_of(models, text), most)) for name, text, most in asked]
    assert found == wanted and len(set(found)) > 6


def test_a_stream_is_the_same_text_and_ends_with_usage(client, models):
    whole = client.chat.completions.create(model="red", messages=HELLO, max_tokens=30)
    stream = client.chat.completions.create(
        model="red", messages=HELLO, max_tokens=30, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks][-1] == whole.choices[0].finish_reason
    assert last.choices == [] and last.usage == whole.usage and len({c.id for c in [*chunks, last]}) == 1


def test_draws_follow_the_seed(client, models, answer):
    """n answers differ, are the same again for the same seed, and are those that generate draws."""
    ask = {"model": "blue", "messages": HELLO, "max_tokens": 12, "temperature": 1.5, "top_p": 0.9, "n": 3}
    found = [
        [c.message.content for c in client.chat.completions.create(**ask, seed=seed).choices] for seed in (1, 1, 2)
    ]
    assert found[0] == found[1] != found[2] and len(set(found[0])) == 3
    sampling = Sampling(temperature=1.5, top_p=0.9)
    wanted = answer("blue", prompt_of(models), 12, sampling=sampling, generator=random_of(1, 2))
    assert found[0][2] == models.base.tokenizer.answer(wanted)


def test_the_newer_name_of_max_tokens_counts_where_both_are_given(client):
    for most, wanted in ((3, 3), (2, 3)):
        more = {"max_tokens": most, "max_completion_tokens": wanted}
        found = client.chat.completions.create(model="tiny", messages=HELLO, **more)
        assert found.usage.completion_tokens == wanted


def test_a_stop_text_ends_the_answer_and_is_not_shown(client):
    whole = client.completions.create(model="tiny", prompt="hello", max_tokens=30)
    text = whole.choices[0].text
    stop = text[6:8]
    at = text.index(stop)
    found = client.completions.create(model="tiny", prompt="hello", max_tokens=30, stop=[stop, "never there"])
    streamed = client.completions.create(model="tiny", prompt="hello", max_tokens=30, stop=stop, stream=True)
    chunks = list(streamed)
    assert found.choices[0].text == "".join(c.choices[0].text for c in chunks) == text[:at]
    assert found.choices[0].finish_reason == chunks[-1].choices[0].finish_reason == "stop"
    assert 0 < found.usage.completion_tokens < whole.usage.completion_tokens


def test_logprobs_are_those_of_the_model(client, models):
    """Of a chat against Decoder.logits over prompt and answer; a completion tells the same numbers in its own form."""
    ask = {"model": "tiny", "max_tokens": 6, "temperature": 0}
    chat = client.chat.completions.create(messages=HELLO, logprobs=True, top_logprobs=3, **ask).choices[0]
    prompt, told = prompt_of(models), chat.logprobs.content
    plain = client.completions.create(prompt=prompt, logprobs=3, **ask).choices[0]
    assert plain.logprobs.token_logprobs == pytest.approx([t.logprob for t in told], abs=1e-5)
    assert plain.logprobs.tokens == [t.token for t in told]
    best = list(generate(models.decoder, prompt, set(), 6))
    logprobs = models.decoder.logits(torch.tensor(prompt + best))[len(prompt) - 1 : -1].log_softmax(-1)
    top = logprobs.topk(3)
    assert [t.logprob for t in told] == pytest.approx(logprobs.max(-1).values.tolist(), abs=1e-4)
    assert [t.token for t in told] == [models.base.tokenizer.decode([i]) for i in best]
    for t, values, ids in zip(told, top.values.tolist(), top.indices.tolist(), strict=True):
        assert [o.logprob for o in t.top_logprobs] == pytest.approx(values, abs=1e-4)
        assert [o.token for o in t.top_logprobs] == [models.base.tokenizer.decode([i], specials=True) for i in ids]
        assert t.bytes is None or bytes(t.bytes).decode() == t.token


def test_several_prompts_and_ids_as_a_prompt(client, models):
    texts = ["hello", "good day"]
    ids = [models.base.tokenizer.encode(text) for text in texts]
    found = [client.completions.create(model="red", prompt=p, max_tokens=8) for p in (texts, ids)]
    assert [c.text for c in found[0].choices] == [c.text for c in found[1].choices]
    assert [c.index for c in found[0].choices] == [0, 1]
    assert found[0].usage.prompt_tokens == sum(map(len, ids))


def post(url: str, content: bytes | str, path: str = "/v1/chat/completions", **headers: str):
    return httpx.post(url + path, content=content, headers={"Content-Type": "application/json"} | headers)


GOOD = {"model": "tiny", "messages": HELLO, "max_tokens": 3}
WRONG = {
    "not JSON": ("{", 400), "a list": ("[]", 400), "a key twice": ('{"model": "tiny", "model": "red"}', 400), "not UTF-8": (b"\xff", 400),
    "nested": ("[" * 100_000, 400), "no model": ({"messages": HELLO}, 400), "another model": (GOOD | {"model": "gpt"}, 404),
    "a model of another kind": (GOOD | {"model": ["tiny"]}, 404), "no messages": ({"model": "tiny"}, 400), "empty": (GOOD | {"messages": []}, 400),
    "a role": (GOOD | {"messages": [{"role": ["user"], "content": "x"}]}, 400), "no content": (GOOD | {"messages": [{"role": "user"}]}, 400),
    "an image": (GOOD | {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, 400),
    "half a character": ('{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}', 400),
    "hot": (GOOD | {"temperature": 3}, 400), "a text for a number": (GOOD | {"temperature": "1"}, 400), "NaN": ('{"model": "tiny", "temperature": NaN, "messages": [{"role": "user", "content": "x"}]}', 400),
    "true for a number": (GOOD | {"n": True}, 400), "none": (GOOD | {"n": 0}, 400), "too many": (GOOD | {"n": 65}, 400), "no tokens": (GOOD | {"max_tokens": 0}, 400),
    "beyond the context": (GOOD | {"max_tokens": 200}, 400), "a long prompt": (GOOD | {"messages": [{"role": "user", "content": "x" * 300}]}, 400),
    "an unknown key": (GOOD | {"temprature": 1}, 400), "tools": (GOOD | {"tools": [{"type": "function"}]}, 400), "an empty stop": (GOOD | {"stop": ""}, 400),
    "five stops": (GOOD | {"stop": list("abcde")}, 400), "a penalty": (GOOD | {"frequency_penalty": 1.0}, 400),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_request_gets_an_error_in_openais_form(url, case):
    body, status = WRONG[case]
    found = post(url, body if isinstance(body, (str, bytes)) else json.dumps(body))
    error = found.json()["error"]
    assert found.status_code == status and set(error) == {"message", "type", "param", "code"}, error
    assert "Traceback" not in found.text and len(error["message"]) < 400


def test_what_changes_nothing_is_taken(url):
    same = {
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "user": "me",
        "tools": None,
        "response_format": {"type": "text"},
    }
    assert post(url, json.dumps(GOOD | same)).status_code == 200


def test_other_paths_methods_types_and_names(url):
    assert httpx.get(url + "/v1/nothing").json()["error"]["type"] == "not_found_error"
    assert httpx.get(url + "/v1/chat/completions").status_code == 405
    assert post(url, json.dumps(GOOD), **{"Content-Type": "text/plain"}).status_code == 415
    assert httpx.get(url + "/v1/models", headers={"Host": "evil.example"}).status_code == 421
    for host in ("localhost:1", "localhost", "127.0.0.1", "[::1]:8000"):
        assert httpx.get(url + "/v1/models", headers={"Host": host}).status_code == 200
    assert len(httpx.get(url + "/" + "x" * 9000).text) < 400


def test_a_body_has_a_limit(models):
    with running(models, guards=Guards(max_body=1000)) as (url, _):
        found = post(url, json.dumps(GOOD | {"user": "x" * 1000}))
        assert found.status_code == 413 and "longer than 1,000 bytes" in found.json()["error"]["message"]
        in_pieces = httpx.post(
            url + "/v1/completions", content=iter([b" " * 600] * 2), headers={"Content-Type": "application/json"}
        )
        assert in_pieces.status_code == 413
        assert post(url, json.dumps(GOOD)).status_code == 200


def test_a_body_that_does_not_come_is_not_waited_for(models):
    with running(models, guards=Guards(body_timeout=0.1)) as (url, _), connected(url) as half:
        half.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 90\r\n\r\n{"
        )
        assert half.recv(100).startswith(b"HTTP/1.1 408")


def connected(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def closed(connection: socket.socket) -> bool:
    """Whether the server ended a connection; what it still sends is read."""
    try:
        while connection.recv(1 << 16):
            pass
    except ConnectionError:
        pass
    except TimeoutError:
        return False
    return True


GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"


@pytest.mark.parametrize("sent", [b"", GET, GET + b"\r\n" + GET], ids=["nothing", "half of it", "half of the second"])
def test_headers_that_do_not_come_are_not_waited_for(models, sent):
    """Nor if they drip: the time is for all of them."""
    with running(models, guards=Guards(header_timeout=0.2)) as (url, _), connected(url) as slow:
        slow.sendall(sent)
        slow.settimeout(0.02)
        end = time.monotonic() + 10
        while not closed(slow):
            assert time.monotonic() < end
            if sent:
                with contextlib.suppress(ConnectionError):
                    slow.sendall(b"X")


def test_headers_and_connections_have_limits(models):
    with (
        running(models, guards=Guards(connections=2)) as (url, _),
        connected(url) as first,
        connected(url) as second,
        connected(url) as third,
    ):
        assert closed(third)
        first.sendall(GET + b"\r\n")
        assert first.recv(100).startswith(b"HTTP/1.1 200")
        with contextlib.suppress(ConnectionError):
            second.sendall(GET + (b"X: " + b"x" * 1000 + b"\r\n") * 500)
        assert closed(second)


def test_a_page_of_others_is_refused(url):
    """No header lets a browser give the answer to another page, and its requests are not answered at all."""
    ask = json.dumps(GOOD)
    for origin in ("https://evil.example", "null", "http://localhost:1"):
        found = post(url, ask, Origin=origin)
        assert found.status_code == 403 and not [name for name in found.headers if name.startswith("access-control")]
    asked = httpx.options(url + "/v1/completions", headers={"Origin": url, "Access-Control-Request-Method": "POST"})
    assert asked.status_code == 405 and not [name for name in asked.headers if name.startswith("access-control")]
    assert post(url, ask, Origin=url).status_code == 200


def test_our_own_fault_is_told_without_a_traceback(models, monkeypatch, capsys):
    monkeypatch.setattr("minilora.serve.app.read_chat", lambda *_: 1 / 0)
    with running(models) as (url, _):
        found = post(url, json.dumps(GOOD))
    assert found.status_code == 500 and found.json()["error"]["message"].startswith("this is a bug of minilora")
    assert "ZeroDivisionError" not in found.text and "ZeroDivisionError" in capsys.readouterr().err


def test_a_key_is_needed_where_there_is_one(models):
    with running(models, guards=Guards(key="it's a=secret;")) as (url, _):
        assert httpx.get(url + "/v1/models").status_code == 401
        assert (
            httpx.get(url + "/v1/models", headers={"Authorization": "Bearer wrong"}).json()["error"]["code"]
            == "invalid_api_key"
        )
        assert httpx.get(url + "/runs").status_code == 401 and httpx.get(url + "/").status_code == 200
        right = {"Authorization": "Bearer it's a=secret;"}
        assert httpx.get(url + "/v1/models", headers=right).status_code == 200
        with httpx.Client(base_url=url) as page:
            assert page.post("/key", json={"key": "wrong"}).status_code == 401
            assert page.post("/key", json={"key": "it's a=secret;"}).status_code == 200
            assert page.get("/runs").status_code == 200
        assert post(url, json.dumps(GOOD), Host="any.example", Authorization="Bearer x").status_code == 401


def wait_until(condition) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_full_queue_says_so(models):
    """One slot and one place in the queue: of many at once, those that fit are answered, the others are told 429."""
    with running(models, slots=1, queue=1) as (url, engine):
        ask = json.dumps(GOOD | {"max_tokens": 150})
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda _: post(url, ask), range(8)))
        codes = [f.status_code for f in found]
        assert set(codes) == {200, 429} and codes.count(200) >= 2
        refused = next(f for f in found if f.status_code == 429)
        assert refused.headers["Retry-After"] == "1" and refused.json()["error"]["type"] == "rate_limit_error"
        assert post(url, json.dumps(GOOD | {"n": 3})).status_code == 429
        assert post(url, ask).status_code == 200 and not engine.unfinished


def stream_of(url: str, **more) -> socket.socket:
    """A connection on which an answer is streamed; its reader has not read yet."""
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps(GOOD | {"stream": True, "max_tokens": 150} | more).encode()
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect((host, int(port)))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


@pytest.fixture
def slow(models, monkeypatch):
    """Every pass takes a hundredth of a second more, so that an answer of 150 tokens is still being written when it is cut."""
    choose = models.choose
    monkeypatch.setattr(models, "choose", lambda requests: time.sleep(0.01) or choose(requests))


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_gives_its_slot_back(models, slow, stream):
    with running(models, slots=1, queue=3) as (url, engine):
        cut = [stream_of(url, stream=stream) for _ in range(3)]
        wait_until(lambda: len(engine.unfinished) == 3)
        for connection in cut:
            connection.close()
        wait_until(lambda: not engine.unfinished)
        assert post(url, json.dumps(GOOD)).status_code == 200 and engine.answered == 1


def test_a_reader_that_does_not_read_is_left(models):
    """Its answer is larger than sockets and buffers are: after a while its requests end, and nobody else waits."""
    guards = Guards(write_timeout=0.3)
    with (
        running(models, guards=guards, slots=16, context=256) as (url, engine),
        stream_of(url, n=16, max_tokens=180, logprobs=True, top_logprobs=20) as stuck,
    ):
        wait_until(lambda: len(engine.unfinished) == 16)
        wait_until(lambda: not engine.unfinished)
        assert post(url, json.dumps(GOOD)).status_code == 200
        stuck.settimeout(10)
        read = b""
        while piece := stuck.recv(1 << 20):
            read += piece
        assert b"[DONE]" not in read


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_has_a_deadline(models, slow, stream):
    with running(models, guards=Guards(timeout=0.2), slots=1) as (url, engine):
        found = post(url, json.dumps(GOOD | {"max_tokens": 150, "stream": stream}))
        error = json.loads(found.text.split("data: ")[-1])["error"]
        assert error["code"] == "timeout" and found.status_code == (200 if stream else 504)
        wait_until(lambda: not engine.unfinished)
        assert post(url, json.dumps(GOOD)).status_code == 200


def test_a_pass_that_fails_takes_its_own_requests_with_it_alone(models, monkeypatch, capsys):
    """What waited is answered after it; the client sees no traceback, the server's log does."""
    with running(models, slots=1, queue=3) as (url, engine):
        real, calls = loop._prefill, []

        def failing(model, cache, requests):
            calls.append(len(requests))
            if len(calls) == 1:
                raise MemoryError("no room")
            return real(model, cache, requests)

        monkeypatch.setattr(loop, "_prefill", failing)
        found = post(url, json.dumps(GOOD))
        assert (
            found.status_code == 500 and "no room" not in found.text and found.json()["error"]["type"] == "server_error"
        )
        assert post(url, json.dumps(GOOD)).status_code == 200 and not engine.unfinished
    assert "MemoryError: no room" in capsys.readouterr().err


def test_closing_ends_what_runs(models, slow):
    """A server that ends tells a client that still waits, once its grace is over."""
    with running(models, slots=1) as (url, engine), ThreadPoolExecutor(1) as pool:
        answer = pool.submit(post, url, json.dumps(GOOD | {"max_tokens": 30}))
        wait_until(lambda: len(engine.unfinished) == 1)
    assert answer.result().status_code == 200 and not engine._thread.is_alive()
