"""Talking with a model: a conversation in the tokenizer's own template or line by line, and a reply that is stopped."""
import io, os, signal, subprocess, sys, time
from unittest import mock

import pytest, torch
from test_families import write

from mechinterp_lib import cli
from mechinterp_lib.core import InputError, home
from mechinterp_lib.models import load_model

TEMPLATE = "{% for m in messages %}{% if m.content == 'BAD' %}{{ raise_exception('no') }}{% endif %}{{ m.role[0] | upper }}{{ m.content }}{% endfor %}{% if add_generation_prompt %}A{% endif %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A small model whose tokenizer has a chat template."
    from transformers import PreTrainedTokenizerFast
    folder = write("qwen2.5", tmp_path_factory.mktemp("chat") / "model")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def test_a_conversation_in_its_template(folder):
    chat = cli.Chat(load_model(folder, device="cpu"), "QR", n=5, temperature=0.0)
    decode = chat.model.tokenizer.decode
    assert decode(chat.read("HI")[0]).replace(" ", "") == "SQRUHIA"
    said = "".join(chat.reply("HI"))
    assert decode(chat.tokens[chat.asked:]) == said == chat.messages[-1]["content"] and cli.read_for(chat, 1) == chat.tokens[:chat.asked] and [message["role"] for message in chat.messages] == ["system", "user", "assistant"]
    assert decode(chat.read("BC")[0]).replace(" ", "") == f"SQRUHIA{said}UBCA".replace(" ", "")                          # what was said is read again
    with pytest.raises(InputError, match="template refuses"): list(chat.reply("BAD"))
    chat.clear()
    assert [message["role"] for message in chat.messages] == ["system"]
    with pytest.raises(InputError, match="no reply yet"): cli.read_for(chat, 1)


def test_a_line_by_itself(folder):
    chat = cli.Chat(load_model(home() / "models" / "shakespeare-small" / "seed0", device="cpu"), n=8, temperature=0.0)
    first, again = ("".join(chat.reply("ROMEO:")) for _ in range(2))
    assert first == again and len(first) == 8 and not chat.messages


def test_what_is_looked_at_is_what_was_read(folder):
    "Also when the context has been full, twice."
    chat = cli.Chat(load_model(folder, device="cpu"), n=150, temperature=0.0)
    list(chat.reply("HI"))
    for n in (1, 40, 70, 120, chat.written):
        read = cli.read_for(chat, n)
        assert len(read) < chat.model.cfg.n_ctx and int(chat.model(torch.tensor([read]))[0, -1].argmax()) == chat.tokens[chat.asked + n - 1]
    with pytest.raises(InputError, match="/lens"): cli.read_for(chat, chat.written + 1)


def test_a_reply_is_stopped_and_kept(folder, monkeypatch):
    def stopped(*_, **__):
        yield 3
        signal.raise_signal(signal.SIGINT)
        yield from (4, 5, 6)
    monkeypatch.setattr(cli, "stream_tokens", stopped)
    chat, before = cli.Chat(load_model(folder, device="cpu")), signal.getsignal(signal.SIGINT)
    assert "".join(chat.reply("HI")) == "CD [stopped]" and chat.messages[-1] == {"role": "assistant", "content": "CD"} and chat.written == 2
    assert signal.getsignal(signal.SIGINT) is before


def test_control_c_ends_the_reply_and_not_the_program():
    talk = subprocess.Popen([sys.executable, "-u", "-c", "import sys; from mechinterp_lib.cli import main; sys.exit(main(['chat', 'shakespeare-small/seed0', '--tokens', '1000000', '--device', 'cpu']))"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        talk.stdin.write(b"ROMEO:\n")
        talk.stdin.flush()
        seen, deadline = b"", time.monotonic() + 120
        while len(seen.partition(b"> ")[2]) < 40 and time.monotonic() < deadline: seen += talk.stdout.read1(64)
        talk.send_signal(signal.SIGINT)
        out, err = talk.communicate(b"/lens 2\n/quit\n", timeout=60)
    finally: talk.kill()
    assert talk.returncode == 0 and b"[stopped]" in out and b"KL" in out, (seen, out, err)


@pytest.mark.parametrize("words, error", [(["--temperature", "-1"], "temperature"), (["--top-p", "0"], "top_p"), (["--tokens", "0"], "n: got 0")])
def test_what_cannot_be_drawn_is_said(words, error, capsys):
    with mock.patch("sys.stdin", io.StringIO("ROMEO:\n")): assert cli.main(["chat", "shakespeare-small/seed0", *words]) == 0
    assert error in capsys.readouterr().out


def test_bytes_that_are_no_text(folder):
    talk = subprocess.run([sys.executable, "-c", f"import sys; from mechinterp_lib.cli import main; sys.exit(main(['chat', {str(folder)!r}, '--tokens', '3', '--device', 'cpu', '--temperature', '1e-45']))"], input=b"\xff\xfe\nHI\n", capture_output=True, timeout=120, env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"})
    assert talk.returncode == 0 and b"not UTF-8" in talk.stdout and talk.stdout.count(b">") >= 3, talk
