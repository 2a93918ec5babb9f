"""Prompts of the samples section reach the model in the template that it is trained with."""

import pytest

from rwkv_accel.generation.engine import TextGenerator


@pytest.mark.parametrize(
    ("raw", "template", "want", "stop"),
    [
        (False, "rwkv", "User: Hi\n\nAssistant:", ("\n\n",)),
        (False, "raw", "Hi", ()),
        (False, "jinja", "<user>Hi<assistant>", ()),
        (True, "jinja", "Hi", ()),
    ],
)
def test_samples_are_asked_in_the_template_of_the_data(run, tmp_path, monkeypatch, raw, template, want, stop):
    asked, real = [], TextGenerator.generate

    def generate(self, prompts, **settings):
        asked.append((prompts, settings["stop"]))
        return real(self, prompts, **settings)

    monkeypatch.setattr(TextGenerator, "generate", generate)
    if template == "jinja":
        template = tmp_path / "t.jinja"
        template.write_text(
            "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}"
        )
    samples = ("samples.prompts=[Hi]", "samples.max_new_tokens=1", f"samples.raw={str(raw).lower()}")
    assert run(f"data.template={template}", "trainer.max_steps=1", *samples) == 0
    assert asked == [([want], stop)]


def test_a_template_that_cannot_write_the_prompt_is_told_before_training(run, tmp_path, capfd):
    template = tmp_path / "t.jinja"
    template.write_text(
        "{% if messages|length == 1 and add_generation_prompt and messages[0].content == 'Hi' %}"
        "{{ raise_exception('never Hi') }}{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    )
    assert run(f"data.template={template}", "trainer.max_steps=1", "samples.prompts=[Hi]") == 2
    assert "never Hi" in capfd.readouterr().err
    assert not (tmp_path / "out" / "loss_data.json").exists()
