"""Chat templates give the text that transformers gives, in a sandbox; a conversation ends well."""

import io
import json
import os
import pty
import subprocess
import sys

import pytest
import torch
from conftest import redraw
from test_gguf import write_gguf
from tokenizers import AddedToken, processors
from training import ROOT

from llm.data.vocabulary import train_bpe
from llm.generate.__main__ import Arguments
from llm.generate.__main__ import main as generate
from llm.generate.chat import read_messages
from llm.generate.load import load_run
from llm.hub.chat_template import load_chat_template
from llm.hub.folder import load_hub_tokenizer
from llm.hub.tables import PretrainedError
from llm.models.case_studies.llama import Llama
from llm.pretrained import export_pretrained, load_pretrained

LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}{{- "Environment: ipython\\n" }}{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""
QWEN3 = """{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n' }}{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1, seen=false) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if not ns.seen and message.role == "user" %}{%- set ns.seen = true %}{%- set ns.last = index %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] + eos_token }}
    {%- endif %}
{%- endfor %}
"""
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'"
    " + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OLDER = """
{% for message in messages %}
    {% if message.role == "system" %}
        {% continue %}
    {% endif %}
    {% if message.role == "assistant" %}
{{ sep_token }}{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}

    {% else %}
{{ message | tojson }} {{ {"a": "<é>"} | tojson(indent=1) }} {{ dict(a=1) }} {{ unknown }}
    {% endif %}
    {% if loop.index > 3 %}
        {% break %}
    {% endif %}
{% endfor %}
"""
TEMPLATES = {"Llama 3": LLAMA3, "Qwen": QWEN3, "Gemma": GEMMA, "Mistral": MISTRAL, "ChatML": CHATML, "older": OLDER}
ONE = [{"role": "user", "content": " What is 2 + 2? "}]
SEVERAL = [
    *ONE,
    {"role": "assistant", "content": "<think>\nEasy.\n</think>\n\n4 <é> 🙂"},
    {"role": "user", "content": "And\n<|im_end|> {{ 7 * 7 }}?"},
]
CONVERSATIONS = {"one": ONE, "several": SEVERAL, "system": [{"role": "system", "content": " Be kind. "}, *SEVERAL]}
NAMES = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "[INST]", "[/INST]", "<start_of_turn>"]
SETTINGS = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "sep_token": "|"}


@pytest.fixture
def hub(tmp_path):
    """A function that writes a tiny model that was trained to chat, with this template, and returns its folder."""

    def write(template=CHATML, **sizes):
        tokenizer = train_bpe(["What is 2 + 2? And user assistant system"], 300)
        tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in NAMES])
        bos = [("<s>", tokenizer.token_to_id("<s>"))]  # before a plain text; a chat template writes it by itself
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=bos)
        n_tokens = tokenizer.get_vocab_size()
        torch.manual_seed(0)
        model = Llama(Llama.Config(**Llama.Config.small | {"vocab_size": n_tokens, "n_layers": 1} | sizes))
        redraw(model)
        folder = export_pretrained(model, tmp_path / "hub")
        tokenizer.save(str(folder / "tokenizer.json"))
        settings = SETTINGS if template is None else SETTINGS | {"chat_template": template}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        return folder

    return write


def outcome(act, *args, **kwargs):
    """What `act` gives, or the last words of its error."""
    try:
        return act(*args, **kwargs)
    except Exception as error:
        return str(error)[-25:]


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_text_and_tokens_are_those_of_transformers(hub, name, conversation):
    transformers = pytest.importorskip("transformers")
    folder, messages = hub(TEMPLATES[name]), CONVERSATIONS[conversation]
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours, tokenizer = load_chat_template(folder), load_hub_tokenizer(folder)
    for answers in (True, False):
        kind = {"add_generation_prompt": answers}
        expected = outcome(theirs.apply_chat_template, messages, tokenize=False, **kind)
        text = outcome(ours.render, messages, **kind)
        assert text == expected
        if (name, conversation) == ("Gemma", "system"):
            assert text.endswith("System role not supported")
            continue
        ids = theirs.apply_chat_template(messages, return_dict=False, **kind)
        assert tokenizer.encode(text, add_special_tokens=False).ids == ids
        assert ids.count(tokenizer.token_to_id("<s>")) == ("bos_token" in TEMPLATES[name])


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__globals__.json.dumps(1) }}",
        "{{ (namespace | attr('__init__')).__globals__ }}",
        "{% set n = namespace(__class__=1) %}{{ n }}",
        "{% set n = namespace() %}{% set n.__dict__ = 1 %}{{ n }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ dict.__call__.__globals__.json }}",
        "{% for i in range(10000000) %}{% endfor %}",
        "{% include 'tokenizer.json' %}",
    ],
)
def test_a_template_that_reaches_out_of_the_sandbox_is_refused_as_in_transformers(hub, template):
    transformers = pytest.importorskip("transformers")
    folder = hub(template)
    with pytest.raises(PretrainedError, match=r"the chat template of .*hub stops: "):
        load_chat_template(folder).render(ONE)
    with pytest.raises(Exception):  # noqa: B017
        transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template(ONE, tokenize=False)


def test_where_templates_are_found_is_as_in_transformers(hub):
    transformers = pytest.importorskip("transformers")

    def check(text, **choice):
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        expected = theirs.apply_chat_template(ONE, tokenize=False, chat_template=choice.get("name"))
        assert load_chat_template(folder, **choice).render(ONE, add_generation_prompt=False) == expected == text

    folder = hub([{"name": "default", "template": "config"}, {"name": "rag", "template": "rag of config"}])
    check("config")
    check("rag of config", name="rag")
    with pytest.raises(PretrainedError, match="no chat template 'tools': choose with --template from default, rag"):
        load_chat_template(folder, "tools")
    (folder / "chat_template.jinja").write_text("file {{ eos_token }}")
    check("file </s>")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("rag of a file")
    check("rag of a file", name="rag")
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|eot_id|>"}}))
    check("file <|eot_id|>")


def test_a_gguf_file_has_templates_and_ends_its_turns(tmp_path, monkeypatch, capsys):
    transformers = pytest.importorskip("transformers")
    tokenizer = train_bpe(["What is 2 + 2? What is"], 260)
    merges = [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in NAMES])
    words = [tokenizer.id_to_token(number) for number in range(tokenizer.get_vocab_size())]
    special = {number: 3 for number in tokenizer.get_added_tokens_decoder()}

    def add(writer, eot):
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(words)
        writer.add_token_merges(merges)
        writer.add_token_types([special.get(number, 1) for number in range(len(words))])
        writer.add_bos_token_id(words.index("<s>"))
        writer.add_eos_token_id(words.index("</s>"))
        writer.add_eot_token_id(eot)
        writer.add_chat_template([{"name": "default", "template": MISTRAL}, {"name": "rag", "template": "x"}])

    (tmp_path / "one").mkdir()
    _, file = write_gguf(tmp_path / "one", "llama", False, lambda writer: add(writer, 256), vocab_size=len(words))
    theirs = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    text = theirs.apply_chat_template(SEVERAL, chat_template=MISTRAL, tokenize=False)
    assert load_chat_template(file).render(SEVERAL) == text
    assert load_chat_template(file, "rag").render(SEVERAL) == "x"
    say(file, monkeypatch, b"Hello\n")
    assert capsys.readouterr().out != "\n\n"
    first, *_ = likeliest(file, "<s>[INST] Hello[/INST]")
    _, file = write_gguf(tmp_path, "llama", False, lambda writer: add(writer, first), vocab_size=len(words))
    say(file, monkeypatch, b"Hello\n")
    assert capsys.readouterr().out == "\n\n"


def test_an_export_keeps_every_template(hub, tmp_path):
    folder = hub(None)
    (folder / "chat_template.jinja").write_text("one")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("two")
    out = export_pretrained(load_pretrained(folder), tmp_path / "out", tokenizer=folder / "tokenizer.json")
    assert [load_chat_template(out, name).render(ONE) for name in ("default", "rag")] == ["one", "two"]


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (None, r"has no chat template \(in tokenizer_config.json or chat_template.jinja\).*leave out --chat"),
        ("{% if %}", "the chat template of .*hub cannot be read: Expected an expression"),
        (7, "chat_template is neither a text nor texts with names"),
        ([{"name": "a"}], "chat_template is neither a text nor texts with names"),
    ],
)
def test_a_folder_without_a_template_or_with_a_broken_one_is_refused_before_its_weights_are_read(hub, template, says):
    folder = hub(template)
    (folder / "model.safetensors").unlink()
    with pytest.raises(PretrainedError, match=says):
        generate([str(folder), "--chat"])


@torch.no_grad()
def likeliest(folder, text, n_tokens=5):
    """The tokens that continue a text, each computed anew."""
    model, tokenizer = load_run(folder, torch.device("cpu"))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    for _ in range(n_tokens):
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    return ids[-n_tokens:]


def say(folder, monkeypatch, text, *flags):
    monkeypatch.setattr(sys, "stdin", None if text is None else io.TextIOWrapper(io.BytesIO(text), encoding="utf-8"))
    generate([str(folder), "--chat", "--device", "cpu", "--temperature", "0", "--max-new-tokens", "5", *flags])


def test_several_turns_from_a_pipe_each_read_all_that_was_said(hub, monkeypatch, capsys):
    folder = hub()
    say(folder, monkeypatch, "Hello\n\n  And é?  \n".encode(), "--system", "Be kind.")
    said = capsys.readouterr().out
    messages = [{"role": "system", "content": "Be kind."}]
    for line in ("Hello", "And é?"):
        messages.append({"role": "user", "content": line})
        text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
        answer = load_hub_tokenizer(folder).decode(likeliest(folder, f"{text}<|im_start|>assistant\n"))
        assert said.startswith(answer + "\n\n")
        said = said.removeprefix(answer + "\n\n")
        messages.append({"role": "assistant", "content": answer})
    assert said == ""


@pytest.mark.parametrize("where", ["generation_config.json", "config.json", "tokenizer_config.json"])
def test_an_answer_ends_at_each_of_the_models_end_tokens(hub, monkeypatch, capsys, where):
    folder = hub()
    whole = likeliest(folder, "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
    second = next(token for token in whole if token != whole[0])
    assert len(whole) == 5
    if where == "tokenizer_config.json":
        name = load_hub_tokenizer(folder).id_to_token(second)
        (folder / where).write_text(json.dumps(SETTINGS | {"eos_token": name, "chat_template": CHATML}))
    else:
        (folder / "generation_config.json").unlink()
        config = json.loads((folder / "config.json").read_text()) if where == "config.json" else {}
        (folder / where).write_text(json.dumps(config | {"eos_token_id": [299, second]}))
    say(folder, monkeypatch, b"Hello\n")
    assert capsys.readouterr().out == load_hub_tokenizer(folder).decode(whole[: whole.index(second)]) + "\n\n"


def test_a_conversation_that_fills_the_context_says_so_and_ends_well(hub, monkeypatch, capsys):
    folder = hub(max_seq_len=60)
    say(folder, monkeypatch, b"Hello\n" * 30, "--max-new-tokens", "3")
    shown = capsys.readouterr()
    assert 1 <= shown.out.count("\n\n") < 30
    assert "tokens, and this model reads max_seq_len = 60: begin another, or set --max-seq-len)" in shown.err
    say(folder, monkeypatch, b"Hello\nHello\n", "--max-new-tokens", "100")
    shown = capsys.readouterr()
    assert shown.out.count("\n\n") == 1 and "(the conversation is full, and this model reads" in shown.err


def test_prompts_are_the_turns_where_they_are_given_and_nothing_is_read(hub, monkeypatch, capsys):
    folder = hub()
    say(folder, monkeypatch, None, "--prompt", "Hello", "--prompt", "And?")
    given = capsys.readouterr().out
    say(folder, monkeypatch, b"Hello\nAnd?\n")
    assert capsys.readouterr().out == given


def test_a_closed_standard_input_and_bytes_that_are_no_text_are_named(hub, monkeypatch, capsys):
    with pytest.raises(ValueError, match="the standard input is closed, and --chat reads messages there"):
        say(hub(), monkeypatch, None)
    with pytest.raises(ValueError, match="a message is not valid utf-8: set the terminal to UTF-8"):
        list(read_messages(io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8")))
    with pytest.raises(ValueError, match="a message is not valid utf-8"):
        list(read_messages(io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8", errors="surrogateescape")))
    assert list(read_messages(io.StringIO(""))) == []
    assert capsys.readouterr().err == ""


def test_a_terminal_is_prompted_and_ends_with_ctrl_d(hub):
    ours, theirs = pty.openpty()
    words = [sys.executable, "-m", "llm.generate", str(hub()), "--chat", "--max-new-tokens", "2", "--device", "cpu"]
    child = subprocess.Popen(words, cwd=ROOT, stdin=theirs, stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    os.write(ours, b"Hello\n\x04")
    out, _ = child.communicate(timeout=300)
    assert child.returncode == 0
    assert out.endswith(b"\n\n") and b"> " not in out
    assert os.read(ours, 10_000).count(b"> ") == 2
    os.close(ours)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"chat": True, "samples": 2}, r"samples = 2, but a conversation goes on with one answer \(--samples\)"),
        ({"system": "Be kind."}, "belong to a conversation: add --chat"),
        ({"template": "rag"}, "belong to a conversation: add --chat"),
        ({"chat": True, "system": "caf\udce9"}, r"the system 'caf\\udce9' is not valid UTF-8.*--system"),
    ],
)
def test_flags_that_do_not_go_together_are_named(settings, says):
    with pytest.raises(ValueError, match=says):
        Arguments("hub", **settings)
