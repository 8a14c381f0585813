"""Chat templates as models have them: whatever they expect, the prompt is in the result, or there is an error."""

from __future__ import annotations

import json
import shutil

import pytest
from transformers import AutoTokenizer

from lem.backends import chat, checkpoint
from lem.errors import RunError
from lem.spec.experiment import Experiment
from lem.workload import tiny

LOOP = "{% for message in messages %}"
PARTS = LOOP + "{% for part in message.content %}{% if part.type == 'text' %}U:{{ part.text }}{% endif %}{% endfor %}"
TEMPLATES = {
    "text": LOOP + "U:{{ message.content }}{% endfor %}A:",
    "trimmed": LOOP + "U:{{ message.content | trim }}{% endfor %}A:",
    "JSON": LOOP + "{{ {'role': 'user', 'content': message.content} | tojson }}{% endfor %}A:",
    "HTML": LOOP + "<p>{{ message.content | escape }}</p>{% endfor %}A:",
    "parts": PARTS + "{% endfor %}A:",
    "parts only": LOOP + "{% if message.content is string %}{{ raise_exception('parts, please') }}{% endif %}"
    "U:{{ message.content[0].text }}{% endfor %}A:",
    "either": LOOP + "U:{% if message.content is string %}{{ message.content }}{% else %}{{ message.content[0].text }}"
    "{% endif %}{% endfor %}A:",
}  # fmt: skip
PROMPTS = ["What is it?", " 'quoted' <b>\"text\"</b> & more\n", "äöü 你好\nin two lines"]


def with_template(folder, template):
    shutil.copytree(tiny.path(), folder)
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": template}))
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompt_is_in_the_rendered_text(tmp_path, name):
    tokenizer = with_template(tmp_path / "model", TEMPLATES[name])
    assert chat.problem_of(tokenizer) is None
    for prompt in PROMPTS:
        assert chat.rendered(tokenizer, prompt).endswith("A:")
    encoded = checkpoint.encode(tokenizer, PROMPTS, Experiment(model="any", chat_template=True), None)
    plain = checkpoint.encode(tokenizer, PROMPTS, Experiment(model="any"), None)
    assert all(len(one.token_ids) > len(other.token_ids) for one, other in zip(encoded, plain, strict=True))


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ bos_token }}", "leaves out the prompt"),
        (LOOP + "{{ message.content[:3] }}{% endfor %}", "leaves out the prompt"),
        ("{{ raise_exception('no system turn') }}", "fails: no system turn"),
        ("{{ undefined_function() }}", "fails:"),
    ],
)
def test_template_without_the_prompt_is_an_error(tmp_path, template, reason):
    tokenizer = with_template(tmp_path / "model", template)
    with pytest.raises(RunError, match=reason):
        chat.rendered(tokenizer, PROMPTS[0])
    assert reason in chat.problem_of(tokenizer)
