import pytest
import tokenizers

from anabranch.data.bpe import train_bpe
from anabranch.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer, load_tokenizer
from anabranch.errors import TokenizerError

ASK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+3?"}]


def with_chatml(template=None):
    backend = tokenizers.Tokenizer.from_str(train_bpe(["abc"], 257)._backend.to_str())
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return HuggingFaceTokenizer(backend, eos_id=backend.token_to_id("<|im_end|>"), chat_template=template)


def test_plain_lines_without_any_template():
    assert ByteTokenizer().apply_chat_template(ASK) == "System: Be brief.\nUser: 2+3?\nAssistant:"
    assert ByteTokenizer().apply_chat_template(ASK, add_generation_prompt=False) == "System: Be brief.\nUser: 2+3?\n"


def test_chatml_where_the_vocabulary_has_it():
    tokenizer = with_chatml()
    prompt = tokenizer.apply_chat_template(ASK)
    assert (
        prompt == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2+3?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.encode(prompt).count(tokenizer.eos_id) == 2


def test_the_folders_own_template_goes_first_and_survives_saving(tmp_path):
    template = (
        "{% for message in messages %}\n  [{{ message['role'] | upper }}] {{ message['content'] }}{{ eos_token }}\n"
        "{% endfor %}\n{% if add_generation_prompt %}>{% endif %}"
    )
    with_chatml(template).save(tmp_path)
    # the newline after a block and the blanks before one go, as templates are written for; the blanks before [ stay
    expected = "  [SYSTEM] Be brief.<|im_end|>\n  [USER] 2+3?<|im_end|>\n>"
    assert load_tokenizer(tmp_path).apply_chat_template(ASK) == expected


def test_it_renders_as_transformers_does(tmp_path):
    transformers = pytest.importorskip("transformers")
    template = (
        "{{ bos_token or '' }}{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ 'none' }}{% endif %}\n"
        "   {% if m['role'] == 'user' %}\n{{ m | tojson }}\n{% else %}{% continue %}{% endif %}\n{% endfor %}!"
    )
    with_chatml(template).save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).apply_chat_template(ASK) == theirs.apply_chat_template(
        ASK, tokenize=False, add_generation_prompt=True
    )


def test_named_templates_and_template_files(tmp_path):
    with_chatml().save(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"chat_template": [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]}')
    assert load_tokenizer(tmp_path).apply_chat_template(ASK) == "D"
    (tmp_path / "chat_template.jinja").write_text("F")
    assert load_tokenizer(tmp_path).apply_chat_template(ASK) == "F"


def test_errors_name_what_is_wrong():
    with pytest.raises(TokenizerError, match="message 1 has no content"):
        ByteTokenizer().apply_chat_template([ASK[0], {"role": "user"}])
    with pytest.raises(TokenizerError, match="refused the messages: only users"):
        with_chatml("{{ raise_exception('only users') }}").apply_chat_template(ASK)
    with pytest.raises(TokenizerError, match="refused the messages"):
        with_chatml("{% for %}").apply_chat_template(ASK)
    with pytest.raises(TokenizerError, match="refused the messages"):  # sandboxed: a template may not reach into Python
        with_chatml("{{ ''.__class__.__mro__[1].__subclasses__() }}").apply_chat_template(ASK)
