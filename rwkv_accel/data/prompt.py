"""A question at inference -> the text that the model reads, in the words of data.template."""

from __future__ import annotations

from collections.abc import Callable

from rwkv_accel.config.schema import SamplesConfig
from rwkv_accel.data.jinja_template import JinjaTemplate
from rwkv_accel.data.template import chat_prompt
from rwkv_accel.errors import UserError

ROLES = ("User:", "System:")


def prompt_writer(template: str) -> Callable[[str], str]:
    """Makes of a question what a model that was trained with this template answers.

    rwkv: the chat form; a text that is written with roles already ("User: ...") only gets the `Assistant:` that it
    ends with. raw: the text as it is. Else the path of a .jinja file.

    Raises:
        UserError: the .jinja file cannot be used, here or for this question.
    """
    if template == "raw":
        return lambda question: question
    return _chat if template == "rwkv" else JinjaTemplate(template).prompt


def sample_prompts(samples: SamplesConfig, template: str) -> list[str]:
    """The prompts of the samples section as the model reads them. Raises UserError as prompt_writer, or if one is
    empty."""
    prompts = [*map(prompt_writer("raw" if samples.raw else template), samples.prompts)]
    if not all(prompts):
        raise UserError("samples.prompts holds an empty text, from which nothing can be continued; leave it out")
    return prompts


def _chat(question: str) -> str:
    if question.startswith(ROLES):
        ends_open = "Assistant:" in question.rsplit("\n\n", 1)[-1]
        return question if ends_open else question.rstrip() + "\n\nAssistant:"
    return chat_prompt(question)
