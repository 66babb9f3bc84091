"""What templates make of a conversation, and what an answer goes on from."""

import asyncio
import dataclasses
from typing import Any

import pytest

from jaxserve.server.answer_plan import AnswerFormat, AnswerPlan
from jaxserve.server.context import ServerContext
from jaxserve.server.http.conversation import (
    ConversationPrompt,
    conversation_prompt,
    thinking_budget,
)
from jaxserve.tokenizers.byte_tokenizer import ByteTokenizer

TURNS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
BEGIN = "{% if add_generation_prompt %}assistant: "
USER = {"role": "user", "content": "Hi <think>so"}


def form(template: str) -> AnswerFormat:
    tokenizer = ByteTokenizer()
    tokenizer.settings = dataclasses.replace(tokenizer.settings, chat_template=template)
    return AnswerFormat.of_model("auto", "think", tokenizer, "llama")


def made(template: str, messages: list[dict[str, Any]], **options: Any) -> ConversationPrompt:
    plan = AnswerPlan(form=form(template))
    return asyncio.run(conversation_prompt(messages, plan, ServerContext(), **options))


@pytest.mark.parametrize(
    ("begin", "begun"),
    [
        ("", None), ("<think>\n", "\n"), ("<think>\nLet me", "\nLet me"),
        ("<think>\n\n</think>\n\n", None),
    ],
)  # fmt: skip
def test_a_template_may_begin_a_thought(begin: str, begun: str | None):
    assert made(f"{TURNS}{BEGIN}{begin}{{% endif %}}", [USER]).begun == begun
    last = {"role": "assistant", "content": begin + "x"}
    options = {"continue_final_message": True}
    expected = None if begun is None else begun + "x"
    assert made(TURNS, [USER, last], **options).begun == expected
    assert made(TURNS, [last], **options).begun == expected


@pytest.mark.parametrize(
    ("template", "effort", "prompt", "budget"),
    [
        ("{{ reasoning_effort }}", "low", "low", None),
        ("{{ reasoning_effort }}", "none", "none", None),
        ("{{ enable_thinking }}", "none", "False", None),
        ("{{ thinking }}", "high", "True", None),
        ("-", "none", "-", 0),
        ("-", "high", "-", None),
        ("-", None, "-", None),
    ],
)
def test_efforts(template: str, effort: str | None, prompt: str, budget: int | None):
    assert bytes(made(template, [USER], effort=effort).token_ids).decode() == prompt
    assert thinking_budget(None, effort, form(template)) == budget
    assert thinking_budget(9, effort, form(template)) == 9


def test_a_template_variable_of_the_request_comes_before_its_effort():
    said = {"reasoning_effort": "x"}
    prompt = made("{{ reasoning_effort }}", [USER], effort="low", variables=said)
    assert bytes(prompt.token_ids) == b"x"
