"""Conversations through the tokenizer's chat template, and which of the tokens the assistant said."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from memopt.errors import BadInput
from memopt.jobs.data_sources import Chat

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\b")
_NO_TEMPLATE = (
    "the tokenizer has no chat template: use the tokenizer of a chat model (chat_template.jinja beside "
    "tokenizer.json), or give `prompt` and `completion` instead of `messages`"
)

Span = tuple[int, int]


def encode_chat(tokenizer: Any, record: Chat) -> tuple[list[int], list[bool]]:
    """Tokens of the templated conversation and which of them the assistant said (its end-of-turn mark included).

    The template's own `{% generation %}` marks are used where it has them; otherwise the turns are found by templating
    the conversation turn by turn. Raises BadInput that names file and line.
    """
    template = tokenizer.chat_template
    if template is None:
        raise BadInput(f"{record.where}: {_NO_TEMPLATE}")
    try:
        if isinstance(template, str) and _GENERATION_MARK.search(template):
            encoded = tokenizer.apply_chat_template(
                list(record.messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            ids, loss = list(encoded["input_ids"]), [bool(each) for each in encoded["assistant_masks"]]
        else:
            text, spans = assistant_spans(tokenizer, record.messages)
            ids, loss = _tokens_in(tokenizer, text, spans)
    except BadInput as error:
        raise BadInput(f"{record.where}: {error}") from None
    except Exception as error:
        # whatever a template raises (jinja2's errors, its own raise_exception, a missing key) is about this record
        raise BadInput(f"{record.where}: the chat template refuses this conversation ({error}); mend it") from None
    if not any(loss):
        raise BadInput(f"{record.where}: the chat template leaves nothing of the assistant's turns; mend or drop it")
    return ids, loss


def assistant_spans(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[Span]]:
    """The whole conversation as text, and the (start, end) characters of what the assistant says in it.

    Raises BadInput when the text of a beginning of the conversation is not the beginning of the text.
    """
    whole = _render(tokenizer, messages)
    spans = []
    for at, turn in enumerate(messages):
        if turn["role"] != "assistant":
            continue
        before = _render(tokenizer, messages[:at], add_generation_prompt=True) if at else ""
        if not whole.startswith(before):
            before = _render(tokenizer, messages[:at])
        if not whole.startswith(before):
            raise BadInput(_unfollowable(at))
        spans.append((len(before), _turn_end(tokenizer, messages[: at + 1], whole, len(before))))
    return whole, spans


def _turn_end(tokenizer: Any, messages: Sequence[Mapping[str, Any]], whole: str, start: int) -> int:
    """Where the last of `messages` ends in `whole`."""
    upto = _render(tokenizer, messages)
    if whole.startswith(upto):
        return len(upto)
    # Some templates (Qwen3's) write a turn differently when it is the last: go by its content and what follows that.
    content = messages[-1]["content"]
    content = content.strip() if isinstance(content, str) else ""
    found = whole.find(content, start) if content else -1
    tail = upto[upto.rfind(content) + len(content) :] if content else ""
    end = found + len(content) + len(tail)
    if found < 0 or whole[found + len(content) : end] != tail:
        raise BadInput(_unfollowable(len(messages) - 1))
    return end


def _unfollowable(at: int) -> str:
    return (
        f"the chat template cannot be followed turn by turn (turn {at + 1}); mark what the assistant says in it with "
        "{% generation %} ... {% endgeneration %}, or give `prompt` and `completion`"
    )


def _render(tokenizer: Any, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False) -> str:
    text: str = tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
    )
    return text


def _tokens_in(tokenizer: Any, text: str, spans: Sequence[Span]) -> tuple[list[int], list[bool]]:
    """Tokens of `text`, and which of them begin inside one of `spans`."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    loss = [any(start <= begin < end for start, end in spans) for begin, _ in encoded["offset_mapping"]]
    return list(encoded["input_ids"]), loss
