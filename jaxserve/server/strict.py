"""Nothing of a request is silently dropped: what is not known, or cannot be, is refused."""

from collections.abc import Collection, Iterator

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from jaxserve.core.errors import InvalidRequest


def reject_unknown_fields(message: Message) -> None:
    """Refuse a message that carries fields of a newer protocol, at any depth.

    Raises:
        InvalidRequest: the message of that name has fields that this server does not know.
    """
    unknown = sorted({field.field_number for field in UnknownFieldSet(message)})
    if unknown:
        raise InvalidRequest(
            f"{message.DESCRIPTOR.name} has fields that this server does not know: "
            f"numbers {', '.join(map(str, unknown[:10]))}"
        )
    for child in _children(message):
        reject_unknown_fields(child)


def refuse_fields(message: Message, *names: str) -> None:
    """Refuse a message in which a field is set that cannot be applied.

    Raises:
        InvalidRequest: one of them is set; it is named.
    """
    given = {field.name for field, _ in message.ListFields()}
    for name in names:
        if name in given:
            raise InvalidRequest(f"{name} cannot be applied by this server", param=name)


def check_token_ids(name: str, ids: Collection[int], vocab_size: int) -> None:
    """Refuse a field's token ids unless all are in the vocabulary.

    Raises:
        InvalidRequest: one is not.
    """
    if len(ids) > vocab_size:
        raise InvalidRequest(f"{name} has more entries than there are tokens", param=name)
    wrong = [i for i in ids if not 0 <= i < vocab_size]
    if wrong:
        raise InvalidRequest(f"{name} must be in [0, {vocab_size}), got {wrong[0]}", param=name)


def _children(message: Message) -> Iterator[Message]:
    for field, value in message.ListFields():
        kind = field.message_type
        if kind is None:
            continue
        if kind.GetOptions().map_entry:
            if kind.fields_by_name["value"].message_type is not None:
                yield from value.values()
        elif isinstance(value, Message):
            yield value
        else:
            yield from value
