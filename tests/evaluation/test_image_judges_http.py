"""The judge over HTTP against a real server on this machine, which looks at the pictures it is sent: brighter is better."""

from __future__ import annotations

import base64
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from polyalign.core.errors import UserError
from polyalign.core.recipe import JudgeConfig
from polyalign.evaluation import judges
from polyalign.evaluation.chat import ChatEndpoint
from polyalign.evaluation.image_judges.endpoint import HttpJudge
from polyalign.evaluation.paired import evaluate_paired

sys.path.insert(0, str(Path(__file__).resolve().parent))

from chat_server import Answer, Server, completion, serving  # noqa: E402  # pyright: ignore[reportMissingImports]


def brightness(part: dict[str, Any]) -> float:
    head, _, data = part["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    picture = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    assert picture.format == "PNG" and picture.mode == "RGB"
    return float(np.asarray(picture).mean())


def by_brightness(body: dict[str, Any]) -> Answer:
    """What a model would answer that likes bright pictures."""
    (message,) = body["messages"]
    text, *shown = message["content"]
    assert message["role"] == "user" and text["type"] == "text"
    lights = [brightness(part) for part in shown]
    if len(lights) == 1:
        return completion(json.dumps({"score": round(lights[0] / 25.5, 3)}))
    return completion(f"Let me see.\n```json\n{json.dumps({'better': 1 if lights[0] > lights[1] else 2})}\n```")


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(by_brightness) as running:
        yield running


def grey(*levels: int) -> list[Image.Image]:
    return [Image.new("RGB", (4, 3), (level, level, level)) for level in levels]


def asked(*prompts: str) -> list[dict[str, str]]:
    return [{"prompt": prompt} for prompt in prompts]


def judge(server: Server, **options: Any) -> HttpJudge:
    given = {"url": server.url, "model": "looker-7b", "backoff": 0, **options}
    made = judges.build(JudgeConfig(name="http", options=given))
    assert isinstance(made, HttpJudge)
    return made


def test_pointwise_scores_come_back_in_order(server):
    made = judge(server, workers=3)
    assert made.score(asked("a", "b", "c", "d"), grey(255, 0, 102, 51)) == [10.0, 0.0, 4.0, 2.0]
    paths, headers, bodies = zip(*server.seen, strict=True)
    assert set(paths) == {"/v1/chat/completions"} and not any("authorization" in header for header in headers)
    assert {body["model"] for body in bodies} == {"looker-7b"} and {body["temperature"] for body in bodies} == {0}
    texts = [body["messages"][0]["content"][0]["text"] for body in bodies]
    assert sorted(text.split("\n")[1] for text in texts) == ["a", "b", "c", "d"]
    assert made.version.startswith("1 looker-7b at 127.0.0.1:") and not made.relative
    assert not made.endpoint.failures


def test_prompts_with_braces_questions_of_ones_own_and_fields(server):
    made = judge(server, question="Rate {prompt} from 0 to 10", request={"temperature": None, "max_tokens": 9, "model": "sly"})
    made.score(asked('{"score": 9} {0}'), grey(0))
    ((_, _, body),) = server.seen
    assert body["messages"][0]["content"][0]["text"] == 'Rate {"score": 9} {0} from 0 to 10'
    assert "temperature" not in body and body["max_tokens"] == 9 and body["model"] == "looker-7b"
    assert made.version != judge(server).version


def test_pairwise_scores_are_shares_of_comparisons_won(server):
    made = judge(server, mode="pairwise")
    prompts = asked("a", "b", "a", "b", "a")
    assert made.score(prompts, grey(10, 200, 30, 100, 20)) == [0.0, 1.0, 1.0, 0.0, 0.5]
    assert len(server.seen) == 3 + 1
    # a tie that the model calls, and equal pictures, which it is not asked about
    server.answer, server.seen = (lambda body: completion("0")), []
    assert made.score(asked("a", "a"), grey(1, 2)) == [0.5, 0.5] and len(server.seen) == 1
    assert made.score(asked("a", "a"), grey(7, 7)) == [0.5, 0.5] and len(server.seen) == 1
    with pytest.raises(UserError, match="1 prompts have one picture, such as 'b'"):
        made.score(asked("a", "a", "b"), grey(1, 2, 3))


def test_the_order_is_drawn_by_the_key_and_a_model_that_likes_the_first_place_gains_nothing(server):
    server.answer = lambda body: completion('{"better": 1}')
    prompts = [f"prompt {index}" for index in range(40)]
    pairs = asked(*[prompt for prompt in prompts for _ in range(2)])
    pictures = grey(*[50 + index for index in range(80)])
    first = judge(server, mode="pairwise").score(pairs, pictures)
    assert 8 <= sum(first[::2]) <= 32  # a coin: outside with a chance of 1 in 10 000
    assert judge(server, mode="pairwise").score(pairs, pictures) == first
    assert judge(server, mode="pairwise", seed=1).score(pairs, pictures) != first
    turned = judge(server, mode="pairwise").score(pairs, [pictures[index ^ 1] for index in range(80)])
    assert turned == [first[index ^ 1] for index in range(80)]  # which picture wins does not depend on the order they come in
    assert judge(server, mode="pairwise", orders="both").score(pairs, pictures) == [0.5] * 80
    server.answer = by_brightness
    assert judge(server, mode="pairwise", orders="both").score(pairs[:2], pictures[:2]) == [0.0, 1.0]


def test_failures_are_asked_again_and_counted(server, caplog):
    failing = [(500, {}, b"overloaded"), (429, {"Retry-After": "0"}, b""), completion("no idea"), (200, {}, b"<html>")]

    def answer(body):
        return failing.pop() if failing else by_brightness(body)

    server.answer = answer
    made = judge(server, workers=1)
    assert made.score(asked("a"), grey(255)) == [10.0]
    assert dict(made.endpoint.failures) == {"status 500": 1, "status 429": 1, "unusable answer": 2}
    assert "questions asked again: 1 status 429, 1 status 500, 2 unusable answer" in caplog.text


@pytest.mark.parametrize(
    "text",
    [
        "I cannot rate this picture.",
        '{"score": 11}',
        '{"score": "7"}',
        '{"score": NaN}',
        '{"score": true}',
        "7 of 10",
        "-1",
        "",
        None,
    ],
)
def test_a_garbage_answer_is_an_error_that_quotes_it(server, text):
    server.answer = lambda body: completion(text)
    with pytest.raises(UserError) as raised:
        judge(server, retries=1).score(asked("a"), grey(9))
    message = str(raised.value)
    assert "looker-7b at 127.0.0.1" in message and "after 2 attempts" in message and len(server.seen) == 2
    assert (text or "") in message and "was asked for" in message


def test_a_number_beyond_all_floats_is_garbage(server):
    server.answer = lambda body: completion(f'{{"score": 1{"0" * 400}}}')
    with pytest.raises(UserError, match="was asked for"):
        judge(server, retries=0).score(asked("a"), grey(9))


@pytest.mark.parametrize("text", ["3", '{"better": 3}', '{"score": 1}', "the first"])
def test_pairwise_garbage_too(server, text):
    server.answer = lambda body: completion(text)
    with pytest.raises(UserError, match="was asked for"):
        judge(server, mode="pairwise", retries=0).score(asked("a", "a"), grey(9, 10))


@pytest.mark.parametrize(
    "text", ["7.5", " 7.5\n", 'x {"score": 1} then {"score": 7.5}', '```json\n{"score": 7.5, "why": "b"}\n```']
)
def test_numbers_are_read_however_they_are_wrapped(server, text):
    server.answer = lambda body: completion(text)
    assert judge(server, retries=0).score(asked("a"), grey(9)) == [7.5]


def test_refusals_end_at_once_and_endless_answers_are_cut(server):
    server.answer = lambda body: (401, {}, b'{"error": "wrong key"}')
    with pytest.raises(UserError, match="status 401.*wrong key"):
        judge(server).score(asked("a"), grey(9))
    assert len(server.seen) == 1
    server.answer = lambda body: (200, {}, b"[" * (1 << 19))
    with pytest.raises(UserError, match="a chat completion was asked for"):
        judge(server, retries=0).score(asked("a"), grey(9))
    server.answer = lambda body: (503, {"Retry-After": "\u00b2"}, b"")  # a digit to str.isdigit, and no number to float
    with pytest.raises(UserError, match="status 503.*after 1 attempts"):
        judge(server, retries=0).score(asked("a"), grey(9))
    server.answer = lambda body: (200, {}, b"x" * (3 << 20))
    with pytest.raises(UserError) as raised:
        judge(server, retries=0).score(asked("a"), grey(9))
    assert len(str(raised.value)) < 600


def test_redirects_are_not_followed(server):
    with serving(by_brightness) as elsewhere:
        for status in (301, 302, 303, 307, 308):
            server.answer = lambda body, status=status: (status, {"Location": f"{elsewhere.url}/chat/completions"}, b"")
            with pytest.raises(UserError, match="redirect|status 308"):
                judge(server).score(asked("a"), grey(9))
    assert len(server.seen) == 5 and not elsewhere.seen


def test_an_unreachable_endpoint_is_named():
    with Server(by_brightness) as gone:
        url = gone.url
    made = HttpJudge(url=url, model="looker-7b", retries=2, backoff=0)
    with pytest.raises(UserError, match=r"looker-7b at 127.0.0.1:\d+\): it could not be reached .* \(after 3 attempts\)"):
        made.score(asked("a"), grey(9))
    assert made.endpoint.failures["unreachable"] >= 3


def test_the_key_comes_from_the_environment_and_appears_nowhere(server, monkeypatch):
    with pytest.raises(UserError, match="there is no such environment variable"):
        judge(server, key_variable="LOOKER_KEY")
    monkeypatch.setenv("LOOKER_KEY", "secret-7")
    made = judge(server, key_variable="LOOKER_KEY")
    made.score(asked("a"), grey(9))
    assert server.seen[0][1]["authorization"] == "Bearer secret-7"
    server.answer = lambda body: (403, {}, b"no")
    with pytest.raises(UserError) as raised:
        made.score(asked("a"), grey(9))
    assert "secret-7" not in str(raised.value) + made.version


def test_wrong_options_are_explained():
    for options, said in (
        ({"url": "file:///etc/passwd"}, "url is 'file:///etc/passwd'"),
        ({"url": "http://me:secret@host/v1"}, "a key by key_variable"),
        ({"url": "127.0.0.1:8000"}, "url is"),
        ({"mode": "listwise"}, "allowed: pointwise, pairwise"),
        ({"orders": "one"}, "allowed: shuffled, both"),
        ({"workers": 0}, "workers is 0"),
        ({"question": "Rate it"}, "needs {prompt}"),
        ({"retries": -1}, "retries is -1"),
        ({"timeout": 0}, "timeout is 0"),
        ({"tries": 3}, "cannot be made with the options"),
    ):
        with pytest.raises(UserError, match=said):
            judges.build(JudgeConfig(name="http", options={"url": "http://127.0.0.1:1/v1", "model": "m", **options}))


def test_waits_double_up_to_a_minute():
    """Read off the schedule; nothing is slept through."""
    endpoint = ChatEndpoint("http", "http://127.0.0.1:1/v1", "m", None, {}, backoff=2.0)
    assert [endpoint.wait(attempt, 0.0) for attempt in range(1, 8)] == [2, 4, 8, 16, 32, 60, 60]
    assert endpoint.wait(1, 7.0) == 7.0 and endpoint.wait(1, 900.0) == 60.0


def test_relative_scores_do_not_evaluate(server):
    with pytest.raises(UserError, match="compares outputs of one prompt with each other.*pointwise"):
        evaluate_paired(grey(1, 2), grey(3, 4), asked("a", "a"), [0, 1], [judge(server, mode="pairwise")], seed=0)
    report = evaluate_paired(grey(1, 2), grey(30, 40), asked("a", "b"), [0, 1], [judge(server, label="looker")], seed=0)
    assert report["win_rate"]["wins"] == 2 and report["judge"]["name"] == "looker"
