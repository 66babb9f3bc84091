"""Chat templates: the dialect that models use, and what a template may not do."""

import pytest

from jaxserve.core.errors import InvalidRequest
from jaxserve.tokenizers.byte_tokenizer import ByteTokenizer
from jaxserve.tokenizers.chat import ChatTemplate

MESSAGES = [{"role": "user", "content": "<Hi> & \u00e9"}]


def render(source: str, **options: int) -> str:
    template = ChatTemplate(source, **options)
    return template.render(MESSAGES, add_generation_prompt=True, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}", "<s><Hi> & \u00e9</s>"),
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "<Hi> & \u00e9"}'),
        ("{% if true %}\n    {% if add_generation_prompt %}\nA\n{% endif %}\n{% endif %}", "A\n"),
        ("{% if tools is not none %}tools{% endif %}-", "-"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% generation %}{{ messages[0].role }}{% endgeneration %}!", "user!"),
        ("{{ '-' * 5 }}{{ 2 ** 3 * 2 }}", "-----16"),
    ],
)
def test_dialect(source: str, expected: str):
    assert render(source) == expected


def test_date():
    assert render("{{ strftime_now('%Y') }}").isdigit()


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[7].content.x }}", "has no"),
        ("{{ 1 / 0 }}", "division"),
        ("{% if %}", "broken"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ 'a' * 10 ** 9 }}", "too large"),
        ("{{ 9 ** 9999 }}", "too large"),
    ],
)
def test_refused(source: str, reason: str):
    with pytest.raises(InvalidRequest, match=reason):
        render(source)


def test_endless_output_is_cut():
    loop = "{% for i in range(1000) %}{{ messages[0].content }}{% endfor %}"
    with pytest.raises(InvalidRequest, match="exceeds 100 characters"):
        render(loop, max_chars=100)


def test_template_decides_about_bos():
    tokenizer = ByteTokenizer()
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert ids == [tokenizer.BOS, *b"user: Hi\nassistant:"]
    opened = tokenizer.apply_chat_template([], add_generation_prompt=False)
    assert opened == [tokenizer.BOS]
