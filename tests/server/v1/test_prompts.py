"""Prompts in their three forms."""

import asyncio
import threading

import pytest

from jaxserve.core.errors import InvalidRequest
from jaxserve.server import prompts
from jaxserve.server.limits import RequestLimits
from jaxserve.server.v1 import jaxserve_pb2 as pb
from jaxserve.server.v1.prompts import prompt_token_ids
from jaxserve.tokenizers.byte_tokenizer import ByteTokenizer

LIMITS = RequestLimits(max_prompt_chars=10_000)


def prompt(request: pb.GenerateRequest | pb.TokenizeRequest) -> list[int]:
    return asyncio.run(prompt_token_ids(request, ByteTokenizer(), 512, LIMITS))


def test_the_three_kinds_of_prompt() -> None:
    tokenizer = ByteTokenizer()
    assert prompt(pb.GenerateRequest(text="hé")) == tokenizer.encode("hé")
    assert prompt(pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5, 6]))) == [5, 6]
    messages = [{"role": "user", "content": "hi"}]
    chat = pb.ChatMessages(messages=[pb.ChatMessage(**messages[0])])
    assert prompt(pb.GenerateRequest(chat=chat)) == tokenizer.apply_chat_template(messages)
    chat.add_generation_prompt = False
    plain = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    assert prompt(pb.GenerateRequest(chat=chat)) == plain


def test_control_tokens_are_found_in_texts_and_not_in_chats() -> None:
    assert prompt(pb.TokenizeRequest(text="a<eos>")).count(ByteTokenizer.EOS) == 1
    ids = prompt(pb.TokenizeRequest(chat=chat(role="user", content="a<eos>")))
    assert ids.count(ByteTokenizer.EOS) == 0
    assert bytes(ids[1:]).startswith(b"user: a<eos>\n")


def test_tokenize_may_leave_out_special_tokens() -> None:
    request = pb.TokenizeRequest(text="hi", add_special_tokens=False)
    assert prompt(request) == ByteTokenizer().encode("hi", add_special_tokens=False)


def chat(**message: str) -> pb.ChatMessages:
    return pb.ChatMessages(messages=[pb.ChatMessage(**message)])


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (pb.GenerateRequest(), "no prompt"),
        (pb.GenerateRequest(text=""), "empty"),
        (pb.GenerateRequest(text="x" * 10_001), "10001"),
        (pb.GenerateRequest(token_ids=pb.TokenIds()), "empty"),
        (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * 513)), "513 tokens"),
        (pb.GenerateRequest(chat=pb.ChatMessages()), "no messages"),
        (pb.GenerateRequest(chat=chat(content="x")), "role"),
        (pb.GenerateRequest(chat=chat(role="user", content="x" * 10_001)), "10001"),
        (pb.TokenizeRequest(chat=chat(role="user"), add_special_tokens=True), "does not apply"),
    ],
)
def test_prompts_that_cannot_be_served(
    request_: pb.GenerateRequest | pb.TokenizeRequest, says: str
) -> None:
    with pytest.raises(InvalidRequest, match=says):
        prompt(request_)


def test_long_texts_are_encoded_off_the_event_loop() -> None:
    threads = []

    class Spy(ByteTokenizer):
        def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
            threads.append(threading.current_thread())
            return super().encode(text, add_special_tokens=add_special_tokens)

    for length in (prompts.MAX_INLINE_CHARS, prompts.MAX_INLINE_CHARS + 1):
        request = pb.GenerateRequest(text="x" * length)
        asyncio.run(prompt_token_ids(request, Spy(), 512, LIMITS))
    assert threads[0] is threading.main_thread()
    assert threads[1] is not threading.main_thread()
